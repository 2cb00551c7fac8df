"""Values over several ciphertexts: a convolution by tiles, shapes of tiles, their choice, whole networks.

The 5 x 5 convolution is that of Aharoni et al., HeLayers (arXiv 2011.01805): 4 x 4 tiles of a picture
whose rows and columns are interleaved, so that neighbours are in other tiles, and a tile is rotated for
the picture's borders alone. Other slots hold other pictures. Matrices are multiplied in tiles
[rows/t1, columns/t2] of several shapes. The choice of shapes is compared with all combinations there are.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.refresh_nets import alexnet, lively, resnet20
from bench.rows import Row, row
from bench.tails import Client, Conv, folded, random_layers
from blindtail.he import cost
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, FloatArray, Layer, Quadratic
from blindtail.he.normal import normalised
from blindtail.he.objective import Objective
from blindtail.he.params import Parameters
from blindtail.he.program import Program
from blindtail.he.tiled_compiler import compile_tiled
from blindtail.he.tiles import TileShape
from blindtail.he.tiling import choose
from blindtail.models.layers import Square
from blindtail.models.refresh import Refresh, refresh_costs

SOURCES = (
    "blindtail/he/*.py",
    "blindtail/models/*.py",
    "native/src/*",
    "bench/refresh_nets.py",
    "bench/tails.py",
    "bench/tiles.py",
)
#: Of the paper's convolution; of what is chosen over the best there is; of one core.
ROTATIONS, ERROR, CHOSEN, COMPILED_S = 72, 1e-3, 1.05, 30.0
_SIDE, _WINDOW, _TILE, _RING = 28, 5, 4, 8192
_RANDOM = 25  # networks
#: Rows and columns of the matrix, its ring, and t2 of the tiles that are tried.
_MATRIX, _MATRIX_RING, _COLUMNS = (256, 1024), 4096, (16, 32, 64, 128, 256, 512)
_METRICS = ("total_s", "memory_bytes", "uplink_bytes", "key_bytes")


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick`: fewer repetitions, two shapes of a matrix, one small network, none that is large."""
    quick = bool(args.quick)
    made = [*convolution(1 if quick else 5, 1 if quick else 20)]
    made += matrices(_COLUMNS[2:4] if quick else _COLUMNS, 3 if quick else 20, not quick)
    made += [chosen(net) for net in (NETS[:1] if quick else NETS)]
    made.append(_several([chosen(random_small(seed)) for seed in range(2 if quick else _RANDOM)]))
    if not quick:
        made.append(_dense_network())
        made += [*_network("AlexNet-shaped", alexnet(), (3, 32, 32))]
        made += [*_network("ResNet-20", resnet20(), (3, 32, 32))]
    return made


# -- one convolution ----------------------------------------------------------------------


