"""`.bt` files: what the owner of a model hands to the edge and to the cloud.

A `.bt` is a zip (see `blindtail.archive`) of `manifest.json` and, in `edge.bt`,
one ONNX graph per stage, exit and interlude; in `cloud.bt`, one safetensors file
per compiled tail, or per segment of one. Nothing in it is executable, and nothing
is a pickle. `edge.bt` holds no weight of the tail. Files with refreshed tails have a
format version of their own.

Hashes tell damage, not forgery: who may hand out a `.bt` is the deployment's
matter. Neither torch nor a cryptographic library is imported here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import safetensors.numpy

from blindtail.archive import FORMAT_VERSION, REFRESH_FORMAT_VERSION, decode, kind, write
from blindtail.errors import BundleError, ModelError
from blindtail.he.spec import TailSpec
from blindtail.interludes import RefreshedTail, graph_name
from blindtail.preprocessing import Preprocessing

if TYPE_CHECKING:
    from blindtail.he.program import Program

MAX_CLASSES = 100_000


@dataclass(frozen=True, slots=True)
class StageInfo:
    """One stage of the head. `macs` counts multiplications of its dense and convolution layers."""

    name: str
    macs: int
    bytes: int  # parameters and buffers as float32
    output_shape: tuple[int, ...]  # of one image, without the batch; (features,) of several tensors


@dataclass(frozen=True, slots=True)
class ExitInfo:
    """One early exit: where it sits, what it costs, and how sure it must be.

    confidence = max softmax(logits / temperature); below `threshold`, chosen on
    validation data for a default share of offloads, the image goes on.
    """

    name: str
    after_stage: int
    temperature: float
    macs: int
    bytes: int
    threshold: float


@dataclass(frozen=True)
class EdgeBundle:
    """`edge.bt`: head, exits, preprocessing, class names, and the public half of each tail.

    `cuts` maps the index of the stage after which the network may be cut to the
    encrypted tail's description, and for a refreshed tail to that of its first segment;
    `refreshed` then has all of it, by the same index. `onnx` holds "stage0", "stage1", ... and
    "exit0", ... (by index of the exit), each taking and giving float32 (1, ...), and the
    interludes of refreshed tails (`blindtail.interludes`).
    """

    model: str
    version: str
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    stages: tuple[StageInfo, ...]
    exits: tuple[ExitInfo, ...]
    cuts: Mapping[int, TailSpec]
    edge_budget: Mapping[str, int]  # "macs", "bytes" of head and exits
    onnx: Mapping[str, bytes]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    refreshed: Mapping[int, RefreshedTail] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self.model, self.version)
        stages = len(self.stages)
        if not stages or not self.exits or not 2 <= len(self.class_names) <= MAX_CLASSES:
            raise ModelError("an edge bundle needs a stage, an exit and two classes at least")
        afters = [e.after_stage for e in self.exits]
        if afters != sorted(set(afters)) or afters[0] < 0 or afters[-1] >= stages:
            raise ModelError(f"exits must follow different stages 0..{stages - 1}, in order; got {afters}")
        for e in self.exits:
            if not (math.isfinite(e.temperature) and e.temperature > 0 and 0.0 <= e.threshold <= 2.0):
                raise ModelError(f"exit {e.name!r}: temperature must be above zero, threshold in [0, 2]")
        for cut, spec in self.cuts.items():
            if not 0 <= cut < stages:
                raise ModelError(f"cut {cut} is not after one of the stages 0..{stages - 1}")
            if spec.features != math.prod(self.stages[cut].output_shape):
                raise ModelError(f"cut {cut}: the tail takes {spec.features} values, the stage gives others")
            self._check_tail(cut, spec)
        if set(self.refreshed) - set(self.cuts):
            raise ModelError(
                f"refreshed tails at {sorted(set(self.refreshed) - set(self.cuts))}: no cut there"
            )
        if set(self.edge_budget) != {"macs", "bytes"}:
            raise ModelError("edge_budget holds exactly macs and bytes")
        wanted = {f"stage{i}" for i in range(stages)} | {f"exit{i}" for i in range(len(self.exits))}
        wanted |= {graph_name(cut, i) for cut, t in self.refreshed.items() for i in range(len(t.interludes))}
        if set(self.onnx) != wanted:
            raise ModelError(f"an edge bundle needs the graphs {sorted(wanted)}, got {sorted(self.onnx)}")
        for name in ("cuts", "edge_budget", "onnx", "metrics", "refreshed"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))
        for cut, tail in self.refreshed.items():
            tail.check_graphs(cut, self.onnx)

    def _check_tail(self, cut: int, spec: TailSpec) -> None:
        tail = self.refreshed.get(cut)
        if (spec.segment is not None) != (tail is not None):
            raise ModelError(f"cut {cut}: a segment needs the rest of its tail, and no other tail has any")
        if tail is not None and tail.specs[0] != spec:
            raise ModelError(f"cut {cut}: the refreshed tail does not begin with the segment at the cut")
        last = spec if tail is None else tail.specs[-1]
        if (tail is None or not tail.ends_in_interlude) and last.outputs != len(self.class_names):
            raise ModelError(f"cut {cut}: the tail gives {last.outputs} logits, not one per class")

    def segments(self, cut: int) -> tuple[TailSpec, ...]:
        """What is sent for one offload at `cut`, one round trip each: several for a refreshed tail alone."""
        tail = self.refreshed.get(cut)
        return (self.cuts[cut],) if tail is None else tail.specs

    def describe(self) -> dict[str, Any]:
        """The manifest's content as JSON: everything but graphs and hashes."""
        refreshed = {str(cut): tail.to_json() for cut, tail in self.refreshed.items()}
        return {
            **({"refreshed": refreshed} if refreshed else {}),
            "model": self.model,
            "version": self.version,
            "preprocessing": self.preprocessing.to_json(),
            "class_names": list(self.class_names),
            "stages": [
                {"name": s.name, "macs": s.macs, "bytes": s.bytes, "output_shape": list(s.output_shape)}
                for s in self.stages
            ],
            "exits": [
                {
                    "name": e.name,
                    "after_stage": e.after_stage,
                    "temperature": e.temperature,
                    "macs": e.macs,
                    "bytes": e.bytes,
                    "threshold": e.threshold,
                }
                for e in self.exits
            ],
            "cuts": {str(cut): spec.to_json() for cut, spec in self.cuts.items()},
            "edge_budget": dict(self.edge_budget),
            "metrics": dict(self.metrics),
        }

    def save(self, path: str | Path) -> None:
        """Write atomically; the same bundle gives the same bytes."""
        members = {f"{name}.onnx": data for name, data in self.onnx.items()}
        write(Path(path), "blindtail-edge", self.describe(), members, _format_of(self.refreshed))

    @classmethod
    def open(cls, path: str | Path) -> EdgeBundle:
        """Raises `BundleError` when the file is missing, damaged or not an `edge.bt`."""
        return decode(Path(path), "blindtail-edge", cls._from_members)

    @classmethod
    def _from_members(cls, data: Mapping[str, Any], members: Mapping[str, bytes]) -> EdgeBundle:
        refreshed = _refreshed_in(data, "refreshed")
        if any(not name.endswith(".onnx") for name in members):
            raise BundleError(f"unknown members {sorted(n for n in members if not n.endswith('.onnx'))}")
        stages = tuple(
            StageInfo(_str(s["name"]), _int(s["macs"]), _int(s["bytes"]), tuple(map(_int, s["output_shape"])))
            for s in data["stages"]
        )
        exits = tuple(
            ExitInfo(
                name=_str(e["name"]),
                after_stage=_int(e["after_stage"]),
                temperature=float(e["temperature"]),
                macs=_int(e["macs"]),
                bytes=_int(e["bytes"]),
                threshold=float(e["threshold"]),
            )
            for e in data["exits"]
        )
        return cls(
            model=_str(data["model"]),
            version=_str(data["version"]),
            preprocessing=Preprocessing.from_json(data["preprocessing"]),
            class_names=tuple(map(_str, data["class_names"])),
            stages=stages,
            exits=exits,
            cuts={int(cut): TailSpec.from_json(spec) for cut, spec in data["cuts"].items()},
            edge_budget={str(k): _int(v) for k, v in data["edge_budget"].items()},
            onnx={name.removesuffix(".onnx"): blob for name, blob in members.items()},
            metrics=dict(data["metrics"]),
            refreshed={int(cut): RefreshedTail.from_json(tail) for cut, tail in refreshed.items()},
        )


