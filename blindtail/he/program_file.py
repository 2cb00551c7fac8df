"""The file form of a program's operations: JSON for what they are, arrays for their weights.

A program's identity is a hash of that form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import ModelError
from blindtail.he.elementwise import Op, ProductOp, ScaleOp, SquareOp, SumOp
from blindtail.he.layers import Shapes
from blindtail.he.layout import Layout, expand_runs, runs
from blindtail.he.operations import MapOp, Term
from blindtail.he.sparse import Sparse, Weight
from blindtail.he.spec import TailSpec, canonical_json, sha256_hex

#: 2: folds are groups of rotations, offsets have a stride. 3: complex slots; a fold may conjugate.
#: 4: operations name what they read; products, sums, multiples; maps of several values; sparse weights.
FORMAT_VERSION = 4
KINDS: dict[type, str] = {
    MapOp: "map",
    SquareOp: "square",
    ProductOp: "product",
    SumOp: "sum",
    ScaleOp: "scale",
}
#: Three layers with cubics over 64 ciphertexts each are 9 * 64 + 3 * 64.
MAX_OPS = 1024


def structure(ops: tuple[Op, ...]) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Operations as a JSON structure, and their weights by name, little-endian.

    Numbers are float64. A sparse weight is three arrays: its rows' starts (out + 1,) int64,
    the column of each entry (n,) int32, and its value (n,).
    """
    listed: list[dict[str, Any]] = []
    tensors: dict[str, NDArray[Any]] = {}
    for index, op in enumerate(ops):
        item: dict[str, Any] = {
            "op": KINDS[type(op)],
            "name": op.name,
            "level": op.level,
            "reads": list(op.backs),
            "out_scale": op.out_scale.hex(),
        }
        if isinstance(op, MapOp):
            more: dict[str, list[Any]] = {"shapes": [], "sparse": []}
            for i, term in enumerate(op.terms):
                shapes, sparse = _put(f"op{index}.weight{i or ''}", term, tensors)
                more["shapes"].append(shapes)
                more["sparse"].append(sparse)
            tensors[f"op{index}.bias"] = np.ascontiguousarray(op.bias, "<f8")
            item.update(
                in_scales=[term.in_scale.hex() for term in op.terms],
                offsets=[[term.offsets, term.stride] for term in op.terms],
                rows=runs(tuple(op.rows.tolist())),
                baby=op.baby,
                folds=[list(group) for group in op.folds],
                out_layout=op.out_layout.to_json(),
                **more,
            )
        else:
            item["in_scales"] = [scale.hex() for scale in op.in_scales]
        if isinstance(op, ScaleOp):
            tensors[f"op{index}.factors"] = np.ascontiguousarray(op.factors, "<f8")
        constant = op.constant if isinstance(op, ScaleOp | SumOp) else None
        if constant is not None:
            tensors[f"op{index}.constant"] = np.ascontiguousarray(constant, "<f8")
        listed.append(item)
    return {"format": FORMAT_VERSION, "ops": listed}, tensors


def content_id(spec: TailSpec, ops: tuple[Op, ...]) -> str:
    """The program id: hex SHA-256 over the description but for that id, the operations and their weights."""
    listed, tensors = structure(ops)
    blobs = [part for name in sorted(tensors) for part in (name.encode(), tensors[name].tobytes())]
    nameless = replace(spec, program_id="0" * 64).to_json()
    return sha256_hex(canonical_json({**listed, "spec": nameless}), *blobs)


def _put(name: str, term: Term, tensors: dict[str, NDArray[Any]]) -> tuple[Any, Any]:
    """A weight's arrays; its shapes, and the size of a sparse one, each None where there is none."""
    shapes = None if term.shapes is None else [list(shape) for shape in term.shapes]
    if not isinstance(term.weight, Sparse):
        tensors[name] = np.ascontiguousarray(term.weight, "<f8")
        return shapes, None
    tensors[f"{name}.starts"] = np.ascontiguousarray(term.weight.starts, "<i8")
    tensors[f"{name}.columns"] = np.ascontiguousarray(term.weight.columns, "<i4")
    tensors[f"{name}.values"] = np.ascontiguousarray(term.weight.values, "<f8")
    return shapes, list(term.weight.shape)


