"""What CKKS makes of each PyTorch operation: the one table that the compiler's front end and `lint` go by.

An operation of an activation is *linear* (it folds into the affine map around it), a *square* (one
level), or *refused*: then it has a reason and, where there is one, a rewrite. Leaves of Podschwadt et
al., "SoK: Privacy-preserving Deep Learning with Homomorphic Encryption" (arXiv 2112.12855): activation
functions, pooling, normalisation, and what has no polynomial form at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from blindtail.he.layers import MAX_SHIFT
from blindtail.models import operation_names as names
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.operation_names import name_of
from blindtail.models.rewrites import Rewrite, average_pool, batch_norm
from blindtail.models.rulings import Effect, Live, Ruling, lives
from blindtail.models.tracing import ABOUT_SHAPE

TRAIN = "train again (see `blindtail train --help`)"
USE_SQUARE = f"use blindtail.models.layers.Square or Quadratic instead and {TRAIN}"
#: Powers that are taken as they are written.
MOST_POWER = 16
USE_AVERAGE = "use AvgPool2d, or a stride in the convolution before it, and train again"
USE_BATCHNORM = "use BatchNorm, whose statistics are fixed after training, and train again"
NOT_KNOWN = "is not known to this release as linear or as a square"
AT_THE_EDGE = "cut the network after it, so that it stays at the edge"


def rule_module(module: nn.Module, args: Sequence[Any], last: bool = False) -> Ruling:
    """The verdict on a layer. `last`: nothing but reshapes follows it."""
    kind = type(module).__name__
    shape = args[0].shape if args and isinstance(args[0], Live) else ()
    if isinstance(module, Square):
        return Ruling(Effect.SQUARE, kind)
    if isinstance(module, Polynomial):
        return Ruling(Effect.SQUARE, kind)
    if isinstance(module, Quadratic):
        return _quadratic(module)
    base = next((c for c in names.LINEAR_MODULES if isinstance(module, c)), None)
    if isinstance(module, names.NORMS_WITH_STATISTICS) and module.running_mean is None:
        reason = "keeps no running statistics, so it divides by those of its input"
        return Ruling(
            Effect.REFUSED,
            kind,
            reason,
            "set track_running_stats=True and train again",
            batch_norm(module, shape),
        )
    # A subclass with a forward of its own is not what its base is.
    if base is not None and (type(module).forward is base.forward or kind.startswith("Parametrized")):
        if isinstance(module, nn.Flatten) and (
            module.start_dim != 1 or module.end_dim not in (-1, len(shape) - 1)
        ):
            return _flatten(module, shape)
        return Ruling(Effect.LINEAR, kind)
    if len(lives(args)) == 0:
        return Ruling(Effect.CONSTANT, kind)
    return _refused(names.layer_name(module), kind, shape, last, module=module, args=args)


def rule_call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any], last: bool = False) -> Ruling:
    """The verdict on a function or method; operands that depend on the activation are `Live`."""
    if isinstance(kwargs.get("input"), Live):
        args, kwargs = (kwargs["input"], *args), {k: v for k, v in kwargs.items() if k != "input"}
    name, live = name_of(node), [*lives(args), *lives(kwargs)]
    kind = _written(node, name)
    if not live or name in ("_assert", "assert_fn"):
        return Ruling(Effect.CONSTANT, kind)
    if name in ABOUT_SHAPE or (name == "getitem" and not isinstance(args[0], Live) and not lives(args[0])):
        return Ruling(Effect.SHAPE, kind)
    if name in names.DROPOUTS and _dropping(args, kwargs):
        reason = "drops values in evaluation too"
        return Ruling(
            Effect.REFUSED,
            kind,
            reason,
            "pass training=self.training",
            Rewrite(nn.Dropout, (_p(args, kwargs),)),
        )
    if name == "getitem" and isinstance(args[0], tuple | list):
        return Ruling(Effect.LINEAR, kind)  # one of several results
    if name in names.LIKE:
        return Ruling(Effect.SHAPE, kind)
    if name in names.RANDOM:
        return Ruling(
            Effect.REFUSED, kind, "is random", "leave the noise out of evaluation: if self.training:"
        )
    if name in names.CASTS and any(
        isinstance(a, torch.dtype) and not a.is_floating_point for a in _all(args, kwargs)
    ):
        return Ruling(Effect.REFUSED, kind, "rounds to whole numbers", AT_THE_EDGE)
    if name in names.ALONG and _along_batch(name, args, kwargs, live[0]):
        return Ruling(Effect.REFUSED, kind, "mixes the images of a batch", "use another dimension than 0")
    if name == "setitem":
        reason = "writes into a part of an activation"
        return Ruling(
            Effect.REFUSED, kind, reason, "build the whole with torch.cat, or a product with a constant mask"
        )
    if name == "getitem" and isinstance(args[0], Live) and (lives(args[1]) or not _keeps_batch(args[1])):
        reason = "picks images of a batch or places that depend on values"
        return Ruling(Effect.REFUSED, kind, reason, "keep whole activations and batches: index as x[:, ...]")
    if name == "addcmul" and len(args) >= 3 and len(lives(args[1:3])) < 2:
        return Ruling(Effect.LINEAR, kind)
    if name == "where" and len(args) == 3 and not lives(args[0]):
        return Ruling(Effect.LINEAR, kind)  # a constant choice
    if name in names.SUMS and (name != "lerp" or not lives(args[2:])):
        return Ruling(Effect.LINEAR, kind)
    if len(live) == 1 and _linear_in_one(name, args, kwargs):
        return Ruling(Effect.LINEAR, kind)
    return _product(node, name, kind, args, kwargs, live) or _refused(
        name, kind, live[0].shape, last, args=args, kwargs=kwargs
    )


def _all(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    return [*args, *kwargs.values()]


def _along_batch(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], live: Live) -> bool:
    place = 2 if name in ("roll", "diff") else 1
    dim = kwargs.get("dim", kwargs.get("dims", args[place] if len(args) > place else None))
    dims = dim if isinstance(dim, tuple | list) else [dim]
    return any(d in (0, -len(live.shape)) for d in dims if isinstance(d, int))


def moves_only(node: fx.Node, ruling: Ruling, module: nn.Module | None) -> bool:
    """Whether an operation changes no value: reshapes, Dropout, Identity."""
    if ruling.effect is not Effect.LINEAR:
        return ruling.effect in (Effect.SHAPE, Effect.CONSTANT)
    if module is not None:
        return isinstance(module, nn.Flatten | nn.Unflatten | nn.Identity | nn.modules.dropout._DropoutNd)
    return name_of(node) in names.MOVES


def _linear_in_one(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    if name in ("linear", "conv1d", "conv2d", "conv3d", "batch_norm", "pad", "gather", "masked_fill"):
        if not (args and isinstance(args[0], Live)):
            return False  # an activation as a weight
        if name == "batch_norm":
            training = kwargs.get("training", args[5] if len(args) > 5 else False)
            return not training and (args[1] if len(args) > 1 else kwargs.get("running_mean")) is not None
        return True
    if name in ("mul", "matmul", "rmatmul"):
        return True
    if name == "truediv":
        rounding = kwargs.get("rounding_mode")
        return isinstance(args[0], Live) and rounding is None
    if name == "pow":
        return isinstance(args[0], Live) and len(args) > 1 and args[1] == 1
    if name == "where":
        return not lives(args[0])
    if name in ("mean", "sum"):
        dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis"))
        return dim is not None
    return name in names.LINEAR


def _product(
    node: fx.Node,
    name: str,
    kind: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    live: Sequence[Live],
) -> Ruling | None:
    """Squares, powers, and products of activations."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if name == "square" or power(name, args, kwargs):
        return Ruling(Effect.SQUARE, kind)
    if name == "mul" and len(live) == 2 and len(args) > 1 and args[0] is args[1]:
        return Ruling(Effect.SQUARE, kind)
    if name == "pow" and isinstance(args[0], Live):
        reason = f"a power of {exponent} is no polynomial of degree 2 to {MOST_POWER}"
        return Ruling(Effect.REFUSED, kind, reason, USE_SQUARE, Rewrite(Square))
    if name in ("mul", "matmul", "bmm", "mm", "einsum", "addcmul", "linear", "conv2d", "tensordot", "inner"):
        reason = "multiplies two different activations; what runs encrypted is polynomials of one"
        if name != "mul":
            return Ruling(Effect.REFUSED, kind, reason, AT_THE_EDGE)
        return Ruling(
            Effect.REFUSED,
            kind,
            reason,
            "write xy as ((x + y)^2 - (x - y)^2) / 4 where both come straight from linear layers; "
            "a x^2 + b x + c of one activation, also x * sigmoid(x), is blindtail.models.layers.Quadratic; "
            f"else leave the gate out and train again, or {AT_THE_EDGE}",
            code="s = self.square(torch.cat([x + y, x - y], 1)).chunk(2, 1); z = (s[0] - s[1]) / 4",
        )
    if name in ("truediv", "rdiv", "floordiv", "floor_divide", "remainder", "fmod", "mod", "reciprocal"):
        if name == "truediv" and isinstance(args[0], Live) and not lives(args[1:]):
            return None
        reason = "divides by an activation, or rounds: no polynomial does"
        return Ruling(
            Effect.REFUSED, kind, reason, f"leave the division out, scale by a constant, or {AT_THE_EDGE}"
        )
    return None


