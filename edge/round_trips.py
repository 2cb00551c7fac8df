"""Encrypt, evaluate, decrypt: what an offload does once for each segment of its tail."""

from __future__ import annotations

from dataclasses import dataclass

from blindtail.errors import DeadlineExceeded
from blindtail.records import TailTimings
from edge.interludes import Values
from edge.latency import LatencyBook
from edge.ranges import ACTIVATION, Ranges
from edge.request import Clock, Request
from edge.tail import Cipher, Tail


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """Those of one offload of `request` at `cut`; `values` fill up with what is decrypted. For one thread.

    latencies  what encryption and decryption take, for the time that the cloud is left
    ranges     told how large each activation is
    """

    request: Request
    cut: int
    tail: Tail
    cipher: Cipher
    values: Values
    latencies: LatencyBook
    ranges: Ranges
    clock: Clock

    def make(self, segment: int) -> TailTimings:
        """The round trip of a segment, those before it having been made. Raises `DeadlineExceeded` where
        the time left does not suffice, and what the cipher and the tail raise.

        What is sent, and whether, never depends on what was decrypted before: on time alone, and on the
        cloud.
        """
        request, cipher = self.request, self.cipher
        decrypt_s = self._p95_s("decrypt")
        self._require(self._p95_s("encrypt") + decrypt_s)
        x = self.values.input(segment)
        found = self.ranges.note(ACTIVATION, self.cut, x, segment)
        request.notes |= {kind: max(v, request.notes.get(kind, 0.0)) for kind, v in found.items()}
        ticket = None if segment else self.tail.take_ticket(cipher)
        request.sent_ticket |= ticket is not None
        with request.step("encrypt"):
            container = cipher.encrypt(x, _less(request.left_s(), decrypt_s), ticket, segment)

        remaining_s = _less(request.left_s(), decrypt_s)
        self._require(decrypt_s)
        request.uplink_bytes += len(container)
        sent_s, request.awaiting = self.clock(), True
        try:
            reply = self.tail.evaluate(container, remaining_s, segment)
        except BaseException:
            request.add("network", self.clock() - sent_s)
            raise
        request.awaiting = False
        request.reply_bytes += len(reply.container)
        request.ticket |= reply.timings.ticket
        inside_s = reply.timings.queue_s + reply.timings.eval_s
        request.add("network", self.clock() - sent_s - inside_s)
        request.add("queue", reply.timings.queue_s)
        request.add("eval", reply.timings.eval_s)

        # Even a reply that came late has taught what an offload takes.
        self._require(decrypt_s)
        with request.step("decrypt"):
            opened = cipher.decrypt(reply.container, request.left_s(), segment)
        with request.step("interlude"):
            self.values.opened(segment, opened)
        return reply.timings

    def _require(self, needed_s: float) -> None:
        left_s = self.request.left_s()
        if left_s is not None and left_s <= needed_s:
            raise DeadlineExceeded("the time left does not suffice for the next step")

    def _p95_s(self, step: str) -> float:
        return self.latencies.estimate(step, self.clock()).p95_s


def _less(left_s: float | None, margin_s: float) -> float | None:
    return None if left_s is None else left_s - margin_s


__all__ = ["RoundTrips"]
