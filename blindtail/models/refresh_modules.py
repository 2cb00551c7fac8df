"""A refreshed tail's segments and interludes as modules, cut out of its traced graph."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.models.plans import is_number, number
from blindtail.models.rounds import Rounds, offsets, shape, width


class _Builder:
    """A graph that computes values of the tail from given ones, as a module of its own."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.graph = rounds, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self.targets: dict[str, Any] = {}
        self._flat: dict[str, fx.Node] = {}
        self._parts: dict[fx.Node, tuple[str, int, int]] = {}

    def offer(self, name: str, nodes: list[fx.Node]) -> None:
        """The flat input `name` holds these values one after the other; it is taken only if asked for."""
        for node, start, end in offsets(nodes):
            self._parts.setdefault(node, (name, start, end))

    def input(self, name: str) -> fx.Node:
        if name not in self._flat:
            last = next(reversed(self._flat.values()), None)
            if last is None:
                first = next(iter(self.graph.nodes), None)
                with self.graph.inserting_before(first) if first is not None else contextlib.nullcontext():
                    self._flat[name] = self.graph.placeholder(name)
            else:
                with self.graph.inserting_after(last):
                    self._flat[name] = self.graph.placeholder(name)
        return self._flat[name]

    @property
    def taken(self) -> tuple[str, ...]:
        return tuple(self._flat)

    def value(self, node: fx.Node) -> fx.Node:
        """A live value: a part of an input, or computed anew from its operands."""
        if node not in self.env:
            part = self._parts.get(node)
            self.env[node] = self._copy(node) if part is None else self._part(node, *part)
        return self.env[node]

    def _part(self, node: fx.Node, name: str, start: int, end: int) -> fx.Node:
        flat = self.input(name)
        piece = self.graph.call_method("narrow", (flat, 1, start, end - start))
        return self.graph.call_method("reshape", (piece, (-1, *shape(node))))

    def _copy(self, node: fx.Node) -> fx.Node:
        network = self.rounds.network
        for source in node.all_input_nodes:
            if source in self.rounds.place:
                self.value(source)
        made = self.graph.node_copy(node, self._operand)
        if node.op == "call_module":
            self.targets[str(node.target)] = network.module(node)
        return made

    def _operand(self, node: fx.Node) -> Any:
        if node in self.rounds.place:
            return self.value(node)
        if is_number(node.meta["value"]):
            size = next(iter(self._flat.values()))
            return number(self.graph, size, node.meta["value"], node.meta["third"])
        if node not in self.env:
            if node.op == "get_attr":
                value: Any = self.rounds.network.root
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                self.targets[str(node.target)] = value
            self.env[node] = self.graph.node_copy(node, self._operand)
        return self.env[node]

    def build(self, nodes: list[fx.Node]) -> fx.GraphModule:
        """Gives these values, flat and one after the other: (B, n)."""
        flat = [self.graph.call_method("reshape", (self.value(n), (-1, width(n)))) for n in nodes]
        self.graph.output(flat[0] if len(flat) == 1 else self.graph.call_function(torch.cat, (flat, 1)))
        module = fx.GraphModule(self.targets, self.graph)
        return module.eval()


def segment_module(rounds: Rounds, k: int) -> fx.GraphModule:
    """(B, inputs) -> (B, outputs) of segment k, weights of its own."""
    builder = _Builder(rounds)
    builder.offer("x", rounds.inputs(k))
    builder.input("x")
    return copy.deepcopy(builder.build(rounds.outputs(k)))


def interlude_module(rounds: Rounds, k: int) -> tuple[nn.Module | None, tuple[str, ...]]:
    """What gives x(k+1), or the logits, from values known after k + 1 round trips; and which it takes."""
    last = k == rounds.segments - 1
    wanted = [rounds.network.output] if last else rounds.inputs(k + 1)
    if last and rounds.outputs(k) == wanted:
        return None, ()
    builder = _Builder(rounds)
    for j in range(k, -1, -1):  # the newest first: a value is read where it is at hand
        builder.offer(f"y{j}", rounds.outputs(j))
        builder.offer(f"x{j}", rounds.inputs(j))
    builder.input(f"y{k}")
    module = builder.build(wanted)
    held = {name: t for name, t in module.state_dict().items() if t.numel() > 1}
    if held:
        raise ModelError(f"the edge would need weights ({', '.join(held)}) between two segments: cut later")
    return module, builder.taken


class Squared(nn.Module):
    """Between two segments of one run."""

    def forward(self, y: Tensor) -> Tensor:
        return y * y


__all__ = ["Squared", "interlude_module", "segment_module"]
