"""From a trained PyTorch tail to affine maps and quadratics.

A tail is traced with torch.fx and run, in float64, on a basis: row 0 of the
batch is the zero vector, row i + 1 the i-th unit vector of the last
activation's output (or of the tail's input). Whatever chain of linear layers
follows, its dense matrix is f(e_i) - f(0) and its bias f(0). An activation ends
one map and starts the next basis.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from blindtail.errors import ModelError
from blindtail.he.layers import Affine, Layer
from blindtail.he.layers import Quadratic as FoldedQuadratic
from blindtail.models.batches import trace_twice
from blindtail.models.layers import Quadratic, Square
from blindtail.models.operations import (
    Effect,
    Live,
    lives,
    moves_only,
    name_of,
    nothing_follows,
    rule_call,
    rule_module,
)
from blindtail.models.tracing import Untraceable, first_line, unwrapped

#: Most values an activation may have: folding runs one image for each, in float64.
MAX_WIDTH = 8192


class _Value(Live):
    """A traced tensor: images of the basis of `segment`, shape (1 + width, ...)."""

    def __init__(self, segment: int, data: Tensor) -> None:
        super().__init__(tuple(data.shape))
        self.segment, self.data = segment, data


class _Batch(int):
    """The number of images in a basis, times `each`: another one in the next segment."""

    each: int = 1

    def __mul__(self, other: Any) -> Any:
        product = _Batch(int(self) * int(other))
        product.each = self.each * int(other)
        return product

    __rmul__ = __mul__


@dataclass
class _Folder:
    """Runs a traced tail on bases and collects what it finds."""

    layers: list[Layer] = field(default_factory=list)
    segment: int = 0
    parts: list[str] = field(default_factory=list)  # names of linear layers since the last activation
    images: int = 0  # of the newest basis

    def basis(self, shape: tuple[int, ...], where: str) -> _Value:
        width = math.prod(shape)
        if not 1 <= width <= MAX_WIDTH:
            raise ModelError(
                f"tail layer {where}: takes {width} values, a tail may hold 1 to {MAX_WIDTH}: "
                "cut the network later, or pool before the cut"
            )
        rows = torch.zeros(width + 1, width, dtype=torch.float64)
        rows[1:] = torch.eye(width, dtype=torch.float64)
        self.images = width + 1
        return _Value(self.segment, rows.view(width + 1, *shape))

    def close(self, value: _Value, where: str) -> None:
        """Everything linear up to `value` becomes one dense affine map."""
        flat = value.data.reshape(len(value.data), -1)
        bias = flat[0]
        weight = (flat[1:] - bias).T
        self.layers.append(Affine(weight.numpy().copy(), bias.numpy().copy(), "+".join(self.parts) or where))
        self.parts = []

    def activate(self, value: _Value, a: Tensor, b: Tensor, c: Tensor, name: str) -> _Value:
        """End the map at `value`; a, b, c broadcast against one image's shape."""
        self.close(value, f"before {name}")
        shape = tuple(value.data.shape[1:])
        full = [np.ascontiguousarray(v.double().expand(shape).reshape(-1).numpy()) for v in (a, b, c)]
        self.layers.append(FoldedQuadratic(full[0], full[1], full[2], name))
        self.segment += 1
        return self.basis(shape, name)


def fold_tail(tail: nn.Module, input_shape: tuple[int, ...]) -> list[Layer]:
    """Fold a tail into [Affine, Quadratic, Affine, ..., Affine], all float64.

    tail         gives logits (B, classes) for activations (B, *input_shape);
                 used in evaluation mode, left unchanged
    input_shape  of one image's activation at the cut; its elements are numbered
                 in (C, H, W) order

    Linear layers between two activations become one dense map; `Square` is the
    quadratic (1, 0, 0). The result is checked against the tail itself. Raises
    `ModelError` naming the layer, and what to write instead, when a layer is
    neither linear nor quadratic, or when the tail branches around an activation.
    """
    tail = unwrapped(tail)
    for path, tensor in tail.state_dict().items():
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ModelError(f"tail layer {path}: has no weights yet; run the network once, then train it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"tail layer {path}: holds NaN or infinite weights; train or load the model again"
            )
    if isinstance(tail, Square | Quadratic) or _is_leaf(tail):
        tail = nn.Sequential(tail)
    folder, shape = _Folder(), tuple(input_shape)
    start = folder.basis(shape, "input")
    with torch.no_grad():
        exact, graph, own_floats = _traced(tail, shape)
        out = _run(exact, graph, folder, start)
        if out.segment != folder.segment:
            raise ModelError("the tail's output goes around its last activation: remove the skip connection")
        folder.close(out, "output")
        _check_against(copy.deepcopy(tail).eval(), folder.layers, shape, own_floats)
    return folder.layers


