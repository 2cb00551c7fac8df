"""One cell on a Ray cluster of its own, from start to clean end: `python -m cloud.app`.

The cluster is local, bound to loopback, with its own token, temporary folder
and ports, so that any number of them live side by side and none is shared with
an edge. (Or it was there before: see `cloud.fleet`.) This process restarts the
gateway when that dies and keeps the announce file true. When the cluster itself is
lost it ends, and `cloud.supervisor`, whose child it is, starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from blindtail.announce import write_json
from blindtail.config import load_config
from blindtail.errors import BlindtailError, TailUnavailable
from cloud import fleet
from cloud.config import CloudConfig

#: Ray refuses less than 75 MiB; containers of requests in flight are all it holds.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
_START_S = 180.0
#: After this many deaths of the gateway within the window, a new cluster is tried.
_GATEWAY_DEATHS, _DEATH_WINDOW_S = 3, 120.0
_POLL_S = 0.2
#: Exit code: the cluster is lost, and another one is wanted.
LOST = 3
_DESCRIBE_S = 0.5
#: As in `cloud.actor`, which cannot be imported before Ray's environment is set.
_NAMESPACE = "blindtail-cell"


class _Cell:
    """The supervisor's state. `ray` is imported after the environment is set: it reads it then."""

    def __init__(
        self,
        config: CloudConfig,
        folder: Path,
        announce: Path | None,
        about: Mapping[str, Any],
        tell: Callable[..., None],
        requests: Requests,
        joined: tuple[str, str | None, str | None] | None = None,
    ) -> None:
        import ray

        self._ray = ray
        self._config, self._announce = config, announce
        self._tell = tell
        self._gateway: Any = None
        self._gateway_pidfd = -1
        self._written: dict[str, Any] = {}
        self._requests, self._stop = requests, requests.stop
        # Ray prints its own account of a worker's death to standard output, where our JSON goes,
        # and has no setting against it; the cell's log has what matters.
        ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
        self._joined = joined
        self._neighbours: fleet.Neighbours | None = None
        self._met: tuple[str, ...] = ()
        if joined is not None:
            context = fleet.join(ray, joined[0], joined[1], _NAMESPACE, requests.stop.is_set)
        else:
            # PR_SET_PDEATHSIG ties Ray's processes to the thread that starts them: the main one.
            context = ray.init(
                address="local",
                num_cpus=config.evaluators,
                num_gpus=0,
                object_store_memory=_OBJECT_STORE_BYTES,
                include_dashboard=False,
                namespace=_NAMESPACE,
                configure_logging=True,
                logging_level="ERROR",
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=str(folder),
            )
        self._node = node = ray._private.worker.global_worker.node
        self._identity = {
            "ray_address": str(context.address_info["gcs_address"]),
            "cluster_id": str(node.cluster_id.hex()),
            **about,
        }
        # After ray.init, which installs its own. The parent alone says when to end.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)

    def run(self) -> int:
        self._tell("progress", text="starting evaluators")
        if self._joined:
            fleet.clear(self._ray, _NAMESPACE, self._prefix(), self._config.host, self._config.port)
            self._neighbours = fleet.Neighbours(self._ray, _NAMESPACE, "gateway", self._prefix())
            self._neighbours.start()
        description = self._start_gateway()
        if self._stop.is_set():
            return 0
        self._tell("ready", announced=self._publish(description))
        deaths: list[float] = []
        next_s = 0.0
        while not self._stop.wait(_POLL_S):
            if self._node.dead_processes():
                return LOST  # the raylet or Ray's control store: only a new cluster helps
            if self._gateway_gone():
                now = time.monotonic()
                deaths = [*(t for t in deaths if now - t < _DEATH_WINDOW_S), now]
                if len(deaths) >= _GATEWAY_DEATHS or not self._ray.is_initialized():
                    return LOST
                drained = bool(self._written.get("draining"))
                try:
                    self._publish(self._start_gateway())
                except (BlindtailError, self._ray.exceptions.RayError):
                    return LOST
                if drained:
                    self._gateway.drain.remote(0.0)
            elif time.monotonic() >= next_s:
                next_s = time.monotonic() + _DESCRIBE_S
                self._refresh()
                self._meet()
        return 0

    def close(self) -> None:
        try:
            if self._gateway is not None and not self._gateway_gone():
                self._drain()
                grace_s = self._config.shutdown_grace_s
                self._ray.get(self._gateway.stop.remote(grace_s), timeout=grace_s + 15)
        except Exception:
            pass  # it is ended with the cluster, below
        finally:
            if self._announce is not None:
                self._announce.unlink(missing_ok=True)
            if self._joined and self._gateway is not None:
                # Detached, on a cluster that goes on.
                with contextlib.suppress(Exception):
                    self._ray.kill(self._gateway)
            self._ray.shutdown()

    def _drain(self) -> None:
        """Until edges have gone, the grace is over, or the parent has lost patience."""
        drained = self._gateway.drain.remote()
        while not self._requests.now.is_set() and not self._gateway_gone():
            if self._ray.wait([drained], timeout=_POLL_S)[0]:
                return

    def _peer_address(self) -> str:
        """host:port that other cells of a Ray cluster dial."""
        if self._joined is None:
            return ""
        ip = self._ray.util.get_node_ip_address() if self._joined[1] is None else self._joined[1]
        return self._joined[2] or f"{ip}:{self._config.port}"

    def _meet(self) -> None:
        """Tells the gateway who else is there, when that has changed."""
        if self._neighbours is not None and self._neighbours.addresses != self._met:
            self._met = self._neighbours.addresses
            self._gateway.meet.remote(self._met)

    def _prefix(self) -> str:
        """What the names of this node's gateways begin with."""
        from cloud.actor import GATEWAY

        return f"{GATEWAY}-{fleet.tag(self._ray.get_runtime_context().get_node_id())}-"

    def _start_gateway(self) -> dict[str, Any]:
        """Raises `ConfigError` or `TailUnavailable`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from cloud.actor import NAMESPACE, GatewayActor, raise_outcome

        ray = self._ray
        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(GatewayActor).options(
            name=self._prefix() + secrets.token_hex(4) + f"@{self._peer_address()}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        self._gateway, self._met = actor.remote(self._config), ()
        started = self._gateway.start.remote()
        try:
            end_s = time.monotonic() + _START_S
            while True:
                done, _ = ray.wait([started], timeout=_POLL_S)
                if done:
                    outcome = ray.get(done[0])
                    break
                if self._stop.is_set():
                    return {}
                if time.monotonic() > end_s:
                    raise TailUnavailable(f"the gateway did not start within {_START_S:.0f} s")
        except ray.exceptions.RayError as error:
            raise TailUnavailable("the gateway's process ended while it started") from error
        raise_outcome(outcome)
        description: dict[str, Any] = outcome[1]
        if self._gateway_pidfd >= 0:
            os.close(self._gateway_pidfd)
        self._gateway_pidfd = os.pidfd_open(description["gateway_pid"])
        return description

    def _gateway_gone(self) -> bool:
        if self._gateway_pidfd < 0:
            return False
        readable, _, _ = select.select([self._gateway_pidfd], [], [], 0)
        return bool(readable)

    def _refresh(self) -> None:
        """Evaluators come and go: keeps the announce file true."""
        try:
            description = self._ray.get(self._gateway.describe.remote(), timeout=5)
        except self._ray.exceptions.RayError:
            return  # busy or dying; the pidfd tells which
        self._publish(description)

    def _publish(self, description: Mapping[str, Any]) -> Mapping[str, Any]:
        content = {**description, **self._identity}
        if content != self._written and self._announce is not None:
            write_json(self._announce, content)
        self._written = content
        return content


def _environment(folder: Path) -> None:
    """Ray's settings for this process and its children; before `ray` is imported."""
    token = folder / "token"
    handle = os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(secrets.token_hex(32))
    # Workers must find this code wherever the command was started.
    code = str(Path(__file__).resolve().parents[1])
    paths = [code, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_NAMESPACE"):
        os.environ.pop(name, None)
    os.environ.update(
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(token),
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
        # Despite its name: keeps Ray on the loopback interface, on every system.
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
        # Containers (0.1 to 0.4 MB) go along with the call: through the object store they take twice as long.
        RAY_max_direct_call_object_size=str(2 * 1024 * 1024),
        GRPC_ENABLE_FORK_SUPPORT="0",
        PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)),
    )


