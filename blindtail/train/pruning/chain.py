"""The layers of a tail that can be pruned, as matrices, and what of them the compiled tail knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine
from blindtail.he.layers import Layer as Folded
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.train.pruning.groups import BoolArray, FloatArray, Groups, IntArray, diagonals
from blindtail.train.pruning.permute import Orders, Sides, spread

#: Weights of a tail are counted in float32, exact up to here.
_MOST_WEIGHTS = 1 << 24


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's weights as a matrix: (out, in) or, of a convolution, (out channels, in * window)."""

    name: str
    weight: Tensor
    first: int  # number of its first weight, counted through the tail from 1
    step: int  # which map of the folded tail it is, -1 when other layers fold into the same
    probe: FloatArray  # that map, with each entry's weight by number; 0 elsewhere

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight[0].numel()

    def matrix(self) -> FloatArray:
        return np.asarray(self.weight.detach().reshape(self.shape).double().numpy())


@dataclass(frozen=True, eq=False)
class Chain:
    """The layers of a tail in order, with a joint before each and one after the last.

    units  of each joint: as many elements or channels as may change places
    free   whether they may: not where a layer's elements and the compiled map's do not match
    maps   how many affine maps the folded tail has
    """

    layers: tuple[Layer, ...]
    sides: tuple[Sides, ...]
    units: tuple[int, ...]
    free: tuple[bool, ...]
    widths: tuple[int, ...]  # elements of the folded tail's joints, one more than maps

    @property
    def names(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def identity(self) -> Orders:
        return [np.arange(n) for n in self.units]

    def shuffled(self, seed: int) -> Orders:
        """Orders drawn at random, where they are free."""
        rng = np.random.default_rng(seed)
        pairs = zip(self.units, self.free, strict=True)
        return [rng.permutation(n) if free else np.arange(n) for n, free in pairs]

    def elements(self, orders: Orders) -> list[IntArray]:
        """Orders of units -> of the elements of each joint of the folded tail, one more than maps."""
        found = [np.arange(width) for width in self.widths]
        for i, layer in enumerate(self.layers):
            if layer.step >= 0:
                for joint, at in ((i, layer.step), (i + 1, layer.step + 1)):
                    if self.free[joint]:
                        found[at] = spread(orders[joint], self.widths[at] // self.units[joint])
        return found

    def filled(self, folded: Sequence[Folded]) -> list[Folded]:
        """The folded tail with next to nothing in place of zero weights: as if it were not pruned."""
        found: list[Folded] = []
        probes = {layer.step: layer.probe for layer in self.layers}
        for at, layer in enumerate(folded):
            probe = probes.get(at // 2)
            if isinstance(layer, Affine) and probe is not None:
                tiny = 1e-12 * max(float(np.abs(layer.weight).max()), 1e-300)
                layer = replace(
                    layer, weight=np.where((layer.weight == 0) & (probe != 0), tiny, layer.weight)
                )
            found.append(layer)
        return found

    def diagonals(self, program: Program) -> list[Groups]:
        """Groups by the diagonals of a program that was compiled from this tail, unpruned and in this order.

        Raises `ModelError` for a layer that is not one map of its own.
        """
        maps = [op for op in program.ops if isinstance(op, MapOp)]
        found = []
        for layer in self.layers:
            if layer.step < 0:
                raise ModelError(
                    f"tail layer {layer.name}: folds into one map with another layer, so that a diagonal "
                    "holds no single weights of it; prune by tiles, or merge the two layers"
                )
            found.append(diagonals(maps[layer.step], layer.probe, layer.first, layer.shape))
        return found


def chain_of(tail: nn.Module, shape: tuple[int, ...]) -> Chain:
    """The linear layers and convolutions of a tail, in the order in which they stand in it.

    shape  of one image's activation at the cut

    Raises `ModelError` when the tail has none or cannot be folded.
    """
    found = _prunable(tail)
    if not found:
        raise ModelError("this tail has no linear layer or convolution that could be pruned")
    probes, firsts = _numbered(tail, shape)
    last = [first + module.weight.numel() for first, (_, module) in zip(firsts, found, strict=True)]
    layers = []
    for (name, module), first, end in zip(found, firsts, last, strict=True):
        step = _own_step(probes, first, end)
        probe = probes[step] if step >= 0 else np.zeros((0, 0))
        layers.append(Layer(name, module.weight, first, step, probe))
    widths = (probes[0].shape[1], *(probe.shape[0] for probe in probes))
    return _joined(layers, widths)


def _prunable(tail: nn.Module) -> list[tuple[str, nn.Linear | nn.Conv2d]]:
    return [
        (name, module)
        for name, module in tail.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]


def _numbered(tail: nn.Module, shape: tuple[int, ...]) -> tuple[list[FloatArray], list[int]]:
    """Of each folded map the weights' numbers in their places; and each layer's first number.

    0 where a map has no weight, NaN where an entry is made of several.
    """
    probe = copy.deepcopy(tail).eval()
    for norm in probe.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.eps = 0.0
            norm.reset_parameters()  # gains of one, statistics of no effect
    modules = [module for _, module in _prunable(probe)]
    sizes = [module.weight.numel() for module in modules]
    firsts = [1 + sum(sizes[:i]) for i in range(len(sizes))]
    if sum(sizes) >= _MOST_WEIGHTS:
        raise ModelError(f"this tail has more than {_MOST_WEIGHTS:,} weights: cut the network later")
    numbers = np.arange(sum(sizes) + 1)
    shuffled = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(sum(sizes))])

    def folded(values: IntArray) -> list[FloatArray]:
        with torch.no_grad():
            for module, first, size in zip(modules, firsts, sizes, strict=True):
                own = torch.from_numpy(values[first : first + size]).view_as(module.weight)
                module.weight.copy_(own)
                if module.bias is not None:
                    module.bias.zero_()
        steps = [step for step in fold_tail(probe, shape) if isinstance(step, Affine)]
        if any(step.skips for step in steps):
            raise ModelError(
                "a tail with connections around its activations is not pruned: its layers' orders depend on "
                "each other; leave the connections out, or prune nothing"
            )
        return [np.asarray(step.weight, np.float64) for step in steps]

    found = []
    # An entry is a weight times a constant, as pooling has it, or a sum of several; the latter does not
    # follow when numbers are dealt out anew.
    for ones, named, dealt in zip(
        folded(np.ones_like(numbers)), folded(numbers), folded(shuffled), strict=True
    ):
        held = ones != 0
        number = np.rint(np.divide(named, ones, out=np.zeros_like(ones), where=held)).astype(np.int64)
        known = np.clip(number, 0, len(shuffled) - 1)
        close = np.abs(named - known * ones) + np.abs(dealt - shuffled[known] * ones)
        found.append(np.where(close <= 1e-6 * np.abs(ones), known, np.nan))
    return found, firsts


def _own_step(probes: Sequence[FloatArray], first: int, end: int) -> int:
    """The map that holds these numbers and no others; -1 when there is none."""
    for at, probe in enumerate(probes):
        inside = (probe >= first) & (probe < end)
        if inside.any():
            every = len(np.unique(probe[inside])) == end - first
            return at if every and bool((inside | (probe == 0)).all()) else -1
    return -1


def _joined(layers: Sequence[Layer], widths: tuple[int, ...]) -> Chain:
    """Joints: as many units as there are rows before and columns (or channels) after."""
    first = layers[0]
    before = first.weight.shape[1]
    units, free, sides = [before], [_fits(first, before, widths, True)], []
    for i, layer in enumerate(layers):
        columns = layer.shape[1]
        if columns % units[-1]:
            units[-1], free[-1] = layer.weight.shape[1], False
        sides.append(Sides(columns // units[-1]))
        if i and not (layer.step == layers[i - 1].step + 1 and layer.step > 0):
            free[i] = False
        free[i] = free[i] and _fits(layer, units[i], widths, True)
        units.append(layer.shape[0])
        free.append(_fits(layer, layer.shape[0], widths, False))
    for i, layer in enumerate(layers):
        # A joint that is not free keeps its order, whatever its units are called on either side.
        if not free[i]:
            units[i] = units[i] if layer.shape[1] % units[i] == 0 else layer.shape[1]
    return Chain(tuple(layers), tuple(sides), tuple(units), tuple(free), widths)


def _fits(layer: Layer, units: int, widths: tuple[int, ...], columns: bool) -> bool:
    """Whether each entry of the layer's map belongs to the unit that its weight belongs to."""
    if layer.step < 0:
        return False
    width = widths[layer.step if columns else layer.step + 1]
    if width % units:
        return False
    rows, cols = np.nonzero(layer.probe)
    number = layer.probe[rows, cols].astype(np.int64) - layer.first
    if columns:
        block = layer.shape[1] // units
        return bool((number % layer.shape[1] // block == cols // (width // units)).all())
    return bool((number // layer.shape[1] == rows // (width // units)).all())


class Masks:
    """Which weights of a chain stay; the rest is zero, and is kept so while the tail is trained.

    kept  (out, in) of each layer, by weight
    """

    def __init__(self, chain: Chain, kept: Sequence[BoolArray]) -> None:
        self.kept = [np.array(k, bool) for k in kept]
        self._pairs: list[tuple[Tensor, Tensor]] = []
        for layer, mask in zip(chain.layers, self.kept, strict=True):
            if mask.shape != layer.shape:
                raise ModelError(f"a mask of shape {mask.shape} for layer {layer.name}, {layer.shape}")
            pruned = torch.from_numpy(~mask).view(layer.weight.shape)
            self._pairs.append((layer.weight, pruned))

    @torch.no_grad()
    def apply(self) -> None:
        """Set what is pruned to zero: after each step of an optimizer."""
        for weight, pruned in self._pairs:
            weight.masked_fill_(pruned, 0.0)

    def __iter__(self) -> Iterator[BoolArray]:
        return iter(self.kept)


__all__ = ["Chain", "Layer", "Masks", "chain_of"]