def _traced(tail: nn.Module, input_shape: tuple[int, ...]) -> tuple[nn.Module, fx.Graph, bool]:
    """A float64 copy in evaluation mode, its graph, and whether the forward makes float32 tensors itself."""
    exact = copy.deepcopy(tail).double().eval()
    try:
        return exact, _graph(exact, input_shape, torch.float64), False
    except ModelError as error:
        if not any(word in str(error) for word in ("ouble", "dtype", "datatype")):
            raise
    coarse = copy.deepcopy(tail).float().eval()
    graph = _graph(coarse, input_shape, torch.float32)
    return coarse.double(), graph, True


def _run(tail: nn.Module, graph: fx.Graph, folder: _Folder, start: _Value) -> _Value:
    env: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node.name] = start
            continue
        args = fx.node.map_arg(node.args, lambda n: env[n.name])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n.name])
        where = _where(node)
        try:
            if node.op == "output":
                if not isinstance(args[0], _Value):
                    raise ModelError("a tail gives one tensor of logits: return that alone")
                return args[0]
            env[node.name] = _step(tail, folder, node, args, kwargs, where)
        except (RuntimeError, IndexError, TypeError, AttributeError, ValueError) as error:
            raise ModelError(f"tail layer {where}: does not fit its input: {first_line(error)}") from error
    raise ModelError("the tail returns nothing")


