"""Tracing with two sizes of a batch: the batch's own numbers are told from the layers'."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindtail.models.tracing import Traced, Untraceable, attribute, trace

_OTHER_BATCH = "does other things for other numbers of images"


def trace_twice(
    root: nn.Module,
    two: Sequence[Tensor],
    three: Sequence[Tensor],
    *,
    opaque: frozenset[str] = frozenset(),
    lenient: frozenset[str] = frozenset(),
) -> Traced:
    """Trace with batches of two and of three images: numbers that grow with them are asked of the input.

    Raises `Untraceable`.
    """
    traced = trace(root, two, opaque=opaque, lenient=lenient)
    outcomes = [d.outcome for d in traced.decisions]
    nodes = list(traced.graph.nodes)
    for node in nodes:
        node.meta["third"] = _grown(node.meta["value"])
    try:
        others = list(trace(root, three, opaque=opaque, lenient=lenient, outcomes=outcomes).graph.nodes)
    except Untraceable as error:
        traced.unsteady = f"{_OTHER_BATCH} ({error.line or error.reason})"
        return traced
    for a, b in zip(nodes, others, strict=False):
        if (a.op, target_name(a)) != (b.op, target_name(b)):
            traced.unsteady = f"{_OTHER_BATCH} ({a.meta['line'] or b.meta['line'] or a.name})"
            return traced
        a.meta["third"] = b.meta["value"]
        if a.op == "get_attr" and not _same_constant(root, a, b):
            user = next(iter(a.users), a)
            traced.unsteady = (
                f"makes random tensors, or some of the batch's size ({user.meta['line'] or user.name})"
            )
            return traced
        if a.op not in ("placeholder", "output", "get_attr"):
            _ask_for_batch(traced, a, b)
    return traced


def _grown(value: Any) -> Any:
    """A value as it would be with three images, where only its shape tells."""
    if isinstance(value, torch.Size):
        return torch.Size((3, *value[1:])) if value[:1] == (2,) else value
    return tuple(_grown(v) for v in value) if isinstance(value, tuple) else value


def _same_constant(root: nn.Module, a: fx.Node, b: fx.Node) -> bool:
    """Whether two traces made the same tensor: one of the batch's size, or a random one, differs."""
    one, other = attribute(root, str(a.target)), attribute(root, str(b.target))
    return not isinstance(one, Tensor) or (one.shape == other.shape and bool(torch.equal(one, other)))


def target_name(node: fx.Node) -> str:
    """A function's or method's bare name, or a layer's path; constants made on the way have no name."""
    if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
        return "_tensor_constant"
    return str(node.target) if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))


def _ask_for_batch(traced: Traced, node: fx.Node, other: fx.Node) -> None:
    """Replace numbers among a node's arguments that grow with the batch."""
    source = next(n for n in traced.graph.nodes if n.op == "placeholder")

    def asked(two: Any, three: Any) -> Any:
        if isinstance(two, tuple | list) and isinstance(three, tuple | list) and len(two) == len(three):
            return type(two)(asked(a, b) for a, b in zip(two, three, strict=True))
        if type(two) is not int or type(three) is not int or two == three:
            return two
        each = three - two
        if 2 * each != two:
            traced.unsteady = traced.unsteady or f"{_OTHER_BATCH} ({node.meta['line'] or node.name})"
            return two
        with traced.graph.inserting_before(node):
            made = [traced.graph.call_method("size", (source, 0))]
            if each > 1:
                made.append(traced.graph.call_function(operator.mul, (made[0], each)))
        for n, value in zip(made, ((2, 3), (two, three)), strict=False):
            n.meta = {"module": "", "line": "", "ends": [], "value": value[0], "third": value[1]}
        return made[-1]

    node.args = asked(tuple(node.args), tuple(other.args))
    node.kwargs = {k: asked(v, other.kwargs.get(k)) for k, v in node.kwargs.items()}


__all__ = ["target_name", "trace_twice"]