def power(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """The exponent of a power that is a polynomial to evaluate; 0 for anything else."""
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    if name != "pow" or not args or not isinstance(args[0], Live):
        return 0
    return next((k for k in range(2, MOST_POWER + 1) if _equals(exponent, k)), 0)


def _refused(
    name: str,
    kind: str,
    shape: tuple[int, ...],
    last: bool,
    *,
    module: nn.Module | None = None,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Ruling:
    """Why an operation is not polynomial, and what takes its place."""
    if last and name in names.LAST_ONLY:
        advice = f"end the tail in plain logits; the edge applies {name} after decryption"
        return Ruling(Effect.REFUSED, kind, "is no polynomial", advice, Rewrite(nn.Identity))
    if name == "glu":
        reason = "multiplies one half of the channels with a sigmoid of the other"
        return Ruling(Effect.REFUSED, kind, reason, f"halve the layer before it and {USE_SQUARE}")
    if name in names.ELEMENTWISE:
        rewrite = Rewrite(Quadratic) if name in names.SMOOTH else Rewrite(Square)
        return Ruling(Effect.REFUSED, kind, "is no polynomial", USE_SQUARE, rewrite)
    if name in names.POOLS and len(args) + len(kwargs or {}) > 1:
        dims = (kwargs or {}).get("dim", args[1] if len(args) > 1 else None)
        code = f"x = x.mean({dims!r}, keepdim={(kwargs or {}).get('keepdim', False)})  # in place of {kind}"
        return Ruling(Effect.REFUSED, kind, "compares values", f"take the mean and {TRAIN}", code=code)
    if "pool" in name:
        rewrite_pool = average_pool(name, module, args, kwargs or {})
        return Ruling(
            Effect.REFUSED, kind, "takes the largest, which compares values", USE_AVERAGE, rewrite_pool
        )
    if name == "normalize":
        reason = "divides by a norm of the activation"
        return Ruling(Effect.REFUSED, kind, reason, USE_BATCHNORM, batch_norm(module, shape))
    if any(
        part in name for part in ("layernorm", "groupnorm", "instancenorm", "rmsnorm", "responsenorm")
    ) or (
        name in ("layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm", "batch_norm")
    ):
        reason = "divides by statistics of its own input"
        return Ruling(Effect.REFUSED, kind, reason, USE_BATCHNORM, batch_norm(module, shape))
    if name in ("lstm", "gru", "rnn") or name.endswith(("lstmcell", "grucell", "rnncell", "cell")):
        reason = "applies sigmoid or tanh step after step"
        return Ruling(Effect.REFUSED, kind, reason, AT_THE_EDGE)
    if "attention" in name or "transformer" in name:
        return Ruling(Effect.REFUSED, kind, names.ATTENTION, AT_THE_EDGE)
    if name in names.COMPARES:
        return Ruling(Effect.REFUSED, kind, "compares values, which no polynomial does", AT_THE_EDGE)
    if name in names.EDGE:
        return Ruling(Effect.REFUSED, kind, names.EDGE[name], AT_THE_EDGE)
    if name in ("mean", "sum", "var", "std", "prod", "max", "min"):
        reason = "mixes the images of a batch" if name in ("mean", "sum") else "is no square of its input"
        return Ruling(
            Effect.REFUSED,
            kind,
            reason,
            "name the dimensions, without 0: for instance x.mean((2, 3))"
            if name in ("mean", "sum")
            else AT_THE_EDGE,
        )
    reason = NOT_KNOWN
    return Ruling(
        Effect.REFUSED,
        kind,
        reason,
        f"write it with layers that are (docs/guide/model-owner.md), or {AT_THE_EDGE}",
    )


def _quadratic(module: Quadratic) -> Ruling:
    a, b = module.a.detach(), module.b.detach()
    if bool((a == 0).any()):
        reason = "has a quadratic coefficient a of 0 for some channel"
        advice = "keep |a| away from 0: call project_() after each training step"
    else:
        shift = float((b / (2 * a)).abs().max())
        if shift <= MAX_SHIFT:
            return Ruling(Effect.SQUARE, "Quadratic")
        reason = f"has |b / 2a| up to {shift:.1f}, above {MAX_SHIFT:g}: precision would go"
        advice = "call project_() after each training step"
    mended = Rewrite(Quadratic, (module.channels,))
    return Ruling(Effect.REFUSED, "Quadratic", reason, advice, mended, code="project_()")


def _flatten(module: nn.Flatten, shape: tuple[int, ...]) -> Ruling:
    """Dimension 0 must stay; a partial Flatten behind it only moves values."""
    if (
        math.prod(shape[1:]) == 1
        or module.start_dim >= 1
        or (shape and -len(shape) + 1 <= module.start_dim < 0)
    ):
        return Ruling(Effect.LINEAR, "Flatten")
    reason = "must flatten everything but the batch"
    return Ruling(Effect.REFUSED, "Flatten", reason, "use nn.Flatten()", Rewrite(nn.Flatten))


def _equals(value: Any, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _dropping(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    p = _p(args, kwargs)
    return bool(kwargs.get("training", args[2] if len(args) > 2 else True)) and p != 0


def _p(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return kwargs.get("p", args[1] if len(args) > 1 else 0.5)


def _keeps_batch(index: Any) -> bool:
    """x[:, ...] and x[..., i]; x[0] and x[None] do not."""
    if not isinstance(index, tuple):
        return index is Ellipsis or index == slice(None)
    first = index[0] if index else slice(None)
    return first is Ellipsis or (isinstance(first, slice) and first == slice(None))


def _written(node: fx.Node, name: str) -> str:
    """How the owner wrote it: "F.relu", "torch.cat", "x.view" or "x * y"."""
    signs = {
        "mul": "x * y",
        "add": "x + y",
        "sub": "x - y",
        "truediv": "x / y",
        "matmul": "x @ y",
        "pow": "x ** y",
    }
    if node.op == "call_method":
        return f"x.{node.target}()"
    module = str(getattr(node.target, "__module__", "") or "")
    if name == "getitem":
        return "x[...]"
    if module.startswith("_operator") and name in signs:
        return signs[name]
    if "functional" in module or "_jit_internal" in module or module.startswith("torch._C._nn"):
        return f"F.{name}"
    return f"torch.{name}"


def nothing_follows(node: fx.Node, root: nn.Module) -> bool:
    """Whether all that comes after a node is reshapes and the output."""
    for user in node.users:
        module = root.get_submodule(str(user.target)) if user.op == "call_module" else None
        moves = (
            name_of(user) in names.MOVES if module is None else isinstance(module, nn.Flatten | nn.Identity)
        )
        if user.op != "output" and not (moves and nothing_follows(user, root)):
            return False
    return True


__all__ = [
    "moves_only",
    "name_of",
    "nothing_follows",
    "rule_call",
    "rule_module",
]