def _graph(tail: nn.Module, input_shape: tuple[int, ...], dtype: torch.dtype) -> fx.Graph:
    generator = torch.Generator().manual_seed(0)
    two, three = (torch.randn(batch, *input_shape, generator=generator, dtype=dtype) for batch in (2, 3))
    required = [
        p
        for p in inspect.signature(tail.forward).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(required) > 1:
        names = ", ".join(p.name for p in required)
        raise ModelError(f"a tail takes one input, the activation at the cut; this forward takes {names}")
    try:
        traced = trace_twice(tail, [two], [three])
    except Untraceable as error:
        inside = f"tail layer {error.module}" if error.module else "the tail's own forward"
        at = f" at {error.line}" if error.line else ""
        if error.kind == "shapes":
            raise ModelError(f"{inside}: does not fit its input: {error.reason}") from error
        if error.kind == "list":
            raise ModelError(
                f"{inside}{at} calls a module that it does not own: keep layers in nn.ModuleList, "
                "nn.ModuleDict or as attributes, not in a list, dict or function"
            ) from error
        if error.kind == "values":
            raise ModelError(
                f"{inside}{at} depends on its input's values: keep that at the edge, "
                "or write it as a plain chain of layers, for instance nn.Sequential"
            ) from error
        raise ModelError(
            f"{inside}{at} cannot be traced ({error.reason}): use fixed shapes, "
            "and write it as a plain chain of layers, for instance nn.Sequential"
        ) from error
    if traced.unsteady:
        raise ModelError(
            f"the tail's forward {traced.unsteady}: "
            "leave the batch alone, for instance flatten(1) and x.shape[1:]"
        )
    return traced.graph


def _is_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


def _where(node: fx.Node) -> str:
    """A layer's path, or the function's node with the module and line it is called in."""
    if node.op == "call_module":
        return str(node.target)
    module, line = node.meta.get("module", ""), node.meta.get("line", "")
    at = ", ".join(part for part in (f"in {module}" if module else "", line) if part)
    return f"{node.name} [{at}]" if at else node.name


def _step(
    tail: nn.Module,
    folder: _Folder,
    node: fx.Node,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: str,
) -> Any:
    """One operation on bases. Raises `ModelError` with the reason and the way out."""
    if node.op == "get_attr":
        value = _attribute(tail, str(node.target))
        # Tensors that the forward made itself were not converted with the tail's own.
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
    module = tail.get_submodule(str(node.target)) if node.op == "call_module" else None
    last = nothing_follows(node, tail)
    ruling = (
        rule_call(node, args, kwargs, last)
        if module is None
        else rule_module(module, (*args, *kwargs.values()), last)
    )
    if ruling.effect is Effect.REFUSED:
        raise ModelError(
            f"tail layer {where} ({ruling.kind}): cannot run encrypted, it {ruling.reason}; {ruling.advice}"
        )
    if ruling.effect is Effect.SQUARE:
        value = (*lives(args), *lives(kwargs))[0]
        assert isinstance(value, _Value)
        return _square(folder, value, module, where)
    operands = [v for v in (*lives(args), *lives(kwargs)) if isinstance(v, _Value)]
    if ruling.effect is Effect.LINEAR and len({v.segment for v in operands}) > 1:
        raise ModelError(
            f"tail layer {where}: joins values from before and after an activation; this release has no "
            "skip connection around Square or Quadratic: remove it and train again, or cut after it"
        )
    if ruling.effect is Effect.SHAPE:
        return _counted(_call(node, module, _bare(args), _bare(kwargs)), operands, _asked(node, args))
    images = len(operands[0].data) if operands else folder.images
    if not operands and node.target in (operator.getitem, operator.mul):
        images = 0  # a batch out of a shape stays one: the next segment has another
    result = _call(node, module, _bare(args, images), _bare(kwargs, images))
    if ruling.effect is not Effect.LINEAR:
        return result
    if module is not None or not moves_only(node, ruling, module):
        folder.parts.append(str(node.target) if module is not None else node.name)
    return _wrapped(result, operands[0], where)


def _square(folder: _Folder, value: _Value, module: nn.Module | None, where: str) -> _Value:
    if value.segment != folder.segment:
        raise ModelError(
            f"tail layer {where}: is a second activation beside another one, on values from before it; "
            "this release takes one after the other: join both branches (torch.cat) and square once, "
            "or remove the skip connection"
        )
    if isinstance(module, Quadratic):
        shape = () if module.channels is None else (module.channels,) + (1,) * (value.data.dim() - 2)
        a, b, c = (v.detach().view(shape) for v in (module.a, module.b, module.c))
        return folder.activate(value, a, b, c, where)
    one, zero = torch.ones(()), torch.zeros(())
    return folder.activate(value, one, zero, zero, where)


def _call(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if module is not None:
        return module(*args, **kwargs)
    if name_of(node) in ("to", "type", "float", "double", "type_as", "cpu", "cuda") and args:
        return args[0]
    if node.op == "call_method":
        return getattr(args[0], str(node.target).removesuffix("_"))(*args[1:], **kwargs)
    if not callable(node.target):
        raise TypeError(f"{node.target} is no function")
    # In place, a function would write over a basis that others still read.
    functions = {"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "truediv"}
    name = functions.get(getattr(node.target, "__name__", ""))
    function: Any = node.target if name is None else getattr(operator, name)
    return function(*args, **kwargs)


def _bare(value: Any, images: int = 0) -> Any:
    """Arguments with tensors in the place of traced values, and `images` as the number of images."""
    if isinstance(value, _Value):
        return value.data
    if isinstance(value, _Batch) and images:
        return images * value.each
    if isinstance(value, tuple | list):
        return type(value)(_bare(v, images) for v in value)
    if isinstance(value, dict):
        return {k: _bare(v, images) for k, v in value.items()}
    return value


def _asked(node: fx.Node, args: Sequence[Any]) -> Any:
    """The dimension that `size` is asked for, None for all."""
    return args[1] if str(node.target) == "size" and len(args) > 1 else None


def _counted(result: Any, operands: Sequence[_Value], dim: Any) -> Any:
    """A shape whose first number is a batch."""
    if isinstance(result, torch.Size):
        return (_Batch(result[0]), *result[1:])
    first = bool(operands) and dim is not None and dim in (0, -operands[0].data.dim())
    return _Batch(result) if first and isinstance(result, int) else result


def _wrapped(result: Any, source: _Value, where: str) -> Any:
    if isinstance(result, tuple | list):
        return tuple(_wrapped(r, source, where) for r in result)
    if result.dim() < 1 or result.shape[0] != len(source.data):
        raise ModelError(f"tail layer {where}: must keep the batch as dimension 0 (use flatten(1))")
    return _Value(source.segment, result)


def _attribute(tail: nn.Module, path: str) -> Any:
    value: Any = tail
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _check_against(
    tail: nn.Module, layers: list[Layer], input_shape: tuple[int, ...], own_floats: bool
) -> None:
    """The folded layers must give what the tail gives: guards against what tracing cannot see.

    own_floats  its forward makes float32 tensors, so that it runs in float32 alone
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *input_shape, generator=generator, dtype=torch.float64)
    x, tail = (x.float(), tail.float()) if own_floats else (x, tail.double())
    wanted = tail(x).numpy().reshape(len(x), -1)
    while not np.isfinite(wanted).all() and bool(x.any()):
        x = x / 16  # many squares in a row leave the range of numbers
        wanted = tail(x).numpy().reshape(len(x), -1)
    got = x.double().numpy().reshape(len(x), -1)
    for layer in layers:
        got = layer(got)
    scale = max(1.0, float(np.abs(wanted).max()))
    if wanted.shape != got.shape or not np.allclose(
        got, wanted, rtol=0.0, atol=(1e-3 if own_floats else 1e-8) * scale
    ):
        raise ModelError(
            "the folded tail does not give what the tail gives: some layer is not linear or mixes images "
            "of a batch; write the tail as a plain chain of layers"
        )
