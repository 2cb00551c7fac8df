"""From a trained PyTorch tail to affine maps and polynomials.

A tail is traced with torch.fx and run, in float64, on a basis: row 0 of the
batch is the zero vector, row i + 1 the i-th unit vector of the last
activation's output (or of the tail's input). Whatever chain of linear layers
follows, its dense matrix is f(e_i) - f(0) and its bias f(0). An activation ends
one map and starts the next basis. A wide basis runs in parts, whose columns go into
a sparse matrix where most of them are zero, as a convolution's are.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from blindtail.errors import ModelError
from blindtail.he.bases import Batch, Folder, Value, applied, bare, layers_of, valued
from blindtail.he.layers import FloatArray, Layer, outputs
from blindtail.he.layers import Polynomial as Folded
from blindtail.he.layers import Quadratic as FoldedQuadratic
from blindtail.models.batches import trace_twice
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.operations import moves_only, name_of, nothing_follows, power, rule_call, rule_module
from blindtail.models.rulings import Effect, lives
from blindtail.models.several import Shape, check_takes, image_of, piece, several
from blindtail.models.tracing import Untraceable, first_line, unwrapped
from blindtail.progress import Progress, Span

#: The comparison with the tail itself: largest value inside, and how often inputs are halved for that.
_INSIDE, _HALVINGS = 1e3, 40


def fold_tail(
    tail: nn.Module, input_shape: Shape | Sequence[Shape], progress: Progress | Span | None = None
) -> list[Layer]:
    """Fold a tail into [Affine, Quadratic or Polynomial, Affine, ..., Affine], all float64.

    tail         gives logits (B, classes) for activations (B, *input_shape);
                 used in evaluation mode, left unchanged
    input_shape  of one image's activation at the cut; its elements are numbered
                 in (C, H, W) order. Several for a tail that takes several tensors: elements
                 are those of the first, then of the second, ... (`blindtail.models.several`)
    progress     told of each layer (`blindtail.progress`)

    Linear layers between two activations become one map, kept sparse where that is
    much smaller; `Square` is the quadratic (1, 0, 0). The result is checked against the tail itself. Raises
    `ModelError` naming the layer, and what to write instead, when a layer is
    neither linear nor polynomial. Connections that skip activations become `Affine.skips`.
    """
    tail, shape = _of_one_tensor(unwrapped(tail), input_shape)
    for path, tensor in tail.state_dict().items():
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise ModelError(f"tail layer {path}: has no weights yet; run the network once, then train it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"tail layer {path}: holds NaN or infinite weights; train or load the model again"
            )
    if isinstance(tail, Square | Quadratic | Polynomial) or _is_leaf(tail):
        tail = nn.Sequential(tail)
    found, whole = list[Folder](), Span.of(progress)
    Folder().basis(shape, "input")
    with torch.no_grad():
        exact, graph, own_floats = _traced(tail, shape)
        image = image_of(next(iter(graph.nodes))) if len(shape) == 1 else None
        while not found or len(found) < found[0].parts:
            folder = Folder(len(found))
            start = folder.basis(shape, "input", image)
            own = whole.parts(*[1.0] * (found or [folder])[0].parts)[len(found)]
            folder.close(_run(exact, graph, folder, start, own), "output")
            found.append(folder)
        layers = layers_of(found)
        _check_against(copy.deepcopy(tail).eval(), layers, shape, own_floats)
    return whole.ended(layers)


def _of_one_tensor(tail: nn.Module, input_shape: Shape | Sequence[Shape]) -> tuple[nn.Module, Shape]:
    """A tail of several tensors as one of the flat activation that they make. Raises `ModelError`."""
    if not any(isinstance(n, Sequence) for n in input_shape):
        return tail, tuple(input_shape)  # type: ignore[arg-type]
    given = several(input_shape)  # type: ignore[arg-type]
    check_takes(tail, "a tail", given, "the cut")
    return piece(tail, given), given.shape


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


def _run(tail: nn.Module, graph: fx.Graph, folder: Folder, start: Value, span: Span) -> Value:
    env: dict[str, Any] = {}
    for node, part in span.over(list(graph.nodes)):
        if node.op == "placeholder":
            env[node.name] = start
            continue
        args = fx.node.map_arg(node.args, lambda n: env[n.name])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n.name])
        where = _where(node)
        if node.op == "call_module":
            part.at(0.0, f"folding {where}")
        try:
            if node.op == "output":
                if not isinstance(args[0], Value):
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
        raise ModelError(
            f"a tail takes one input, the activation at the cut; this forward takes {names}: let the stage "
            "before it give a tuple of as many tensors"
        )
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
    folder: Folder,
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
        assert isinstance(value, Value)
        return folder.activate(value, _activation(value, module, power(name_of(node), args, kwargs), where))
    operands = [v for v in (*lives(args), *lives(kwargs)) if isinstance(v, Value)]
    if ruling.effect is Effect.SHAPE:
        return _counted(_call(node, module, bare(args), bare(kwargs)), operands, _asked(node, args))
    if ruling.effect is not Effect.LINEAR:
        images = len(operands[0].data) if operands else folder.images
        if not operands and node.target in (operator.getitem, operator.mul):
            images = 0  # a batch out of a shape stays one: the next source has another
        return _call(node, module, bare(args, images), bare(kwargs, images))
    result = applied(lambda a, k: _call(node, module, a, k), args, kwargs, operands)
    if module is not None or not moves_only(node, ruling, module):
        folder.names.append(str(node.target) if module is not None else node.name)
    return valued(result, operands, where, moves_only(node, ruling, module))


def _activation(value: Value, module: nn.Module | None, degree: int, where: str) -> FoldedQuadratic | Folded:
    """By element of one image: a square, a quadratic, a polynomial, or a power."""
    image = tuple(value.data.shape[1:])

    def spread(c: Tensor, channels: int | None) -> FloatArray:
        shape = () if channels is None else (channels,) + (1,) * (len(image) - 1)
        whole = c.detach().double().view(shape).expand(image)
        return np.ascontiguousarray(whole.reshape(-1).numpy())

    if isinstance(module, Polynomial):
        rows = [spread(c, module.channels) for c in module.coefficients]
        return Folded(np.stack(rows), where)
    if isinstance(module, Quadratic):
        a, b, c = (spread(v, module.channels) for v in (module.a, module.b, module.c))
        return FoldedQuadratic(a, b, c, where)
    one = np.ones(math.prod(image))
    if degree > 2:
        return Folded(np.stack([0 * one] * degree + [one]), where)
    return FoldedQuadratic(one, 0 * one, 0 * one, where)


def _call(node: fx.Node, module: nn.Module | None, args: Any, kwargs: Any) -> Any:
    if module is not None:
        made = _columns(module, args[0]) if len(args) == 1 and not kwargs else None
        return module(*args, **kwargs) if made is None else made
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


def _columns(module: nn.Module, x: Any) -> Tensor | None:
    """What a dense layer gives for unit vectors and zeros (rows, in): columns of its weights, and its bias.

    The same numbers as by multiplying, which takes (rows, in, out) products. None for all else.
    """
    if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
        return None
    if not isinstance(x, Tensor) or x.dim() != 2 or x.shape[1] != module.in_features:
        return None
    if int(torch.count_nonzero(x)) > len(x):
        return None
    rows, columns = x.nonzero(as_tuple=True)
    if bool((rows[1:] == rows[:-1]).any()) or not bool((x[rows, columns] == 1).all()):
        return None
    made = x.new_zeros(len(x), module.out_features)
    made[rows] = module.weight.T[columns]
    return made if module.bias is None else made + module.bias


def _asked(node: fx.Node, args: Sequence[Any]) -> Any:
    """The dimension that `size` is asked for, None for all."""
    return args[1] if str(node.target) == "size" and len(args) > 1 else None


def _counted(result: Any, operands: Sequence[Value], dim: Any) -> Any:
    """A shape whose first number is a batch."""
    if isinstance(result, torch.Size):
        return (Batch(result[0]), *result[1:])
    first = bool(operands) and dim is not None and dim in (0, -operands[0].data.dim())
    return Batch(result) if first and isinstance(result, int) else result


def _attribute(tail: nn.Module, path: str) -> Any:
    value: Any = tail
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _calm(layers: list[Layer], x: FloatArray) -> float:
    """A power of two <= 1 by which x (n, features) is to be multiplied, so that numbers stay precise.

    A high power of a value of 3 is large enough for its rounding to outweigh what follows, and many
    squares in a row leave the range of numbers: values inside stay below `_INSIDE` where some factor
    brings them there, else finite.
    """
    finite = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for factor in 0.5 ** np.arange(_HALVINGS):
            largest = float(np.max([np.abs(value).max(initial=0.0) for value in outputs(layers, x * factor)]))
            if largest <= _INSIDE:
                return float(factor)
            if not finite and np.isfinite(largest):
                finite = float(factor)
    return finite


def _check_against(
    tail: nn.Module, layers: list[Layer], input_shape: tuple[int, ...], own_floats: bool
) -> None:
    """The folded layers must give what the tail gives: guards against what tracing cannot see.

    own_floats  its forward makes float32 tensors, so that it runs in float32 alone
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *input_shape, generator=generator, dtype=torch.float64)
    x = x * _calm(layers, x.numpy().reshape(len(x), -1))
    x, tail = (x.float(), tail.float()) if own_floats else (x, tail.double())
    wanted = tail(x.clone()).numpy().reshape(len(x), -1)
    got = outputs(layers, x.double().numpy().reshape(len(x), -1))[-1]
    scale = max(1.0, float(np.abs(wanted).max()))
    if wanted.shape != got.shape or not np.allclose(
        got, wanted, rtol=0.0, atol=(1e-3 if own_floats else 1e-8) * scale
    ):
        raise ModelError(
            "the folded tail does not give what the tail gives: some layer is not linear or mixes images "
            "of a batch; write the tail as a plain chain of layers"
        )