def convolution(batches: int, runs: int) -> Iterator[Row]:
    """Of batches of pictures, as many as there are lanes, encrypted."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(1, 1, _WINDOW, _WINDOW)) / _WINDOW
    step = folded(Conv(kernel, rng.normal(size=1) / 8, 1, _SIDE, _WINDOW // 2))
    shape = TileShape.parse(f"[{_SIDE}~/{_TILE}, {_SIDE}~/{_TILE}]")
    lanes = _RING // 2 // shape.positions
    x = rng.uniform(0, 1, (batches, lanes, _SIDE**2))
    program = compile_tiled([step], x[0], lanes=lanes, ring_degree=_RING, only=[[shape], [shape]])
    products, turns, alone = _counted(program)
    name = f"{_WINDOW} x {_WINDOW} convolution, {shape}, {lanes} pictures"
    window = _WINDOW**2 - 1
    yield row(f"{name}: tiles", shape.tiles, "1")
    yield row(
        f"{name}: rotations",
        turns,
        "1",
        target=ROTATIONS,
        note=f"{window * shape.tiles} where each tile is rotated for each place of the window, "
        f"{alone} with each output's own",
    )
    yield row(f"{name}: products", products, "1")
    spec = program.spec
    seconds, error = _encrypted(program, step, x, runs)
    took, predicted = statistics.median(seconds), program.predicted_s("native")
    net: dict[str, Any] = {
        "net": "convolution",
        "backend": "native",
        "threads": 1,
        "eval_s": took,
        "uplink_bytes": spec.uplink_bytes,
        "key_bytes": spec.key_bytes,
        "reply_bytes": spec.reply_bytes,
        "max_abs_err": error,
    }
    note = f"N = {_RING}, one level; predicted {predicted:.3f} s"
    yield row(f"{name}: one evaluation", took, "s", n=len(seconds), spread=_spread(seconds), note=note, **net)
    yield row(f"{name}: a picture", took / lanes, "s", n=len(seconds) * lanes)
    yield row(f"{name}: up", spec.uplink_bytes, "bytes", note=f"{spec.uplink_bytes / lanes:,.0f} a picture")
    yield row(f"{name}: down", spec.reply_bytes, "bytes", note=f"{spec.reply_bytes / lanes:,.0f} a picture")
    yield row(f"{name}: keys", spec.key_bytes, "bytes", note=f"{len(spec.keys)} keys")
    yield row(f"{name}: largest error of a pixel", error, "1", target=ERROR, n=batches * lanes)


def _counted(program: Program) -> tuple[int, int, int]:
    """Products, rotations, and rotations where outputs share none."""
    together = cost.counted(program.ops, program.spec.input_ciphertexts, "native")
    alone = sum(cost.count(op, "native").rotations for op in program.ops)
    return sum(c.products for c in together), sum(c.rotations for c in together), alone


def _encrypted(program: Program, step: Affine, x: FloatArray, runs: int) -> tuple[list[float], float]:
    """Seconds of evaluations on `native`, and the largest error; x (batches, lanes, features)."""
    client, worst, seconds = Client.of(program, "native"), 0.0, list[float]()
    for batch in x:
        request = client.encryptor.encrypt(batch)
        got = client.decryptor.decrypt(client.evaluate("native", request)).reshape(len(batch), -1)
        worst = max(worst, float(np.abs(got - (batch @ step.weight.T + step.bias)).max()))
    for _ in range(runs):
        begun = time.perf_counter()
        client.evaluate("native", request)
        seconds.append(time.perf_counter() - begun)
    return seconds, worst


def _spread(seconds: Sequence[float]) -> float:
    low, high = np.percentile(seconds, [5, 95])
    return float(high - low)


# -- one matrix, tiles of several shapes ------------------------------------------------------


def matrices(columns: Sequence[int], runs: int, choice: bool = True) -> list[Row]:
    """Seconds of one product for each shape of tiles, and for what the choice finds by itself."""
    outputs, inputs = _MATRIX
    (step,) = random_layers((inputs, outputs))
    assert isinstance(step, Affine)
    x = np.random.default_rng(1).uniform(0, 1, (4, 1, inputs))
    made, slots = [], _MATRIX_RING // 2
    for t2 in columns:
        t1 = slots // t2
        first, last = f"[*/{t1}, {inputs}/{t2}]", f"[{outputs}/{t1}, ?/{t2}]"
        only = [[TileShape.parse(first)], [TileShape.parse(last)]]
        program = compile_tiled([step], x[:, 0], ring_degree=_MATRIX_RING, only=only, objective=Objective())
        made.append(_product(f"[{outputs}/{t1}, {inputs}/{t2}]", program, step, x, runs))
    if choice:  # half a minute
        program = compile_tiled([step], x[:, 0], ring_degree=_MATRIX_RING)
        made.append(_product(f"{outputs} x {inputs}, chosen for its time", program, step, x, runs))
    return made


def _product(name: str, program: Program, step: Affine, x: FloatArray, runs: int) -> Row:
    seconds, error = _encrypted(program, step, x, runs)
    spec = program.spec
    products, turns, _ = _counted(program)
    return row(
        f"matrix {name}",
        statistics.median(seconds),
        "s",
        n=runs,
        spread=_spread(seconds),
        note=f"predicted {1e3 * program.predicted_s('native'):.1f} ms; "
        f"{spec.input_ciphertexts} ciphertexts in, {spec.output_ciphertexts} out; {products} products, "
        f"{turns} rotations; {len(spec.keys)} keys of {spec.key_bytes / 1e6:.1f} MB; "
        f"up {spec.uplink_bytes / 1e3:.0f} kB, down "
        f"{spec.reply_bytes / 1e3:.0f} kB; error {error:.1e}",
    )


# -- the choice beside all there is -------------------------------------------------------------


@dataclass(frozen=True)
class Small:
    """A network for which all combinations can be tried: parts, image that goes in, slots of one image."""

    name: str
    parts: Callable[[], Sequence[Conv | Affine]]
    image: tuple[int, ...]
    positions: int

    @property
    def layers(self) -> list[Layer]:
        made: list[Layer] = []
        for part in self.parts():
            if made:
                n = len(made[-1].bias)  # type: ignore[union-attr]
                made.append(Quadratic(np.ones(n), np.zeros(n), np.zeros(n), f"square{len(made)}"))
            made.append(part if isinstance(part, Affine) else folded(part))
        return made


def _conv(given: int, out: int, side: int, stride: int = 1, window: int = 3) -> Conv:
    rng = np.random.default_rng(out)
    weight = rng.normal(size=(out, given, window, window)) / window
    return Conv(weight, rng.normal(size=out) / 8, stride, side, window // 2)


def _dense(given: int, out: int) -> Affine:
    (made,) = random_layers((given, out))
    assert isinstance(made, Affine)
    return made


NETS = (
    Small("conv 2 of 4 x 4, dense 4", lambda: [_conv(1, 2, 4), _dense(32, 4)], (1, 4, 4), 8),
    Small("conv 2 at stride 2, dense 3", lambda: [_conv(2, 2, 4, 2), _dense(8, 3)], (2, 4, 4), 8),
    Small("conv 5 x 5 of 4 x 4, dense 4", lambda: [_conv(1, 1, 4, 1, 5), _dense(16, 4)], (1, 4, 4), 4),
    Small("two convs, dense 3", lambda: [_conv(1, 2, 4), _conv(2, 2, 4, 2), _dense(8, 3)], (1, 4, 4), 8),
    Small("dense 24, 12, 5", lambda: [_dense(24, 12), _dense(12, 5)], (24,), 8),
)


def random_small(seed: int) -> Small:
    """Two or three maps: convolutions of 4 x 4 or 8 x 8 pixels and a dense one, or dense ones alone."""
    rng = np.random.default_rng(seed)
    given, side = int(rng.integers(1, 3)), int(rng.choice([4, 8]))
    positions = int(rng.choice([8, 16])) * side // 4
    classes = int(rng.integers(3, 11))
    if rng.integers(4) == 0:
        widths = [int(w) for w in rng.integers(8, 65, 2)]
        dense = [(a, b) for a, b in itertools.pairwise([*widths, classes])]
        return Small(f"dense {widths}", lambda: [_dense(a, b) for a, b in dense], (widths[0],), positions)
    image, convolutions = (given, side, side), list[tuple[int, int, int, int, int]]()
    for _ in range(int(rng.integers(1, 3)) if side == 4 else 1):
        out, stride, window = int(rng.integers(1, 5)), int(rng.integers(1, 3)), int(rng.choice([3, 5]))
        convolutions.append((given, out, side, stride, window))
        given, side = out, -(-side // stride)
    inside = given * side * side
    name = ", ".join(
        f"conv {c[0]} to {c[1]} of {c[2]} x {c[2]} by {c[4]}, stride {c[3]}" for c in convolutions
    )
    return Small(
        name, lambda: [*(_conv(*c) for c in convolutions), _dense(inside, classes)], image, positions
    )


def chosen(net: Small) -> Row:
    """The largest of the ratios that objectives of one metric each come to."""
    tail = normalised(net.layers)
    parameters = Parameters.create(tail.depth, _RING)
    lanes = parameters.slots // net.positions
    told, ratios, seconds = list[str](), list[float](), [0.0, 0.0]
    for metric in _METRICS:
        wanted, found = Objective({metric: 1.0}), list[float]()
        for every in (False, True):
            begun = time.process_time()
            made = choose(tail, parameters, wanted, image=net.image, lanes=lanes, every=every)
            seconds[every] += time.process_time() - begun
            found.append(made.costs.of(metric))
        ratios.append(found[0] / found[1])
        told.append(f"{metric} {ratios[-1]:.3f}")
    return row(
        f"{net.name}, {net.positions} positions: chosen over all",
        max(ratios),
        "1",
        target=CHOSEN,
        n=len(_METRICS),
        note=f"{', '.join(told)}; {seconds[0]:.1f} s against {seconds[1]:.1f} s",
    )


def _several(found: Sequence[Row]) -> Row:
    worst = max(found, key=lambda one: one["value"])
    return row(
        "random networks: chosen over all",
        worst["value"],
        "1",
        target=CHOSEN,
        n=len(found),
        note=f"the largest; {worst['name'].partition(':')[0]}: {worst['note']}",
    )


# -- whole networks -------------------------------------------------------------------------------


def _dense_network() -> Row:
    """The largest dense map that a ring of 16384 holds in one ciphertext."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8192, 8192), Square(), nn.Linear(8192, 10))
    x = np.random.default_rng(0).uniform(-1, 1, (64, 8192))
    begun = time.process_time()
    made = compile_tail(fold_tail(net, (8192,)), x)
    took = time.process_time() - begun
    note = f"of one core; N = {made.spec.parameters.ring_degree}"
    return row("dense 8192, 8192, 10: compiled in", took, "s", target=COMPILED_S, note=note)


def _network(name: str, net: nn.Sequential, shape: tuple[int, int, int]) -> Iterator[Row]:
    """Compiled as a refreshed tail; weights by seed."""
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    x = np.random.default_rng(0).uniform(-2, 2, (256, int(np.prod(shape))))
    begun = time.process_time()
    costs = refresh_costs(lively(net), shape, x, Refresh())
    took = time.process_time() - begun
    yield row(f"{name}: compiled in", took, "s", target=COMPILED_S, note="of one core")
    yield row(f"{name}: round trips", costs.round_trips, "1", note=f"N = {costs.ring_degree}")
    yield row(f"{name}: predicted", costs.predicted_s, "s", note="reference core, all segments")
    yield row(f"{name}: up", costs.uplink_bytes, "bytes", note="all segments")
    yield row(f"{name}: down", costs.reply_bytes, "bytes", note="all segments")
    yield row(f"{name}: keys", costs.key_bytes, "bytes", note=f"{costs.evaluation_keys} keys")