@dataclass(frozen=True)
class CloudBundle:
    """`cloud.bt`: one compiled tail per cut. `programs` maps the stage index of the cut to it.

    Of a refreshed tail `programs` has the first segment and `following` the others, in order.
    """

    model: str
    version: str
    programs: Mapping[int, Program]
    following: Mapping[int, tuple[Program, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self.model, self.version)
        if not self.programs or min(self.programs) < 0:
            raise ModelError("a cloud bundle needs at least one tail, at a cut numbered from 0")
        chains = {cut for cut, program in self.programs.items() if program.spec.segment is not None}
        if set(self.following) != chains:
            raise ModelError("a cloud bundle holds all segments of a refreshed tail, and no others")
        if chains:
            from blindtail.he.segments import check_programs

            for cut in chains:
                check_programs(self.segments(cut))
        for name in ("programs", "following"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def segments(self, cut: int) -> tuple[Program, ...]:
        """The tail at a cut: its segments in order, a single one but for refreshed tails."""
        return (self.programs[cut], *self.following.get(cut, ()))

    def save(self, path: str | Path) -> None:
        """Write atomically; the same bundle gives the same bytes."""
        members: dict[str, bytes] = {}
        data: dict[str, Any] = {"model": self.model, "version": self.version, "programs": {}}
        for cut, program in sorted(self.programs.items()):
            data["programs"][str(cut)] = _put(program, f"tail{cut}", members)
        if self.following:
            data["following"] = {
                str(cut): [_put(p, f"tail{cut}.{i}", members) for i, p in enumerate(rest, 1)]
                for cut, rest in sorted(self.following.items())
            }
        write(Path(path), "blindtail-cloud", data, members, _format_of(self.following))

    @classmethod
    def open(cls, path: str | Path) -> CloudBundle:
        """Raises `BundleError` when the file is missing, damaged or not a `cloud.bt`."""
        return decode(Path(path), "blindtail-cloud", cls._from_members)

    @classmethod
    def _from_members(cls, data: Mapping[str, Any], members: Mapping[str, bytes]) -> CloudBundle:
        structures = {int(cut): structure for cut, structure in data["programs"].items()}
        rest = {int(cut): list(listed) for cut, listed in _refreshed_in(data, "following").items()}
        wanted = {f"tail{cut}" for cut in structures}
        wanted |= {f"tail{cut}.{i}" for cut, listed in rest.items() for i in range(1, len(listed) + 1)}
        if set(members) != {f"{name}.safetensors" for name in wanted}:
            raise BundleError("its tails and its weight files do not belong together")
        programs = {cut: _take(structure, f"tail{cut}", members) for cut, structure in structures.items()}
        following = {
            cut: tuple(_take(s, f"tail{cut}.{i}", members) for i, s in enumerate(listed, 1))
            for cut, listed in rest.items()
        }
        return cls(_str(data["model"]), _str(data["version"]), programs, following)


def save_program(path: Path, program: Program) -> None:
    """One program alone, also a segment: what a cell's own processes read. Written atomically."""
    members: dict[str, bytes] = {}
    data = {"program": _put(program, "program", members)}
    write(path, "blindtail-program", data, members)


def open_program(path: Path) -> Program:
    """Raises `BundleError` when the file is missing, damaged or not of `save_program`."""

    def build(data: Mapping[str, Any], members: Mapping[str, bytes]) -> Program:
        if set(members) != {"program.safetensors"}:
            raise BundleError("its program and its weight file do not belong together")
        return _take(data["program"], "program", members)

    return decode(path, "blindtail-program", build)


def _put(program: Program, name: str, members: dict[str, bytes]) -> dict[str, Any]:
    structure, tensors = program.to_parts()
    ordered = {key: np.ascontiguousarray(tensors[key]) for key in sorted(tensors)}
    members[f"{name}.safetensors"] = safetensors.numpy.save(ordered)
    return structure


def _take(structure: Mapping[str, Any], name: str, members: Mapping[str, bytes]) -> Program:
    from blindtail.he.program import Program

    return Program.from_parts(structure, safetensors.numpy.load(members[f"{name}.safetensors"]))


def _format_of(refreshed: Mapping[int, Any]) -> int:
    return REFRESH_FORMAT_VERSION if refreshed else FORMAT_VERSION


def _refreshed_in(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = data.get(name, {})
    if bool(found) != (data["format_version"] == REFRESH_FORMAT_VERSION):
        raise BundleError(f"format version {data['format_version']} and its tails contradict each other")
    return found


def sniff(path: str | Path) -> Literal["edge", "cloud"]:
    """Which kind of `.bt` a file is. Raises `BundleError` when it is none, or damaged."""
    found = kind(path)
    if found == "blindtail-program":
        raise BundleError(f"{Path(path).name} is a cell's own file of one program: give its model's cloud.bt")
    return "edge" if found == "blindtail-edge" else "cloud"


def content_version(*parts: bytes) -> str:
    """A short version for a model that was given none: 12 hex digits over its contents."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:12]


def _check_names(model: str, version: str) -> None:
    for what, value in (("model", model), ("version", version)):
        if not 1 <= len(value) <= 100 or not value.isascii() or not value.isprintable() or "/" in value:
            raise ModelError(f"a {what}'s name is 1 to 100 printable ASCII characters without '/'")


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _int(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError("expected a whole number from 0")
    return value


__all__ = [
    "CloudBundle",
    "EdgeBundle",
    "ExitInfo",
    "Preprocessing",
    "RefreshedTail",
    "StageInfo",
    "content_version",
    "open_program",
    "save_program",
    "sniff",
]
