"""`lint`: what of a PyTorch network can run encrypted, why the rest cannot, and where to cut.

    report = lint(net, (3, 32, 32))
    for finding in report.findings:
        print(finding.layer, finding.verdict, finding.reason, finding.rewrite)
    for cut in report.cuts:
        print(cut.name, cut.verdict, cut.depth, cut.plan)
    head, tail = split(net, (3, 32, 32), after="features.8")

A tail is everything after a cut. It runs encrypted if it is made of linear layers with polynomials
between them (`blindtail.models.operations` says what counts as which), in a row or with connections
around them, and if the levels it consumes fit a ring at 128-bit security. All problems are found in
one pass.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.he.bases import MAX_WIDTH
from blindtail.models import findings as telling
from blindtail.models.cuts import RANDOM_INPUTS, Cut, draft, planned, something_left
from blindtail.models.findings import Finding
from blindtail.models.network import Network
from blindtail.models.plans import (
    MOST_FOLDING_VALUES,
    MOST_NAMED_VALUES,
    Plan,
    activations,
    head_module,
    tail_module,
    too_large,
)
from blindtail.models.reading import read
from blindtail.models.refresh import Refresh, RefreshCosts, refresh_costs
from blindtail.models.several import MOST_TENSORS, Flat, several
from blindtail.models.tracing import Untraceable, first_line, unwrapped
from blindtail.progress import Progress, Span

Shape = tuple[int, ...]
#: Rows of calibration data that are used.
_CALIBRATION_ROWS = 64


@dataclass(frozen=True)
class LintReport:
    """All of it; immutable, and JSON by `to_json`."""

    network: str
    input_shapes: tuple[Shape, ...]
    findings: tuple[Finding, ...]
    cuts: tuple[Cut, ...]
    calibration: str  # where the activations came from that plans were compiled with

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Findings of what does not run as it is."""
        return tuple(f for f in self.findings if f.verdict != "runs")

    @property
    def whole(self) -> Cut | None:
        """The cut at the input: the whole network encrypted. None where it does not take floats alone."""
        return next((cut for cut in self.cuts if cut.name == "input"), None)

    @property
    def verdict(self) -> str:
        """ "runs": some tail runs as it is; "rewrite": some does after rewrites; "edge": none does."""
        verdicts = {cut.verdict for cut in self.cuts}
        return next((v for v in ("runs", "rewrite") if v in verdicts), "edge")

    def cut(self, name: str) -> Cut:
        """Raises `ModelError` naming the cuts there are."""
        for cut in self.cuts:
            if cut.name == name:
                return cut
        raise ModelError(_no_cut(name, [cut.name for cut in self.cuts]))

    def to_json(self) -> dict[str, Any]:
        return {
            "network": self.network,
            "input_shapes": [list(s) for s in self.input_shapes],
            "verdict": self.verdict,
            "findings": [f.to_json() for f in self.findings],
            "cuts": [cut.to_json() for cut in self.cuts],
            "calibration": self.calibration,
        }


def lint(
    module: nn.Module,
    input_shape: Shape | Sequence[Shape],
    calibration: NDArray[Any] | None = None,
    *,
    cut: str | None = None,
    plans: bool = True,
    progress: Progress | None = None,
) -> LintReport:
    """Read a network: a finding for each layer, and every place where it can be cut.

    module       any `nn.Module`; used in evaluation mode, left unchanged
    input_shape  of one image, without the batch; several for a forward with several inputs: then the
                 cut at the input is that of a tail in which they meet
    calibration  preprocessed inputs (n, *input_shape): plans then use your weights and ranges.
                 Without it inputs are standard normal. Of several inputs (n, features), each
                 flattened, one after the other
    cut          plan this one only, also where it is slow
    plans        False: no costs, only verdicts

    Raises `ModelError` when the network does not run on such inputs, when calibration data does not
    fit, or when there is no such cut. A network that cannot be traced is a finding.
    """
    given, name = _shapes(input_shape), type(module).__name__
    root, shapes = _of_one_tensor(_prepared(module), given)
    data = None if calibration is None else _checked(calibration, shapes)
    try:
        inputs = {batch: _random(root, shapes, batch) for batch in (2, 3)}
    except ModelError as error:
        one = _random(root, shapes, 1)  # raises where it runs on nothing
        found = [telling.one_image(name, error), *telling.not_finite(root), *telling.listed(root, one)]
        return LintReport(name, given, tuple(found), (), "none")
    bad = telling.not_finite(root)
    try:
        network = read(root, inputs[2], inputs[3])
    except Untraceable as error:
        found = [telling.untraceable(name, error), *bad, *telling.listed(root, inputs[2])]
        return LintReport(name, given, tuple(found), (), "none")
    if not network.results or network.output.op == "placeholder":
        found = [*telling.of_network(network), *bad, telling.no_output(name)]
        return LintReport(name, given, tuple(found), (), "none")
    positions = network.positions()
    if cut is not None:
        positions = [_find(network, cut)]
    broken = {finding.layer: finding for finding in bad}
    drafts = [draft(network, node, broken) for node in positions]
    drafts = [d for d in drafts if cut is not None or something_left(network, d.node)]
    samples, source = _samples(network, shapes, data, [d.node for d in drafts if plans and not d.problems])
    made = planned(network, drafts, samples, plans, cut is not None, progress, data is not None)
    findings = [*bad, *telling.of_network(network), *telling.limits(network, made)]
    return LintReport(name, given, tuple(findings), tuple(made), source)


