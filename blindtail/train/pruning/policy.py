"""What to prune, by which score, and how much: the sub-policies of HE-PEx, and the two baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal, get_args

import numpy as np

from blindtail.errors import ConfigError
from blindtail.train.pruning.groups import BoolArray, FloatArray, Groups

Method = Literal["p4e", "magnitude", "random"]
Scope = Literal["local", "global"]
Score = Literal["weight", "min", "max", "avg"]
Kind = Literal["diagonal", "tile"]


@dataclass(frozen=True)
class Policy:
    """How tails are pruned.

    fraction   of weights (or groups, see `score`) that the first pruning removes
    layers     another fraction for some layers, by name in the tail ("2"); 0 leaves one as it is
    method     "p4e": prune, retrain, permute, prune almost-zero groups and expand, retrain (Aharoni et
               al., HE-PEx, arXiv 2207.03384); "magnitude" and "random" are baselines: prune single
               weights, retrain
    groups     "diagonal": what a diagonal of the compiled tail covers; "tile": rectangles
    tile       rows and columns of a tile
    scope      "local": the fraction is each layer's; "global": layers compete
    score      magnitude of each "weight" on its own, or "min", "max" or "avg" of a group's, which is
               then pruned whole
    threshold  a tile becomes zero when at most this part of its weights is left after the permutation
    zero_share of groups that become zero, in place of the threshold; by default `fraction` for
               diagonals, for which few weights in each would free none
    iterations, rounds  of the search for orders, at most
    seed       of everything random

    Raises `ConfigError` for a value out of range.
    """

    fraction: float = 0.9
    layers: Mapping[str, float] = field(default_factory=dict)
    method: Method = "p4e"
    groups: Kind = "diagonal"
    tile: tuple[int, int] = (4, 8)
    scope: Scope = "local"
    score: Score = "weight"
    threshold: float = 0.0625
    zero_share: float | None = None
    iterations: int = 20
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", MappingProxyType(dict(self.layers)))
        shares = {"fraction": self.fraction, "threshold": self.threshold, **self.layers}
        if self.zero_share is not None:
            shares["zero_share"] = self.zero_share
        for name, value in shares.items():
            if not 0.0 <= value < 1.0:
                raise ConfigError(f"pruning: {name} = {value:g} must lie between 0 and 1, 1 left out")
        for name, known in (("method", Method), ("groups", Kind), ("scope", Scope), ("score", Score)):
            if getattr(self, name) not in get_args(known):
                raise ConfigError(f"pruning: {name} is one of {', '.join(get_args(known))}")
        if self.iterations < 1 or self.rounds < 1 or self.seed < 0 or min(self.tile) < 1:
            raise ConfigError(
                "pruning needs tiles of a place, one iteration, one round and a seed of 0 or more"
            )
        if self.scope == "global" and self.layers:
            raise ConfigError("pruning: with scope = global the fraction is shared: name no layers")

    @classmethod
    def parse(cls, told: Sequence[str], **others: object) -> Policy:
        """From texts "0.9" (all layers) and "LAYER=0.9"; with layers alone, others are left as they are.

        Raises `ConfigError` for what is no number.
        """
        fraction: float | None = None
        layers: dict[str, float] = {}
        for text in told:
            name, equals, value = text.rpartition("=")
            try:
                number = float(value)
            except ValueError:
                raise ConfigError(f"--prune {text}: write a fraction, 0.9, or LAYER=0.9") from None
            if equals:
                layers[name] = number
            else:
                fraction = number
        if fraction is None:
            fraction = 0.0 if layers else 0.9
        return cls(fraction=fraction, layers=layers, **others)  # type: ignore[arg-type]

    def share(self, layer: str) -> float:
        return self.layers.get(layer, self.fraction)

    def zero_shares(self, names: Sequence[str]) -> list[float] | None:
        """Share of groups of each layer that become zero; None where the threshold decides."""
        if self.zero_share is not None:
            return [self.zero_share if self.share(name) else 0.0 for name in names]
        return [self.share(name) for name in names] if self.groups == "diagonal" else None


def random_masks(shapes: Sequence[tuple[int, int]], shares: Sequence[float], seed: int) -> list[BoolArray]:
    """Weights that stay, (out, in) of each layer, drawn evenly: exactly the share of each is pruned."""
    rng = np.random.default_rng(seed)
    found = []
    for shape, share in zip(shapes, shares, strict=True):
        kept = np.ones(shape[0] * shape[1], bool)
        kept[rng.permutation(kept.size)[: round(share * kept.size)]] = False
        found.append(kept.reshape(shape))
    return found


def scores(weight: FloatArray, groups: Groups, score: Score) -> FloatArray:
    """(out, in) by place: the magnitude of each weight, or its group's least, largest or mean one."""
    size = np.abs(weight)
    if score == "weight":
        return size
    found = {
        "min": lambda: -groups.largest(-size),
        "max": lambda: groups.largest(size),
        "avg": lambda: groups.sums(size) / np.maximum(groups.sizes, 1),
    }[score]()
    return np.asarray(found[groups.index], np.float64)


def first_masks(
    weights: Sequence[FloatArray], groups: Sequence[Groups], shares: Sequence[float], policy: Policy
) -> list[BoolArray]:
    """Weights that stay, (out, in) by place of each layer: all but the share with the lowest scores.

    Of equal scores that of the earlier place goes first; a group that is pruned goes whole.
    """
    found = [scores(w, g, policy.score) for w, g in zip(weights, groups, strict=True)]
    if policy.scope == "local":
        return [_highest(s, g, share, policy) for s, g, share in zip(found, groups, shares, strict=True)]
    if policy.score == "weight":
        flat = np.concatenate([s.reshape(-1) for s in found])
        kept = np.ones(flat.size, bool)
        kept[np.argsort(flat, kind="stable")[: round(policy.fraction * flat.size)]] = False
        parts = np.split(kept, np.cumsum([s.size for s in found])[:-1])
        return [part.reshape(s.shape) for part, s in zip(parts, found, strict=True)]
    each = [_by_group(s, g) for s, g in zip(found, groups, strict=True)]
    every = np.concatenate(each)
    stays = np.ones(every.size, bool)
    stays[np.argsort(every, kind="stable")[: round(policy.fraction * every.size)]] = False
    parts = np.split(stays, np.cumsum([len(e) for e in each])[:-1])
    return [g.places(part) for g, part in zip(groups, parts, strict=True)]


def _highest(by_place: FloatArray, groups: Groups, share: float, policy: Policy) -> BoolArray:
    values = by_place.reshape(-1) if policy.score == "weight" else _by_group(by_place, groups)
    stays = np.ones(values.size, bool)
    stays[np.argsort(values, kind="stable")[: round(share * values.size)]] = False
    return stays.reshape(by_place.shape) if policy.score == "weight" else groups.places(stays)


def _by_group(by_place: FloatArray, groups: Groups) -> FloatArray:
    values = np.zeros(groups.count)
    values[groups.index.reshape(-1)] = by_place.reshape(-1)
    return values


__all__ = ["Kind", "Method", "Policy", "Scope", "Score", "first_masks", "random_masks", "scores"]
