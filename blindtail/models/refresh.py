"""Refreshed tails from an owner's module: segments that run encrypted, interludes that the edge does.

    tail = refresh_tail(net, (1, 28, 28), activations, Refresh())
    tail.programs, tail.interludes

Refreshing is for an owner to allow, never a default: between two segments the device sees
activations of the tail in the clear (docs/threat-model.md). Weights stay in the cloud.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer
from blindtail.he.probes import Image, fold_local
from blindtail.he.program import Program
from blindtail.he.segments import Division, Run, compile_runs
from blindtail.interludes import check_weight_free
from blindtail.models.export import export_values
from blindtail.models.network import Network
from blindtail.models.plans import MOST_NAMED_VALUES, PREDICT_FOR
from blindtail.models.reading import read
from blindtail.models.refresh_modules import Squared, interlude_module, segment_module
from blindtail.models.rounds import Rounds, place, shape, width
from blindtail.models.several import image_of
from blindtail.models.tracing import Untraceable, unwrapped
from blindtail.progress import Progress, Span

Floats = NDArray[np.float64]
#: Rows on which the chain is compared with the tail itself; relative to the largest logit.
_COMPARED, _TOLERANCE = 16, 1e-4


@dataclass(frozen=True)
class Refresh:
    """An owner's leave to decrypt between round trips. The device then sees those activations.

    at                names of layers whose result is decrypted and encrypted again, beside those
                      that must be: a round trip more each, and fewer levels
    ring_degree       N of all segments; without it the smallest that needs the fewest round trips
    key_budget_bytes  most bytes of all segments' evaluation keys together
    """

    at: tuple[str, ...] = ()
    ring_degree: int | None = None
    key_budget_bytes: int | None = None


@dataclass(frozen=True)
class Interlude:
    """What the edge does behind one segment: an ONNX graph, and the names of its inputs (`interludes`)."""

    inputs: tuple[str, ...]
    onnx: bytes


@dataclass(frozen=True)
class RefreshedProgram:
    """A tail as segments, one round trip each, and what the edge does between them.

    Of one segment it is an ordinary tail, without interludes.
    """

    programs: tuple[Program, ...]
    interludes: tuple[Interlude, ...]

    @property
    def predicted_s(self) -> float:
        """Server seconds of all segments on the reference core."""
        return sum(p.predicted_s(PREDICT_FOR) for p in self.programs)

    def costs(self) -> RefreshCosts:
        return RefreshCosts.of(self.programs)


@dataclass(frozen=True)
class SegmentCosts:
    """One round trip."""

    name: str
    inputs: int
    outputs: int
    levels: int
    predicted_s: float
    uplink_bytes: int
    reply_bytes: int


@dataclass(frozen=True)
class RefreshCosts:
    """What a refreshed tail costs, before any key exists: of each segment, and together."""

    ring_degree: int
    key_bytes: int
    evaluation_keys: int
    segments: tuple[SegmentCosts, ...]

    @classmethod
    def of(cls, programs: Sequence[Program]) -> RefreshCosts:
        lead = programs[0].spec
        rows = tuple(
            SegmentCosts(
                p.ops[0].name.removesuffix(".tile0"),
                p.spec.features,
                p.spec.outputs,
                p.spec.input_level,
                p.predicted_s(PREDICT_FOR),
                p.spec.uplink_bytes,
                p.spec.reply_bytes,
            )
            for p in programs
        )
        return cls(lead.parameters.ring_degree, lead.key_bytes, len(lead.keys), rows)

    @property
    def round_trips(self) -> int:
        return len(self.segments)

    @property
    def predicted_s(self) -> float:
        return sum(s.predicted_s for s in self.segments)

    @property
    def uplink_bytes(self) -> int:
        return sum(s.uplink_bytes for s in self.segments)

    @property
    def reply_bytes(self) -> int:
        return sum(s.reply_bytes for s in self.segments)

    def to_json(self) -> dict[str, Any]:
        totals = {
            name: getattr(self, name)
            for name in ("round_trips", "predicted_s", "uplink_bytes", "reply_bytes")
        }
        return {**asdict(self), **totals, "predicted_for": PREDICT_FOR}


@dataclass(frozen=True)
class _Step:
    """One segment before it is compiled, and what the edge does behind it, in terms of such segments."""

    layers: list[Layer]
    module: nn.Module
    after: nn.Module | None
    taken: tuple[str, ...]


def refresh_tail(
    tail: nn.Module,
    input_shape: tuple[int, ...],
    calibration: Floats,
    refresh: Refresh,
    progress: Progress | Span | None = None,
) -> RefreshedProgram:
    """Cut a tail into segments and interludes and compile it.

    tail         gives logits (B, classes) for activations (B, *input_shape); left unchanged
    calibration  activations at the cut, (n, features): they bound every value that is encrypted
    progress     told how far it is (`blindtail.progress`)

    Activations that are no polynomial are done exactly, by the edge; sums with earlier values as
    well (`models.rounds`). A run of squares too deep for a ring is cut too (`he.segments`).
    The result is checked against the tail itself. Raises `ModelError` naming the layer.
    """
    whole = Span.of(progress)
    folding, compiling, rest = whole.parts(4, 15, 1)
    steps = split_tail(tail, input_shape, refresh.at, progress=folding)
    values = _values(steps, calibration)
    _compare(tail, input_shape, values)
    programs, division = _compiled(_runs(steps, values), refresh, compiling)
    rest.at(0.0, "what the edge does in between")
    return whole.ended(RefreshedProgram(programs, _interludes(steps, division.pieces, programs)))


def _compiled(runs: Sequence[Run], refresh: Refresh, span: Span) -> tuple[tuple[Program, ...], Division]:
    return compile_runs(
        runs, ring_degree=refresh.ring_degree, key_budget_bytes=refresh.key_budget_bytes, progress=span
    )


def refresh_costs(
    tail: nn.Module,
    input_shape: tuple[int, ...],
    calibration: Floats,
    refresh: Refresh,
    most_values: float = MOST_NAMED_VALUES,
    progress: Progress | Span | None = None,
) -> RefreshCosts:
    """What `refresh_tail` would come to, without graphs and checks. Raises `ModelError`."""
    whole = Span.of(progress)
    folding, compiling = whole.parts(1, 3)
    runs = runs_of(tail, input_shape, calibration, refresh, most_values, folding)
    return whole.ended(RefreshCosts.of(_compiled(runs, refresh, compiling)[0]))


def runs_of(
    tail: nn.Module,
    input_shape: tuple[int, ...],
    calibration: Floats,
    refresh: Refresh,
    most_values: float = MOST_NAMED_VALUES,
    progress: Progress | Span | None = None,
) -> list[Run]:
    """What lies between interludes, with what goes into it for these activations (n, features)."""
    steps = split_tail(tail, input_shape, refresh.at, most_values, progress)
    return _runs(steps, _values(steps, calibration))


def _runs(steps: Sequence[_Step], values: Mapping[str, Floats]) -> list[Run]:
    return [Run(step.layers, values[f"x{k}"], step.layers[0].name) for k, step in enumerate(steps)]


@torch.no_grad()
def split_tail(
    tail: nn.Module,
    input_shape: tuple[int, ...],
    at: Sequence[str] = (),
    most_values: float = MOST_NAMED_VALUES,
    progress: Progress | Span | None = None,
) -> list[_Step]:
    """The segments of a tail, folded, each with the interlude behind it.

    most_values  that folding one of them may hold at once, 8 bytes each

    Raises `ModelError`.
    """
    whole = Span.of(progress)
    whole.at(0.0, "reading the tail")
    rounds = place(_read(tail, input_shape), at)
    steps = []
    for k, part in whole.over(range(rounds.segments)):
        features = sum(map(width, rounds.inputs(k)))
        module = segment_module(rounds, k)
        after, taken = interlude_module(rounds, k)
        part.at(0.0, f"folding {_named(module) or f'segment {k}'}")
        local = _local(rounds, k, module)
        if local is not None:
            steps.append(_Step([local], module.double(), after, taken))
            continue
        held = (features + 1) * max([*map(width, rounds.outputs(k)), features])
        if held > most_values:
            raise ModelError(
                f"segment {k} ({features} values in): folding its layers would hold {8 * held / 1e9:.1f} GB: "
                "cut later, or use fewer channels or smaller images"
            )
        steps.append(_Step(fold_tail(module, (features,), part), module.double(), after, taken))
    return whole.ended(steps)


def _local(rounds: Rounds, k: int, module: fx.GraphModule) -> Affine | None:
    """A segment between images that is one convolution, or several: folded without trying every pixel."""
    given, made = _image(rounds.inputs(k)), _image(rounds.outputs(k))
    if given is None or made is None:
        return None
    exact = copy.deepcopy(module).double().eval()
    try:
        return fold_local(exact, given, made, _named(module) or f"segment {k}")
    except RuntimeError:  # its forward makes tensors in single precision: one by one, then
        return None


def _named(module: fx.GraphModule) -> str:
    """Its layers, or "" where it has none."""
    return "+".join(str(node.target) for node in module.graph.nodes if node.op == "call_module")


def _image(nodes: Sequence[fx.Node]) -> Image | None:
    """Of images of one height and width, channel after channel: all of them together."""
    shapes = [image_of(node) or shape(node) for node in nodes]
    if any(len(one) != 3 or one[1:] != shapes[0][1:] for one in shapes):
        return None
    return sum(one[0] for one in shapes), shapes[0][1], shapes[0][2]


def _read(tail: nn.Module, input_shape: tuple[int, ...]) -> Network:
    root = copy.deepcopy(unwrapped(tail)).cpu().float().eval()
    for path, tensor in root.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"tail layer {path}: holds NaN or infinite weights; train it again")
    if type(root).__module__.startswith(("torch.nn", "blindtail.models.layers")) and not isinstance(
        root, nn.Sequential
    ):
        root = nn.Sequential(root).eval()
    generator = torch.Generator().manual_seed(0)
    two, three = ([torch.randn(b, *input_shape, generator=generator)] for b in (2, 3))
    try:
        network = read(root, two, three)
    except Untraceable as error:
        inside = _forward_of(error.module)
        raise ModelError(f"{inside} cannot be traced ({error.line}: {error.reason})") from error
    for branch in network.traced.decisions:
        raise ModelError(
            f"{_forward_of(branch.module)} at {branch.line} depends on its input's values: keep that at the "
            "edge, or write it as a plain chain of layers, for instance nn.Sequential"
        )
    return network


def _forward_of(module: str) -> str:
    return f"tail layer {module}" if module else "the tail's own forward"


# -- values, checks and graphs ------------------------------------------------------------


@torch.no_grad()
def _values(steps: Sequence[_Step], calibration: Floats, batch: int = 64) -> Mapping[str, Floats]:
    """x0, y0, x1, ... and the logits ("logits") of calibration data, in double precision, each (n, width)."""
    rows: dict[str, list[Tensor]] = {}
    for start in range(0, len(calibration), batch):
        known = {"x0": torch.from_numpy(calibration[start : start + batch])}
        for k, step in enumerate(steps):
            known[f"y{k}"] = step.module(known[f"x{k}"])
            found = known[f"y{k}"]
            if step.after is not None:
                found = step.after.double()(*(known[name] for name in step.taken))
            known[f"x{k + 1}" if k + 1 < len(steps) else "logits"] = found
        for name, value in known.items():
            rows.setdefault(name, []).append(value)
    return {name: torch.cat(parts).numpy() for name, parts in rows.items()}


@torch.no_grad()
def _compare(tail: nn.Module, input_shape: tuple[int, ...], values: Mapping[str, Floats]) -> None:
    """Raises `ModelError` unless the chain gives what the tail gives, image by image."""
    exact = copy.deepcopy(unwrapped(tail)).float().eval()
    for row in range(min(_COMPARED, len(values["x0"]))):
        x = torch.from_numpy(values["x0"][row : row + 1]).float().reshape(1, *input_shape)
        wanted = exact(x).reshape(-1).double().numpy()
        got = values["logits"][row]
        if wanted.shape != got.shape or not np.allclose(
            wanted, got, rtol=0, atol=_TOLERANCE * max(1e-30, float(np.abs(wanted).max()))
        ):
            raise ModelError(
                "the segments of this tail do not give what the tail gives: something in its forward "
                "depends on other images of a batch, or on chance"
            )


def _interludes(
    steps: Sequence[_Step], pieces: Sequence[Sequence[int]], programs: Sequence[Program]
) -> tuple[Interlude, ...]:
    """ONNX graphs in terms of the compiled segments: run k is segments first[k] to first[k + 1] - 1."""
    first = np.concatenate([[0], np.cumsum([len(p) for p in pieces])]).tolist()
    made: list[Interlude] = []
    for k, step in enumerate(steps):
        for j in range(first[k], first[k + 1] - 1):
            made.append(_exported(Squared(), (f"y{j}",), programs, j))
        if step.after is not None:
            renamed = tuple(
                f"x{first[int(n[1:])]}" if n[0] == "x" else f"y{first[int(n[1:]) + 1] - 1}"
                for n in step.taken
            )
            made.append(_exported(step.after, renamed, programs, first[k + 1] - 1))
    return tuple(made)


def _exported(
    module: nn.Module, names: tuple[str, ...], programs: Sequence[Program], index: int
) -> Interlude:
    def size(name: str) -> int:
        spec = programs[int(name[1:])].spec
        return spec.features if name[0] == "x" else spec.outputs

    graph = export_values(module, [(name, size(name)) for name in names], f"interlude{index}")
    check_weight_free(f"interlude{index}", graph)
    return Interlude(names, graph)


__all__ = [
    "Interlude",
    "Refresh",
    "RefreshCosts",
    "RefreshedProgram",
    "SegmentCosts",
    "refresh_costs",
    "refresh_tail",
    "runs_of",
    "split_tail",
]
