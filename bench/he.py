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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np

from bench.ahead import ticket_rows, ticket_runs
from bench.interleave import Run, clocked, cores, interleaved, median_ratio, pin_workers, pinned, summary
from bench.peers.child import PEERS, Description, Peer, PeerFailed, own
from bench.peers.protocol import Part as PeerPart
from bench.peers.protocol import Task
from bench.rows import Row, row
from bench.tails import Client, Conv, Net, nets
from blindtail.errors import ConfigError, ModelError
from blindtail.he.backends import settle
from blindtail.he.calibration import Calibration, calibrate
from blindtail.he.compiler import compile_tail
from blindtail.he.cost import Part
from blindtail.he.layers import Affine, FloatArray, evaluate_clear, squares_only
from blindtail.he.program import Program
from blindtail.he.slotmaps import power_of_two

SOURCES = (
    "blindtail/he/*.py",
    "native/src/*",
    "bench/ahead.py",
    "bench/he.py",
    "bench/interleave.py",
    "bench/peers/*.py",
    "bench/tails.py",
    "blindtail/models/zoo/fashion/cloud.bt",
)
#: It pins itself: one core a thread.
PIN_CPU = False

NETS = ("A", "B", "C", "D", "demo")


@dataclass(frozen=True)
class Target:
    """Most seconds and bytes of one net on `native`, one thread, a batch of one."""

    eval_s: float
    uplink_bytes: int
    key_bytes: int
    reply_bytes: int = 26_000


TARGETS = {
    "A": Target(0.020, 185_000, 45_000_000),
    "B": Target(0.006, 123_500, 15_000_000),
    "C": Target(0.016, 185_000, 30_000_000),
    "D": Target(0.020, 185_000, 45_000_000),
}
ENCRYPT_S, DECRYPT_S = 0.008, 0.003
#: Largest error of a logit, over max(1, max |logit|).
ERROR = 2e-3
#: Of what two independent processes gain, so much at least is the gain of two threads.
TWO_THREADS = 0.9
#: Predicted seconds are at most this far off, or twice the machine's noise.
PREDICTED = 0.10
CALIBRATION_S = 1.0
#: TenSEAL's parameters for them, as its users run it.
TENSEAL = {
    "A": (8192, [31, 26, 26, 26, 26, 26, 26, 31]),
    "B": (8192, [40, 30, 30, 30, 40]),
    "C": (8192, [31, 26, 26, 26, 26, 26, 26, 31]),
}


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
        PeerPart(p.weight, p.bias, p.stride, p.side) if isinstance(p, Conv) else PeerPart(p.weight, p.bias)
        for p in net.parts
    )
    return Task(net.name, parts, net.inputs, threads, tuple(on))


def _left_out(net: str, name: str, error: Exception) -> None:
    print(f"bench he: {net}: {name} left out: {error}", file=sys.stderr, flush=True)


@dataclass
class _System:
    """One competitor's rows-to-be: what it costs in bytes, and its largest error so far."""

    label: str
    backend: str
    threads: int
    sizes: tuple[int, int, int]  # uplink, keys, reply
    note: str = ""
    error: float = 0.0

    def saw(self, got: FloatArray, want: FloatArray) -> None:
        self.error = max(self.error, float(np.abs(np.ravel(got) - want).max()))


