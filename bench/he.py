"""The encrypted tail, `native` beside `seal` and rivals: seconds, bytes and error of each net.

`eval_total_s` runs from container in to container out: unpacking, seed expansion and
packing included. Weights and inputs come from fixed seeds. All systems take turns in one
run, pinned, in an order that rotates; medians of at least twenty runs after a warm-up, of
three where one takes over a second. TenSEAL's `CKKSVector.mm` has the parameters its
tutorial uses for such a net, its ciphertext already parsed. Other rivals run in
interpreters of their own (`--peer NAME=PYTHON`, `bench.peers`).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from bench import net_rows
from bench.ahead import ticket_rows, ticket_runs
from bench.interleave import Run, clocked, cores, interleaved, median_ratio, pin_workers, pinned, summary
from bench.net_rows import System
from bench.peers.child import PEERS, Description, Peer, PeerFailed, own
from bench.peers.protocol import Part as PeerPart
from bench.peers.protocol import Task
from bench.rows import Row, row
from bench.tails import Client, Conv, Net, nets
from bench.tenseal_mm import PARAMETERS, tenseal
from blindtail.errors import ConfigError, ModelError
from blindtail.he.backends import settle
from blindtail.he.calibration import calibrate
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import FloatArray
from blindtail.he.normal import normalised
from blindtail.he.program import Program
from blindtail.he.slotmaps import power_of_two

SOURCES = (
    "blindtail/he/*.py",
    "native/src/*",
    "bench/ahead.py",
    "bench/he.py",
    "bench/interleave.py",
    "bench/net_rows.py",
    "bench/peers/*.py",
    "bench/tails.py",
    "bench/tenseal_mm.py",
    "blindtail/models/zoo/fashion/cloud.bt",
)
#: It pins itself: one core a thread.
PIN_CPU = False

NETS = ("A", "B", "C", "D", "E", "demo")

#: Of what two independent processes gain, so much at least is the gain of two threads.
TWO_THREADS = 0.9


def rows(args: argparse.Namespace) -> list[Row]:
    """args: quick, threads (of `native`), nets (comma-separated) and peer (NAME=PYTHON, a list)."""
    quick = bool(args.quick)
    threads = int(getattr(args, "threads", None) or 1)
    wanted = names(getattr(args, "nets", None))
    rivals = parse_peers(getattr(args, "peer", None) or [])
    on, pair = cores(threads), cores(2)
    found: list[Row] = []
    with pinned(on[:1]):
        for net, program in nets(wanted):
            found += _net(net, program, threads, on, rivals, quick)
            if net.name == "C":
                found += _two_threads(net, pair, quick)
    return found


def names(told: str | None) -> list[str]:
    """The nets of `--nets`. Raises `ConfigError` for one that there is not."""
    wanted = [name.strip() for name in (told or ",".join(NETS)).split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in NETS]:
        raise ConfigError(f"there is no net {unknown[0]!r}: --nets takes some of {','.join(NETS)}")
    return wanted


def parse_peers(told: Sequence[str]) -> dict[str, str]:
    """NAME=PYTHON of each rival. Raises `ConfigError` for an unknown name or a missing `=`."""
    found = {}
    for entry in told:
        name, equals, python = entry.partition("=")
        if not equals or not python or name not in PEERS:
            raise ConfigError(f"--peer {entry}: write NAME=PYTHON; NAME is one of {', '.join(sorted(PEERS))}")
        found[name] = python
    return found


def task_of(net: Net, threads: int, on: Sequence[int]) -> Task:
    """The net as a child reads it."""
    parts = tuple(
        PeerPart(p.weight, p.bias, p.stride, p.side, p.padding)
        if isinstance(p, Conv)
        else PeerPart(np.asarray(p.weight, np.float64), p.bias)
        for p in net.parts
    )
    return Task(net.name, parts, net.inputs, threads, tuple(on))


def _left_out(net: str, name: str, error: Exception) -> None:
    print(f"bench he: {net}: {name} left out: {error}", file=sys.stderr, flush=True)


def _net(
    net: Net, program: Program, threads: int, on: Sequence[int], rivals: dict[str, str], quick: bool
) -> list[Row]:
    spec, x = program.spec, net.inputs
    want = normalised(net.layers)(x)
    ours = settle("auto")
    costs = calibrate(spec.parameters) if ours == "native" else None
    client = Client.of(program, *dict.fromkeys((ours, "seal")), threads=threads)
    requests = [client.encryptor.encrypt(values) for values in x]
    with pin_workers(on):  # threads are born with the first evaluation
        reply = client.evaluate(ours, requests[0])
    sizes = spec.uplink_bytes, spec.key_bytes, spec.reply_bytes
    systems: dict[str, System] = {}
    runs: dict[str, Run] = {}
    for backend in client.loaded:
        many = threads if backend == "native" else 1
        label = f"{backend}, {many} threads" if many > 1 else backend
        systems[backend] = System(label, backend, many, sizes)
        runs[backend] = clocked(lambda i, b=backend: client.evaluate(b, requests[i % len(x)]))  # type: ignore[misc]
        few = 3 if program.predicted_s(backend) > 1 else len(requests)
        for request, logits in zip(requests[:few], want[:few], strict=True):
            systems[backend].saw(client.decryptor.decrypt(client.evaluate(backend, request)), logits)
    runs["again"] = runs[ours]
    runs |= ticket_runs(client, requests)
    runs["encrypt"] = clocked(lambda i: client.encryptor.encrypt(x[i % len(x)]))
    runs["decrypt"] = clocked(lambda _: client.decryptor.decrypt(reply))
    full = _full_lanes(net, program, threads, on)
    if full is not None:
        runs["lanes"] = clocked(lambda i: full[1].evaluate(ours, full[2]))
    if not quick and net.name in PARAMETERS:
        runs["tenseal"], systems["tenseal"] = tenseal(net, want)
    with ExitStack() as stack:
        described: dict[str, Description] = {}
        missing: list[Row] = []
        for name, python in rivals.items():
            try:
                peer = Peer(name, python, task_of(net, threads, on))
            except PeerFailed as error:
                _left_out(net.name, name, error)
                missing.append(net_rows.absent(net.name, name, error))
                continue
            stack.callback(peer.close)
            told = described[name] = peer.description
            systems[name] = System(
                told.system, name, threads, (told.uplink_bytes, told.key_bytes, told.reply_bytes), told.note
            )
            runs[name] = _peer_run(peer, systems[name], want)

        def dropped(name: str, error: Exception) -> None:
            _left_out(net.name, name, error)
            missing.append(net_rows.absent(net.name, name, error))

        seconds = interleaved(runs, quick, dropped, expected=PeerFailed)
    measured = {name: system for name, system in systems.items() if name in seconds}
    noise = abs(median_ratio(seconds["again"], seconds[ours]) - 1)
    made = list(net_rows.evaluations(net.name, measured, seconds, ours, float(np.abs(want).max())))
    made += ticket_rows(net.name, seconds)
    made += net_rows.edge(net.name, seconds, described)
    if full is not None:
        made.append(net_rows.amortised(net.name, full[0], seconds["lanes"]))
    if threads == 1:
        made += net_rows.predicted(net.name, program, ours, costs, seconds, noise)
    made += [*net_rows.ratios(net.name, measured, seconds, ours), *missing]
    made.append(
        row(
            f"{net.name}: machine noise, {ours} measured twice",
            noise,
            "1",
            n=len(seconds["again"]),
            note="the ratio of both medians less one",
        )
    )
    return made


def _peer_run(peer: Peer, system: System, want: FloatArray) -> Run:
    def run(index: int, times: int) -> list[float]:
        seconds, logits = peer.run(index % len(want), times)
        system.saw(logits, want[index % len(want)])
        return seconds

    return run


def _full_lanes(
    net: Net, program: Program, threads: int, on: Sequence[int]
) -> tuple[Program, Client, bytes] | None:
    """The tail with the lanes that take least predicted time an image, a client, and a full request.

    None when that is one lane.
    """
    parameters = program.spec.parameters
    lanes, best = 2 * parameters.slots // power_of_two(min(len(p.bias) for p in net.parts)), program
    while lanes > 1:
        try:
            made = compile_tail(net.layers, net.calibration, lanes=lanes, ring_degree=parameters.ring_degree)
        except ModelError:
            made = program
        best = min(best, made, key=lambda p: p.predicted_s("native") / p.spec.lanes)
        lanes //= 2
    if best is program:
        return None
    client = Client.of(best, threads=threads)
    images = net.calibration[np.arange(best.spec.lanes) % len(net.calibration)]
    request = client.encryptor.encrypt(images)
    with pin_workers(on):
        client.evaluator.evaluate(client.keys, request)
    return best, client, request


def _two_threads(net: Net, on: Sequence[int], quick: bool) -> list[Row]:
    """What a second thread gains, beside what a second process gains, in the same rounds."""
    if len(on) < 2 or settle("auto") != "native":
        _left_out(net.name, "two threads", ConfigError("it takes two cores and the native backend"))
        return []
    times, rounds = (5, 3) if quick else (10, 20)
    alone: list[list[float]] = [[], []]
    both: list[list[float]] = [[], []]
    threaded: list[float] = []
    with ExitStack() as stack:
        single = [own(task_of(net, 1, [core])) for core in on]
        for peer in single:
            stack.callback(peer.close)
        double = own(task_of(net, 2, on))
        stack.callback(double.close)

        def one(which: int) -> None:
            alone[which] += single[which].run(0, times + 1)[0][1:]

        def pair() -> None:
            for peer in single:
                peer.ask(0, times + 2)
            for which, peer in enumerate(single):
                both[which] += peer.answer()[0][1:-1]  # while the other surely runs as well

        def two() -> None:
            threaded.extend(double.run(0, times + 1)[0][1:])

        turns = [lambda: one(0), lambda: one(1), pair, two]
        for i in range(rounds):
            for turn in turns[i % 4 :] + turns[: i % 4]:
                turn()
    processes = sum(median_ratio(a, b) for a, b in zip(alone, both, strict=True))
    gain = median_ratio([*alone[0], *alone[1]], threaded)
    return [
        row(
            f"{net.name}: gain of two threads over that of two processes",
            gain / processes,
            "1",
            target=TWO_THREADS,
            at_most=False,
            n=len(threaded),
            note=f"two threads {gain:.3g}x, two processes {processes:.3g}x, same rounds",
        ),
        row(
            f"{net.name}: native, 2 threads, eval_total_s in those rounds",
            statistics.median(threaded),
            "s",
            **summary(threaded),
            note=f"one thread {statistics.median([*alone[0], *alone[1]]):.4g} s",
        ),
    ]
