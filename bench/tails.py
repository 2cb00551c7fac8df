"""Tails by fixed seed, the nets of `bench he`, and a client: what benchmarks, evidence and tests use."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from blindtail.bundle import CloudBundle
from blindtail.he.backends import Evaluator, Keys, open_evaluator, settle
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, FloatArray, Layer, Quadratic
from blindtail.he.objective import Objective
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.secret import Decryptor, Encryptor, SecretKey


def random_layers(widths: Sequence[int], seed: int = 0, plain: bool = True) -> list[Layer]:
    """Dense layers scaled by fan-in with an activation after each but the last.

    plain  squares; otherwise a x^2 + b x + c, coefficients random per element
    """
    rng = np.random.default_rng(seed)
    made: list[Layer] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = rng.normal(size=(outputs, inputs)) / np.sqrt(inputs)
        made.append(Affine(weight, rng.normal(size=outputs) / 8, f"fc{i}"))
        if i == len(widths) - 2:
            break
        a, b, c = np.ones(outputs), np.zeros(outputs), np.zeros(outputs)
        if not plain:
            a = np.where(rng.random(outputs) < 0.5, -1.0, 1.0) * rng.uniform(0.2, 1.0, outputs)
            b, c = rng.normal(size=(2, outputs))
        made.append(Quadratic(a, b, c, f"act{i}"))
    return made


@dataclass(frozen=True)
class Conv:
    """A convolution on square images: weight (out, in, k, k), bias (out,)."""

    weight: FloatArray
    bias: FloatArray
    stride: int
    side: int  # of the image that goes in
    padding: int = 0


@dataclass(frozen=True)
class Net:
    """A tail as people write it, with data: a square follows each part but the last.

    calibration, inputs  activations at the cut, (n, features)
    """

    name: str
    parts: tuple[Conv | Affine, ...]
    calibration: FloatArray
    inputs: FloatArray

    @property
    def layers(self) -> list[Layer]:
        """[Affine, Quadratic, ..., Affine]: convolutions folded into maps."""
        made: list[Layer] = []
        for i, part in enumerate(self.parts):
            step = part if isinstance(part, Affine) else folded(part)
            made.append(step)
            if i < len(self.parts) - 1:
                n = len(step.bias)
                made.append(Quadratic(np.ones(n), np.zeros(n), np.zeros(n), f"square{i}"))
        return made


#: Widths of the fully connected ones; A's and D's first layer is a convolution before them.
WIDTHS = {
    "A": (256, 64, 10),
    "B": (512, 128, 10),
    "C": (784, 128, 128, 10),
    "D": (980, 100, 10),
    "E": (3136, 512, 10),
}
#: Channels, side of a window, stride and padding of the convolutions before, on 28 x 28 pixels.
CONVOLUTIONS = {"A": ((4, 7, 3, 0),), "D": ((5, 2, 2, 0),), "E": ((32, 5, 2, 2), (64, 5, 2, 2))}
#: What plans are chosen for, where it is not the default.
OBJECTIVES = {"E": Objective(at_most={"uplink_bytes": 400_000, "key_bytes": 100_000_000, "error": 1.5e-3})}
DEMO = "demo"
_INPUTS = 20


def nets(names: Sequence[str]) -> Iterator[tuple[Net, Program]]:
    """Nets by name with their compiled programs; `demo` is the bundled model's tail at each cut."""
    for name in names:
        if name == DEMO:
            yield from _demo()
        else:
            net = dense_or_conv(name)
            yield net, compile_tail(net.layers, net.calibration, objective=OBJECTIVES.get(name))


def dense_or_conv(name: str) -> Net:
    """A, B, C, D or E. Raises `KeyError` for another name."""
    parts: list[Conv | Affine] = [p for p in random_layers(WIDTHS[name]) if isinstance(p, Affine)]
    features = WIDTHS[name][0]
    if name in CONVOLUTIONS:
        rng, inputs, width, before = np.random.default_rng(3), 1, 28, []
        for channels, side, stride, padding in CONVOLUTIONS[name]:
            weight = rng.normal(size=(channels, inputs, side, side)) / (side * np.sqrt(inputs))
            before.append(Conv(weight, rng.normal(size=channels) / 8, stride, width, padding))
            inputs, width = channels, (width + 2 * padding - side) // stride + 1
        parts, features = [*before, *parts], 784
    calibration = np.random.default_rng(1).uniform(0, 1, (200, features))
    return Net(name, tuple(parts), calibration, calibration[:_INPUTS])


def _demo() -> Iterator[tuple[Net, Program]]:
    path = Path(__file__).parents[1] / "blindtail/models/zoo/fashion/cloud.bt"
    for cut, program in CloudBundle.open(path).programs.items():
        spec = program.spec
        maps = [Affine(op.weight, op.bias, op.name) for op in program.ops if isinstance(op, MapOp)]
        inputs = np.random.default_rng(2).uniform(0, spec.input_bound / 4, (200, spec.features))
        yield Net(f"{DEMO} (cut {cut})", tuple(maps), inputs, inputs[:_INPUTS]), program


def folded(part: Conv) -> Affine:
    """A convolution as the map that the compiler takes, by the compiler's own front end."""
    import torch
    from torch import nn

    from blindtail.he.frontend import fold_tail

    outputs, inputs, size, _ = part.weight.shape
    layer = nn.Conv2d(inputs, outputs, size, part.stride, part.padding, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(part.weight))
        assert layer.bias is not None
        layer.bias.copy_(torch.from_numpy(part.bias))
    (made,) = fold_tail(nn.Sequential(layer, nn.Flatten()), (inputs, part.side, part.side))
    assert isinstance(made, Affine)
    return made


@dataclass(frozen=True)
class Client:
    """One program with one client's fresh keys, loaded by one or more backends.

    loaded  by the backend's name, in the order asked for; the first is `evaluator` and `keys`
    """

    loaded: Mapping[str, tuple[Evaluator, Keys]]
    encryptor: Encryptor
    decryptor: Decryptor

    @classmethod
    def of(cls, program: Program, *backends: str, threads: int = 1) -> Client:
        """backends: "native", "seal" or "auto", which stands alone when none is named."""
        loaded: dict[str, tuple[Evaluator, Keys]] = {}
        with tempfile.TemporaryDirectory() as folder:
            sent = Path(folder) / "keys"
            secret = SecretKey.generate(program.spec, sent)
            for name in map(settle, backends or ("auto",)):
                evaluator = open_evaluator(name, program, threads)
                prepared = Path(folder) / f"prepared-{name}"
                evaluator.prepare_keys(sent, prepared)
                loaded[name] = evaluator, evaluator.load_keys(prepared)
        return cls(loaded, Encryptor(program.spec, secret), Decryptor(program.spec, secret))

    @property
    def evaluator(self) -> Evaluator:
        return next(iter(self.loaded.values()))[0]

    @property
    def keys(self) -> Keys:
        return next(iter(self.loaded.values()))[1]

    def evaluate(self, backend: str, container: bytes) -> bytes:
        """Container in, container out, on one of the loaded backends."""
        evaluator, keys = self.loaded[backend]
        return evaluator.evaluate(keys, container)
