"""Who is attached: edges and cells, one record a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from blindtail.errors import BlindtailError, ContainerError, Overloaded, TailUnavailable
from blindtail.identity import Identity, Role
from blindtail.wire.control import Hello, PeerKind, PolicyUpdate, Report
from blindtail.wire.policies import FleetPeer
from orchestrator.config import AttachLimits

#: How long a peer should wait when there is no room.
_RETRY_S = 10.0
_LOOPBACK = "loopback/"


def voter_of(identity: Identity, instance: bytes) -> str:
    """Whose word on a policy this is: one vote a certificate, or on loopback one a process."""
    return identity.name if identity.role is not None else _LOOPBACK + instance.hex()


def passing(voter: str) -> bool:
    """True for a voter that nobody will meet again once its process is gone."""
    return voter.startswith(_LOOPBACK)


@dataclass(eq=False)
class Peer:
    """One stream. Lives on the controller's loop; times are seconds of its clock."""

    identity: Identity
    hello: Hello
    since_s: float
    allowance: float
    checked_s: float
    version: int = 0  # of the policy that it says is in force there
    newest_sent: int = 0
    report: Report | None = None
    reported_s: float = 0.0
    _next: PolicyUpdate | None = None
    _over: BlindtailError | None = None
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.version = self.newest_sent = self.hello.policy_version

    @property
    def is_edge(self) -> bool:
        return self.hello.kind is PeerKind.EDGE

    @property
    def model(self) -> str:
        """An edge's own; "" for cells, which serve several."""
        return self.hello.models[0][0] if self.is_edge else ""

    @property
    def voter(self) -> str:
        return voter_of(self.identity, self.hello.instance)

    def send(self, update: PolicyUpdate) -> None:
        """Leaves `update` for the stream; one that is still waiting there is out of date and dropped."""
        self._next = update
        self.newest_sent = update.version
        self._news.set()

    def end(self, error: BlindtailError) -> None:
        """Ends the stream with `error`."""
        self._over = error
        self._news.set()

    async def next_update(self) -> PolicyUpdate:
        """Waits for what goes down next. Raises what `end` was given."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._over is not None:
                raise self._over
            if self._next is not None:
                update, self._next = self._next, None
                return update

    def take_allowance(self, now_s: float, per_s: float) -> None:
        """One message has come. Raises `Overloaded` for a peer that floods the stream."""
        self.allowance = min(2 * per_s, self.allowance + (now_s - self.checked_s) * per_s)
        self.checked_s = now_s
        if self.allowance < 1:
            raise Overloaded(f"more than {per_s:g} messages a second on one stream", _RETRY_S)
        self.allowance -= 1

    def shown(self, now_s: float, with_report: bool = True) -> FleetPeer:
        report = self.report if with_report else None
        return FleetPeer(
            replace(self.hello, policy_version=self.version),
            self.identity.name,
            max(0.0, now_s - self.since_s),
            -1.0 if self.report is None else max(0.0, now_s - self.reported_s),
            report or Report(0.0),
        )


class Peers:
    """All streams, within bounds."""

    def __init__(self, limits: AttachLimits) -> None:
        self._limits = limits
        self._peers: dict[tuple[str, bytes, PeerKind, str], Peer] = {}
        self._of_identity: dict[str, int] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __len__(self) -> int:
        return len(self._peers)

    def add(self, identity: Identity, hello: Hello, now_s: float) -> Peer:
        """A stream begins. A process that dials again replaces its own earlier stream, which may be
        one that broke unnoticed. Raises `AccessDenied`, `ContainerError`, `Overloaded`."""
        identity.require(Role.EDGE if hello.kind is PeerKind.EDGE else Role.CELL)
        if hello.kind is PeerKind.EDGE and len(hello.models) != 1:
            raise ContainerError(f"an edge attaches with its one model; this Hello names {len(hello.models)}")
        burst = 2 * self._limits.messages_per_s
        peer = Peer(identity, hello, now_s, burst, now_s)
        earlier = self._peers.get(self._key(peer))
        if earlier is not None:
            self.remove(earlier)
            earlier.end(TailUnavailable("this process has attached again"))
        if len(self._peers) >= self._limits.total:
            raise Overloaded(f"{self._limits.total} streams are attached, the most accepted", _RETRY_S)
        if self._of_identity.get(identity.name, 0) >= self._limits.per_identity:
            raise Overloaded(
                f"{self._limits.per_identity} streams of one identity are the most accepted: give every "
                "device a certificate of its own",
                _RETRY_S,
            )
        self._peers[self._key(peer)] = peer
        self._of_identity[identity.name] = self._of_identity.get(identity.name, 0) + 1
        return peer

    def remove(self, peer: Peer) -> bool:
        """False when another stream has taken its place already."""
        if self._peers.get(self._key(peer)) is not peer:
            return False
        del self._peers[self._key(peer)]
        left = self._of_identity.pop(peer.identity.name) - 1
        if left:
            self._of_identity[peer.identity.name] = left
        return True

    @staticmethod
    def _key(peer: Peer) -> tuple[str, bytes, PeerKind, str]:
        return (peer.identity.name, peer.hello.instance, peer.hello.kind, peer.model)


__all__ = ["Peer", "Peers", "passing", "voter_of"]