def _weight(size: Any, name: str, tensors: Mapping[str, NDArray[Any]]) -> Weight:
    if size is None:
        return np.asarray(tensors[name], np.float64)
    rows, columns = map(int, size)
    starts = np.asarray(tensors[f"{name}.starts"], np.int64)
    values = np.asarray(tensors[f"{name}.values"], np.float64)
    if len(starts) != rows + 1 or starts[0] or starts[-1] != len(values) or (np.diff(starts) < 0).any():
        raise ModelError("a sparse weight's rows do not follow one another")
    each = np.repeat(np.arange(rows, dtype=np.int32), np.diff(starts))
    return Sparse((rows, columns), each, np.asarray(tensors[f"{name}.columns"], np.int32), values)


def _shapes(listed: Any) -> Shapes | None:
    if listed is None:
        return None
    before, after = (tuple(map(int, shape)) for shape in listed)
    return before, after


def read_ops(listed: list[Any], tensors: Mapping[str, NDArray[Any]], spec: TailSpec) -> tuple[Op, ...]:
    """Inverse of `structure`; each layout follows from the operation before.

    Raises `ModelError` and what a malformed structure gives (`LookupError`,
    `TypeError`, `ValueError`, `OverflowError`); `Program.from_parts` translates them.
    """
    if not listed or len(listed) > MAX_OPS:
        raise ModelError(f"a program has between 1 and {MAX_OPS} operations")
    ops: list[Op] = []
    layouts = list(spec.input_layout.tiles(spec.parameters.slots))
    for index, item in enumerate(listed):
        backs = tuple(int(back) for back in item["reads"])
        if not backs or not all(1 <= back <= len(layouts) for back in backs):
            raise ModelError("an operation reads what is not there")
        read = [layouts[len(layouts) - back] for back in backs]
        op = _read_op(item, f"op{index}", backs, read, tensors)
        ops.append(op)
        layouts.append(op.out_layout if isinstance(op, MapOp) else op.layout)
    return tuple(ops)


def _read_op(
    item: Mapping[str, Any],
    key: str,
    backs: tuple[int, ...],
    read: list[Layout],
    tensors: Mapping[str, NDArray[Any]],
) -> Op:
    kind, name, level = item["op"], str(item["name"]), int(item["level"])
    out_scale = float.fromhex(item["out_scale"])
    scales = tuple(float.fromhex(scale) for scale in item["in_scales"])
    if len(scales) != len(backs):
        raise ModelError("an operation has a scale for each value that it reads")

    def tensor(of: str) -> NDArray[np.float64]:
        return np.asarray(tensors[f"{key}.{of}"], np.float64)

    if kind == "map":
        terms = [
            Term(
                back,
                _weight(size, f"{key}.weight{i or ''}", tensors),
                layout,
                int(offsets),
                int(stride),
                scale,
                _shapes(shapes),
            )
            for i, (back, layout, (offsets, stride), scale, size, shapes) in enumerate(
                zip(backs, read, item["offsets"], scales, item["sparse"], item["shapes"], strict=True)
            )
        ]
        first = terms[0]
        return MapOp(
            name=name,
            level=level,
            weight=first.weight,
            bias=tensor("bias"),
            in_layout=first.in_layout,
            out_layout=Layout.from_json(item["out_layout"]),
            rows=np.asarray(expand_runs(item["rows"]), np.int32),
            offsets=first.offsets,
            stride=first.stride,
            baby=int(item["baby"]),
            folds=tuple(tuple(int(f) for f in group) for group in item["folds"]),
            in_scale=first.in_scale,
            out_scale=out_scale,
            back=first.back,
            others=tuple(terms[1:]),
            shapes=first.shapes,
        )
    if kind == "square":
        if len(backs) != 1:
            raise ModelError("a square reads one value")
        return SquareOp(name, level, read[0], scales[0], out_scale, backs[0])
    if kind == "product":
        if len(backs) != 2:
            raise ModelError("a product reads two values")
        left, right = backs
        return ProductOp(name, level, read[0], (scales[0], scales[1]), out_scale, (left, right))
    if kind == "sum":
        constant = tensor("constant") if f"{key}.constant" in tensors else None
        if set(scales) != {out_scale}:
            raise ModelError("a sum keeps its operands' scale")
        return SumOp(name, level, read[0], out_scale, backs, constant)
    if kind == "scale":
        return ScaleOp(name, level, read[0], scales, out_scale, backs, tensor("factors"), tensor("constant"))
    raise ModelError(f"operation {kind!r} is unknown to this release")
