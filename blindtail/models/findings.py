"""What `lint` says of each layer: a verdict, the reason, and a rewrite to paste."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from blindtail.he.bases import MAX_WIDTH
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.network import Network, Outcome, most_levels
from blindtail.models.operations import AT_THE_EDGE, NOT_KNOWN, name_of, rule_module
from blindtail.models.rulings import Effect, Live, Ruling
from blindtail.models.several import kind_of
from blindtail.models.tracing import Untraceable, first_line

if TYPE_CHECKING:
    from blindtail.models.lint import Cut

_PLAIN = "write it as a plain chain of layers, for instance nn.Sequential, with fixed shapes"


@dataclass(frozen=True)
class Finding:
    """The verdict on one layer.

    layer    dotted path, or "path.function" for a function; "output" for what the network returns
    kind     "ReLU", "F.relu", "x + y", ...
    verdict  "runs", "rewrite" (to something that runs), "edge" (stays before the cut) or "unknown"
    reason   why it does not run; "" where it does
    rewrite  Python to paste where there is some, else what to do
    advice   what else there is to do
    levels   consumed in a tail, after the rewrite; layers that fold into a map share its one
    calls    how often the forward calls it
    line     "file.py:12" of a function, or ""
    """

    layer: str
    kind: str
    verdict: str
    reason: str = ""
    rewrite: str = ""
    levels: int = 0
    calls: int = 1
    line: str = ""
    advice: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def of_network(network: Network) -> list[Finding]:
    """A finding for each layer and function, in the order they run, then skips and the output."""
    walk = _from_inputs(network)
    found: dict[tuple[str, str, str], Finding] = {}
    for node in network.nodes:
        ruling = network.rulings.get(node)
        if ruling is None or ruling.effect in (Effect.CONSTANT, Effect.SHAPE):
            continue
        if node.op != "call_module" and ruling.effect is Effect.LINEAR:
            if not network.moves(node):
                _add(found, _runs(network, node, ruling, walk))
            continue
        if network.only_decides(node):
            continue
        if network.unused(node):
            if ruling.effect is not Effect.LINEAR and network.plain_output:
                reason, rewrite = "its result is not used", "leave the call out"
                _add(
                    found,
                    Finding(place(network, node), ruling.kind, "rewrite", reason, rewrite, line=_line(node)),
                )
            continue
        if ruling.effect is Effect.REFUSED:
            _add(found, _refused(network, node, ruling, walk))
        else:
            _add(found, _runs(network, node, ruling, walk))
    findings = list(found.values())
    findings += _branches(network)
    if not network.plain_output and network.results:
        findings.append(_output(network))
    if network.unsteady:
        reason = network.unsteady
        findings.append(
            Finding(
                "forward",
                kind_of(network.root),
                "rewrite",
                reason,
                "leave the batch alone: x.flatten(1), x.shape[1:]",
            )
        )
    return findings


def _add(found: dict[tuple[str, str, str], Finding], new: Finding) -> None:
    """A layer that is called again is counted, not listed twice."""
    key = (new.layer, new.kind, new.reason)
    old = found.get(key)
    if old is None:
        found[key] = new
    else:
        found[key] = Finding(**{**asdict(old), "calls": old.calls + 1, "levels": old.levels + new.levels})


def _from_inputs(network: Network) -> Outcome:
    """The walk over all of the network, with every rewrite made."""
    first = network.inputs[0]
    if not network.results:
        return Outcome()
    if len(network.inputs) == 1:
        return network.follow(first, rewritten=True)
    cuts = network.cuts()
    return network.follow(cuts[0], rewritten=True) if cuts else Outcome()


def place(network: Network, node: fx.Node) -> str:
    """A layer's path; for a function that of the module it is called in, and its name."""
    if node.op == "call_module":
        return str(node.target)
    module = node.meta["module"]
    return f"{module}.{name_of(node)}" if module else name_of(node)


def _line(node: fx.Node) -> str:
    return "" if node.op == "call_module" else str(node.meta["line"])


def _runs(network: Network, node: fx.Node, ruling: Ruling, walk: Outcome) -> Finding:
    levels = walk.levels.get(node, 0)
    return Finding(place(network, node), ruling.kind, "runs", levels=levels, line=_line(node))


