"""Pruned tails: zero tiles and diagonals, the error they cost, and what they save encrypted, measured.

An autoencoder 256-64-x^2-256 on the middle 16 x 16 pixels of Fashion-MNIST's test file (8,000 of its
images to train, 2,000 to measure), HE-PEx's reference: learning rate 0.0025, 10 epochs for each training,
fraction 0.9, tiles of 4 x 8, threshold 0.0625; one point retrains for 50 epochs each time. Both maps and
the square between them run encrypted.
Errors are of seeds 0 to 4, paired with the unpruned network of the same seed; encrypted tails are those of
seed 0, unpruned and pruned in turns on `native`, one thread on one core.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.interleave import Run, clocked, interleaved, median_ratio, summary
from bench.rows import Row, row
from bench.tails import Client
from blindtail.he.backends import settle
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import FloatArray
from blindtail.he.native_backend import NativeEvaluator
from blindtail.he.program import Program
from blindtail.he.secret import SecretKey
from blindtail.models.data import load
from blindtail.models.layers import Square
from blindtail.progress import Span
from blindtail.train.fit import bounded
from blindtail.train.pruning import Arranged, Chain, Masks, Policy, Pruned, chain_of, prune
from blindtail.train.pruning.compiled import counted
from blindtail.train.pruning.groups import Groups, tiles
from blindtail.train.pruning.owner import by_diagonals

SOURCES = (
    "blindtail/he/*.py",
    "blindtail/train/pruning/*.py",
    "bench/interleave.py",
    "bench/prune.py",
    "bench/tails.py",
    "native/src/*",
)

PIXELS, HIDDEN, BATCH, EPOCHS, RATE = 256, 64, 32, 10, 2.5e-3
TRAINED_ON, SEEDS, LANES = 8_000, 5, 16
#: HE-PEx's claims at a fraction of 0.9: zero tiles, error, and time or memory, over those without pruning.
ZERO_TILES, ERROR, COST = 0.5, 1.25, 0.4
TILES = Policy(groups="tile")


@dataclass(frozen=True)
class Point:
    """A policy whose groups are the diagonals of a layout with so many lanes; epochs of each retraining."""

    policy: Policy = field(default_factory=Policy)
    lanes: int = LANES
    epochs: int = EPOCHS


_LONGER = 50
POINTS: Mapping[str, Point] = {
    "0.9 of both maps": Point(),
    "0.9 of the first map, 0.8 of the second, 50 epochs": Point(
        Policy(layers={"0": 0.9, "2": 0.8}), epochs=_LONGER
    ),
    "0.94 of the first map, 0.5 of the second": Point(Policy(layers={"0": 0.94, "2": 0.5})),
    "0.9 of the first map": Point(Policy(fraction=0.0, layers={"0": 0.9})),
    "0.9 of both maps, 8 lanes": Point(lanes=8),
    "0.9 of both maps, 1 lane": Point(lanes=1),
}
#: Tails whose predicted gain is told, whatever they answer.
TAILS, SEVERAL = ((256, 64, 256), (784, 128, 10), (784, 128, 128, 10)), (1, 4, 16)
_TWO_SIDED_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}


@dataclass(frozen=True)
class Trainer:
    """Images (n, 256) in [0, 1], and how long each training lasts."""

    train: Tensor
    test: Tensor
    epochs: int = EPOCHS

    @classmethod
    def of(cls, images: int = TRAINED_ON, epochs: int = EPOCHS) -> Trainer:
        pixels = torch.from_numpy(load("fashion", "test").pixels.copy()).float() / 255.0
        middle = pixels[:, 0, 6:22, 6:22].flatten(1)
        return cls(middle[:images], middle[TRAINED_ON:], epochs)

    def lasting(self, epochs: int) -> Trainer:
        """With that many epochs for each full training's ten; a quick run's are fewer alike."""
        return replace(self, epochs=self.epochs * epochs // EPOCHS)

    def fit(self, net: nn.Module, seed: int, masks: Masks | None = None) -> float:
        """One training in place, deterministic by seed; the mean squared error of test images."""
        optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(self.epochs):
            order = torch.randperm(len(self.train), generator=generator)
            for start in range(0, len(order), BATCH):
                x = self.train[order[start : start + BATCH]]
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(F.mse_loss(net(x), x))
                optimizer.step()
                if masks is not None:
                    masks.apply()
        return self.error(net)

    @torch.no_grad()
    def error(self, net: nn.Module) -> float:
        return float(F.mse_loss(net(self.test), self.test))


def autoencoder() -> nn.Sequential:
    """256 - 64 - x^2 - 256. With biases near 1 the square is close to linear where training begins."""
    first = nn.Linear(PIXELS, HIDDEN)
    nn.init.ones_(first.bias)
    return nn.Sequential(first, Square(), nn.Linear(HIDDEN, PIXELS))


@dataclass
class Found:
    """Of one seed: networks and errors by name."""

    plain: nn.Sequential
    error: float  # of `plain`
    longer: dict[int, float]  # trained as long as a pruned one, by the epochs of a retraining
    pruned: dict[str, Pruned] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    nets: dict[str, tuple[nn.Sequential, Arranged]] = field(default_factory=dict)


def trained(trainer: Trainer, seed: int) -> Found:
    """The unpruned network, and its error after as many epochs as a pruned one has."""
    with bounded(1, seed):
        net = autoencoder()
        error = trainer.fit(net, seed)
        longer = {}
        for epochs in sorted({point.epochs for point in POINTS.values()}):
            further, longest = copy.deepcopy(net), trainer.lasting(epochs)
            longest.fit(further, seed + 1000)
            longer[epochs] = longest.fit(further, seed + 2000)
        return Found(net, error, longer)


def pruned(trainer: Trainer, found: Found, name: str, policy: Policy, seed: int, lanes: int = 1) -> None:
    """Prune a copy of the unpruned network, retrained on the same images."""
    net = copy.deepcopy(found.plain)
    turn = itertools.count(1)

    def retrain(masks: Masks, _: Span) -> None:
        trainer.fit(net, seed + 1000 * next(turn), masks)

    with bounded(1, seed):
        chain = chain_of(net, (PIXELS,))
        made, groups = None, _tiles(chain)
        if policy.groups == "diagonal":
            values = trainer.train[:500].double().numpy()
            made, groups = by_diagonals(chain, fold_tail(net, (PIXELS,)), values, lanes, None)
        found.pruned[name] = prune(chain, groups, policy, retrain)
        found.errors[name] = trainer.error(net)
        found.nets[name] = net, Arranged(made, found.pruned[name].elements, lanes)


def _tiles(chain: Chain) -> list[Groups]:
    return [tiles(layer.shape, TILES.tile) for layer in chain.layers]


def rows(args: argparse.Namespace) -> list[Row]:
    quick = bool(args.quick)
    trainer = Trainer.of(*((1_000, 2) if quick else ()))
    seeds = range(2 if quick else SEEDS)
    every = [trained(trainer, seed) for seed in seeds]
    baselines = {name: Policy(groups="tile", method=name) for name in ("magnitude", "random")}
    for seed, found in zip(seeds, every, strict=True):
        for name, policy in {"p4e": TILES, **baselines}.items():
            pruned(trainer, found, name, replace(policy, seed=seed), seed)
        for name, point in POINTS.items():
            policy = replace(point.policy, seed=seed)
            pruned(trainer.lasting(point.epochs), found, name, policy, seed, point.lanes)
    made = [*_unpruned(every), *_tile_rows(every), *_policies(trainer, every[0])]
    for name, point in POINTS.items():
        made += _errors(f"diagonals, {name}", name, every, ERROR, point.epochs)
    made += _predicted()
    return made + list(encrypted(trainer, every[0], quick))


def _unpruned(every: Sequence[Found]) -> Iterator[Row]:
    told = {"unpruned: mean squared error": [f.error for f in every]}
    for epochs in every[0].longer:
        what = f"unpruned, trained as long as one pruned with {epochs} epochs: the same"
        told[what] = [f.longer[epochs] for f in every]
    for what, values in told.items():
        yield row(what, statistics.mean(values), "1", n=len(values), note=f"seeds {_spread(values)}")


def _tile_rows(every: Sequence[Found]) -> Iterator[Row]:
    for name, target in (("p4e", ZERO_TILES), ("magnitude", None), ("random", None)):
        shares = [statistics.mean(f.pruned[name].zero_groups) for f in every]
        yield row(
            f"tiles of 4 x 8, {name} at 0.9: zero tiles",
            statistics.mean(shares),
            "1",
            target=target,
            at_most=False,
            n=len(shares),
            note=f"{_interval(shares)}; weights left {statistics.mean(every[0].pruned[name].left):.3f}",
        )
        yield from _errors(f"tiles of 4 x 8, {name} at 0.9", name, every, None if target is None else ERROR)


def _errors(
    what: str, name: str, every: Sequence[Found], target: float | None, epochs: int = EPOCHS
) -> Iterator[Row]:
    """Paired by seed: over the network as it was pruned, and over one trained as long."""
    ratios = [f.errors[name] / f.error for f in every]
    longer = [f.errors[name] / f.longer[epochs] for f in every]
    yield row(
        f"{what}: error over unpruned",
        statistics.mean(ratios),
        "1",
        target=target,
        n=len(ratios),
        note=f"{_interval(ratios)}; over one trained as long {statistics.mean(longer):.2f}, "
        f"{_interval(longer)}",
    )


def _policies(trainer: Trainer, found: Found) -> Iterator[Row]:
    """Sub-policies of the first pruning, seed 0. A tile's score at 0.9 leaves whole tiles alone."""
    for scope, score in itertools.product(("local", "global"), ("weight", "min", "max", "avg")):
        name = f"{scope}, {score}"
        policy = Policy(groups="tile", scope=scope, score=score)  # type: ignore[arg-type]
        pruned(trainer, found, name, policy, 0)
        zero = found.pruned[name].zero_groups
        yield row(
            f"tiles of 4 x 8, {name}: zero tiles",
            statistics.mean(zero),
            "1",
            note=f"first map {zero[0]:.2f}, second {zero[1]:.2f}; "
            f"error over unpruned {found.errors[name] / found.error:.2f}",
        )


