"""A rival that computes in the clear, or misbehaves as its net's name says."""

from __future__ import annotations

import sys
import time

from bench.peers.protocol import Floats, Rival, Task, serve


class Clear(Rival):
    system, note = "clear 1.0", "a fake"
    uplink_bytes, key_bytes, reply_bytes = 100, 200, 300

    def __init__(self, task: Task) -> None:
        print("chatter on standard output, as libraries like it")
        self._task = task
        self._runs = 0
        if task.name == "broken":
            raise RuntimeError("no layout\nfits")
        if task.name == "slow":
            time.sleep(60)
        if task.name == "gone":
            print("the last word", file=sys.stderr, flush=True)
            sys.exit(3)

    def encrypt(self, x: Floats) -> Floats:
        return x

    def evaluate(self, encrypted: Floats) -> Floats:
        self._runs += 1
        if self._task.name == "flaky" and self._runs > 3:
            raise MemoryError("out of memory")
        for i, part in enumerate(self._task.parts):
            encrypted = part.weight @ (encrypted**2 if i else encrypted) + part.bias
        return encrypted

    def decrypt(self, reply: Floats) -> Floats:
        return reply


if __name__ == "__main__":
    sys.exit(serve(Clear))