def _refused(network: Network, node: fx.Node, ruling: Ruling, walk: Outcome) -> Finding:
    verdict = "rewrite"
    if ruling.rewrite is None and not ruling.code and AT_THE_EDGE in ruling.advice:
        verdict = "unknown" if NOT_KNOWN in ruling.reason else "edge"
    rewrite = pasted(network.root, ruling, str(node.target) if node.op == "call_module" else None)
    return Finding(
        place(network, node),
        ruling.kind,
        verdict,
        ruling.reason,
        rewrite or ruling.advice,
        walk.levels.get(node, 0),
        line=_line(node),
        advice=ruling.advice if rewrite else "",
    )


def pasted(root: nn.Module, ruling: Ruling, path: str | None) -> str:
    """Python that makes the rewrite of a layer at `path`, or of a function; "" where there is none."""
    if path is not None and ruling.code.endswith("()"):
        return f"{target(root, path)}.{ruling.code}  # after each training step"
    if ruling.rewrite is None:
        return ruling.code
    if path is not None:
        return f"{target(root, path)} = {ruling.rewrite.text}  # was {ruling.kind}"
    name = ruling.rewrite.kind.__name__.lower()
    return (
        f"self.{name} = {ruling.rewrite.text}  # in __init__; call self.{name}(x) in place of {ruling.kind}"
    )


def target(root: nn.Module, path: str) -> str:
    """A dotted path as Python writes it: "features.3.act" -> "self.features[3].act"."""
    text, module = "self", root
    for part in path.split("."):
        if isinstance(module, nn.Sequential | nn.ModuleList):
            text += f"[{part}]"
        elif isinstance(module, nn.ModuleDict):
            text += f'["{part}"]'
        else:
            text += f".{part}"
        module = getattr(module, part)
    return text


def _branches(network: Network) -> list[Finding]:
    found = []
    for line in dict.fromkeys(d.line for d in network.traced.decisions):
        reason = f"its forward branches on the values of an activation ({line})"
        rewrite = "move the branch into the head, before the cut (an early exit: `exits` of SplitModel)"
        found.append(Finding("forward", kind_of(network.root), "edge", reason, rewrite, line=line))
    return found


def _output(network: Network) -> Finding:
    kind = type(network.nodes[-1].args[0]).__name__.removeprefix("immutable_")
    reason = "is more than one tensor; a tail gives logits alone"
    rewrite = f"return logits  # the first tensor of the {kind}, and nothing else"
    return Finding("output", kind, "rewrite", reason, rewrite)


def limits(network: Network, cuts: Sequence[Cut]) -> list[Finding]:
    """Findings about a whole that is too deep or too wide: which layer it begins at, and where to cut."""
    found = []
    walk = _from_inputs(network)
    able = next((cut for cut in cuts if cut.verdict != "edge"), None)
    way_out = f"cut after {able.name}" if able is not None else "make it shallower"
    surprises = [cut for cut in cuts if cut.surprising]
    for text in dict.fromkeys(t for cut in surprises for t in (*cut.problems, cut.note) if t):
        # What the compiler alone could tell: ranges of values, and what this reading takes and it does not.
        layer, _, reason = text.rpartition(": values reach")
        if layer:
            reason, _, way = reason.partition("; ")
            found.append(Finding(layer, "values", "rewrite", f"values reach{reason}", way or way_out))
        else:
            found.append(Finding(surprises[0].name, "tail", "unknown", text, way_out))
    if walk.depth > most_levels():
        beyond = [n for n, at in walk.before.items() if walk.depth - at > most_levels()]
        node = beyond[-1] if beyond else None
        layer = place(network, node) if node is not None else "input"
        kind = network.rulings[node].kind if node is not None else ""
        reason = (
            f"too deep: all of it consumes {walk.depth} levels, the largest 128-bit ring holds "
            f"{most_levels()}; from here on it is too many"
        )
        found.append(Finding(layer, kind, "edge", reason, way_out))
    wide = next((n for n in walk.levels if values_squared(network, n) > MAX_WIDTH), None)
    if wide is not None:
        reason = f"too wide: {values_squared(network, wide)} values, an encrypted tail holds {MAX_WIDTH}"
        found.append(Finding(place(network, wide), network.rulings[wide].kind, "edge", reason, way_out))
    return found


def values_squared(network: Network, node: fx.Node) -> int:
    """Values of one image that go into a square, 0 for what is none."""
    if not _is_square(network, node):
        return 0
    return max(network.width(n) for n in node.all_input_nodes if n in network.live)


