"""A tail cut out of a network, as it is or with its rewrites made, and what it costs encrypted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer, Polynomial
from blindtail.he.layers import Quadratic as FoldedQuadratic
from blindtail.he.params import MAX_LOG2_Q_128
from blindtail.he.program import Program
from blindtail.he.sparse import entries
from blindtail.models.network import Network, Outcome
from blindtail.models.rulings import Effect
from blindtail.progress import Progress, Span

#: The backend whose cost model predicts seconds.
PREDICT_FOR = "native"
#: A tail is planned without being asked for by name up to so many multiplications and values held.
MOST_FOLDING_MACS, MOST_FOLDING_VALUES = 4e10, 6e7
LESS_FOR_OTHERS = 0.05
#: Where that is too much: as if its maps were dense, which needs no folding, up to so many entries of them.
MOST_DENSE_ENTRIES = 3e7
DENSE = "about the most it can cost: as if its layers were dense; --cut plans it in full"
#: By name, up to so many values (8 bytes each).
MOST_NAMED_VALUES = 5e8


@dataclass(frozen=True)
class Plan:
    """What an encrypted tail costs: a compiled program's numbers, before any key exists."""

    depth: int  # levels consumed
    ring_degree: int  # N
    ring_levels: int  # the most that this ring holds at 128 bits
    log2_key_modulus: float
    security_bound_log2: int  # the largest log2 of a key modulus that is 128-bit secure for N
    predicted_s: float  # one evaluation on the reference core
    uplink_bytes: int
    reply_bytes: int
    key_bytes: int  # evaluation keys, uploaded once
    evaluation_keys: int
    rotations: int
    own_weights: bool  # False: compiled with the sizes of the layers and weights brought to unit outputs
    dense: bool = False  # about the most it can be: as if each map had no zeros

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "predicted_for": PREDICT_FOR}


def levels_held(ring_degree: int) -> int:
    """The most levels that a ring holds at 128 bits: primes have 30 bits, one is special, one stays."""
    return MAX_LOG2_Q_128[ring_degree] // 30 - 2


def tail_module(network: Network, cut: fx.Node, rewrites: Outcome | None = None) -> fx.GraphModule:
    """What follows a cut, as a module that takes the activation there; weights are shared.

    rewrites  the walk whose rewrites are made on the way
    """
    return _extract(network, [cut], network.output, rewrites)


def head_module(network: Network, cut: fx.Node) -> fx.GraphModule:
    """What comes before a cut, the activation there being its output; weights are shared."""
    return _extract(network, network.inputs, cut, None)


def _extract(
    network: Network, sources: Sequence[fx.Node], result: fx.Node, rewrites: Outcome | None
) -> fx.GraphModule:
    graph, targets = fx.Graph(), dict[str, Any]()
    env: dict[fx.Node, Any] = {}
    for source in sources:
        env[source] = graph.placeholder(source.name if source.op == "placeholder" else "activation")
    needed = _needed(result, set(sources))
    for node in network.nodes:
        if node not in needed or node in env:
            continue
        if rewrites is not None and node in rewrites.rewritten:
            rewrite = network.rulings[node].rewrite
            assert rewrite is not None
            name = f"rewritten_{node.name}"
            targets[name] = rewrite.build().eval()
            first = next(n for n in node.all_input_nodes if n in network.live)
            env[node] = graph.call_module(name, (env[first],))
        elif is_number(node.meta["value"]):
            env[node] = number(graph, env[sources[0]], node.meta["value"], node.meta["third"])
        else:
            missing = [n for n in node.all_input_nodes if n not in env]
            if missing:
                raise ModelError("its tail needs a constant that is made from an activation before the cut")
            env[node] = graph.node_copy(node, lambda n: env[n])
            if node.op == "call_module":
                targets[str(node.target)] = network.module(node)
            elif node.op == "get_attr":
                value: Any = network.root
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                targets[str(node.target)] = value
    graph.output(env[result])
    return fx.GraphModule(targets, graph)


