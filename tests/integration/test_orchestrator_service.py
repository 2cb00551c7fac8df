"""A whole orchestrator over gRPC: edges, operators, roles, hostile peers, and a process that is killed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from blindtail import cli
from blindtail.certs import create_authority, issue
from blindtail.errors import (
    AccessDenied,
    BlindtailError,
    ConfigError,
    ContainerError,
    Overloaded,
    TailUnavailable,
)
from blindtail.identity import Role
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.rpc import ClientTlsFiles, from_rpc_error, secure_channel
from blindtail.serving import TlsFiles, probe_port
from blindtail.wire.control import (
    CONTROL,
    Hello,
    PeerKind,
    PolicyChange,
    PolicyState,
    Report,
    Welcome,
    decode_down,
    encode_up,
)
from orchestrator import servicer
from orchestrator.config import AttachLimits, OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from orchestrator.policies_client import PoliciesClient
from tests.attach_cases import Host, until
from tests.certificates import certificates

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).resolve().parents[2]
FAST = PolicyDocument("deadline", {"safety": 1.2}, Objectives(0.5)).encode()
OTHER = PolicyDocument("edge-only").encode()
QUICK = OrchestratorConfig(report_interval_s=0.1, settle_s=0.3)


@pytest.fixture
def orchestrator(tmp_path: Path) -> Iterator[LocalOrchestrator]:
    with LocalOrchestrator(state_dir=tmp_path / "state", config=QUICK) as running:
        yield running


@contextmanager
def two_edges(address: str) -> Iterator[tuple[Host, Host]]:
    hosts = Host(), Host()
    with ExitStack() as stack:
        for host in hosts:
            assert stack.enter_context(host.attached(address)).wait_connected(5)
        yield hosts


def test_a_policy_on_its_way_and_back(orchestrator: LocalOrchestrator) -> None:
    with two_edges(orchestrator.address) as (one, two), orchestrator.policies() as client:
        first = client.set(PolicyChange("", FAST, "rush hour"))
        assert (first.update.version, first.note, first.author) == (1, "rush hour", "loopback")
        until(lambda: one.version == two.version == 1)
        until(lambda: client.get()[0].applied == 2)
        one.refuse = "no such stage"
        client.set(PolicyChange("toy", OTHER))
        until(lambda: client.history()[0].update.version == 3)
        newest, bad, _ = client.history()
        assert bad.state is PolicyState.ROLLED_BACK
        assert newest.note == "rolled back from 2: refused by 1 of 2 edges: no such stage; as in version 1"
        assert newest.update.document == FAST
        until(lambda: two.version == 3)
        with pytest.raises(ConfigError, match="did you mean 'threshold'"):
            client.set(PolicyChange("", PolicyDocument("treshold").encode()))
        assert len(client.history()) == 3


def test_the_fleet(orchestrator: LocalOrchestrator) -> None:
    with two_edges(orchestrator.address) as (one, _), orchestrator.policies() as client:
        one.answers = 3

        def counted() -> bool:
            return any(peer.report.routes.get("tail") == 3 for peer in client.fleet())

        until(counted)
        peers = client.fleet()
        assert {p.hello.instance for p in peers} >= {one.instance}
        assert all(p.identity == "loopback" and 0 <= p.reported_s < 5 for p in peers)
        counted_for = {(c.model, c.kind, c.name): c.total for c in client.usage()}
        assert counted_for[("toy", "route", "tail")] == 3
        assert client.usage("other") == []
    with orchestrator.policies() as client:
        until(lambda: client.fleet() == [])


def test_it_stops_at_once_and_its_edges_come_back(orchestrator: LocalOrchestrator) -> None:
    host = Host()
    with host.attached(orchestrator.address) as attachment:
        assert attachment.wait_connected(5)
        with orchestrator.policies() as client:
            client.set(PolicyChange("", FAST))
        until(lambda: host.version == 1)
        for _ in range(2):
            orchestrator.stop()
            until(lambda: not attachment.connected)
            with orchestrator.policies() as client, pytest.raises(TailUnavailable, match="no orchestrator"):
                client.get()
            orchestrator.start()
            assert attachment.wait_connected(5)
            with orchestrator.policies() as client:
                assert client.get()[0].update.version == 1


# --- peers that misbehave ---------------------------------------------------------


def attach(address: str, messages: list[bytes], credentials: Any = "insecure-loopback") -> list[Any]:
    """What comes down for these messages; raises what the stream ends with."""
    with secure_channel(address, credentials) as channel:
        call = channel.stream_stream(f"/{CONTROL}/Attach", None, None)(iter(messages), timeout=10)
        try:
            return [decode_down(data) for data in call]
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error


HELLO = encode_up(Hello(PeerKind.EDGE, bytes(16), "1", (("toy", "1"),)))
REPORT = encode_up(Report(1.0))
HOSTILE: dict[str, tuple[list[bytes], type[BlindtailError], str]] = {
    "no hello": ([REPORT], ContainerError, "must be a Hello"),
    "rubbish": ([b"\xff" * 50], ContainerError, "not a AttachUp"),
    "rubbish later": ([HELLO, b"\xff" * 50], ContainerError, "not a AttachUp"),
    "hello twice": ([HELLO, HELLO], ContainerError, "after its Hello"),
    "too large": ([HELLO, bytes(100_000)], ContainerError, "accepted"),
    "far too large": ([HELLO, bytes(5_000_000)], Overloaded, "larger than max"),
    "a flood": ([HELLO, *[REPORT] * 500], Overloaded, "messages a second"),
}


@pytest.mark.parametrize(("messages", "error", "says"), HOSTILE.values(), ids=HOSTILE.keys())
def test_a_bad_stream_ends_alone(
    orchestrator: LocalOrchestrator, messages: list[bytes], error: type[BlindtailError], says: str
) -> None:
    host = Host()
    with host.attached(orchestrator.address) as attachment, orchestrator.policies() as client:
        assert attachment.wait_connected(5)
        with pytest.raises(error, match=says):
            attach(orchestrator.address, messages)
        until(lambda: len(client.fleet()) == 1)
        assert attachment.connected
        client.set(PolicyChange("", FAST))
        until(lambda: host.version == 1)


def test_a_peer_that_says_nothing(orchestrator: LocalOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "HELLO_S", 0.1)
    over = threading.Event()
    silent = iter(lambda: over.wait(5), False)
    with secure_channel(orchestrator.address, "insecure-loopback") as channel:
        call = channel.stream_stream(f"/{CONTROL}/Attach", None, None)(silent, timeout=5)
        with pytest.raises(grpc.RpcError) as raised:
            list(call)
    over.set()
    assert "no Hello came" in str(from_rpc_error(raised.value))
    assert attach(orchestrator.address, []) == []  # ended before it began
    assert attach(orchestrator.address, [HELLO, REPORT]) == [Welcome(0.1)]


def test_no_room(tmp_path: Path) -> None:
    config = OrchestratorConfig(attach=AttachLimits(total=1))
    with LocalOrchestrator(config=config) as running, Host().attached(running.address) as attachment:
        assert attachment.wait_connected(5)
        with pytest.raises(Overloaded, match="most accepted"):
            attach(running.address, [HELLO])


# --- roles ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ClientTlsFiles]:
    folder = tmp_path_factory.mktemp("certs") / "authority"
    create_authority(folder)
    made = {}
    for name, role in (
        ("control", Role.ORCHESTRATOR),
        ("camera", Role.EDGE),
        ("a", Role.CELL),
        ("ada", Role.OPERATOR),
    ):
        files = issue(folder, name, role)
        made[name] = ClientTlsFiles(files.ca, files.certificate, files.key)
    return made


@pytest.fixture
def secured(tmp_path: Path, issued: dict[str, ClientTlsFiles]) -> Iterator[LocalOrchestrator]:
    own = issued["control"]
    config = OrchestratorConfig(tls=TlsFiles(own.certificate, own.key, own.ca), report_interval_s=0.1)
    with LocalOrchestrator(state_dir=tmp_path, config=config) as running:
        yield running


def test_roles_over_mutual_tls(secured: LocalOrchestrator, issued: dict[str, ClientTlsFiles]) -> None:
    edge, cell = Host(), Host(kind=PeerKind.CELL)
    with (
        edge.attached(secured.address, issued["camera"]) as one,
        cell.attached(secured.address, issued["a"]) as two,
        secured.policies(issued["ada"]) as client,
    ):
        assert one.wait_connected(5)
        assert two.wait_connected(5)
        assert client.set(PolicyChange("", FAST)).author == "operator:ada"
        until(lambda: edge.version == 1)
        assert {p.identity for p in client.fleet()} == {"edge:camera", "cell:a"}
        assert cell.version == 0  # policies are for edges
        for name in ("camera", "a", "control"):
            with secured.policies(issued[name]) as stranger:
                for call in (
                    stranger.get,
                    stranger.fleet,
                    stranger.usage,
                    lambda: stranger.set(PolicyChange("", OTHER)),
                ):
                    with pytest.raises(AccessDenied, match="role operator"):
                        call()
        edge_hello, cell_hello = HELLO, encode_up(cell.hello())
        for name, hello, says in (
            ("camera", cell_hello, "role cell"),
            ("a", edge_hello, "role edge"),
            ("ada", edge_hello, "role edge or cell"),
            ("control", cell_hello, "role edge or cell"),
        ):
            with pytest.raises(AccessDenied, match=says):
                attach(secured.address, [hello], issued[name])
        assert len(client.history()) == 1
    with pytest.raises(TailUnavailable):
        attach(secured.address, [HELLO])  # no TLS


def test_a_certificate_of_another_authority(tmp_path: Path) -> None:
    """Roles of strangers' certificates come from the settings."""
    files = certificates(tmp_path / "certs", "control", "alice", "bob")

    def of(name: str) -> ClientTlsFiles:
        return ClientTlsFiles(files["ca.pem"], files[f"{name}.pem"], files[f"{name}.key"])

    config = OrchestratorConfig(
        tls=TlsFiles(files["control.pem"], files["control.key"], files["ca.pem"]),
        roles={"cn:alice": "operator"},
    )
    with LocalOrchestrator(state_dir=tmp_path / "state", config=config) as running:
        with running.policies(of("alice")) as client:
            assert client.set(PolicyChange("", FAST)).author == "cn:alice"
        with running.policies(of("bob")) as client, pytest.raises(AccessDenied):
            client.get()
        assert attach(running.address, [HELLO], of("bob"))[0] == Welcome(2.0)


