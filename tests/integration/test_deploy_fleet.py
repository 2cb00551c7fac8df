"""Cells on a Ray cluster that was there before: one head, two nodes, a cell on each."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.errors import ConfigError
from blindtail.ports import free_port
from blindtail.rpc import INSECURE_LOOPBACK, TailStub, secure_channel
from blindtail.wire import KeyState
from cloud.fleet import addresses_in, check_environment
from tests.cell_process import wait_for
from tests.cloud_cases import Client, activation, bundle, expected

pytest.importorskip("ray")
pytestmark = pytest.mark.timeout(180)

ROOT = Path(__file__).resolve().parents[2]
#: Addresses of one machine that Ray takes for three hosts.
HEAD, FIRST, SECOND = "127.0.0.2", "127.0.0.3", "127.0.0.4"


def ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


class Cluster:
    """`ray start` three times; every process it made is known by its group and ended with it."""

    def __init__(self, folder: Path) -> None:
        self.address = f"{HEAD}:{free_port(HEAD)}"
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
            # Despite its name: addresses other than 127.0.0.1.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",
            "PYTHONPATH": str(ROOT),
        }
        self.folder = folder
        self.nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, ip: str, cpus: int) -> None:
        # The root of the paths is the same for all nodes of a machine: the head's.
        where = (
            ["--address", self.address]
            if ip != HEAD
            else [
                *("--head", "--port", self.address.rpartition(":")[2], "--temp-dir", str(self.folder)),
                "--include-dashboard=false",
            ]
        )
        with (self.folder / f"{ip}.log").open("wb") as log:
            self.nodes[ip] = subprocess.Popen(
                [
                    *(str(Path(sys.executable).parent / "ray"), "start", *where, "--block"),
                    *("--node-ip-address", ip, "--num-cpus", str(cpus)),
                    *("--object-store-memory", "80000000", "--disable-usage-stats"),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        # One after another: two that start at once on one machine can take the same ports.
        log_file = self.folder / f"{ip}.log"
        wait_for(lambda: "Ray runtime started" in log_file.read_text(), f"the node {ip} did not start")

    def raylet(self, ip: str) -> int:
        """The pid of a node's raylet, 0 as long as there is none."""
        children = Path(f"/proc/{self.nodes[ip].pid}/task/{self.nodes[ip].pid}/children").read_text()
        for pid in map(int, children.split()):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "raylet":
                return pid
        return 0

    def stop(self) -> None:
        for node in self.nodes.values():
            node.terminate()
        for node in self.nodes.values():
            try:
                node.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
                node.wait(5)


