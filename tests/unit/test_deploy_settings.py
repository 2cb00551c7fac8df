"""Settings files of deploy/ are read by the classes that will read them, and fit the files beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from blindtail.config import load_config
from blindtail.errors import ConfigError
from cloud.config import CloudConfig
from deploy.checks import composition
from edge.config import EdgeConfig
from orchestrator.config import OrchestratorConfig

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("deploy/**/*.toml"))
KINDS: dict[str, type[Any]] = {"cell": CloudConfig, "orchestrator": OrchestratorConfig, "edge": EdgeConfig}


def read(path: Path) -> Any:
    return load_config(KINDS[path.stem.partition("-")[0]], path)


def test_every_role_has_settings_in_both_places() -> None:
    found = {(p.relative_to(ROOT / "deploy").parts[0], p.stem) for p in FILES}
    compose = {("compose", name) for name in ("cell-a", "cell-b", "orchestrator", "edge")}
    assert found == compose | {("kubernetes", name) for name in ("cell", "orchestrator", "edge")}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT / "deploy").as_posix())
def test_it_is_read_and_is_safe(path: Path) -> None:
    config = read(path)
    assert config.tls is not None
    assert config.metrics_port
    if isinstance(config, EdgeConfig):
        assert not config.plaintext
    else:
        assert config.host == "0.0.0.0"
    assert str(config.state_dir).startswith("/var/lib/blindtail/"), "the only folder that may be written"


def test_a_misspelt_setting_would_be_seen(tmp_path: Path) -> None:
    path = tmp_path / "cell.toml"
    path.write_text(
        (ROOT / "deploy/compose/settings/cell-a.toml").read_text().replace("evaluators", "evaluator")
    )
    with pytest.raises(ConfigError, match="evaluators"):
        read(path)


def test_compose_waits_longer_than_a_drain_takes() -> None:
    services = composition.load()["services"]
    for name in ("cell-a", "cell-b"):
        drain_s = read(composition.FOLDER / "settings" / f"{name}.toml").drain_grace_s
        assert composition.seconds_of(services[name]["stop_grace_period"]) >= drain_s + 20


def test_compose_names_are_dialled_as_they_are_certified() -> None:
    """Every host that settings dial is a service, and `certs` issues a certificate with that name."""
    services = composition.load()["services"]
    script = services["certs"]["command"][0]
    dialled: set[str] = set()
    for name in ("cell-a", "cell-b", "orchestrator", "edge"):
        config = read(composition.FOLDER / "settings" / f"{name}.toml")
        for field in ("cloud", "peers", "others"):
            value = getattr(config, field, None) or ()
            dialled |= set([value] if isinstance(value, str) else value)
        dialled |= {
            a for a in (getattr(config, "orchestrator", None), getattr(config, "advertise", None)) if a
        }
    assert {address.partition(":")[0] for address in dialled} == {"cell-a", "cell-b", "orchestrator"}
    assert dialled == {"cell-a:50051", "cell-b:50051", "orchestrator:50052"}
    assert "for name in orchestrator cell-a cell-b" in script
    for name in ("cell-a", "cell-b", "orchestrator", "edge"):
        tls = read(composition.FOLDER / "settings" / f"{name}.toml").tls
        assert {p.name for p in (tls.certificate, tls.key)} == {f"{name}.pem", f"{name}.key"}
        mounts = [m for m in services[name]["volumes"] if isinstance(m, dict)]
        assert [m["volume"]["subpath"] for m in mounts] == [f"authority/{name}"]


def test_prometheus_of_compose_scrapes_the_ports_of_the_settings() -> None:
    there = yaml.safe_load((composition.FOLDER / "settings" / "prometheus.yml").read_text())
    ours = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    jobs = {job["job_name"]: job["static_configs"][0]["targets"] for job in there["scrape_configs"]}
    assert set(jobs) == {job["job_name"] for job in ours["scrape_configs"]}
    for target in (t for targets in jobs.values() for t in targets):
        name, _, port = target.partition(":")
        assert read(composition.FOLDER / "settings" / f"{name}.toml").metrics_port == int(port)


def test_grafana_finds_its_dashboard_and_its_source() -> None:
    settings = composition.FOLDER / "settings" / "grafana"
    provider = yaml.safe_load((settings / "dashboards/blindtail.yaml").read_text())["providers"][0]
    mounts = composition.load()["services"]["grafana"]["volumes"]
    assert f"../grafana:{provider['options']['path']}:ro" in mounts
    assert yaml.safe_load((settings / "datasources/prometheus.yaml").read_text())["datasources"][0]["uid"]
    assert json.loads((ROOT / "deploy/grafana/blindtail.json").read_text())["title"]
