"""From an owner's module to a `Network`: traced with two sizes of a batch, and each operation ruled on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindtail.models.batches import target_name, trace_twice
from blindtail.models.network import Network, keeps_batch
from blindtail.models.operation_names import name_of
from blindtail.models.operations import AT_THE_EDGE, nothing_follows, rule_call, rule_module
from blindtail.models.rulings import Effect, Live, Ruling
from blindtail.models.tracing import Traced, Untraceable, trace

#: Branches on values that are tried the other way.
_MOST_FLIPS = 4
_KEEP_FIRST = "keep the batch as dimension 0: flatten(1), no permute or reshape that moves it"


def read(root: nn.Module, two: Sequence[Tensor], three: Sequence[Tensor]) -> Network:
    """Trace `root` (evaluation mode, given up to this) on batches of two and of three images, and rule.

    Modules whose forward cannot be traced are taken whole. Raises `Untraceable` when it is the network's own.
    """
    opaque: dict[str, Untraceable] = {}
    lenient = {""}
    while True:
        try:
            options: dict[str, Any] = {"opaque": frozenset(opaque), "lenient": frozenset(lenient)}
            traced = trace_twice(root, two, three, **options)
        except Untraceable as error:
            if not error.module or error.module in opaque:
                raise
            opaque[error.module] = error
            continue
        alone = {
            str(n.target) for n in traced.graph.nodes if n.op not in ("placeholder", "output", "get_attr")
        }
        # A wrapper around a module that branches on values: look into it, as into the network itself.
        if len(alone) == 1 and (only := next(iter(alone))) in opaque and opaque[only].kind == "values":
            del opaque[only]
            lenient.add(only)
            continue
        break
    rulings, live = _rule(root, traced, opaque)
    same = _same_after(root, traced, two, options)
    return Network(root, traced, rulings, live, opaque, same)


def _same_after(root: nn.Module, traced: Traced, two: Sequence[Tensor], options: Mapping[str, Any]) -> int:
    """The node from which on all branches on values have ended: tried the other way, the rest is the same."""
    if not traced.decisions:
        return 0
    nodes, same = list(traced.graph.nodes), 0
    first = list(trace(root, two, outcomes=[d.outcome for d in traced.decisions], **options).graph.nodes)
    inserted = len(nodes) - len(first)  # questions for the batch, all but the last of them before any branch
    for index, decision in enumerate(traced.decisions[:_MOST_FLIPS]):
        same = max(same, decision.after + inserted)
        outcomes = [d.outcome for d in traced.decisions[:index]] + [not decision.outcome]
        try:
            other = list(trace(root, two, outcomes=outcomes, **options).graph.nodes)
        except Untraceable as error:
            if isinstance(error.__cause__, AssertionError | ValueError):
                continue  # a guard: the other way there is no answer at all
            return len(nodes)
        equal = 0
        for a, b in zip(reversed(first), reversed(other), strict=False):
            if (a.op, target_name(a)) != (b.op, target_name(b)) or a.meta["value"] != b.meta["value"]:
                break
            equal += 1
        same = max(same, len(nodes) - equal)
    return same if len(traced.decisions) <= _MOST_FLIPS else len(nodes)


def _rule(
    root: nn.Module, traced: Traced, opaque: Mapping[str, Untraceable]
) -> tuple[dict[fx.Node, Ruling], set[fx.Node]]:
    rulings: dict[fx.Node, Ruling] = {}
    live: set[fx.Node] = set()
    operands: dict[fx.Node, Any] = {}
    for node in traced.graph.nodes:
        value = node.meta["value"]
        if node.op in ("output", "get_attr"):
            operands[node] = value
            continue
        if node.op == "placeholder":
            live.add(node)
            operands[node] = Live(value)
            continue
        args = fx.node.map_arg(node.args, operands.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, operands.__getitem__)
        last = nothing_follows(node, root)
        if str(node.target) in opaque and node.op == "call_module":
            ruling = _opaque(root.get_submodule(str(node.target)), opaque[str(node.target)])
        elif node.op == "call_module":
            ruling = rule_module(root.get_submodule(str(node.target)), (*args, *kwargs.values()), last)
        else:
            ruling = rule_call(node, args, kwargs, last)
        sources = [n for n in node.all_input_nodes if n in live]
        moved = any(not keeps_batch(n.meta["value"], n.meta["third"]) for n in sources)
        if moved and name_of(node) == "getitem":
            ruling = Ruling(Effect.LINEAR, ruling.kind)  # what moved the batch is told already
        kept = keeps_batch(value, node.meta["third"])
        if ruling.effect in (Effect.LINEAR, Effect.SQUARE) and not kept and not moved:
            reason = "does not keep the images of a batch apart in dimension 0"
            ruling = Ruling(Effect.REFUSED, ruling.kind, reason, _KEEP_FIRST)
        rulings[node] = ruling
        alive = ruling.effect not in (Effect.SHAPE, Effect.CONSTANT) and _tensors(value)
        operands[node] = _operand(value) if alive else value
        if alive:
            live.add(node)
    return rulings, live


def _opaque(module: nn.Module, error: Untraceable) -> Ruling:
    kind, at = type(module).__name__, f" ({error.line})" if error.line else ""
    if error.kind == "values":
        reason = f"branches on the values of an activation{at}"
        return Ruling(Effect.REFUSED, kind, reason, AT_THE_EDGE)
    if error.kind == "list":
        reason = f"calls a module that it does not own{at}"
        advice = (
            "keep layers in nn.ModuleList, nn.ModuleDict or as attributes, not in a list, dict or function"
        )
        return Ruling(Effect.REFUSED, kind, reason, advice, code="self.layers = nn.ModuleList(layers)")
    reason = f"cannot be traced{at}: {error.reason}"
    return Ruling(Effect.REFUSED, kind, reason, f"write it as a plain chain of layers, or {AT_THE_EDGE}")


def _tensors(value: Any) -> bool:
    return isinstance(value, torch.Size) or (isinstance(value, tuple) and any(_tensors(v) for v in value))


def _operand(value: Any) -> Any:
    if isinstance(value, torch.Size):
        return Live(value)
    return tuple(_operand(v) for v in value) if isinstance(value, tuple) else value


__all__ = ["read"]