def encrypted(trainer: Trainer, found: Found, quick: bool) -> Iterator[Row]:
    """Unpruned and pruned tails in turns: seconds, bytes and operations; outputs against the clear net."""
    settle("native")
    x = trainer.train[:1000].double().numpy()
    layers = fold_tail(found.plain, (PIXELS,))
    programs: dict[str, Program] = {}
    plain = {p.lanes: f"unpruned, {_lanes(p.lanes)}" for p in POINTS.values()}
    for lanes, name in plain.items():
        programs[name] = compile_tail(layers, x, lanes=lanes)
    for name in POINTS:
        net, how = found.nets[name]
        programs[name] = how.compile(fold_tail(net, (PIXELS,)), x)
    runs: dict[str, Run] = {}
    clients = {name: Client.of(program, "native") for name, program in programs.items()}
    for name, program in programs.items():
        batch = trainer.test[: program.spec.lanes].double().numpy()
        request = clients[name].encryptor.encrypt(batch)
        runs[name] = clocked(lambda _, c=clients[name], r=request: c.evaluate("native", r))  # type: ignore[misc]
    runs["again"] = runs[plain[LANES]]
    seconds = interleaved(runs, quick)
    noise = median_ratio(seconds["again"], seconds[plain[LANES]])
    sizes = {name: memory_bytes(program) for name, program in programs.items()}
    for name, program in programs.items():
        if name in plain.values():
            note = _counts(program)
            yield row(
                f"{name}: evaluation",
                statistics.median(seconds[name]),
                "s",
                note=note,
                **summary(seconds[name]),
            )
            yield row(f"{name}: encoded weights and expanded keys", sizes[name], "bytes")
            continue
        before = plain[program.spec.lanes]
        error = _difference(found.nets[name][0], program, clients[name], trainer)
        yield row(
            f"diagonals, {name}: seconds over unpruned",
            median_ratio(seconds[name], seconds[before]),
            "1",
            target=COST,
            n=len(seconds[name]),
            note=f"{1e3 * statistics.median(seconds[name]):.2f} ms; {_counts(program)}; the same twice: "
            f"{noise:.3f}; error {error:.1e}",
        )
        # Others on the machine take the caches away, which costs the larger program more.
        yield row(
            f"diagonals, {name}: fastest run over unpruned's fastest",
            min(seconds[name]) / min(seconds[before]),
            "1",
            target=COST,
            n=len(seconds[name]),
            note=f"{1e3 * min(seconds[name]):.2f} ms over {1e3 * min(seconds[before]):.2f} ms",
        )
        yield row(
            f"diagonals, {name}: memory over unpruned",
            sizes[name] / sizes[before],
            "1",
            target=COST,
            note=f"{sizes[name] / 1e6:.1f} MB",
        )


