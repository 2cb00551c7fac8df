"""A whole orchestrator on this host, and streams of any bytes to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.rpc import from_rpc_error, secure_channel
from blindtail.wire.control import CONTROL, Hello, PeerKind, decode_down, encode_up
from orchestrator.config import OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from tests.attach_cases import Host

FAST = PolicyDocument("deadline", {"safety": 1.2}, Objectives(0.5)).encode()
OTHER = PolicyDocument("edge-only").encode()
QUICK = OrchestratorConfig(report_interval_s=0.1, settle_s=0.3)


@pytest.fixture(name="orchestrator")
def orchestrator_of_one_test(tmp_path: Path) -> Iterator[LocalOrchestrator]:
    with LocalOrchestrator(state_dir=tmp_path / "state", config=QUICK) as running:
        yield running


@contextmanager
def two_edges(address: str) -> Iterator[tuple[Host, Host]]:
    hosts = Host(), Host()
    with ExitStack() as stack:
        for host in hosts:
            assert stack.enter_context(host.attached(address)).wait_connected(5)
        yield hosts


def attach(address: str, messages: list[bytes], credentials: Any = "insecure-loopback") -> list[Any]:
    """What comes down for these messages; raises what the stream ends with."""
    with secure_channel(address, credentials) as channel:
        call = channel.stream_stream(f"/{CONTROL}/Attach", None, None)(iter(messages), timeout=10)
        try:
            return [decode_down(data) for data in call]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


HELLO = encode_up(Hello(PeerKind.EDGE, bytes(16), "1", (("toy", "1"),)))