def _is_square(network: Network, node: fx.Node) -> bool:
    ruling = network.rulings[node]
    return ruling.effect is Effect.SQUARE or (ruling.rewrite is not None and bool(ruling.rewrite.levels))


def not_finite(root: nn.Module) -> list[Finding]:
    """Layers whose weights or statistics hold NaN or infinity."""
    found = []
    for path, tensor in root.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            owner = path.rpartition(".")[0]
            kind = type(root.get_submodule(owner)).__name__ if owner else kind_of(root)
            reason = f"{path} holds NaN or infinity"
            rewrite = "train it again with a lower rate, or load an earlier checkpoint"
            found.append(Finding(owner or path, kind, "rewrite", reason, rewrite))
    return found


def holds(path: str, broken: str) -> bool:
    """Whether a layer or parameter at `path` is, or is part of, the broken one, or the other way round."""
    return path == broken or path.startswith(f"{broken}.") or broken.startswith(f"{path}.")


def untraceable(name: str, error: Untraceable) -> Finding:
    """The one finding on a network whose own forward no graph describes."""
    at = f" ({error.line})" if error.line else ""
    if error.kind == "list":
        rewrite = (
            "self.layers = nn.ModuleList(layers)  # so that the network owns them, also in its state_dict"
        )
        return Finding(
            "forward", name, "rewrite", f"calls a module that it does not own{at}", rewrite, line=error.line
        )
    reason = f"cannot be traced{at}: {error.reason}"
    return Finding("forward", name, "unknown", reason, _PLAIN, line=error.line)


def one_image(name: str, error: Exception) -> Finding:
    """A network that takes one image and no batch of them."""
    reason = f"takes a batch of one image only: {error}"
    rewrite = "x = x.flatten(1)  # in place of a fixed batch, as in x.view(1, -1); x.shape[0] is the batch"
    return Finding("forward", name, "rewrite", reason, rewrite)


def no_output(name: str) -> Finding:
    reason = "is not one tensor that depends on the input"
    return Finding("output", name, "rewrite", reason, "return logits  # one tensor, and nothing else")


def listed(root: nn.Module, inputs: Sequence[Tensor]) -> list[Finding]:
    """Verdicts on the layers that run, without a graph: for networks that cannot be traced."""
    found: dict[str, Finding] = {}

    def seen(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        given = [Live(tuple(a.shape)) if isinstance(a, Tensor) else a for a in args]
        ruling = rule_module(module, given)
        if path in found or ruling.effect is Effect.CONSTANT:
            return
        if ruling.effect is not Effect.REFUSED:
            found[path] = Finding(path, ruling.kind, "runs")
            return
        verdict = "rewrite" if ruling.rewrite is not None else "edge"
        rewrite = pasted(root, ruling, path)
        found[path] = Finding(
            path,
            ruling.kind,
            verdict,
            ruling.reason,
            rewrite or ruling.advice,
            advice=ruling.advice if rewrite else "",
        )

    with _hooked(root, seen):
        refusal(root, inputs)
    return list(found.values())


@contextmanager
def _hooked(root: nn.Module, seen: Any) -> Iterator[None]:
    handles = []
    for path, module in root.named_modules():
        leaf = isinstance(module, Square | Quadratic | Polynomial) or type(module).__module__.startswith(
            "torch.nn"
        )
        if path and leaf and not isinstance(module, nn.Sequential | nn.ModuleList | nn.ModuleDict):

            def hook(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                seen(path, module, args)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def refusal(root: nn.Module, inputs: Sequence[Tensor]) -> str | None:
    """Why the network does not run on `inputs`, with the layer's name; None where it does."""
    inside: list[str] = []
    handles = []
    for path, module in root.named_modules():

        def before(module: nn.Module, args: Any, path: str = path) -> None:
            inside.append(path)

        def after(module: nn.Module, args: Any, output: Any) -> None:
            inside.pop()

        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            root(*inputs)
        return None
    except Exception as error:
        where = f"layer {inside[-1]}" if inside and inside[-1] else "its forward"
        shapes = " and ".join(str(tuple(x.shape[1:])) for x in inputs)
        return f"the network does not run on an input of shape {shapes}: {where}: {first_line(error)}"
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "Finding",
    "holds",
    "limits",
    "listed",
    "no_output",
    "not_finite",
    "of_network",
    "one_image",
    "refusal",
    "untraceable",
]
