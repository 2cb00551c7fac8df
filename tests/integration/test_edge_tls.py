"""Edge and cell over mutual TLS: keys, session and evaluations, with real ciphertexts."""

from __future__ import annotations

from pathlib import Path

import pytest

from blindtail.bundle import CloudBundle
from blindtail.rpc import ClientTls, Credentials
from cloud.config import CloudConfig, TlsFiles
from cloud.local import LocalCell
from edge.runtime import EdgeRuntime
from orchestrator.policy import CloudOnly
from tests.certificates import certificates
from tests.edge_fakes import bundle_of, image, program

pytestmark = pytest.mark.timeout(120)


def test_an_edge_offloads_over_mutual_tls_and_a_stranger_does_not(tmp_path: Path) -> None:
    made = certificates(tmp_path / "certs", "server", "device")
    strange = certificates(tmp_path / "strange", "device")  # the right name, another authority

    def client(files: dict[str, Path]) -> ClientTls:
        return ClientTls(
            made["ca.pem"].read_bytes(), files["device.pem"].read_bytes(), files["device.key"].read_bytes()
        )

    def opened(address: str, credentials: Credentials, state: str) -> EdgeRuntime:
        return EdgeRuntime.open(
            bundle_of(spec=program().spec),
            address,
            credentials=credentials,
            policy=CloudOnly(),
            state_dir=tmp_path / state,
        )

    config = CloudConfig(tls=TlsFiles(made["server.pem"], made["server.key"], made["ca.pem"]))
    bundle = CloudBundle("toy", "1", {2: program()})
    with LocalCell([bundle], backend="seal", state_dir=tmp_path / "cell", config=config) as cell:
        with opened(cell.address, client(made), "state") as edge:
            assert edge.wait_ready(60), edge.status()
            answer = edge.infer(image(1, 60))
            assert (answer.route, answer.fallback) == ("tail", None)
        with opened(cell.address, client(strange), "stranger") as edge:
            assert not edge.wait_ready(5)
            answer = edge.infer(image(1, 60))
            assert (answer.offloaded, answer.fallback) == (False, "unavailable")
