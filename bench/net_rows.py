"""The rows of one net in `bench he`: what each system takes, beside its targets."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from bench.interleave import median_ratio, summary
from bench.peers.child import Description
from bench.rows import Row, row
from blindtail.he.calibration import Calibration
from blindtail.he.cost import Part
from blindtail.he.layers import FloatArray
from blindtail.he.program import Program


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
    "E": Target(0.25, 400_000, 100_000_000, 56_000),
}
ENCRYPT_S, DECRYPT_S = 0.008, 0.003
#: Largest error of a logit, over max(1, max |logit|).
ERROR = 2e-3
#: Predicted seconds are at most this far off, or twice the machine's noise.
PREDICTED = 0.10
CALIBRATION_S = 1.0


@dataclass
class System:
    """One competitor's rows-to-be: what it costs in bytes, and its largest error so far."""

    label: str
    backend: str
    threads: int
    sizes: tuple[int, int, int]  # uplink, keys, reply
    note: str = ""
    error: float = 0.0
    seen: int = 0  # replies that it is the largest of

    def saw(self, got: FloatArray, want: FloatArray) -> None:
        self.seen += 1
        self.error = max(self.error, float(np.abs(np.ravel(got) - want).max()))


def evaluations(
    net: str, systems: dict[str, System], seconds: dict[str, list[float]], ours: str, largest: float
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
                n=system.seen,
                note=f"max |logit| {largest:.3g}",
            )
    uplink, keys, reply = systems[ours].sizes
    yield row(f"{net}: uplink", uplink, "bytes", target=target.uplink_bytes if target else None)
    yield row(f"{net}: evaluation keys", keys, "bytes", target=target.key_bytes if target else None)
    yield row(f"{net}: reply", reply, "bytes", target=target.reply_bytes if target else None)


def _costs(system: System) -> str:
    up, keys, _ = system.sizes
    return f"{up / 1e6:.3g} MB up, {keys / 1e6:.3g} MB of keys, error {system.error:.2g}; {system.note}"


def edge(net: str, seconds: dict[str, list[float]], described: dict[str, Description]) -> Iterator[Row]:
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


def predicted(
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
        expected, value = program.predicted_s(ours, costs, part), statistics.median(seconds[name])
        yield row(
            f"{net}: predicted seconds off measured, {ours}{how}",
            abs(expected / value - 1),
            "1",
            target=max(PREDICTED, 2 * noise) if part == "total" else None,
            n=len(seconds[name]),
            note=f"predicted {expected:.4g} s, measured {value:.4g} s",
        )
    if costs is not None:
        yield row(f"{net}: calibration, {ours}", costs.took_s, "s", target=CALIBRATION_S)


def ratios(net: str, systems: dict[str, System], seconds: dict[str, list[float]], ours: str) -> Iterator[Row]:
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


def amortised(net: str, program: Program, seconds: list[float]) -> Row:
    spec = program.spec
    return row(
        f"{net}: amortised per image, {spec.lanes} lanes",
        statistics.median(seconds) / spec.lanes,
        "s",
        n=len(seconds),
        note=f"{statistics.median(seconds):.3g} s for {spec.lanes} images; a request of "
        f"{spec.uplink_bytes / 1000:,.0f} KB, keys of {spec.key_bytes / 1e6:.1f} MB",
    )


def absent(net: str, name: str, why: Exception) -> Row:
    """A rival that does not run this net, and why."""
    return row(f"{net}: {name} does not run it", 0, "1", n=0, note=" ".join(str(why).split()))
