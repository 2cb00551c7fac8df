"""ShapedLink: a TCP proxy on loopback that behaves like a slow, distant or broken link.

Per direction, all connections share one rate (a virtual clock that says when the
wire is free) and one propagation delay, with optional jitter; bytes are neither
lost nor reordered, as TCP sees it. The link can stall, be cut, count bytes, and
record every byte per connection and direction, which is what a leak scan reads.

In a program or a test, in a thread of its own:

    with ShapedLink("127.0.0.1:50051", rate_bps=20e6, delay_s=0.02) as link:
        channel_to(link.address)

As a process: `python -m blindtail.link --target 127.0.0.1:50051 --listen 0
--rate-bps 20e6 --delay-s 0.02 --announce link.json`. SIGUSR1 stalls the link,
SIGUSR2 lets it go on, SIGTERM ends it and prints the byte counts as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from blindtail.errors import ConfigError, StateError

#: A piece occupies the wire for about this long: fine grain without many wake-ups.
_PIECE_S = 0.004
_PIECE_MIN, _PIECE_MAX = 1_500, 64 * 1024
#: How far reading runs ahead of the wire, on top of the delay (a router's buffer).
_BACKLOG_S = 0.05
_SOCKET_BUFFER = 256 * 1024


@dataclass(frozen=True, slots=True)
class LinkCounts:
    """What has crossed so far. "up" is from the client to the target."""

    up_bytes: int
    down_bytes: int
    connections: int


class _Direction:
    """One direction of the link: when may a piece leave, and when does it arrive?"""

    def __init__(self, rate_bps: float | None, delay_s: float, jitter_s: float, seed: int) -> None:
        self.rate_bps, self.delay_s, self.jitter_s = rate_bps, delay_s, jitter_s
        self.bytes = 0
        self._free_s = 0.0  # the wire is busy until then
        self._arrival_s = 0.0  # of the last piece; pieces stay in order
        self._random = random.Random(seed)
        self.piece = _PIECE_MAX
        if rate_bps is not None:
            self.piece = int(min(max(rate_bps / 8 * _PIECE_S, _PIECE_MIN), _PIECE_MAX))

    def send(self, count: int, now_s: float) -> float:
        """Books `count` bytes; the time at which they arrive."""
        self.bytes += count
        self._free_s = max(self._free_s, now_s)
        if self.rate_bps is not None:
            self._free_s += count * 8 / self.rate_bps
        jitter_s = self._random.uniform(0, self.jitter_s) if self.jitter_s else 0.0
        self._arrival_s = max(self._arrival_s, self._free_s + self.delay_s + jitter_s)
        return self._arrival_s

    def backlog_s(self, now_s: float) -> float:
        return self._free_s - now_s


class ShapedLink:
    """A shaped proxy from a port on 127.0.0.1 to `target` ("host:port").

    rate_bps   bits per second in each direction, or an (up, down) pair; None = unshaped
    delay_s    one-way propagation delay; a round trip takes twice as long
    jitter_s   extra delay, uniform in [0, jitter_s], pieces kept in order
    port       port to listen on; 0 = any free one
    record     directory for every byte: `NNNN.up` and `NNNN.down` per connection

    A context manager that runs in a thread of its own; `stall`, `resume`, `cut`,
    `counts` and `close` may be called from any thread. Raises `ConfigError` for
    a bad setting or a port in use.
    """

    def __init__(
        self,
        target: str,
        *,
        rate_bps: float | tuple[float | None, float | None] | None = None,
        delay_s: float = 0.0,
        jitter_s: float = 0.0,
        port: int = 0,
        record: Path | None = None,
        seed: int = 0,
    ) -> None:
        host, _, number = target.rpartition(":")
        if not host or not number.isdecimal():
            raise ConfigError(f"{target!r} is not an address: write host:port")
        self._target = (host.strip("[]"), int(number))
        up, down = rate_bps if isinstance(rate_bps, tuple) else (rate_bps, rate_bps)
        if any(r is not None and not r > 0 for r in (up, down)) or delay_s < 0 or jitter_s < 0:
            raise ConfigError("a link needs a rate above 0 bit/s, and a delay and jitter of 0 s or more")
        self._up = _Direction(up, delay_s, jitter_s, seed)
        self._down = _Direction(down, delay_s, jitter_s, seed + 1)
        self._wanted_port, self._record = port, record
        self._port = 0
        self._connections = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing: asyncio.Event | None = None
        self._refusing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._problem: BaseException | None = None

    # -- lifetime ------------------------------------------------------------

    def open(self) -> Self:
        """Starts listening. Raises `ConfigError` when the port is in use."""
        if self._thread is not None:
            raise StateError("this link is open already")
        ready = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="shaped-link", daemon=True)
        self._thread.start()
        ready.wait()
        if self._problem is not None:
            self._thread.join()
            raise ConfigError(
                f"the link cannot listen on port {self._wanted_port}: choose another, or 0"
            ) from (self._problem)
        return self

    def close(self) -> None:
        """Ends every connection and stops listening. May be called twice."""
        if self._thread is None or not self._thread.is_alive():
            return
        self._call(self._end)
        self._thread.join(timeout=10)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- control -------------------------------------------------------------

    @property
    def port(self) -> int:
        return self._port

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._port}"

    def counts(self) -> LinkCounts:
        return LinkCounts(self._up.bytes, self._down.bytes, self._connections)

    def stall(self) -> None:
        """No byte arrives any more, in either direction; connections stay open."""

        def hold() -> None:
            if self._flowing:
                self._flowing.clear()

        self._call(hold)

    def resume(self) -> None:
        """Ends `stall` and `cut`: held bytes go on, new connections are taken."""

        def go_on() -> None:
            self._refusing = False
            if self._flowing:
                self._flowing.set()

        self._call(go_on)

    def cut(self) -> None:
        """Resets every connection, and every new one, until `resume`."""

        def break_all() -> None:
            self._refusing = True
            for task in list(self._tasks):
                task.cancel()

        self._call(break_all)

    def _call(self, function: Callable[[], None]) -> None:
        """Runs `function` on the link's loop and waits for it."""
        if self._loop is None or self._thread is None:
            raise StateError("open the link first")
        done = threading.Event()

        def run() -> None:
            try:
                function()
            finally:
                done.set()

        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(run)
            done.wait(5)

    # -- the proxy -----------------------------------------------------------

    def _run(self, ready: threading.Event) -> None:
        try:
            asyncio.run(self._serve(ready))
        except OSError as error:
            self._problem = error
        finally:
            ready.set()

    async def _serve(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop, self._flowing = asyncio.Event(), asyncio.Event()
        self._flowing.set()
        if self._record is not None:
            self._record.mkdir(parents=True, exist_ok=True)
        server = await asyncio.start_server(
            self._accept, "127.0.0.1", self._wanted_port, limit=2 * _PIECE_MAX
        )
        self._port = server.sockets[0].getsockname()[1]
        ready.set()
        await self._stop.wait()
        server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end(self) -> None:
        if self._stop is not None:
            self._stop.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._connect(reader, writer)
        except (OSError, asyncio.CancelledError):
            pass  # either end broke, or `cut` or `close` ended it: nothing to tell anyone
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            return
        self._connections += 1
        name = f"{self._connections:04d}"
        _tune(writer)
        # The hand-shake takes a round trip before anything flows.
        await asyncio.sleep(self._up.delay_s + self._down.delay_s)
        far_reader, far_writer = await asyncio.open_connection(*self._target, limit=2 * _PIECE_MAX)
        _tune(far_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(self._up, reader, far_writer, f"{name}.up"))
                group.create_task(self._pump(self._down, far_reader, writer, f"{name}.down"))
        except* OSError:
            pass
        finally:
            far_writer.transport.abort()

    async def _pump(
        self, way: _Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> None:
        """Reads pieces and books them; a second task delivers them when they arrive."""
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        with contextlib.ExitStack() as stack:
            file: BinaryIO | None = None
            if self._record is not None:
                file = stack.enter_context((self._record / name).open("wb"))
            deliver = asyncio.create_task(self._deliver(pieces, writer))
            try:
                while not deliver.done():
                    data = await reader.read(way.piece)
                    if file is not None:
                        file.write(data)
                        file.flush()
                    pieces.put_nowait((way.send(len(data), loop.time()), data))
                    if not data:
                        break
                    if (ahead_s := way.backlog_s(loop.time()) - _BACKLOG_S) > 0:
                        await asyncio.sleep(ahead_s)
                await deliver
            finally:
                deliver.cancel()

    async def _deliver(
        self, pieces: asyncio.Queue[tuple[float, bytes]], writer: asyncio.StreamWriter
    ) -> None:
        loop = asyncio.get_running_loop()
        assert self._flowing is not None
        while True:
            arrival_s, data = await pieces.get()
            if (wait_s := arrival_s - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            await self._flowing.wait()
            if not data:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(data)
            await writer.drain()


def _tune(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m blindtail.link`. Runs until SIGTERM or SIGINT; prints the counts."""
    parser = argparse.ArgumentParser(prog="blindtail.link", description="A shaped TCP link on loopback.")
    parser.add_argument("--target", required=True, help="host:port that the link leads to")
    parser.add_argument("--listen", type=int, default=0, help="port on 127.0.0.1; 0 = any free one")
    parser.add_argument("--rate-bps", type=float, help="bits per second and direction; default unshaped")
    parser.add_argument("--delay-s", type=float, default=0.0, help="one-way delay in seconds")
    parser.add_argument("--jitter-s", type=float, default=0.0, help="extra delay, uniform up to this")
    parser.add_argument("--record", type=Path, help="directory that gets every byte, per connection")
    parser.add_argument("--announce", type=Path, help="file that gets address, port and pid as JSON")
    given = parser.parse_args(arguments)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    try:
        link = ShapedLink(
            given.target,
            rate_bps=given.rate_bps,
            delay_s=given.delay_s,
            jitter_s=given.jitter_s,
            port=given.listen,
            record=given.record,
        ).open()
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        signal.signal(signal.SIGUSR1, lambda *_: link.stall())
        signal.signal(signal.SIGUSR2, lambda *_: link.resume())
        announcement = json.dumps({"address": link.address, "port": link.port, "pid": os.getpid()})
        if given.announce is not None:
            part = given.announce.with_name(given.announce.name + ".part")
            part.write_text(announcement)
            part.replace(given.announce)
        print(announcement, flush=True)
        ended.wait()
    finally:
        link.close()
    print(json.dumps(asdict(link.counts())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
