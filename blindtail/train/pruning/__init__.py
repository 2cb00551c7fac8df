"""Pruning of tails for encrypted evaluation: zero diagonals need no product, no rotation and no key.

groups    what is pruned together: tiles, or what a diagonal of the compiled tail covers
policy    how much, by which score
permute   orders of units in which what is left fills few groups
p4e       prune, retrain, permute, prune and expand, retrain
chain     a tail's layers as matrices; masks that stay while it is trained
compiled  pruned tails to programs
owner     all of it for a `SplitModel`
"""

from blindtail.train.pruning.chain import Chain, Masks, chain_of
from blindtail.train.pruning.compiled import Arranged
from blindtail.train.pruning.owner import PrunedTails, Pruning, prune_tails
from blindtail.train.pruning.p4e import Pruned, prune
from blindtail.train.pruning.policy import Policy

__all__ = [
    "Arranged",
    "Chain",
    "Masks",
    "Policy",
    "Pruned",
    "PrunedTails",
    "Pruning",
    "chain_of",
    "prune",
    "prune_tails",
]
