"""From a trained PyTorch tail to affine maps and quadratics.

A tail is traced with torch.fx and run, in float64, on a basis: row 0 of the
batch is the zero vector, row i + 1 the i-th unit vector of the last
activation's output (or of the tail's input). Whatever chain of linear layers
follows, its dense matrix is f(e_i) - f(0) and its bias f(0). An activation ends
one map and starts the next basis.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.he.layers import Affine, Layer
from blindtail.he.layers import Quadratic as FoldedQuadratic
from blindtail.models.layers import Quadratic, Square

#: Linear layers that fold; in evaluation mode each is an affine map of its input.
LINEAR_MODULES: tuple[type[nn.Module], ...] = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.Flatten,
    nn.Unflatten,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Identity,
    nn.ZeroPad2d,
)
_LINEAR_FUNCTIONS: frozenset[Callable[..., Any]] = frozenset(
    {torch.flatten, F.linear, F.conv2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.dropout}
)
#: Most values an activation may have: folding runs one image for each, in float64.
MAX_WIDTH = 8192
_RESHAPES = frozenset({"flatten", "view", "reshape", "contiguous"})
_USE_SQUARE = (
    "use blindtail.models.layers.Square or Quadratic instead and train again (see `blindtail train --help`)"
)
_USE_AVERAGE = "use AvgPool2d, or a stride in the convolution before it, and train again"
_USE_BATCHNORM = "use BatchNorm, whose statistics are fixed after training, and train again"
_NO_LOGIT_CHANGE = "end the tail in plain logits; the edge applies softmax after decryption"


def _rewrite(kind: str) -> str:
    """What to put in the place of a layer that cannot be evaluated encrypted."""
    name = kind.lower()
    if "max" in name and "pool" in name:
        return _USE_AVERAGE
    if "softmax" in name or "logsigmoid" in name:
        return _NO_LOGIT_CHANGE
    if any(part in name for part in ("layernorm", "groupnorm", "instancenorm", "layer_norm")):
        return _USE_BATCHNORM
    if "attention" in name or "transformer" in name or name in ("lstm", "gru", "rnn"):
        return "cut the network after it, so that it stays at the edge"
    return _USE_SQUARE


@dataclass(frozen=True)
class _Value:
    """A traced tensor: images of the basis of `segment`, shape (1 + width, ...)."""

    segment: int
    data: Tensor


@dataclass
class _Folder:
    """Runs a traced tail on bases and collects what it finds."""

    layers: list[Layer] = field(default_factory=list)
    segment: int = 0
    parts: list[str] = field(default_factory=list)  # names of linear layers since the last activation
    values: list[_Value] = field(default_factory=list)

    def basis(self, shape: tuple[int, ...], where: str) -> _Value:
        width = math.prod(shape)
        if not 1 <= width <= MAX_WIDTH:
            raise ModelError(
                f"tail layer {where}: takes {width} values, a tail may hold 1 to {MAX_WIDTH}: "
                "cut the network later, or pool before the cut"
            )
        rows = torch.zeros(width + 1, width, dtype=torch.float64)
        rows[1:] = torch.eye(width, dtype=torch.float64)
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
    for path, tensor in tail.state_dict().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"tail layer {path}: holds NaN or infinite weights; train or load the model again"
            )
    tail = copy.deepcopy(tail).double().eval()
    folder = _Folder()
    with torch.no_grad():
        out = _run(tail, folder, tuple(input_shape))
        if out.segment != folder.segment:
            raise ModelError("the tail's output goes around its last activation: remove the skip connection")
        folder.close(out, "output")
        _check_against(tail, folder.layers, tuple(input_shape))
    return folder.layers


class _Tracer(fx.Tracer):
    """Descends into the owner's modules, stops at PyTorch's and at our activations."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, Square | Quadratic) or super().is_leaf_module(module, path)


