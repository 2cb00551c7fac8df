"""An edge site: its own Ray cluster, N EdgeActors, and a stream of images.

Edge and cloud never share a Ray cluster: inside one, either could run code on the
other. A site's cluster takes only calls that carry its own random token, and ends
with the site.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError, StateError
from blindtail.metrics import check_metrics_port
from blindtail.records import Answer
from edge.config import EdgeConfig

_STATUS_S = 30.0
_GATE_S = 0.05
_OBJECT_STORE_BYTES = 100_000_000
#: The token of every site of this process.
_token: str | None = None


@contextmanager
def site_cluster(cpus: int) -> Iterator[dict[str, str]]:
    """A local Ray cluster of this process alone; yields its address and id.

    Ray reads its authentication when it is loaded and keeps it: a process can run
    several sites one after the other, but Ray must not have been loaded before the
    first. Raises `StateError` when it was, or when it is in use.
    """
    global _token
    ray_loaded = sys.modules.get("ray")
    if ray_loaded is not None and (_token is None or ray_loaded.is_initialized()):
        raise StateError("Ray is in use in this process already: start the site in a process of its own")
    _token = _token or secrets.token_hex(32)
    home = Path(tempfile.mkdtemp(prefix="btedge-", dir=_short_tmp()))
    token = home / "token"
    token.touch(mode=0o600)
    token.write_text(_token)
    settings = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # A single-node cluster that listens on loopback: nobody outside needs it.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "PYTHONPATH": os.pathsep.join(_import_paths()),
    }
    before = {name: os.environ.get(name) for name in (*settings, "RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    os.environ.update(settings)
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    try:
        import ray

        try:
            info = ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                configure_logging=False,
                _temp_dir=str(home),
            )
            yield {"ray_address": str(info.address_info["gcs_address"]), "cluster_id": _cluster_id()}
        finally:
            ray.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(home, ignore_errors=True)


def run_site(
    config: EdgeConfig,
    images: NDArray[Any],
    labels: Sequence[int] | NDArray[Any] | None = None,
    *,
    announce: Path | None = None,
    statuses: list[dict[str, Any]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Answers `images` (n, C, H, W) on `config.actors` actors; yields one record per image.

    labels    true labels (n,), copied into the records
    announce  file written once the actors are up: {"ray_address", "cluster_id",
              "actors": [{"name", "pid"}], "ready", "pid"}
    statuses  gets every actor's status at the end

    Records come as answers complete, not in order: {"index", "label", "at_s" (since
    the first image), "monotonic_s" (the host's clock), "actor"} and the fields of
    `blindtail.records.Answer`, with the answer's own label as "predicted". At most
    `in_flight` images per actor are on the way. The
    cluster ends with the iterator. Raises `ConfigError` and `BundleError` before
    anything starts, `InputError` for an image that does not fit the model.
    """
    EdgeBundle.open(config.model)
    config.credentials()
    for port in filter(None, map(config.metrics_port_of, range(config.actors))):
        check_metrics_port(config.metrics_host, port)
    if len(images) == 0:
        raise ConfigError("there are no images to answer")
    # SIGTERM twice: `ray.init` replaces our handler with one of its own.
    with _terminable(), site_cluster(config.actors) as cluster, _terminable():
        import ray

        from edge.actor import start_actor

        actors = [start_actor(f"edge-{i}", config, i) for i in range(config.actors)]
        pids = ray.get([a.pid.remote() for a in actors])
        ready = False
        if config.ready_timeout_s:
            ready = all(ray.get([a.wait_ready.remote(config.ready_timeout_s) for a in actors]))
        if announce is not None:
            named = [{"name": f"edge-{i}", "pid": pid} for i, pid in enumerate(pids)]
            _write(announce, {**cluster, "actors": named, "ready": ready, "pid": os.getpid()})
        try:
            yield from _drive(actors, images, labels, config)
        finally:
            if statuses is not None:
                statuses.extend(ray.get([a.status.remote() for a in actors], timeout=_STATUS_S))
            ray.wait([a.close.remote() for a in actors], num_returns=len(actors), timeout=5.0)


def _drive(
    actors: Sequence[Any],
    images: NDArray[Any],
    labels: Sequence[int] | NDArray[Any] | None,
    config: EdgeConfig,
) -> Iterator[dict[str, Any]]:
    """Keeps every actor busy with at most `in_flight` images, and no faster than they come."""
    import ray

    pace = _Pace(config)
    waiting: dict[Any, tuple[int, int]] = {}  # reference -> (image, actor)
    free = [i for i in range(len(actors)) for _ in range(config.in_flight)]
    coming = 0  # index of the image that comes next
    while waiting or coming < len(images):
        wait_s = None  # until an answer comes
        while free and coming < len(images):
            wait_s = pace.wait_s(coming)
            if wait_s > 0:
                break
            wait_s = None
            actor = free.pop(0)
            image = np.ascontiguousarray(images[coming])
            waiting[actors[actor].infer.remote(image)] = (coming, actor)
            coming += 1
        if not waiting:
            time.sleep(wait_s or 0.0)
            continue
        for reference in ray.wait(list(waiting), num_returns=1, timeout=wait_s)[0]:
            index, actor = waiting.pop(reference)
            free.append(actor)
            answer: Answer = ray.get(reference)
            now_s = time.monotonic()
            yield {
                "index": index,
                "label": None if labels is None else int(labels[index]),
                "at_s": now_s - pace.start_s,
                "monotonic_s": now_s,
                "actor": actor,
                **answer_fields(answer),
            }


class _Pace:
    """When images come: no faster than `images_per_s`, and no more of them than the gate lets pass."""

    def __init__(self, config: EdgeConfig) -> None:
        self._period_s = 0.0 if config.images_per_s is None else 1.0 / config.images_per_s
        self._gate, self._passed = config.gate, 0
        self.start_s = self._next_s = time.monotonic()

    def wait_s(self, number: int) -> float:
        """Seconds to wait before image `number` may come, or before asking again; at most 0: it comes now."""
        now_s = time.monotonic()
        if self._gate is not None and number >= self._passed:
            self._passed = _passed(self._gate)
            if number >= self._passed:
                self._next_s = now_s  # the pace goes on from there: images do not come in a heap
                return _GATE_S
        if self._next_s > now_s:
            return self._next_s - now_s
        # From when it was due, so that a late one does not make all the others late.
        self._next_s += self._period_s
        return 0.0


def _passed(gate: Path) -> int:
    """How many images a gate lets pass. Raises `ConfigError` for a file that does not say."""
    try:
        return int(gate.read_text())
    except FileNotFoundError:
        return sys.maxsize
    except (OSError, ValueError) as error:
        raise ConfigError(f"{gate} must hold one number, of the images that may come") from error


def answer_fields(answer: Answer) -> dict[str, Any]:
    """An answer as plain JSON data; its label is called "predicted"."""
    fields = asdict(answer)
    fields["predicted"] = fields.pop("label")
    return fields


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the site in order, as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _cluster_id() -> str:
    from ray._private.worker import global_worker

    return str(global_worker.node.cluster_id.hex())


def _import_paths() -> list[str]:
    root = str(Path(__file__).resolve().parent.parent)
    return [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]


def _short_tmp() -> str:
    """Ray puts sockets below it, whose paths must stay under 107 characters."""
    usual = tempfile.gettempdir()
    return usual if len(usual) <= 20 else "/tmp"


def _write(path: Path, data: Mapping[str, Any]) -> None:
    """JSON, whole or not at all: readers poll for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data))
    part.replace(path)