@dataclass(frozen=True)
class RefreshedCut:
    """A candidate where the owner lets the edge decrypt between round trips (`models.refresh`).

    costs  of the tail after it; None where it cannot be, or was not planned, and `note` says why
    """

    name: str
    shape: Shape
    costs: RefreshCosts | None
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        costs = None if self.costs is None else self.costs.to_json()
        return {"name": self.name, "shape": list(self.shape), "costs": costs, "note": self.note}


def lint_refreshed(
    module: nn.Module,
    input_shape: Shape | Sequence[Shape],
    calibration: NDArray[Any] | None = None,
    *,
    cut: str | None = None,
    refresh: Refresh | None = None,
    progress: Progress | None = None,
) -> tuple[RefreshedCut, ...]:
    """What tails cost that are refreshed wherever CKKS cannot go on; arguments as for `lint`.

    THE EDGE SEES THE ACTIVATIONS between round trips: it is the owner's decision. Raises `ModelError`
    when the network does not run on such inputs, cannot be traced, or has no such cut.
    """
    root, shapes = _of_one_tensor(_prepared(module), _shapes(input_shape))
    data = None if calibration is None else _checked(calibration, shapes)
    network = _read(root, shapes, type(module).__name__)
    if cut is None:
        positions = [n for n in network.positions() if network.natural(n) and something_left(network, n)]
    else:
        positions = [_find(network, cut)]
    samples, _ = _samples(network, shapes, data, positions)
    most = MOST_FOLDING_VALUES if cut is None else MOST_NAMED_VALUES
    found, whole = [], Span.of(progress)
    for node, part in whole.over(positions):
        part.at(0.0, network.name(node))
        (own,) = part.parts(1, name=f"{network.name(node)}: ")
        shape, costs, note = tuple(int(n) for n in node.meta["value"][1:]), None, ""
        values = samples.get(node)
        if values is None:
            values = np.random.default_rng(0).standard_normal((RANDOM_INPUTS, network.width(node)))
        try:
            if network.width(node) > MAX_WIDTH:
                raise ModelError(f"too wide: {network.width(node)} values, a tail holds {MAX_WIDTH}")
            with np.errstate(all="ignore"):
                costs = refresh_costs(
                    tail_module(network, node), shape, values, refresh or Refresh(), most, own
                )
        except (ModelError, RuntimeError, MemoryError) as error:
            note = first_line(error)
        found.append(RefreshedCut(network.name(node), shape, costs, note))
    return whole.ended(tuple(found))


def split(module: nn.Module, input_shape: Shape | Sequence[Shape], after: str) -> tuple[nn.Module, nn.Module]:
    """(head, tail) of a network cut after `after`, a name of `LintReport.cuts`; in evaluation mode.

    Parts for `SplitModel.from_parts`: head as a stage, tail in `tails`. Weights are copies. At the
    "input" of a network with several inputs the head gives a tuple of them. Raises
    `ModelError` when there is no such cut.
    """
    shapes, root = _shapes(input_shape), _prepared(module)
    if after == "input" and _of_one_tensor(root, shapes)[0] is not root:
        return _Inputs().eval(), root
    network = _read(root, shapes, type(module).__name__)
    node = _find(network, after)
    return head_module(network, node).eval(), tail_module(network, node).eval()


def rewritten_tail(module: nn.Module, input_shape: Shape | Sequence[Shape], after: str) -> nn.Module:
    """The tail of a network cut after `after` with every rewrite made; new layers are untrained.

    At the input of a network with several inputs it takes (B, features), each flattened, one after the other.
    Raises `ModelError` when there is no such cut, when something no rewrite mends stands in its way, or
    when it is too large to be folded.
    """
    root, shapes = _of_one_tensor(_prepared(module), _shapes(input_shape))
    network = _read(root, shapes, type(module).__name__)
    node = _find(network, after)
    found = draft(network, node, {finding.layer: finding for finding in telling.not_finite(network.root)})
    if found.problems:
        nodes = [problem.node for problem in found.changed.problems[:1] if problem.node in network.rulings]
        advice = "".join(f"; {network.rulings[problem].advice}" for problem in nodes if problem is not None)
        raise ModelError(f"the tail after {after} cannot run encrypted: {found.problems[0]}{advice}")
    if large := too_large(network, node, found.walk, named=True):
        raise ModelError(f"the tail after {after} is {large}: cut later")
    return tail_module(network, node, found.changed).eval()


def _of_one_tensor(root: nn.Module, shapes: tuple[Shape, ...]) -> tuple[nn.Module, tuple[Shape, ...]]:
    """A network with several inputs of floats as one of the flat activation that they make (`several`)."""
    if not 1 < len(shapes) <= MOST_TENSORS or telling.refusal(root, several(shapes).zeros()) is not None:
        return root, shapes
    form = several(shapes)
    return Flat(root, form).eval(), (form.shape,)


