"""An owner's whole network, read operation by operation: what CKKS makes of each, and where it can be cut.

`Network.follow` walks from a cut to the logits and counts levels. `blindtail.models.reading` makes one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from blindtail.errors import ModelError
from blindtail.he.layers import Affine
from blindtail.he.layers import Polynomial as FoldedPolynomial
from blindtail.he.normal import levels, normalised
from blindtail.he.params import Parameters
from blindtail.models.layers import Polynomial, Quadratic
from blindtail.models.operations import moves_only, name_of, power
from blindtail.models.rulings import Effect, Live, Ruling
from blindtail.models.tracing import Traced, Untraceable


@cache
def most_levels() -> int:
    """The most levels that a program can consume at 128 bits, in the largest ring."""
    levels = 1
    while True:
        try:
            Parameters.create(levels + 1)
        except ModelError:
            return levels
        levels += 1


@dataclass(frozen=True)
class Problem:
    """Why a tail cannot run: the node it lies at, or None for the whole, and the reason."""

    node: fx.Node | None
    text: str


@dataclass
class Outcome:
    """A walk from a cut to the logits."""

    squares: int = 0  # activations
    problems: list[Problem] = field(default_factory=list)
    rewritten: list[fx.Node] = field(default_factory=list)
    #: What the logits do without.
    left_out: list[fx.Node] = field(default_factory=list)
    #: Values per image of the activation at the cut and of every square.
    widths: list[int] = field(default_factory=list)
    levels: dict[fx.Node, int] = field(default_factory=dict)
    #: Levels consumed before an activation's map, by the activation.
    before: dict[fx.Node, int] = field(default_factory=dict)
    #: Levels consumed on the longest way through: one a map, one or more an activation.
    depth: int = 1


@dataclass
class Network:
    """A traced network with a ruling for each node that an activation goes into."""

    root: nn.Module
    traced: Traced
    rulings: dict[fx.Node, Ruling]
    live: set[fx.Node]
    opaque: Mapping[str, Untraceable]
    same_after: int  # nodes from here on are the same whichever way branches on values go
    nodes: list[fx.Node] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.nodes = list(self.traced.graph.nodes)
        self.order = {node: i for i, node in enumerate(self.nodes)}
        found: list[fx.Node] = []
        fx.node.map_arg(self.nodes[-1].args, found.append)
        self.results = [n for n in found if n in self.live and isinstance(n.meta["value"], torch.Size)]
        self.reaching = _ancestors(self.results[:1])
        self._names = self._name_all()

    @property
    def unsteady(self) -> str:
        """How its forward depends on the number of images, or ""."""
        return self.traced.unsteady

    @property
    def plain_output(self) -> bool:
        """Whether it returns one tensor and nothing else."""
        return isinstance(self.nodes[-1].args[0], fx.Node) and len(self.results) == 1

    @property
    def output(self) -> fx.Node:
        return self.results[0]

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.nodes if n.op == "placeholder"]

    def module(self, node: fx.Node) -> nn.Module | None:
        return self.root.get_submodule(str(node.target)) if node.op == "call_module" else None

    def name(self, node: fx.Node) -> str:
        """A cut's name: the outermost module that ends here, the layer, or the function's own name."""
        return self._names[node]

    def _name_all(self) -> dict[fx.Node, str]:
        names: dict[fx.Node, str] = {}
        used: dict[str, int] = {}
        for node in self.nodes:
            ends = [path for path in node.meta["ends"] if path]
            layer = self._layer(node)
            name = "input" if node.op == "placeholder" and len(self.inputs_of(self.nodes)) == 1 else layer
            name = min(ends, key=len) if ends else name
            used[name] = used.get(name, 0) + isinstance(node.meta["value"], torch.Size)
            names[node] = name if used[name] < 2 else f"{name}@{used[name]}"
        return names

    def _layer(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return str(node.target)
        if name_of(node) == "getitem" and isinstance(node.args[0], fx.Node):
            source = node.args[0]
            if source.op == "call_module" and not isinstance(source.meta["value"], torch.Size):
                return str(source.target)  # the first of several results
        module = node.meta["module"]
        return f"{module}.{name_of(node)}" if module else name_of(node)

    @staticmethod
    def inputs_of(nodes: Sequence[fx.Node]) -> list[fx.Node]:
        return [n for n in nodes if n.op == "placeholder"]

    def known_as(self, node: fx.Node) -> set[str]:
        """Every name that --cut may give a cut."""
        return {self.name(node), node.name, *node.meta["ends"]} | (
            {str(node.target)} if node.op == "call_module" else set()
        )

    def width(self, node: fx.Node) -> int:
        """Values of one image."""
        return math.prod(node.meta["value"][1:])

    def cuts(self) -> list[fx.Node]:
        """Nodes after which one tensor alone goes on to the logits, in order; the input included."""
        crossing = {n for n in self.inputs if self._users(n)}
        found = []
        for node in self.nodes:
            if node.op == "output" or node in self.results[:1]:
                break
            crossing = {n for n in crossing if any(self.order[u] > self.order[node] for u in self._users(n))}
            if node in self.live and node in self.reaching and self._users(node):
                crossing.add(node)
                if crossing == {node} and isinstance(node.meta["value"], torch.Size):
                    found.append(node)
        return found

    def _users(self, node: fx.Node) -> list[fx.Node]:
        """Users that take the values of an activation on to the logits."""
        passed = (Effect.SHAPE, Effect.CONSTANT)
        return [
            u
            for u in node.users
            if u.op == "output" or (u in self.reaching and self.rulings[u].effect not in passed)
        ]

    def natural(self, cut: fx.Node) -> bool:
        """Whether a later cut is not plainly better: fewer values, fewer levels, the same weights hidden."""
        users = self._users(cut)
        while len(users) == 1 and users[0].op != "output" and self.moves(users[0]) and self._users(users[0]):
            users = self._users(users[0])
        if cut.op == "placeholder" or len(users) != 1:
            return True
        user = users[0]
        if user.op == "output" or user not in self.live or isinstance(user.meta["value"], tuple) is False:
            return False
        module = self.module(user)
        if module is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            return False
        weights = module is not None and any(True for _ in module.parameters())
        weights = weights or any(n.op == "get_attr" for n in user.all_input_nodes)
        if weights and not isinstance(module, Quadratic | Polynomial):
            return True
        grows = isinstance(user.meta["value"], torch.Size) and self.width(user) > self.width(cut)
        return grows or len(self._users(user)) == 0

    def positions(self) -> list[fx.Node]:
        """Cuts worth a name: not after what only moves values of another one."""
        cuts = [n for n in self.cuts() if keeps_batch(n.meta["value"], n.meta["third"])]
        return [n for n in cuts if not (self.moves(n) and any(s in cuts for s in n.all_input_nodes))]

    def moves(self, node: fx.Node) -> bool:
        """Whether a node changes no value: reshapes, Dropout, Identity."""
        ruling = self.rulings.get(node)
        return ruling is not None and moves_only(node, ruling, self.module(node))

    def after(self, cut: fx.Node) -> Iterator[fx.Node]:
        """Nodes of a tail that are not only about shapes."""
        for node in self.nodes[self.order[cut] + 1 :]:
            if node in self.rulings and self.rulings[node].effect not in (Effect.SHAPE, Effect.CONSTANT):
                yield node

    def follow(self, cut: fx.Node, rewritten: bool) -> Outcome:
        """Walk from a cut to the logits as the compiler will; with every rewrite made, if `rewritten`."""
        walk = Outcome(widths=[self.width(cut)])
        # Of each node: the levels consumed before the values that it is made of, and whether
        # something linear has made a map of them.
        spent, mapped = {cut: 0}, {cut: False}
        last: fx.Node | None = None
        for node in self.after(cut):
            sources = [n for n in node.all_input_nodes if n in spent]
            if not sources or self.only_decides(node):
                continue
            ruling, consumed = self.rulings[node], 0
            if self.unused(node) and (rewritten or ruling.effect is not Effect.REFUSED):
                walk.left_out += [node] if ruling.effect is not Effect.LINEAR else []
                continue
            at, within = max(spent[n] for n in sources), any(mapped[n] for n in sources)
            if ruling.effect is Effect.SQUARE:
                consumed = self.consumed(node)
            elif ruling.effect is not Effect.LINEAR:
                if rewritten and ruling.rewrite is not None and isinstance(node.meta["value"], torch.Size):
                    walk.rewritten.append(node)
                    consumed = max(ruling.rewrite.levels - 1, 0)
                else:
                    text = f"{self.told(node)}: cannot run encrypted, it {ruling.reason}"
                    walk.problems.append(Problem(node, text))
            if consumed:
                walk.squares += 1
                walk.widths.append(self.width(sources[0]))
                walk.levels[node], walk.before[node] = consumed + (not within), at
                spent[node], mapped[node], last = at + 1 + consumed, False, node
                continue
            if ruling.effect is Effect.LINEAR and not within and not self.moves(node):
                walk.levels[node] = 1
            spent[node], mapped[node] = at, within or not self.moves(node)
        walk.depth = spent.get(self.output, 0) + 1
        if last is not None and not mapped.get(self.output, True):
            walk.levels[last] += 1
        if not self.plain_output and not rewritten:
            walk.problems.append(Problem(None, "the network returns more than one tensor of logits"))
        return walk

    def consumed(self, node: fx.Node) -> int:
        """Levels of an activation's own, without its map's."""
        module = self.module(node)
        if isinstance(module, Polynomial):
            c = module.coefficients.detach().double().reshape(len(module.coefficients), -1).numpy()
            one = Affine(np.eye(c.shape[1]), np.zeros(c.shape[1]))
            return normalised([one, FoldedPolynomial(c), one]).activations[0].levels
        if module is None and (degree := self._power(node)):
            return levels(degree, monic=True)
        return 1

    def _power(self, node: fx.Node) -> int:
        args = [Live(a.meta["value"]) if isinstance(a, fx.Node) else a for a in node.args]
        return power(name_of(node), args, node.kwargs)

    def unused(self, node: fx.Node) -> bool:
        """Whether the logits do without a node: what it computes can be left out."""
        return bool(self.results) and node not in self.reaching and name_of(node) != "setitem"

    def only_decides(self, node: fx.Node) -> bool:
        """Whether a node is there for a branch on values alone."""
        return bool(self.traced.decisions) and node not in self.reaching and name_of(node) != "setitem"

    def told(self, node: fx.Node) -> str:
        """A node for people: path or module, kind and line."""
        kind = self.rulings[node].kind if node in self.rulings else "input"
        if node.op == "call_module":
            return f"{node.target} ({kind})"
        where = ", ".join(part for part in (node.meta["module"], node.meta["line"]) if part)
        return f"{kind} [{where}]" if where else kind


def _ancestors(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    found, waiting = set(nodes), list(nodes)
    while waiting:
        for source in waiting.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def keeps_batch(two: Any, three: Any) -> bool:
    if isinstance(two, torch.Size):
        return (
            isinstance(three, torch.Size)
            and len(two) >= 1
            and (two[0], three[0]) == (2, 3)
            and two[1:] == three[1:]
        )
    if isinstance(two, tuple) and isinstance(three, tuple):
        return len(two) == len(three) and all(keeps_batch(a, b) for a, b in zip(two, three, strict=True))
    return True


__all__ = ["Network", "Outcome", "Problem", "keeps_batch", "most_levels"]
