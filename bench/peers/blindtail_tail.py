"""Our own tail in a process of its own: what two independent processes gain over one."""

from __future__ import annotations

import sys
from typing import Any

from bench.peers.protocol import Floats, Rival, Task, serve


class Tail(Rival):
    system, note = "blindtail", ""

    def __init__(self, task: Task) -> None:
        from bench.interleave import pin_workers
        from bench.tails import Client, nets

        ((_, program),) = nets([task.name])
        self._client = Client.of(program, threads=task.threads)
        spec = program.spec
        self.uplink_bytes, self.key_bytes, self.reply_bytes = (
            spec.uplink_bytes,
            spec.key_bytes,
            spec.reply_bytes,
        )
        first = self.encrypt(task.inputs[0])
        with pin_workers(task.cores):
            self.evaluate(first)

    def encrypt(self, x: Floats) -> bytes:
        return self._client.encryptor.encrypt(x)

    def evaluate(self, encrypted: Any) -> bytes:
        return self._client.evaluator.evaluate(self._client.keys, encrypted)

    def decrypt(self, reply: Any) -> Floats:
        return self._client.decryptor.decrypt(reply).ravel()


if __name__ == "__main__":
    sys.exit(serve(Tail))
