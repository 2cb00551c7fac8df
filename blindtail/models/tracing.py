"""A network's forward as a graph, traced while it runs on a small batch.

torch.fx alone gives up where a forward asks for a shape (`if x.shape[2] < 32`, `range(x.size(1))`).
Here every traced value is computed as it is traced, so that such questions have answers. What
still cannot be traced, a branch on the values of an activation, is told with module and line.
"""

from __future__ import annotations

import operator
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindtail.models.in_place import follow_in_place
from blindtail.models.layers import Polynomial, Quadratic, Square

#: Asked of a tensor, these depend on its shape and type, never on its values.
ABOUT_SHAPE = frozenset(
    {
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "shape", "ndim", "dtype", "device"),
        *("is_floating_point", "is_complex", "is_contiguous", "element_size", "get_device", "is_tensor"),
        *("layout", "is_cuda", "requires_grad", "storage_offset", "is_sparse", "is_quantized", "itemsize"),
    }
)
_FACTORIES = ("zeros", "ones", "full", "empty", "arange", "eye", "linspace", "rand", "randn")
_TORCH = str(Path(torch.__file__).parent)
_SKIPPED = (_TORCH, __file__)


class Untraceable(Exception):
    """A forward that no graph describes.

    kind    "values" (branches on an activation's values), "list" (a module that is no
            submodule), "shapes" (a layer refuses what it is given) or "other"
    module  dotted path of the module whose forward it is; "" is the network itself
    line    "file.py:12" or ""
    """

    def __init__(self, kind: str, module: str, line: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.module, self.line, self.reason = kind, module, line, reason


@dataclass(frozen=True)
class Decision:
    """A branch on an activation's values: in whose forward, where, and after how many nodes."""

    module: str
    line: str
    after: int
    outcome: bool


@dataclass
class Traced:
    """A graph and what was seen while it was traced.

    Each node's meta holds `module` (whose forward made it), `line`, `ends` (modules whose
    output it is) and `value`: a tensor's shape as `torch.Size`, or the value itself. After
    `trace_twice` also `third`, the value with three images.
    """

    root: nn.Module
    graph: fx.Graph
    unsteady: str = ""  # how its forward depends on the number of images, after `trace_twice`
    #: Branches on values that were followed as they fell: in `lenient` modules alone.
    decisions: list[Decision] = field(default_factory=list)


def trace(
    root: nn.Module,
    inputs: Sequence[Tensor],
    *,
    opaque: frozenset[str] = frozenset(),
    lenient: frozenset[str] = frozenset(),
    outcomes: Sequence[bool] = (),
) -> Traced:
    """Trace `root` in evaluation mode on `inputs`, each (B, ...); the module itself is given up to it.

    opaque   modules that are not looked into
    lenient  modules whose branches on values are followed as they fall
    outcomes of the first of those branches, in the place of how they fall

    Descends into the owner's modules, stops at PyTorch's and at our activations. Raises `Untraceable`.
    """
    tracer = _Tracer(inputs, opaque, lenient, outcomes)
    try:
        with torch.no_grad(), _traced_factories(tracer):
            graph = tracer.trace(root)
    except Untraceable:
        raise
    except Exception as error:
        kind = "list" if isinstance(error, NameError) and "submodule" in str(error) else "other"
        if tracer.refused is not None:
            kind = "shapes"
        module = tracer.refused or (tracer.inside[-1] if tracer.inside else "")
        raise Untraceable(kind, module, line_of_error(error), first_line(error)) from error
    for node in graph.nodes:
        node.meta["value"] = _described(tracer.values.get(node))
        for name, default in (("module", ""), ("line", ""), ("ends", [])):
            node.meta.setdefault(name, default)
    follow_in_place(graph, root)
    return Traced(root, graph, decisions=tracer.decisions)


@contextmanager
def _traced_factories(tracer: _Tracer) -> Iterator[None]:
    """`torch.zeros(x.shape[0], 4)` takes no traced number by itself: it is traced where it is given one."""

    def traced(function: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            given = [*args, *kwargs.values()]
            given += [v for a in given if isinstance(a, tuple | list) for v in a]
            if not tracer.computing and any(isinstance(v, fx.Proxy) for v in given):
                return tracer.create_proxy("call_function", function, args, kwargs)
            return function(*args, **kwargs)

        return make

    held = {name: getattr(torch, name) for name in _FACTORIES}
    try:
        for name, function in held.items():
            setattr(torch, name, traced(function))
        yield
    finally:
        for name, function in held.items():
            setattr(torch, name, function)


def unwrapped(module: nn.Module) -> nn.Module:
    """The network inside torch.compile's and DataParallel's wrappers."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(module, attribute, None)
        wrapper = type(module).__module__.startswith(("torch._dynamo", "torch.nn.parallel"))
        if wrapper and isinstance(inner, nn.Module):
            module = inner
    return module


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name."""
    lines = str(error).strip().splitlines()
    text = lines[0].rstrip(". ") if lines else type(error).__name__
    return text.replace("_Proxy", "a traced value").replace("Proxy", "a traced value")


def line_of_error(error: BaseException) -> str:
    """Where in the owner's code an error began: "file.py:12", or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    for frame in reversed(frames):
        if not frame.filename.startswith((_TORCH, ours, "<")):
            return f"{Path(frame.filename).name}:{frame.lineno}"
    return ""


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, torch.Size):
        return tuple(value)
    if type(value) in (tuple, list):
        return tuple(_described(v) for v in value)
    return value


class _Proxy(fx.Proxy):
    """Answers what is asked of shapes with the value at hand."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> Any:
        value = self.tracer.values.get(self.node)
        if isinstance(value, Tensor) and not callable(getattr(value, name, len)):
            if name in ABOUT_SHAPE and name != "shape":
                return getattr(value, name)
            return self.tracer.create_proxy("call_function", getattr, (self, name), {})
        return super().__getattr__(name)

    def __len__(self) -> int:
        value = self.tracer.values.get(self.node)
        return len(value) if isinstance(value, Tensor) else len(self.tracer.known(self))

    def __index__(self) -> int:
        return operator.index(self.tracer.known(self))

    def __int__(self) -> int:
        return int(self.tracer.known(self))

    def __float__(self) -> float:
        return float(self.tracer.known(self))

    def __iadd__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.iadd, (self, other), {})

    def __isub__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.isub, (self, other), {})

    def __imul__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.imul, (self, other), {})

    def __itruediv__(self, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", operator.itruediv, (self, other), {})

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})


