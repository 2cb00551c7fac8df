"""The file form of a program's operations: JSON for what they are, arrays for their weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.operations import MapOp, Op, SquareOp
from blindtail.he.spec import Layout, TailSpec, expand_runs, runs

#: 2: folds are groups of rotations, offsets have a stride. 3: complex slots; a fold may conjugate.
FORMAT_VERSION = 3


def structure(ops: tuple[Op, ...]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Operations as a JSON structure, and their weights by name, float64 little-endian."""
    listed: list[dict[str, Any]] = []
    tensors: dict[str, NDArray[Any]] = {}
    for index, op in enumerate(ops):
        common = {
            "name": op.name,
            "level": op.level,
            "in_scale": op.in_scale.hex(),
            "out_scale": op.out_scale.hex(),
        }
        if isinstance(op, SquareOp):
            listed.append({"op": "square", **common})
            continue
        tensors[f"op{index}.weight"] = np.ascontiguousarray(op.weight, "<f8")
        tensors[f"op{index}.bias"] = np.ascontiguousarray(op.bias, "<f8")
        listed.append(
            {
                "op": "map",
                **common,
                "rows": runs(tuple(op.rows.tolist())),
                "offsets": op.offsets,
                "stride": op.stride,
                "baby": op.baby,
                "folds": [list(group) for group in op.folds],
                "out_layout": op.out_layout.to_json(),
            }
        )
    return {"format": FORMAT_VERSION, "ops": listed}, tensors


def read_ops(listed: list[Any], tensors: Mapping[str, NDArray[Any]], spec: TailSpec) -> tuple[Op, ...]:
    """Inverse of `structure`; each layout follows from the operation before.

    Raises `ModelError` and what a malformed structure gives (`LookupError`,
    `TypeError`, `ValueError`, `OverflowError`); `Program.from_parts` translates them.
    """
    if not listed or len(listed) > 64:
        raise ModelError("a program has between 1 and 64 operations")
    ops: list[Op] = []
    layout = spec.input_layout
    for index, item in enumerate(listed):
        name, level = str(item["name"]), int(item["level"])
        scales = float.fromhex(item["in_scale"]), float.fromhex(item["out_scale"])
        if item["op"] == "square":
            ops.append(SquareOp(name, level, layout, *scales))
            continue
        if item["op"] != "map":
            raise ModelError(f"operation {item['op']!r} is unknown to this release")
        out_layout = Layout.from_json(item["out_layout"])
        ops.append(
            MapOp(
                name=name,
                level=level,
                weight=np.asarray(tensors[f"op{index}.weight"], np.float64),
                bias=np.asarray(tensors[f"op{index}.bias"], np.float64),
                in_layout=layout,
                out_layout=out_layout,
                rows=np.asarray(expand_runs(item["rows"]), np.int32),
                offsets=int(item["offsets"]),
                stride=int(item["stride"]),
                baby=int(item["baby"]),
                folds=tuple(tuple(int(f) for f in group) for group in item["folds"]),
                in_scale=scales[0],
                out_scale=scales[1],
            )
        )
        layout = out_layout
    return tuple(ops)