def _net(
    net: Net, program: Program, threads: int, on: Sequence[int], rivals: dict[str, str], quick: bool
) -> list[Row]:
    spec, x = program.spec, net.inputs
    want = evaluate_clear(squares_only(net.layers), x)
    ours = settle("auto")
    costs = calibrate(spec.parameters) if ours == "native" else None
    client = Client.of(program, *dict.fromkeys((ours, "seal")), threads=threads)
    requests = [client.encryptor.encrypt(values) for values in x]
    with pin_workers(on):  # threads are born with the first evaluation
        reply = client.evaluate(ours, requests[0])
    sizes = spec.uplink_bytes, spec.key_bytes, spec.reply_bytes
    systems: dict[str, _System] = {}
    runs: dict[str, Run] = {}
    for backend in client.loaded:
        many = threads if backend == "native" else 1
        label = f"{backend}, {many} threads" if many > 1 else backend
        systems[backend] = _System(label, backend, many, sizes)
        runs[backend] = clocked(lambda i, b=backend: client.evaluate(b, requests[i % len(x)]))  # type: ignore[misc]
        for request, logits in zip(requests, want, strict=True):
            systems[backend].saw(client.decryptor.decrypt(client.evaluate(backend, request)), logits)
    runs["again"] = runs[ours]
    runs |= ticket_runs(client, requests)
    runs["encrypt"] = clocked(lambda i: client.encryptor.encrypt(x[i % len(x)]))
    runs["decrypt"] = clocked(lambda _: client.decryptor.decrypt(reply))
    full = _full_lanes(net, program, threads, on)
    if full is not None:
        runs["lanes"] = clocked(lambda i: full[1].evaluate(ours, full[2]))
    if not quick and net.name in TENSEAL:
        runs["tenseal"], systems["tenseal"] = _tenseal(net, want)
    with ExitStack() as stack:
        described: dict[str, Description] = {}
        for name, python in rivals.items():
            try:
                peer = Peer(name, python, task_of(net, threads, on))
            except PeerFailed as error:
                _left_out(net.name, name, error)
                continue
            stack.callback(peer.close)
            told = described[name] = peer.description
            systems[name] = _System(
                told.system, name, threads, (told.uplink_bytes, told.key_bytes, told.reply_bytes), told.note
            )
            runs[name] = _peer_run(peer, systems[name], want)
        seconds = interleaved(
            runs, quick, lambda name, error: _left_out(net.name, name, error), expected=PeerFailed
        )
    measured = {name: system for name, system in systems.items() if name in seconds}
    noise = abs(median_ratio(seconds["again"], seconds[ours]) - 1)
    made = list(_evaluations(net.name, measured, seconds, ours, float(np.abs(want).max())))
    made += ticket_rows(net.name, seconds)
    made += _edge(net.name, seconds, described)
    if full is not None:
        made.append(_amortised(net.name, full, seconds["lanes"]))
    if threads == 1:
        made += _predicted(net.name, program, ours, costs, seconds, noise)
    made += _ratios(net.name, measured, seconds, ours)
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


def _peer_run(peer: Peer, system: _System, want: FloatArray) -> Run:
    def run(index: int, times: int) -> list[float]:
        seconds, logits = peer.run(index % len(want), times)
        system.saw(logits, want[index % len(want)])
        return seconds

    return run


def _evaluations(
    net: str, systems: dict[str, _System], seconds: dict[str, list[float]], ours: str, largest: float
) -> Iterator[Row]:
    """Each system's evaluation; bytes and error against their targets for ours."""
    target = TARGETS.get(net)
    for name, system in systems.items():
        value = statistics.median(seconds[name])
        mine = name in (ours, "seal")
        yield row(
            f"{net}: {system.label}, eval_total_s",
            value,
            "s",
            target=target.eval_s if target and name == "native" else None,
            note=system.note if mine else _costs(system),
            **summary(seconds[name]),
            net=net,
            backend=system.backend,
            threads=system.threads,
            eval_s=value,
            uplink_bytes=system.sizes[0],
            key_bytes=system.sizes[1],
            reply_bytes=system.sizes[2],
            max_abs_err=system.error,
        )
        if mine:
            yield row(
                f"{net}: {system.label}, largest error of a logit",
                system.error,
                "1",
                target=ERROR * max(1.0, largest),
                n=20,
                note=f"max |logit| {largest:.3g}",
            )
    uplink, keys, reply = systems[ours].sizes
    yield row(f"{net}: uplink", uplink, "bytes", target=target.uplink_bytes if target else None)
    yield row(f"{net}: evaluation keys", keys, "bytes", target=target.key_bytes if target else None)
    yield row(f"{net}: reply", reply, "bytes", target=target.reply_bytes if target else None)


def _costs(system: _System) -> str:
    up, keys, _ = system.sizes
    return f"{up / 1e6:.3g} MB up, {keys / 1e6:.3g} MB of keys, error {system.error:.2g}; {system.note}"


def _edge(net: str, seconds: dict[str, list[float]], described: dict[str, Description]) -> Iterator[Row]:
    for what, part, target in (
        ("encrypt and pack", "encrypt", ENCRYPT_S),
        ("unpack, decrypt and decode", "decrypt", DECRYPT_S),
    ):
        theirs = {d.system: statistics.median(getattr(d, f"{part}_s")) for d in described.values()}
        yield row(
            f"{net}: {what} at the edge",
            statistics.median(seconds[part]),
            "s",
            target=target,
            note="; ".join(f"{system}: {s:.3g} s" for system, s in theirs.items()),
            **summary(seconds[part]),
        )