def _needed(result: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    found, waiting = {result}, [result]
    while waiting:
        node = waiting.pop()
        if node in stop or is_number(node.meta["value"]):
            continue
        for source in node.all_input_nodes:
            if source not in found:
                found.add(source)
                waiting.append(source)
    return found


def is_number(value: Any) -> bool:
    """Numbers and tuples of them, which come from shapes; a tensor's shape stands for the tensor."""
    if isinstance(value, torch.Size):
        return False
    return not isinstance(value, tuple) or all(is_number(v) for v in value)


def number(graph: fx.Graph, source: fx.Node, two: Any, three: Any) -> Any:
    """A number with two images and with three: constant, or a multiple of the batch."""
    if isinstance(two, tuple):
        return tuple(number(graph, source, a, b) for a, b in zip(two, three, strict=True))
    if two == three or not isinstance(two, int):
        return two
    batch = graph.call_method("size", (source, 0))
    each = three - two
    return batch if each == 1 else graph.call_function(_times, (batch, each))


def _times(batch: int, each: int) -> int:
    return batch * each


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the activations at cuts, by node name."""

    def __init__(self, root: fx.GraphModule, cuts: set[str]) -> None:
        super().__init__(root)
        self.cuts, self.kept = cuts, dict[str, Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.cuts and not result.is_complex():
            self.kept[n.name] = result.flatten(1).clone() if result.dim() > 1 else result[:, None].clone()
        return result


@torch.no_grad()
def activations(
    network: Network, cuts: Sequence[fx.Node], inputs: Sequence[Tensor]
) -> dict[fx.Node, NDArray[np.float64]]:
    """Activations (n, features) at cuts for inputs (n, ...); those that are not finite are left out."""
    root = fx.GraphModule(network.root, network.traced.graph)
    found: dict[fx.Node, list[Tensor]] = {cut: [] for cut in cuts}
    try:
        for i in range(0, len(inputs[0]), 2):
            recorder = _Recorder(root, {cut.name for cut in cuts})
            batch = [x[i : i + 2] for x in inputs]
            if len(batch[0]) < 2:  # a graph may rest on two images
                batch = [torch.cat([x, x]) for x in batch]
            recorder.run(*batch)
            for cut in cuts:
                if cut.name in recorder.kept:
                    found[cut].append(recorder.kept[cut.name])
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError):
        return {}
    joined = {cut: torch.cat(parts).double().numpy() for cut, parts in found.items() if parts}
    return {cut: values for cut, values in joined.items() if np.isfinite(values).all()}


def too_large(network: Network, cut: fx.Node, walk: Outcome, named: bool) -> str:
    """Why folding a tail would take too long or too much memory here, or "".

    Less is spent on a cut where a later one is plainly better.
    """
    share = 1.0 if network.natural(cut) else LESS_FOR_OTHERS
    macs = values = 0.0
    width, largest = float(network.width(cut)), float(network.width(cut))
    for node in network.after(cut):
        if not isinstance(node.meta["value"], torch.Size):
            continue
        largest = max(largest, float(network.width(node)))
        macs += (width + 1) * _macs(network, node)
        values = max(values, (width + 1) * largest)
        effect = network.rulings[node].effect
        if effect is Effect.SQUARE or node in walk.rewritten:
            width = largest = float(network.width(node))
    if values > MOST_NAMED_VALUES:
        return f"not planned: folding its layers would hold {8 * values / 1e9:.0f} GB"
    if not named and (macs > share * MOST_FOLDING_MACS or values > share * MOST_FOLDING_VALUES):
        return (
            f"not planned: folding takes {macs / 1e9:.1f} billion multiplications and "
            f"{8 * values / 1e9:.2f} GB; ask for it by name (--cut)"
        )
    return ""


def _macs(network: Network, node: fx.Node) -> float:
    """Multiplications of one image: of a matrix or a kernel for each output, else one each."""
    module = network.module(node)
    weight = getattr(module, "weight", None)
    each = 1.0
    if isinstance(weight, Tensor) and weight.dim() > 1:
        each = weight[0].numel()
    else:
        for source in node.all_input_nodes:
            shape = source.meta["value"]
            if source.op == "get_attr" and isinstance(shape, torch.Size) and len(shape) > 1:
                each = max(each, math.prod(shape) / max(shape[0], 1))
    return network.width(node) * each


def plan(
    tail: nn.Module,
    shape: tuple[int, ...],
    values: NDArray[np.float64],
    *,
    own_weights: bool,
    progress: Progress | Span | None = None,
) -> tuple[Plan, str]:
    """Compile a tail and read off its costs; and what is wrong with its weights' range, or "".

    own_weights  compile them as they are, and with unit outputs only where that fails.
    Costs do not depend on weights, but for a few bytes of the reply.

    Raises `ModelError` when the tail cannot be folded or fits no ring.
    """
    whole = Span.of(progress)
    folding, compiling = whole.parts(1, 3)
    with np.errstate(all="ignore"):  # weights out of range are told of, not warned about
        return whole.ended(_plan(fold_tail(tail, shape, folding), values, own_weights, compiling))


def _plan(
    layers: Sequence[Layer], values: NDArray[np.float64], own_weights: bool, span: Span
) -> tuple[Plan, str]:
    trouble = ""
    if own_weights:
        try:
            return _read(compile_tail(layers, values, progress=span), own_weights=True), ""
        except ModelError as error:
            trouble = str(error)
    x = values / max(float(np.abs(values).max()), 1e-30)
    program = compile_tail(_unit(layers, x), x, progress=span)
    return _read(program, own_weights=False), trouble


def dense_plan(widths: Sequence[int], outputs: int) -> Plan:
    """A plan for dense maps of these sizes, squares between them: with zeros they cost about that at most.

    Raises `ModelError` when it fits no ring.
    """
    rng, layers = np.random.default_rng(0), list[Layer]()
    for i, (inside, outside) in enumerate(itertools.pairwise([*widths, outputs])):
        if i:
            zeros = np.zeros(inside)
            layers.append(FoldedQuadratic(np.ones(inside), zeros, zeros, f"square{i}"))
        layers.append(Affine(rng.uniform(0.5, 1.0, (outside, inside)), np.zeros(outside), f"map{i}"))
    values = np.abs(rng.standard_normal((8, widths[0])))
    with np.errstate(all="ignore"):
        program = compile_tail(_unit(layers, values), values)
    return replace(_read(program, own_weights=False), dense=True)


def _read(program: Program, *, own_weights: bool) -> Plan:
    spec = program.spec
    n = spec.parameters.ring_degree
    return Plan(
        depth=program.depth,
        ring_degree=n,
        ring_levels=levels_held(n),
        log2_key_modulus=round(spec.parameters.log2_key_modulus, 2),
        security_bound_log2=MAX_LOG2_Q_128[n],
        predicted_s=program.predicted_s(PREDICT_FOR),
        uplink_bytes=spec.uplink_bytes,
        reply_bytes=spec.reply_bytes,
        key_bytes=spec.key_bytes,
        evaluation_keys=len(spec.keys),
        rotations=len(program.rotations),
        own_weights=own_weights,
    )


def _unit(layers: Sequence[Layer], values: NDArray[np.float64]) -> list[Layer]:
    """The same sizes and zeros, each map scaled so that its largest output is 1.

    Quadratics become plain squares; other polynomials are scaled to stay below 1.
    """
    held, made, out = [values], list[Layer](), values
    plain: list[Layer] = []
    for layer in layers:
        if isinstance(layer, FoldedQuadratic):
            one = np.ones_like(layer.a)
            layer = FoldedQuadratic(one, 0 * one, 0 * one, layer.name)
        elif isinstance(layer, Polynomial):
            size = np.abs(layer.coefficients).sum(axis=0)
            layer = replace(layer, coefficients=layer.coefficients / np.maximum(size, 1e-30))
        plain.append(layer)
    for layer in plain:
        if not isinstance(layer, Affine):
            made.append(layer)
            held.append(layer(out))
            continue
        weights = (layer.weight, *(skip.weight for skip in layer.skips))
        tops = [float(np.abs(entries(weight)).max(initial=0)) for weight in weights]
        top = max(*tops, 1e-30)
        unit = replace(layer, bias=np.zeros_like(layer.bias)).times(1 / top)
        out = unit(held[-1], held[:-1])
        largest = max(float(np.abs(out).max()), 1e-30)
        made.append(unit.times(1 / largest))
        out = out / largest
    return made


__all__ = [
    "Plan",
    "activations",
    "dense_plan",
    "head_module",
    "is_number",
    "levels_held",
    "number",
    "plan",
    "tail_module",
    "too_large",
]
