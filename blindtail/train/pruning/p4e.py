"""P4E: prune, retrain, permute, prune almost-zero groups and expand the others, retrain.

Source: Aharoni et al., "HE-PEx: Efficient Machine Learning under Homomorphic Encryption using
Pruning, Permutation and Expansion", arXiv 2207.03384. Their groups are tiles; where groups are
diagonals, `permute.assigned` takes the place of k-means over tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from blindtail.progress import Span
from blindtail.train.pruning.chain import Chain, Masks
from blindtail.train.pruning.groups import BoolArray, FloatArray, Groups, IntArray, kept_counts
from blindtail.train.pruning.permute import (
    Orders,
    almost_zero,
    assigned,
    clustered,
    placed,
    unplaced,
)
from blindtail.train.pruning.policy import Policy, first_masks, random_masks

#: Trains the tail on and calls `Masks.apply` after each step; called once or twice, with a part of the work.
Retrain = Callable[[Masks, Span], None]


@dataclass(frozen=True, eq=False)
class Pruned:
    """A tail's masks after retraining, the orders of its units, and what is left.

    elements     orders of the elements of the folded tail's joints: before the first map, after each
    zero_groups  of each layer, as a part of its groups, in these orders
    left         of each layer's weights, as a part
    """

    masks: Masks
    orders: Orders
    elements: tuple[IntArray, ...]
    zero_groups: tuple[float, ...]
    left: tuple[float, ...]


def prune(
    chain: Chain,
    groups: Sequence[Groups],
    policy: Policy,
    retrain: Retrain,
    span: Span | None = None,
) -> Pruned:
    """Prune the layers of a chain in place. Deterministic by the policy's seed, where `retrain` is.

    groups  of each layer (`blindtail.train.pruning.groups`)
    span    told of each stage (`blindtail.progress`)
    """
    again = policy.method == "p4e"
    first, training, permuting, last = Span.of(span).parts(1, 8, *((1, 8) if again else (0, 0)))
    shares = [policy.share(name) for name in chain.names]
    weights = [layer.matrix() for layer in chain.layers]
    first.at(0.0, "pruning")
    if policy.method == "random":
        kept = random_masks([layer.shape for layer in chain.layers], shares, policy.seed)
    else:
        kept = first_masks(weights, groups, shares, policy)
    masks = _applied(chain, kept)
    training.at(0.0, "retraining")
    retrain(masks, training)
    orders = chain.identity()
    if again:
        permuting.at(0.0, "permuting")
        orders, stay = _permuted(chain, groups, policy, masks)
        masks = _applied(chain, _expanded(chain, groups, orders, stay))
        last.at(0.0, "retraining")
        retrain(masks, last)
    here = [
        placed(m, orders[i + 1], orders[i], side)
        for i, (m, side) in enumerate(zip(masks, chain.sides, strict=True))
    ]
    zero = tuple(float((g.sums(m) == 0).mean()) for g, m in zip(groups, here, strict=True))
    left = tuple(float(m.mean()) for m in masks)
    return Pruned(masks, orders, tuple(chain.elements(orders)), zero, left)


def _applied(chain: Chain, kept: Sequence[BoolArray]) -> Masks:
    masks = Masks(chain, kept)
    masks.apply()
    return masks


def _permuted(
    chain: Chain, groups: Sequence[Groups], policy: Policy, masks: Masks
) -> tuple[Orders, list[BoolArray]]:
    """Orders, and of each layer the groups that stay."""
    wanted = policy.zero_shares(chain.names)
    if wanted is not None:
        return _assigned(chain, groups, policy, kept_counts(groups, wanted))
    orders = clustered(
        masks.kept,
        groups,
        chain.sides,
        chain.identity(),
        chain.free,
        policy.tile,
        policy.threshold,
        policy.iterations,
        policy.rounds,
        policy.seed,
    )
    stay = []
    for i, (kept, group) in enumerate(zip(masks, groups, strict=True)):
        by_place = placed(kept, orders[i + 1], orders[i], chain.sides[i])
        left = ~almost_zero(by_place, group, policy.threshold)
        if not left.any():
            left[np.argmax(group.sums(by_place))] = True
        stay.append(left)
    return orders, stay


def _assigned(
    chain: Chain, groups: Sequence[Groups], policy: Policy, counts: Sequence[int]
) -> tuple[Orders, list[BoolArray]]:
    """The best of `rounds` searches: from the order as it is, and from random ones."""
    energies: list[FloatArray] = []
    for layer in chain.layers:
        energy = layer.matrix() ** 2
        energies.append(energy / max(float(energy.sum()), 1e-300))
    found = [
        assigned(energies, groups, chain.sides, start, chain.free, counts, policy.iterations)
        for start in (
            chain.shuffled(policy.seed * policy.rounds + turn) if turn else chain.identity()
            for turn in range(policy.rounds)
        )
    ]
    orders, stay, _ = max(found, key=lambda one: one[2])
    return orders, stay


def _expanded(
    chain: Chain, groups: Sequence[Groups], orders: Orders, stay: Sequence[BoolArray]
) -> list[BoolArray]:
    """All weights of the groups that stay, those that were pruned before among them."""
    return [
        unplaced(group.places(kept), orders[i + 1], orders[i], chain.sides[i])
        for i, (group, kept) in enumerate(zip(groups, stay, strict=True))
    ]


__all__ = ["Pruned", "Retrain", "prune"]