def _run(tail: nn.Module, folder: _Folder, input_shape: tuple[int, ...]) -> _Value:
    if isinstance(tail, Square | Quadratic) or _is_leaf(tail):
        tail = nn.Sequential(tail)
    try:
        graph = _Tracer().trace(tail)
    except (fx.proxy.TraceError, TypeError, RuntimeError, ValueError) as error:
        raise ModelError(
            f"the tail's forward depends on its input's values or cannot be traced ({error}): "
            "write it as a plain chain of layers, for instance nn.Sequential"
        ) from error
    modules = dict(tail.named_modules())
    env: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            if env:
                raise ModelError("a tail takes one input, the activation at the cut")
            env[node.name] = folder.basis(input_shape, "input")
            continue
        args = fx.node.map_arg(node.args, lambda n: env[n.name])
        kwargs = fx.node.map_arg(node.kwargs, lambda n: env[n.name])
        where = str(node.target) if node.op == "call_module" else node.name
        try:
            if node.op == "output":
                if not isinstance(args[0], _Value):
                    raise ModelError("a tail gives one tensor of logits")
                return args[0]
            if node.op == "get_attr":
                env[node.name] = _attribute(tail, str(node.target))
            elif node.op == "call_module":
                env[node.name] = _module(folder, modules[str(node.target)], args, where)
            else:
                env[node.name] = _call(folder, node, args, kwargs)
        except (RuntimeError, IndexError, TypeError, AttributeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(f"tail layer {where}: does not fit its input: {reason}") from error
    raise ModelError("the tail returns nothing")


def _is_leaf(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential)


def _attribute(tail: nn.Module, path: str) -> Any:
    value: Any = tail
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _current(folder: _Folder, value: Any, where: str) -> _Value:
    if not isinstance(value, _Value):
        raise ModelError(f"tail layer {where}: takes something that is no activation")
    if value.segment != folder.segment:
        raise ModelError(
            f"tail layer {where}: uses values from before an activation; "
            "a tail has no skip connection around Square or Quadratic: remove it and train again"
        )
    return value


def _module(folder: _Folder, module: nn.Module, args: tuple[Any, ...], where: str) -> _Value:
    value = _current(folder, args[0], where)
    if isinstance(module, Square):
        one, zero = torch.ones(()), torch.zeros(())
        return folder.activate(value, one, zero, zero, where)
    if isinstance(module, Quadratic):
        shape = () if module.channels is None else (module.channels,) + (1,) * (value.data.dim() - 2)
        a, b, c = (v.detach().view(shape) for v in (module.a, module.b, module.c))
        return folder.activate(value, a, b, c, where)
    kind = type(module).__name__
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is None:
        raise ModelError(
            f"tail layer {where} ({kind}): keeps no running statistics; set track_running_stats=True"
        )
    if type(module) not in LINEAR_MODULES:
        raise ModelError(f"tail layer {where} ({kind}): cannot run encrypted; {_rewrite(kind)}")
    if isinstance(module, nn.Flatten) and (
        module.start_dim != 1 or module.end_dim not in (-1, value.data.dim() - 1)
    ):
        raise ModelError(f"tail layer {where} (Flatten): must flatten everything but the batch")
    folder.parts.append(where)
    return _Value(value.segment, module(value.data))


def _call(folder: _Folder, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions and tensor methods: reshapes, sums of branches, scaling, and x * x."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    where, operands = node.name, [v for v in args if isinstance(v, _Value)]
    if node.target in (getattr, operator.getitem) or name in ("size", "dim"):
        return _shape_of(node, args, name, where)
    for value in operands:
        _current(folder, value, where)
    if name in ("mul", "square", "pow", "__mul__", "__pow__"):
        other = args[1] if len(args) > 1 else None
        if name == "square" or (name in ("pow", "__pow__") and other == 2) or other is args[0]:
            one, zero = torch.ones(()), torch.zeros(())
            return folder.activate(operands[0], one, zero, zero, where)
        if name in ("mul", "__mul__") and len(operands) == 1:
            left, right = (v.data if isinstance(v, _Value) else v for v in args[:2])
            return _Value(folder.segment, _linear(left * right, where))
    elif name in ("add", "sub", "__add__", "__sub__", "iadd") and not kwargs:
        left, right = (v.data if isinstance(v, _Value) else v for v in args[:2])
        return _Value(folder.segment, _linear(left - right if "sub" in name else left + right, where))
    elif name == "truediv" and len(operands) == 1 and operands[0] is args[0]:
        return _Value(folder.segment, _linear(operands[0].data / args[1], where))
    elif len(operands) == 1 and (
        (node.op == "call_function" and node.target in _LINEAR_FUNCTIONS) or name in _RESHAPES
    ):
        data, rest = operands[0].data, args[1:]
        function = node.target if callable(node.target) else getattr(Tensor, str(name))
        if name == "dropout":
            result = data  # a tail is folded in evaluation mode
        else:
            result = function(data, *rest, **kwargs)
        if result.shape[0] != data.shape[0]:
            raise ModelError(f"tail layer {where}: must keep the batch as dimension 0 (use flatten(1))")
        if name not in _RESHAPES and name not in ("flatten", "dropout"):
            folder.parts.append(where)
        return _Value(folder.segment, result)
    raise ModelError(f"tail layer {where} ({name}): cannot run encrypted; {_rewrite(str(name))}")


def _linear(result: Tensor, where: str) -> Tensor:
    if result.dim() < 2:
        raise ModelError(f"tail layer {where}: must keep the batch as dimension 0")
    return result


def _shape_of(node: fx.Node, args: tuple[Any, ...], name: str, where: str) -> Any:
    """x.shape, x.size(...), and indexing into either; activations themselves are not indexed."""
    source, rest = args[0], args[1:]
    if node.target is operator.getitem and isinstance(source, tuple):
        return source[rest[0]]
    if node.target is getattr and rest == ("shape",) and isinstance(source, _Value):
        return tuple(source.data.shape)
    if name == "size" and isinstance(source, _Value):
        return source.data.shape[rest[0]] if rest else tuple(source.data.shape)
    if name == "dim" and isinstance(source, _Value):
        return source.data.dim()
    raise ModelError(f"tail layer {where} ({name}): cannot run encrypted; keep whole activations")


def _check_against(tail: nn.Module, layers: list[Layer], input_shape: tuple[int, ...]) -> None:
    """The folded layers must give what the tail gives: guards against what tracing cannot see."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, *input_shape, generator=generator, dtype=torch.float64)
    wanted = tail(x).numpy().reshape(len(x), -1)
    got = x.numpy().reshape(len(x), -1)
    for layer in layers:
        got = layer(got)
    scale = max(1.0, float(np.abs(wanted).max()))
    if wanted.shape != got.shape or not np.allclose(got, wanted, rtol=0.0, atol=1e-8 * scale):
        raise ModelError(
            "the folded tail does not give what the tail gives: some layer is not linear or mixes images "
            "of a batch; write the tail as a plain chain of layers"
        )