def test_a_renewed_certificate_is_used(tmp_path: Path) -> None:
    create_authority(tmp_path / "authority")
    own = issue(tmp_path / "authority", "control", Role.ORCHESTRATOR)
    mine = issue(tmp_path / "authority", "camera", Role.EDGE)
    config = OrchestratorConfig(
        tls=TlsFiles(own.certificate, own.key, own.ca), report_interval_s=0.1, settle_s=0.3
    )
    changes: list[bool] = []
    credentials = ClientTlsFiles(mine.ca, mine.certificate, mine.key)
    with (
        LocalOrchestrator(state_dir=tmp_path / "state", config=config) as running,
        Host().attached(running.address, credentials, on_change=changes.append) as attachment,
    ):
        assert attachment.wait_connected(5)
        issue(tmp_path / "authority", "camera", Role.EDGE, renew=True)
        until(lambda: changes == [True, False, True])


# --- operators' commands ------------------------------------------------------------


def blindtail(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_commands(
    orchestrator: LocalOrchestrator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--orchestrator", orchestrator.address, "--plaintext")
    run: Callable[..., tuple[int, str, str]] = lambda *a: blindtail(capsys, "policy", *a, *where)  # noqa: E731
    assert run("get") == (0, "no policy is set: edges go by their own\n", "")
    code, out, _ = run("set", "--policy", "deadline", "--set", "safety=1.2", "--deadline", "0.5")
    assert (code, out.splitlines()) == (
        0,
        [
            "version 1: deadline, safety = 1.2, deadline of 0.5 s",
            "applied by 0 of 0 attached edges, refused by 0",
            "no attached edge serves it now",
        ],
    )
    file = tmp_path / "fast.toml"
    file.write_text('policy = "edge-only"\nobjectives = { deadline_s = 0.1 }\n')
    with two_edges(orchestrator.address) as (one, _):
        code, out, _ = run("set", str(file), "--note", "rush hour", "--json")
        found = json.loads(out)
        assert (code, found["version"], found["applied"], found["following"]) == (0, 2, 2, 2)
        assert found["document"]["objectives"] == {"deadline_s": 0.1}
        one.refuse = "no\x1b[31m thanks"
        code, out, _ = run("set", "--policy", "cloud-only", "--model", "toy")
        assert code == 1
        assert out.splitlines()[-1] == (
            "rolled back from 3: refused by 1 of 2 edges: no [31m thanks; as in version 2: "
            "version 4 is in force"
        )
        code, out, _ = run("fleet")
        assert out.splitlines()[-1] == "2 edges and 0 cells attached"
        assert "edge  loopback  toy 1  policy" in out
        assert [p["kind"] for p in json.loads(run("fleet", "--json")[1])] == ["edge", "edge"]
        assert run("usage")[1].startswith("no edge has reported an answer in the last 24 hours")
        one.answers = 4
        until(lambda: run("usage")[1].startswith("toy  4 answers: tail 4 (100.0%)"))
        assert json.loads(run("usage", "--hours", "1", "--json")[1])["toy"]["route"] == {"tail": 4}
    code, out, _ = run("history")
    assert [line for line in out.splitlines() if line.startswith("version")] == [
        "version 4  for toy  active",
        "version 3  for toy  rolled back",
        "version 2  for all models without one of their own  active",
        "version 1  for all models without one of their own  replaced",
    ]
    assert [e["version"] for e in json.loads(run("get", "--model", "toy", "--json")[1])] == [4]
    assert [e["version"] for e in json.loads(run("history", "--limit", "1", "--json")[1])] == [4]


WRONG = {
    "closest name": (("set", "--policy", "deadlin"), 2, "did you mean 'deadline'"),
    "closest parameter": (("set", "--policy", "deadline", "--set", "safty=1"), 2, "did you mean 'safety'"),
    "no pair": (("set", "--policy", "deadline", "--set", "safety"), 2, "NAME=VALUE"),
    "nothing": (("set",), 2, "say which policy"),
    "file and flags": (("set", "x.toml", "--policy", "deadline"), 2, "not both"),
    "no file": (("set", "not-there.toml"), 2, "there is no settings file"),
    "deadline": (("set", "--policy", "deadline", "--deadline", "-1"), 2, "above 0"),
}


@pytest.mark.parametrize(("arguments", "code", "says"), WRONG.values(), ids=WRONG.keys())
def test_wrong_requests(
    orchestrator: LocalOrchestrator,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    where = ("--orchestrator", orchestrator.address, "--plaintext")
    left, out, err = blindtail(capsys, "policy", *arguments, *where)
    assert (left, out) == (code, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{probe_port('127.0.0.1', 0)}"
    code, _, err = blindtail(capsys, "policy", "get", "--orchestrator", address, "--plaintext")
    assert code == 1
    assert f"no orchestrator answers at {address}" in err


# --- a real process -----------------------------------------------------------------


class Process:
    """`blindtail orchestrator`, started; ended with the block."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.announce = folder / "orchestrator.json"
        command = [sys.executable, "-m", "blindtail", "orchestrator", "--json"]
        command += ["--state-dir", str(folder / "state"), "--announce", str(self.announce), *more]
        self.child = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def ready(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        announced: dict[str, Any] = json.loads(self.child.stdout.readline())
        assert json.loads(self.announce.read_text()) == announced
        return announced

    def end(self, number: int) -> tuple[int, str]:
        """(exit code, what it wrote to standard error)."""
        self.child.send_signal(number)
        _, err = self.child.communicate(timeout=20)
        return self.child.returncode, err

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.end(signal.SIGKILL)


def test_killed_and_started_again(tmp_path: Path) -> None:
    """Edges go on, come back, and find the policy as it was."""
    port, metrics_port = (probe_port("127.0.0.1", 0) for _ in range(2))
    flags = ("--port", str(port), "--metrics-port", str(metrics_port))
    address = f"127.0.0.1:{port}"
    host = Host()
    with (
        Process(tmp_path, *flags) as first,
        host.attached(address) as attachment,
    ):
        assert first.ready()["address"] == address
        assert attachment.wait_connected(5)
        with PoliciesClient(address, "insecure-loopback") as client:
            client.set(PolicyChange("", FAST))
            client.set(PolicyChange("toy", OTHER))
            until(lambda: host.version == 2)
            before = client.history()
        first.end(signal.SIGKILL)
        until(lambda: not attachment.connected)
        assert host.version == 2
        host.answers += 4
        with Process(tmp_path, *flags) as second, PoliciesClient(address, "insecure-loopback") as client:
            second.ready()
            assert attachment.wait_connected(5)
            after = client.history()
            assert [(e.update, e.state, e.note) for e in after] == [
                (e.update, e.state, e.note) for e in before
            ]
            newcomer = Host("other")
            with newcomer.attached(address):
                until(lambda: newcomer.version == 1)
            assert client.set(PolicyChange("toy", FAST)).update.version == 3
            until(lambda: host.version == 3)
            page = (
                urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=5).read().decode()
            )
            assert 'blindtail_orchestrator_peers{kind="edge",model="toy"} 1.0' in page
            assert 'blindtail_orchestrator_policy_version{model="toy"} 3.0' in page
            # Two of them cannot share what they remember.
            with Process(tmp_path, "--port", "0") as third:
                assert third.child.wait(20) == 2
                assert "another orchestrator uses the state directory" in third.end(0)[1]
            code, err = second.end(signal.SIGTERM)
            assert code == 0
            assert "Traceback" not in err
            assert not second.announce.exists()
