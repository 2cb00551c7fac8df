"""Random PyTorch networks, compiled and run: no level or scale is off, and errors keep their bounds.

Every network runs on the `clear` backend with CKKS-sized noise, some on real
ciphertexts, some go the way of an owner (`compile_model`, both files written and
read), each beside PyTorch in float64. Layers are those of
`bench.random_networks`. A slice of the same runs in the tests. `--quick` takes a tenth.
"""

from __future__ import annotations

import argparse
import collections
import copy
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.random_networks import FAMILIES, RandomNetwork, random_network
from bench.rows import Row, row
from bench.tails import Client
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import BlindtailError, ModelError
from blindtail.he.backends import settle
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import FloatArray
from blindtail.he.program import Program
from blindtail.he.stability import Stability, Verdict
from blindtail.models.data import Images
from blindtail.models.several import Form, of_flat
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from blindtail.train.compiled import compile_model

SOURCES = (
    "blindtail/he/*.py",
    "blindtail/models/*.py",
    "native/src/*",
    "bench/networks.py",
    "bench/random_layers.py",
    "bench/random_networks.py",
    "bench/tails.py",
)
_CLEAR, _NATIVE, _SEAL, _OWNERS = 500, 50, 10, 50
#: Every family is in at least this share of the networks.
_LEAST_SHARE = 0.1


@dataclass(frozen=True)
class Checked:
    """What a run of one network gave.

    fault    what is wrong with it, "" for nothing
    ratios   |error| / bound of every logit
    escapes  the stability gate finds that held-out images leave the calibrated ranges
    """

    fault: str
    ratios: FloatArray
    escapes: bool = False


def rows(args: argparse.Namespace) -> list[Row]:
    scale = 10 if args.quick else 1
    clear, native, seal, owners = (n // scale or 1 for n in (_CLEAR, _NATIVE, _SEAL, _OWNERS))
    made, found, drawn = list[Row](), list[Checked](), collections.Counter[str]()
    slowest = largest = (0.0, 0, "")
    for seed in range(clear):
        network = random_network(seed)
        drawn.update(network.families)
        start = time.perf_counter()
        program, checked = on_clear(network, seed)
        took = time.perf_counter() - start
        slowest = max(slowest, (took, network.width, _told(seed, network)))
        if program is not None and network.width > largest[1]:
            start = time.perf_counter()
            compiled(network)
            largest = (time.perf_counter() - start, network.width, _told(seed, network))
        found.append(_at(seed, network, checked))
        _progress("clear", seed + 1, clear)
    rare = sorted(f for f in FAMILIES if drawn[f] < _LEAST_SHARE * clear)
    shares = ", ".join(f"{name} {drawn[name]}" for name in sorted(FAMILIES))
    made += [row("families of layers that are rare", len(rare), "families", target=0, n=clear, note=shares)]
    made += _bounded("clear with noise", found, loosest=32)
    made.append(row("compile time of the widest", largest[0], "s", note=f"{largest[1]} values, {largest[2]}"))
    made.append(row("compiled and run, the slowest", slowest[0], "s", note=slowest[2]))
    for backend, count in ((settle("auto"), native), ("seal", seal)):
        made += _bounded(backend, list(_encrypted(backend, count)), loosest=32)
    by_files = list(_owners(owners))
    made += _bounded("compile_model and both files", by_files)
    escaping = sum(checked.escapes for checked in by_files)
    note = "compiled with allow_unstable, as nothing here is trained for its ranges"
    made.append(row("of these, refused by the stability gate", escaping, "networks", n=owners, note=note))
    return made


def compiled(network: RandomNetwork) -> Program:
    """By the front end and the compiler. Raises `ModelError`."""
    calibration = network.calibration.reshape(len(network.calibration), -1)
    return compile_tail(fold_tail(network.module, network.shape), calibration)


def on_clear(network: RandomNetwork, noise_seed: int) -> tuple[Program | None, Checked]:
    """Compile a network and check it on `clear`; the program is None where it does not compile."""
    try:
        program = compiled(network)
    except BlindtailError as error:
        return None, Checked(f"does not compile: {error}", np.zeros(0))
    return program, check(network, program, noise_seed)


def check(network: RandomNetwork, program: Program, noise_seed: int) -> Checked:
    """Levels as counted from the layers, scales equal wherever operands meet, errors below their bounds."""
    if program.depth != network.levels:
        return Checked(f"consumes {program.depth} levels, its layers {network.levels}", np.zeros(0))
    x = network.inputs.reshape(len(network.inputs), -1)
    try:
        got = ClearEvaluator(program, noise_seed).logits(x)
    except BlindtailError as error:
        return Checked(f"cannot run: {error}", np.zeros(0))
    return _compared(got, network, program)


def check_encrypted(network: RandomNetwork, program: Program, *backends: str) -> dict[str, Checked]:
    """The same on real ciphertexts, by backend, with fresh keys and one request for all."""
    client = Client.of(program, *backends)
    x = network.inputs.reshape(len(network.inputs), -1)
    requests = [client.encryptor.encrypt(image) for image in x]
    return {
        name: _compared(
            np.stack([client.decryptor.decrypt(client.evaluate(name, request)) for request in requests]),
            network,
            program,
        )
        for name in client.loaded
    }


def _compared(got: FloatArray, network: RandomNetwork, program: Program) -> Checked:
    want = network.logits(network.inputs)
    if got.shape != want.shape or not np.isfinite(got).all():
        return Checked(f"gives {got.shape} finite logits, PyTorch {want.shape}", np.zeros(0))
    ratios = np.abs(got - want) / program.error_bounds()[0]
    worst = float(ratios.max())
    return Checked("" if worst <= 1 else f"an error is {worst:.3g} times its bound", ratios.ravel())


def _encrypted(backend: str, count: int) -> Iterable[Checked]:
    """Seeds that no other row has."""
    for seed in range(10_000, 10_000 + count):
        network = random_network(seed)
        try:
            checked = check_encrypted(network, compiled(network), backend)[backend]
        except BlindtailError as error:
            checked = Checked(str(error), np.zeros(0))
        yield _at(seed, network, checked)
        _progress(backend, seed - 9_999, count)


def owners_pair(network: RandomNetwork, folder: Path) -> tuple[EdgeBundle, CloudBundle, Stability]:
    """The network as the tail of a model whose head does nothing, compiled and read back from both files.

    The gate's findings go with them: it finds, but does not refuse.
    """
    image = network.given.image
    assert image is not None
    channels, height, width = image
    outputs = network.logits(network.inputs[:1]).shape[1]
    module, stages = copy.deepcopy(network.module).float(), list[nn.Module]([nn.Identity()])
    tail: nn.Module = nn.Sequential(module, nn.Flatten())
    if (flat := of_flat(module)) is not None:  # the image's channels, in two tensors
        stages.append(_Parted(flat[1]))
        tail = _Flattened(flat[0])
    model = SplitModel.from_parts(
        name="random",
        stages=stages,
        exits={0: nn.Sequential(nn.Flatten(), nn.Linear(network.width, outputs))},
        tails={len(stages) - 1: tail},
        # Pixels of 0 to 255 become -1 to 1, as the network's own data.
        preprocessing=Preprocessing((channels, height, width), (0.5,) * channels, (0.5,) * channels),
        class_names=tuple(f"class {i}" for i in range(outputs)),
    )
    pixels = np.round((network.calibration + 1) * 127.5).astype(np.uint8).reshape(-1, *image)
    labels = np.arange(len(pixels)) % outputs
    made = compile_model(model, Images(pixels, labels, model.class_names), allow_unstable=True)
    made.save(folder)
    gate = made.stability[model.cuts[-1]]
    return EdgeBundle.open(folder / "edge.bt"), CloudBundle.open(folder / "cloud.bt"), gate


class _Parted(nn.Module):
    """The channels of an image in several tensors."""

    def __init__(self, form: Form) -> None:
        super().__init__()
        self.channels = [shape[0] for shape in form.shapes]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.channels, 1)