def _predicted() -> Iterator[Row]:
    """Random weights: costs depend on where zeros are. 0.9 of the diagonals of each map are pruned."""
    for widths, lanes in itertools.product(TAILS, SEVERAL):
        with bounded(1, 0):
            dense = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        between = [layer for pair in zip(dense, [Square() for _ in dense], strict=True) for layer in pair]
        net, shape = nn.Sequential(*between[:-1]), widths[:1]
        x = np.random.default_rng(0).uniform(0, 1, (50, widths[0]))
        layers, chain = fold_tail(net, shape), chain_of(net, shape)
        before = counted(compile_tail(layers, x, lanes=lanes))
        made, groups = by_diagonals(chain, layers, x, lanes, None)
        found = prune(chain, groups, Policy(rounds=1, iterations=2), lambda masks, _: masks.apply())
        after = counted(Arranged(made, found.elements, lanes).compile(fold_tail(net, shape), x))
        yield row(
            f"{'-'.join(map(str, widths))}, {_lanes(lanes)}, 0.9: predicted seconds over unpruned",
            after["predicted_s"] / before["predicted_s"],
            "1",
            note=f"{before['diagonals']} diagonals, {after['diagonals']} left; keys {before['keys']}, "
            f"{after['keys']}; memory {after['memory_bytes'] / before['memory_bytes']:.2f}",
        )


