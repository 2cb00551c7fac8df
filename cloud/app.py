"""`serve`: one cell on a Ray cluster of its own, from start to clean end.

The cluster is local, bound to loopback, with its own token, temporary folder
and ports, so that any number of them live side by side and none is shared with
an edge. This process is the supervisor: it restarts the gateway when that dies,
keeps the announce file true, and gives up with an exit code when it cannot.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import select
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blindtail.errors import BlindtailError, ConfigError, TailUnavailable
from cloud.config import CloudConfig
from cloud.registry import Registry, open_bundles

#: Ray refuses less than 75 MiB; containers of requests in flight are all it holds.
_OBJECT_STORE_BYTES = 80 * 1024 * 1024
_START_S = 180.0
#: This many deaths of the gateway within the window are beyond repair.
_GATEWAY_DEATHS, _DEATH_WINDOW_S = 3, 120.0
_POLL_S = 0.2
#: Short: Ray puts sockets below it, and their paths may have 107 characters.
_FOLDER = "bt-cell-"
_DESCRIBE_S = 0.5


def serve(
    config: CloudConfig,
    *,
    announce: Path | None = None,
    on_ready: Callable[[Mapping[str, Any]], None] = lambda announced: None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> int:
    """Runs a cell until SIGTERM or SIGINT. Call it on the main thread. Returns the exit code.

    `announce` is written atomically once evaluations can start, kept up to date,
    and removed at the end; `on_ready` gets the same content once. Raises
    `ConfigError` or `BundleError` before Ray is started where that can be told.
    """
    on_progress("reading models")
    Registry(open_bundles(config.models), config.backend)
    if config.tls is not None:
        config.tls.load()
    config = replace(
        config,
        port=_port(config.host, config.port),
        models=tuple(p.resolve() for p in config.models),
        state_dir=config.state_dir.resolve(),
    )
    if announce is not None:
        announce.unlink(missing_ok=True)
    _remove_stale_folders()
    folder = tempfile.mkdtemp(prefix=_FOLDER)
    held = _lock(Path(folder) / "lock", os.O_CREAT)
    try:
        on_progress("starting Ray")
        _environment(Path(folder))
        cell = _Cell(config, Path(folder), announce, on_ready, on_progress)
        try:
            return cell.run()
        finally:
            cell.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


class _Cell:
    """The supervisor's state. `ray` is imported after the environment is set: it reads it then."""

    def __init__(
        self,
        config: CloudConfig,
        folder: Path,
        announce: Path | None,
        on_ready: Callable[[Mapping[str, Any]], None],
        on_progress: Callable[[str], None],
    ) -> None:
        import ray

        self._ray = ray
        self._config, self._announce = config, announce
        self._on_ready, self._on_progress = on_ready, on_progress
        self._gateway: Any = None
        self._gateway_pidfd = -1
        self._written: dict[str, Any] = {}
        self._stop = threading.Event()
        # Ray prints its own account of a worker's death to standard output, where our JSON goes,
        # and has no setting against it; the cell's log has what matters.
        ray._private.worker.print_to_stdstream = lambda *args, **kwargs: None
        # PR_SET_PDEATHSIG ties Ray's processes to the thread that starts them: the main one.
        context = ray.init(
            address="local",
            num_cpus=config.evaluators,
            num_gpus=0,
            object_store_memory=_OBJECT_STORE_BYTES,
            include_dashboard=False,
            namespace="blindtail-cell",
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
            "pid": os.getpid(),
        }
        # After ray.init, which installs its own.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())

    def run(self) -> int:
        self._on_progress("starting evaluators")
        description = self._start_gateway()
        if self._stop.is_set():
            return 0
        self._on_ready(self._publish(description))
        deaths: list[float] = []
        next_s = 0.0
        while not self._stop.wait(_POLL_S):
            if self._node.dead_processes():
                return 1  # the raylet or Ray's control store: only a new cluster helps
            if self._gateway_gone():
                now = time.monotonic()
                deaths = [*(t for t in deaths if now - t < _DEATH_WINDOW_S), now]
                if len(deaths) >= _GATEWAY_DEATHS or not self._ray.is_initialized():
                    return 1
                try:
                    self._publish(self._start_gateway())
                except (BlindtailError, self._ray.exceptions.RayError):
                    return 1
            elif time.monotonic() >= next_s:
                next_s = time.monotonic() + _DESCRIBE_S
                self._refresh()
        return 0

    def close(self) -> None:
        try:
            if self._gateway is not None and not self._gateway_gone():
                grace_s = self._config.shutdown_grace_s
                self._ray.get(self._gateway.stop.remote(grace_s), timeout=grace_s + 15)
        except Exception:
            pass  # it is ended with the cluster, below
        finally:
            if self._announce is not None:
                self._announce.unlink(missing_ok=True)
            self._ray.shutdown()

    def _start_gateway(self) -> dict[str, Any]:
        """Raises `ConfigError` or `TailUnavailable`."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        from cloud.actor import GATEWAY, NAMESPACE, GatewayActor, raise_outcome

        ray = self._ray
        node = ray.get_runtime_context().get_node_id()
        actor = ray.remote(GatewayActor).options(
            name=f"{GATEWAY}-{secrets.token_hex(4)}",
            namespace=NAMESPACE,
            lifetime="detached",
            num_cpus=0,
            max_restarts=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
        )
        self._gateway = actor.remote(self._config)
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


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all, for readers that poll. Raises `ConfigError`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write the announce file {path}: {error.strerror}") from error


def _lock(path: Path, flags: int = 0) -> int:
    """A descriptor that holds the file's lock. Raises `OSError` when another process does."""
    handle = os.open(path, os.O_RDWR | flags, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_stale_folders() -> None:
    """Ray's folders of cells that were killed: ours, and locked by nobody any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER}*"):
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            handle = _lock(folder / "lock")
        except OSError:
            continue
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _port(host: str, port: int) -> int:
    """The port to use; 0 becomes a free one now, so that a restarted gateway keeps it.

    Raises `ConfigError` when the port is taken, before Ray's seconds are spent.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bind_to = "127.0.0.1" if host == "localhost" else host
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((bind_to, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror}): stop what uses the port, or choose "
            "another with --port (0 picks a free one)"
        ) from error


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


__all__ = ["serve", "write_json"]