class Cell:
    """`blindtail cloud --ray-address` on one node."""

    def __init__(self, cluster: Cluster, ip: str, folder: Path, port: int = 0) -> None:
        self.folder, self.announce = folder, folder / "announce.json"
        folder.mkdir(exist_ok=True)
        bundle().save(folder / "cloud.bt")
        (folder / "cell.toml").write_text("drain_grace_s = 0.5\n")
        with (folder / "err").open("wb") as err:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "blindtail", "cloud", str(folder / "cloud.bt"), "--json"),
                    *("--backend", "clear", "--evaluators", "1", "--state-dir", str(folder / "state")),
                    *("--announce", str(self.announce), "--host", ip, "--port", str(port)),
                    *("--ray-address", cluster.address, "--node-ip", ip),
                    *("--config", str(folder / "cell.toml")),
                ],
                stdout=subprocess.DEVNULL,
                stderr=err,
                env=cluster.environment,
            )

    def ready(self) -> dict[str, Any]:
        def there() -> bool:
            assert self.process.poll() is None, (self.folder / "err").read_text()
            # One that an earlier command left is still there for a moment.
            return self.announce.exists() and self.read()["pid"] == self.process.pid

        wait_for(there, "the cell did not get ready", 90)
        return self.read()

    def read(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.announce.read_text())
        return content

    def answers(self, upload: bool = True) -> bool:
        """An edge's first answer; without `upload` its keys must come from the other cell."""
        with secure_channel(self.read()["address"], INSECURE_LOOPBACK) as channel:
            client = Client(TailStub(channel))
            session = client.register()
            # CHECKING: the cell asks its peers; an edge waits for what comes of it.
            wait_for(lambda: client.status() is not KeyState.CHECKING, "the peers were asked for too long")
            if upload and client.status() is KeyState.MISSING:
                assert client.upload_and_wait() is KeyState.READY
            wait_for(lambda: client.status() is KeyState.READY, "the keys did not get ready")
            found = client.logits(client.evaluate(session.session))
        return bool(np.allclose(found, expected(activation()), atol=1e-4))

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # Short: Ray puts sockets below it.
    with tempfile.TemporaryDirectory(prefix="bt", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Cluster(Path(folder))
        try:
            made.start(HEAD, 0)
            made.start(FIRST, 1)
            made.start(SECOND, 1)
            yield made
        finally:
            made.stop()


def test_one_cell_per_node_lives_and_ends_with_it(cluster: Cluster, tmp_path: Path) -> None:
    one = Cell(cluster, FIRST, tmp_path / "one")
    two = Cell(cluster, SECOND, tmp_path / "two")
    try:
        first, second = one.ready(), two.ready()
        # One Ray cluster, two cells, each with processes of its own node.
        assert first["cluster_id"] == second["cluster_id"]
        assert first["address"].startswith(FIRST)
        assert second["address"].startswith(SECOND)
        names = [{e["name"].split("-")[1] for e in cell["evaluators"]} for cell in (first, second)]
        assert names[0].isdisjoint(names[1])
        # They find each other: keys that an edge uploads to one are there when it comes to the other.
        wait_for(lambda: two.read()["peers"] == [first["address"]], "the second cell finds no peer")
        wait_for(lambda: one.read()["peers"] == [second["address"]], "the first cell finds no peer")
        assert one.answers()
        assert two.answers(upload=False)

        # A gateway that dies is started again; the neighbour's processes are left alone.
        os.kill(first["gateway_pid"], signal.SIGKILL)
        wait_for(lambda: one.read()["gateway_pid"] != first["gateway_pid"], "no new gateway")
        assert one.read()["address"] == first["address"]
        assert one.answers()
        assert two.read()["gateway_pid"] == second["gateway_pid"]
        assert not ended(second["evaluators"][0]["pid"])

        # A command that was killed leaves its cell behind; the next one takes its place and its port.
        left = one.read()
        one.process.kill()
        one.process.wait(10)
        one = Cell(cluster, FIRST, tmp_path / "one", left["port"])
        one.ready()
        assert ended(left["gateway_pid"])
        assert one.read()["address"] == first["address"]
        assert one.answers()

        # SIGTERM takes the cell off its node; node and neighbour stay.
        last = one.read()
        one.process.terminate()
        assert one.process.wait(30) == 0
        for pid in (last["gateway_pid"], *(e["pid"] for e in last["evaluators"])):
            wait_for(lambda pid=pid: ended(pid), "a process of the ended cell is left", 15)
        assert cluster.raylet(FIRST)
        assert two.answers()

        # A node that is lost takes its cell along; once it is back, so is the cell.
        lost = two.read()
        os.kill(cluster.raylet(SECOND), signal.SIGKILL)
        wait_for(lambda: ended(lost["gateway_pid"]), "the gateway outlived its raylet", 15)
        cluster.nodes.pop(SECOND).wait(30)
        cluster.start(SECOND, 1)
        wait_for(
            lambda: two.announce.exists() and two.read()["gateway_pid"] != lost["gateway_pid"], "no cell", 90
        )
        assert two.read()["address"] == second["address"]
        assert two.answers()
    finally:
        one.end()
        two.end()


def test_a_cluster_without_tokens_is_refused() -> None:
    check_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "secret"})
    check_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/run/token"})
    with pytest.raises(ConfigError, match="RAY_AUTH_MODE=token"):
        check_environment({"RAY_AUTH_TOKEN": "secret"})
    with pytest.raises(ConfigError, match="needs the token"):
        check_environment({"RAY_AUTH_MODE": "token"})


def test_cells_are_found_by_their_gateways_names() -> None:
    names = ["gateway-a1-77@10.0.0.1:5", "gateway-b2-78@10.0.0.2:5", "evaluator-b2-0-1", "gateway-c3-79@"]
    assert addresses_in(names, "gateway", "gateway-a1-") == ("10.0.0.2:5",)
    assert addresses_in(names[:1], "gateway", "gateway-a1-") == ()