def _predicted(
    net: str,
    program: Program,
    ours: str,
    costs: Calibration | None,
    seconds: dict[str, list[float]],
    noise: float,
) -> Iterator[Row]:
    """Operation counts times what was measured before the runs, beside the runs."""
    parts: list[tuple[str, Part, str]] = [(ours, "total", "")]
    parts += [("online", "online", " with a ticket")] if "online" in seconds else []
    for name, part, how in parts:
        predicted, value = program.predicted_s(ours, costs, part), statistics.median(seconds[name])
        yield row(
            f"{net}: predicted seconds off measured, {ours}{how}",
            abs(predicted / value - 1),
            "1",
            target=max(PREDICTED, 2 * noise) if part == "total" else None,
            n=len(seconds[name]),
            note=f"predicted {predicted:.4g} s, measured {value:.4g} s",
        )
    if costs is not None:
        yield row(f"{net}: calibration, {ours}", costs.took_s, "s", target=CALIBRATION_S)


def _ratios(
    net: str, systems: dict[str, _System], seconds: dict[str, list[float]], ours: str
) -> Iterator[Row]:
    for name, system in systems.items():
        if name == ours:
            continue
        yield row(
            f"{net}: {system.label}'s time over {ours}'s",
            median_ratio(seconds[name], seconds[ours]),
            "x",
            target=None if name == "seal" else 1.0,
            at_most=False,
            n=len(seconds[name]),
            note="same run, same core",
        )


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


def _amortised(net: str, full: tuple[Program, Client, bytes], seconds: list[float]) -> Row:
    spec = full[0].spec
    return row(
        f"{net}: amortised per image, {spec.lanes} lanes",
        statistics.median(seconds) / spec.lanes,
        "s",
        n=len(seconds),
        note=f"{statistics.median(seconds):.3g} s for {spec.lanes} images; a request of "
        f"{spec.uplink_bytes / 1000:,.0f} KB, keys of {spec.key_bytes / 1e6:.1f} MB",
    )


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


def _tenseal(net: Net, want: FloatArray) -> tuple[Run, _System]:
    import tenseal as ts

    degree, bits = TENSEAL[net.name]
    context = ts.context(ts.SCHEME_TYPE.CKKS, degree, coeff_mod_bit_sizes=bits, n_threads=1)
    context.global_scale = 2 ** bits[1]
    context.generate_galois_keys()
    first = net.parts[0]
    windows = 0
    if isinstance(first, Conv):
        size = first.weight.shape[2]
        images = net.inputs.reshape(-1, first.side, first.side)
        packed = [ts.im2col_encoding(context, m.tolist(), size, size, first.stride) for m in images]
        vectors, windows = [vector for vector, _ in packed], packed[0][1]
    else:
        vectors = [ts.ckks_vector(context, values.tolist()) for values in net.inputs]

    def convolved(given: Any, part: Conv) -> Any:
        channels = [
            given.conv2d_im2col(kernel[0].tolist(), windows) + float(bias)
            for kernel, bias in zip(part.weight, part.bias, strict=True)
        ]
        return ts.CKKSVector.pack_vectors(channels)

    dense = {
        i: (p.weight.T.tolist(), p.bias.tolist()) for i, p in enumerate(net.parts) if isinstance(p, Affine)
    }

    def evaluate(i: int) -> Any:
        out = vectors[i % len(vectors)]
        for index, part in enumerate(net.parts):
            if isinstance(part, Conv):
                out = convolved(out, part)
            else:
                matrix, bias = dense[index]
                out = out.mm(matrix) + bias
            if index < len(net.parts) - 1:
                out = out.square()
        return out

    keys = context.serialize(
        save_public_key=False, save_secret_key=False, save_galois_keys=True, save_relin_keys=True
    )
    reply = evaluate(0)
    sizes = len(vectors[0].serialize()), len(keys), len(reply.serialize())
    system = _System(
        f"TenSEAL {metadata.version('tenseal')} mm", "tenseal", 1, sizes, "ciphertexts already parsed"
    )
    system.saw(np.asarray(reply.decrypt()), want[0])
    return clocked(evaluate), system