def run(order: Mapping[str, Any], tell: Callable[..., None], requests: Requests) -> int:
    """Exit code: 0 when asked to end, `LOST` when the cluster is lost. Raises `BlindtailError`."""
    config = load_config(CloudConfig, None, order["config"])
    folder = Path(order["folder"])
    announce = None if order["announce"] is None else Path(order["announce"])
    address = order.get("ray_address")
    tell("progress", text="joining the Ray cluster" if address else "starting Ray")
    if address:
        fleet.check_environment()
    else:
        _environment(folder)
    about = {"pid": order["pid"], "cluster_restarts": order["restarts"]}
    joined = (address, order.get("node_ip"), order.get("peer_address")) if address else None
    cell = _Cell(config, folder, announce, about, tell, requests, joined)
    try:
        code = cell.run()
    except BaseException:
        cell.close()
        raise
    if code == LOST and not address:
        # Nothing of Ray can be relied upon any more; the parent ends what is left of it.
        os._exit(LOST)
    cell.close()
    return code


class Requests:
    """What the parent asks for, line by line: "drain", then "end". When it is gone, so is this process."""

    def __init__(self, given: TextIO) -> None:
        self.stop, self.now = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, args=(given,), name="parent", daemon=True).start()

    def _listen(self, given: TextIO) -> None:
        for line in given:
            self.stop.set()
            if line.strip() == "end":
                self.now.set()
        os._exit(LOST)  # Ray's processes are tied to this one's life


def main() -> int:
    # Whatever else is printed here, by Ray for one, must not mix with the events.
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        lock = threading.Lock()

        def tell(event: str, **fields: Any) -> None:
            with lock, contextlib.suppress(OSError):
                print(json.dumps({"event": event, **fields}), file=out, flush=True)

        order = json.loads(sys.stdin.readline())
        try:
            code = run(order, tell, Requests(sys.stdin))
        except BlindtailError as error:
            tell("failed", kind=type(error).__name__, message=str(error))
            code = 1
        except Exception as error:
            tell("failed", kind="", message=f"the cell failed: {type(error).__name__}")
            code = 1
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a thread waits on standard input