class _Tracer(fx.Tracer):
    def __init__(
        self,
        inputs: Sequence[Tensor],
        opaque: frozenset[str],
        lenient: frozenset[str],
        outcomes: Sequence[bool],
    ) -> None:
        super().__init__()
        self.outcomes = outcomes
        self.given, self.opaque, self.lenient = inputs, opaque, lenient
        self.values: dict[fx.Node, Any] = {}
        self.from_data: set[fx.Node] = set()  # numbers that were read out of an activation
        self.inside: list[str] = [""]
        self.refused: str | None = None  # layer that did not take its input
        self.computing = False  # modules are called for their values, not to be traced
        self.decisions: list[Decision] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name in self.opaque or isinstance(m, Square | Quadratic | Polynomial):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> Any:
        """As many inputs as there are; parameters with a default keep it."""
        code = root_fn.__code__
        names = list(code.co_varnames[1 : code.co_argcount])
        names += [f"input_{i}" for i in range(len(names), len(self.given))]
        made = []
        for name, value in zip(names, self.given, strict=False):
            made.append(self.create_proxy("placeholder", name, (), {}))
            self.values[made[-1].node] = value
        return root_fn, [self.root, *made]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **options: Any
    ) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **options)
        node = proxy.node
        node.meta["module"], node.meta["line"] = self.inside[-1], _here()
        if kind != "placeholder":
            self.computing = True
            try:
                self._compute(node)
            finally:
                self.computing = False
        return proxy

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, fx.Proxy]) -> Any:
        if self.computing:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def _compute(self, node: fx.Node) -> None:
        args = fx.node.map_arg(node.args, self._value)
        kwargs = fx.node.map_arg(node.kwargs, self._value)
        name = str(node.target) if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        target: Any = node.target
        if node.op == "get_attr":
            value = attribute(self.root, str(target))
        elif node.op == "call_module":
            try:
                value = self.root.get_submodule(str(target))(*args, **kwargs)
            except Exception:
                self.refused = str(target)
                raise
        elif node.op == "call_method":
            value = getattr(args[0], str(target))(*args[1:], **kwargs)
        else:
            value = target(*args, **kwargs)
        self.values[node] = value
        sources = node.all_input_nodes
        about = name in ABOUT_SHAPE or (node.target is getattr and args[1] in ABOUT_SHAPE)
        read = not about and not _holds_tensor(value) and any(_holds_tensor(self._value(n)) for n in sources)
        if (read and node.op != "get_attr") or any(n in self.from_data for n in sources):
            self.from_data.add(node)

    def _value(self, node: fx.Node) -> Any:
        if node not in self.values and node.op == "get_attr":
            self.values[node] = attribute(self.root, str(node.target))
        return self.values[node]

    def known(self, proxy: fx.Proxy) -> Any:
        """The value of something that does not depend on an activation's values. Raises `Untraceable`."""
        value = self._value(proxy.node)
        if isinstance(value, Tensor) or proxy.node in self.from_data:
            self._decide()
            return value.item() if isinstance(value, Tensor) else value
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        index = len(self.decisions)
        outcome = bool(self.known(obj))
        if len(self.decisions) > index:
            outcome = self.outcomes[index] if index < len(self.outcomes) else outcome
            self.decisions[index] = replace(self.decisions[index], outcome=outcome)
        return outcome

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        value = self._value(obj.node)
        if isinstance(value, Tensor | tuple | list):
            return iter([operator.getitem(obj, i) for i in range(len(value))])
        return super().iter(obj)

    def _decide(self) -> None:
        owner, line = self.inside[-1], _here()
        if owner not in self.lenient:
            raise Untraceable("values", owner, line, "its forward depends on the values of an activation")
        self.decisions.append(Decision(owner, line, len(self.graph.nodes), True))

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.computing:
            return forward(*args, **kwargs)
        path = self.path_of_module(m)
        leaf = self.is_leaf_module(m, path)
        if not leaf:
            self.inside.append(path)
        result = super().call_module(m, forward, args, kwargs)
        if not leaf:
            self.inside.pop()
        if isinstance(result, fx.Proxy) and not leaf:
            result.node.meta.setdefault("ends", []).append(path)
        return result


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, tuple | list) and any(_holds_tensor(v) for v in value)
    )


def attribute(root: nn.Module, path: str) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _here() -> str:
    """The owner's line that is running: "file.py:12", or ""."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED) and not name.startswith("<"):
            return f"{Path(name).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


__all__ = [
    "ABOUT_SHAPE",
    "Decision",
    "Traced",
    "Untraceable",
    "first_line",
    "line_of_error",
    "trace",
    "unwrapped",
]
