"""A cell on one node of a Ray cluster that somebody else runs, a RayCluster on Kubernetes for one.

Every node that shall have a cell runs one `blindtail cloud --ray-address ADDRESS`
beside its raylet. That process joins the cluster as a driver, places the gateway
on its own node, keeps it, and takes it along when it ends. So the cells follow
the nodes: one that joins brings its cell, one that leaves takes its own along,
and nothing else has to know. Cells find each other, for their clients' keys, by
the names of their gateways, which end in "@" and the address to dial.

Nobody imports Ray here: who does passes it in.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from blindtail.errors import BlindtailError, ConfigError, TailUnavailable
from blindtail.serving import probe_port

_log = logging.getLogger(__name__)
_JOIN_S = 120.0
_POLL_S = 0.5
_CLEAR_S = 20.0
#: Hexadecimal digits of a node's id that go into the names of its actors.
_TAG = 12


def tag(node_id: str) -> str:
    """What names the actors of one node."""
    return node_id[:_TAG]


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Raises `ConfigError` when the Ray cluster would take calls from anybody.

    Whoever can call into a Ray cluster runs code on its machines.
    """
    if environment.get("RAY_AUTH_MODE") != "token":
        raise ConfigError(
            "a Ray cluster that others can reach needs token authentication: start its nodes and this "
            "command with RAY_AUTH_MODE=token and the same token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        )
    if not (environment.get("RAY_AUTH_TOKEN") or environment.get("RAY_AUTH_TOKEN_PATH")):
        raise ConfigError("RAY_AUTH_MODE=token needs the token: set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH")


def join(
    ray: Any,
    address: str,
    node_ip: str | None,
    namespace: str,
    stopped: Callable[[], bool] = lambda: False,
    limit_s: float = _JOIN_S,
) -> Any:
    """Connects to the cluster through this node's raylet, as soon as there is one; Ray's context.

    address  host:port of the cluster's control store, or "auto"
    node_ip  this node's address in the cluster, where the machine has several nodes

    Raises `TailUnavailable` after `limit_s`, or when `stopped` says so.
    """
    end_s = time.monotonic() + limit_s
    while True:
        try:
            return ray.init(
                address=address,
                namespace=namespace,
                configure_logging=True,
                logging_level="ERROR",
                log_to_driver=False,
                **({} if node_ip is None else {"_node_ip_address": node_ip}),
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            # The raylet starts side by side with this process.
            if stopped() or time.monotonic() > end_s:
                raise TailUnavailable(
                    f"no Ray node of the cluster {address} on this machine after {limit_s:.0f} s: start one "
                    f"with `ray start --address={address}` ({type(error).__name__})"
                ) from error
            time.sleep(_POLL_S)


def clear(ray: Any, namespace: str, prefix: str, host: str, port: int, limit_s: float = _CLEAR_S) -> None:
    """Ends the gateways that an earlier command left on this node, and waits for their port.

    Raises `ConfigError` when the port stays taken.
    """
    for entry in ray.util.list_named_actors(all_namespaces=True):
        if entry["namespace"] == namespace and entry["name"].startswith(prefix):
            try:
                ray.kill(ray.get_actor(entry["name"], namespace=namespace))
            except ValueError:
                continue  # it died meanwhile
    end_s = time.monotonic() + limit_s
    while port:
        try:
            probe_port(host, port)
        except BlindtailError:
            if time.monotonic() > end_s:
                raise
            time.sleep(_POLL_S)
        else:
            return


class Neighbours(threading.Thread):
    """Looks every few seconds which other gateways there are; `addresses` is what was last seen.

    A thread of its own, since the question waits while the cluster's control store is away.
    """

    def __init__(self, ray: Any, namespace: str, kind: str, own: str, every_s: float = 2.0) -> None:
        super().__init__(name="neighbours", daemon=True)
        self._ray, self._namespace, self._kind, self._own = ray, namespace, kind, own
        self._every_s = every_s
        self.addresses: tuple[str, ...] = ()

    def run(self) -> None:
        while True:
            try:
                named = self._ray.util.list_named_actors(all_namespaces=True)
            except Exception as error:
                _log.warning("other cells cannot be looked up now: %s", type(error).__name__)
            else:
                ours = [e["name"] for e in named if e["namespace"] == self._namespace]
                self.addresses = addresses_in(ours, self._kind, self._own)
            time.sleep(self._every_s)


def addresses_in(names: Iterable[str], kind: str, own: str) -> tuple[str, ...]:
    """The addresses in the names of actors of a kind, but for those that begin with `own`."""
    found = {n.rpartition("@")[2] for n in names if n.startswith(f"{kind}-") and not n.startswith(own)}
    return tuple(sorted(found - {""}))


__all__ = ["Neighbours", "addresses_in", "check_environment", "clear", "join", "tag"]