class _Flattened(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *given: Tensor) -> Tensor:
        logits: Tensor = self.inner(*given)
        return logits.flatten(1)


def _owners(count: int) -> Iterable[Checked]:
    done, seed = 0, 20_000
    while done < count:
        seed += 1
        network = random_network(seed, images=True)
        if network.logits(network.inputs[:1]).shape[1] < 2:
            continue  # a model has two classes or more
        done += 1
        try:
            with tempfile.TemporaryDirectory() as folder:
                _, cloud, found = owners_pair(network, Path(folder))
            checked = check(network, cloud.programs[max(cloud.programs)], seed)
            checked = replace(checked, escapes=found.verdict is Verdict.ESCAPES)
        except BlindtailError as error:
            checked = Checked(str(error), np.zeros(0))
        yield _at(seed, network, checked)
        _progress("owners", done, count)


def _bounded(what: str, found: list[Checked], loosest: float | None = None) -> list[Row]:
    faults = [checked.fault for checked in found if checked.fault]
    ratios = np.concatenate([checked.ratios for checked in found])
    if not len(ratios):
        raise ModelError(f"{what}: no network ran: {faults[0]}")
    told = "; ".join(faults[:3])
    made = [
        row(f"{what}: networks that fail", len(faults), "networks", target=0, n=len(found), note=told),
        row(f"{what}: largest error over its bound", float(ratios.max()), "1", target=1, n=len(ratios)),
    ]
    if loosest is not None:
        median = float(1 / np.median(ratios))
        made.append(row(f"{what}: median of bound over error", median, "1", target=loosest, n=len(ratios)))
    return made


def _at(seed: int, network: RandomNetwork, checked: Checked) -> Checked:
    """A fault says which network it is of."""
    return replace(checked, fault=checked.fault and f"{_told(seed, network)}: {checked.fault}")


def _told(seed: int, network: RandomNetwork) -> str:
    shapes = " and ".join(" x ".join(map(str, shape)) for shape in network.given.shapes)
    return f"seed {seed}, input {shapes}, {network.levels} levels"


def _progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total} ", end="" if done < total else "\n", file=sys.stderr, flush=True)
