"""The script of compose's service `certs`, run here: every service finds what its settings name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blindtail.certs import create_authority, issue, show
from blindtail.config import load_config
from blindtail.health_cli import check
from blindtail.identity import Role
from blindtail.rpc import ClientTls
from cloud.config import CloudConfig, TlsFiles
from cloud.local import LocalCell
from deploy.checks import composition
from tests.cloud_cases import bundle

pytestmark = pytest.mark.timeout(90)


def test_compose_makes_the_certificates_that_its_settings_name(tmp_path: Path) -> None:
    services = composition.load()["services"]
    (script,) = services["certs"]["command"]
    assert services["certs"]["volumes"] == ["certs:/var/lib/blindtail"]
    script = script.replace("cd /var/lib/blindtail", f"cd '{tmp_path}'")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def run() -> str:
        command = [*services["certs"]["entrypoint"], script]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "cell:cell-a" in run()
    for name, identity in (("cell-a", "cell:cell-a"), ("orchestrator", "orchestrator:orchestrator")):
        shown = show(tmp_path / "authority" / name / f"{name}.pem")
        assert (shown.identity, set(shown.hosts)) == (identity, {name, "localhost", "127.0.0.1"})
    for name, role in (("edge", "edge"), ("operator", "operator")):
        assert show(tmp_path / "authority" / name / f"{name}.pem").role == role

    # As the cell reads them, with the mount's folder put in place of its target.
    text = (composition.FOLDER / "settings" / "cell-a.toml").read_text()
    mount = next(m for m in services["cell-a"]["volumes"] if isinstance(m, dict))
    settings = tmp_path / "cell.toml"
    settings.write_text(text.replace(mount["target"], str(tmp_path / mount["volume"]["subpath"])))
    config = load_config(CloudConfig, settings)
    assert config.tls is not None
    config.tls.load()
    assert not (tmp_path / mount["volume"]["subpath"] / "ca.key").exists(), (
        "no service sees the authority's key"
    )

    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    run()  # a second start changes nothing
    assert made == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_one_certificate_has_the_names_of_all_pods(tmp_path: Path) -> None:
    """On Kubernetes cells dial each other by pod: one name for all of them, with a wildcard."""
    authority = tmp_path / "ca"
    create_authority(authority)
    pods = "blindtail-cell-peers.blindtail.svc.cluster.local"
    files = issue(authority, "cell", Role.CELL, hosts=("localhost", f"*.{pods}"))
    config = CloudConfig(tls=TlsFiles(files.certificate, files.key, files.ca))
    ca, certificate, key = (p.read_bytes() for p in (files.ca, files.certificate, files.key))
    with LocalCell([bundle()], backend="clear", state_dir=tmp_path / "cell", config=config) as cell:
        for name, serving in ((f"10-1-2-3.{pods}", True), ("localhost", True), ("cell.example", False)):
            assert check(cell.address, ClientTls(ca, certificate, key, name))["serving"] is serving