def _read(root: nn.Module, shapes: Sequence[Shape], name: str) -> Network:
    """Raises `ModelError`."""
    try:
        return read(root, _random(root, shapes, 2), _random(root, shapes, 3))
    except Untraceable as error:
        raise ModelError(f"{name} cannot be cut: {error.reason} ({error.line})") from error


def _find(network: Network, name: str) -> fx.Node:
    """The cut of this name. Raises `ModelError`."""
    cuts = network.cuts()
    exact = [n for n in cuts if network.name(n) == name] or [n for n in cuts if name in network.known_as(n)]
    if not exact:
        raise ModelError(_no_cut(name, [network.name(n) for n in network.positions()]))
    return exact[-1] if name in exact[-1].meta["ends"] else exact[0]


def _samples(
    network: Network, shapes: Sequence[Shape], data: list[Tensor] | None, cuts: Sequence[fx.Node]
) -> tuple[Mapping[fx.Node, NDArray[np.float64]], str]:
    """Activations at cuts, and how they came about."""
    inputs = data or _random(network.root, shapes, RANDOM_INPUTS)
    fitting = [cut for cut in cuts if network.width(cut) <= MAX_WIDTH]
    found = activations(network, fitting, inputs)
    if data is not None:
        return found, f"{len(inputs[0])} calibration inputs"
    source = f"{RANDOM_INPUTS} standard normal inputs through the network's own head"
    if len(found) < len(fitting):
        source += "; standard normal activations where that gave no finite values"
    return found, source


def _prepared(module: nn.Module) -> nn.Module:
    """A float32 copy in evaluation mode on the processor, out of PyTorch's wrappers."""
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError("this is TorchScript: give the nn.Module that it was made from")
    module = unwrapped(module)
    try:
        root = copy.deepcopy(module).cpu().float().eval()
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"{type(module).__name__} cannot be copied: {first_line(error)}") from error
    alone = type(root).__module__.startswith(("torch.nn", "blindtail.models.layers"))
    return _Alone(root).eval() if alone and not isinstance(root, nn.Sequential) else root


class _Alone(nn.Sequential):
    """One layer as a network, with as many inputs as it takes."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return self[0](*inputs)  # type: ignore[no-any-return]


class _Inputs(nn.Module):
    """A stage that does nothing, for several tensors."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs


def _shapes(given: Shape | Sequence[Shape]) -> tuple[Shape, ...]:
    """One shape or several -> several. Raises `ModelError`."""
    nested = bool(given) and all(isinstance(s, Sequence) for s in given)
    shapes: Any = tuple(tuple(s) for s in given) if nested else (tuple(given),)  # type: ignore[arg-type]
    for shape in shapes:
        if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
            raise ModelError(f"an input shape is one image's, for instance (3, 32, 32), not {shape}")
    return shapes  # type: ignore[no-any-return]


def _checked(calibration: NDArray[Any], shapes: Sequence[Shape]) -> list[Tensor]:
    x = np.asarray(calibration)
    if len(shapes) != 1:
        raise ModelError("calibration data needs a network with one input, or several of floats")
    if x.ndim < 1 or tuple(x.shape[1:]) != shapes[0] or not len(x):
        raise ModelError(
            f"calibration data has shape {x.shape}; this network takes inputs of (n, "
            f"{', '.join(map(str, shapes[0]))}), n of 1 or more, preprocessed as it expects them"
        )
    if x.dtype.kind not in "biuf":
        raise ModelError(f"calibration data holds {x.dtype.name}, not numbers: save an array of floats")
    if not np.isfinite(x).all():
        raise ModelError("calibration data holds NaN or infinity; check the images it was computed from")
    rows = x[:: max(1, len(x) // _CALIBRATION_ROWS)][:_CALIBRATION_ROWS]
    return [torch.from_numpy(np.ascontiguousarray(rows, np.float32))]


def _random(root: nn.Module, shapes: Sequence[Shape], batch: int) -> list[Tensor]:
    """Standard normal inputs, or zeros and ones for a network of whole numbers. Raises `ModelError`."""
    generator = torch.Generator().manual_seed(batch)
    floats = [torch.randn(batch, *shape, generator=generator) for shape in shapes]
    refused = telling.refusal(root, floats)
    if refused is None:
        return floats
    whole = [torch.randint(0, 2, (batch, *shape), generator=generator) for shape in shapes]
    if telling.refusal(root, whole) is None:
        return whole
    raise ModelError(refused)


def _no_cut(name: str, there: Sequence[str]) -> str:
    shown = ", ".join(there[:24]) + (", ..." if len(there) > 24 else "")
    return f"there is no cut after {name!r} where a single activation goes on; there are: {shown}"


__all__ = [
    "Cut",
    "Finding",
    "LintReport",
    "Plan",
    "RefreshedCut",
    "lint",
    "lint_refreshed",
    "rewritten_tail",
    "split",
]