def memory_bytes(program: Program) -> int:
    """Measured: encoded weights of an evaluator, and the file of one client's expanded keys."""
    evaluator = NativeEvaluator(program)
    with tempfile.TemporaryDirectory() as folder:
        sent, prepared = Path(folder) / "keys", Path(folder) / "prepared"
        SecretKey.generate(program.spec, sent)
        evaluator.prepare_keys(sent, prepared)
        return evaluator.plain_bytes + prepared.stat().st_size


def _difference(net: nn.Module, program: Program, client: Client, trainer: Trainer) -> float:
    """Largest error of a pixel of one ciphertext's images, encrypted against clear."""
    batch = trainer.test[: program.spec.lanes]
    reply = client.evaluate("native", client.encryptor.encrypt(batch.double().numpy()))
    got: FloatArray = client.decryptor.decrypt(reply)
    with torch.no_grad():
        return float(np.abs(got.reshape(len(batch), -1) - net(batch).numpy()).max())


def _lanes(count: int) -> str:
    return "1 lane" if count == 1 else f"{count} lanes"


def _counts(program: Program) -> str:
    found: Mapping[str, Any] = counted(program)
    return (
        f"{found['diagonals']} products, {found['rotations']} rotations, {found['keys']} keys of "
        f"{found['key_bytes'] / 1e6:.1f} MB, predicted {1e3 * found['predicted_s']:.2f} ms"
    )


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.4g} to {max(values):.4g}"


def _interval(values: Sequence[float]) -> str:
    """95% of the mean, by Student's t."""
    if len(values) not in _TWO_SIDED_95:
        return _spread(values)
    half = _TWO_SIDED_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"95% within {statistics.mean(values) - half:.3f} to {statistics.mean(values) + half:.3f}"
