"""Several tensors at one place of a network, and the one flat activation that they make.

    stage -> (main, skip)     tensors (B, 8, 4, 4) and (B, 4, 8, 8)
    flat((main, skip))        (B, 384): each flattened in (C, H, W) order, one after the other
    Flat(tail, form)          takes those (B, 384) and gives tail(main, skip)

What the edge encrypts, what an ONNX graph gives and what the compiler folds is always one
activation. Where a stage gives a tuple it is the flat one, and the tensors are slices of it.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from blindtail.errors import ModelError
from blindtail.models.layers import Polynomial, Quadratic, Square
from blindtail.models.tracing import unwrapped

Shape = tuple[int, ...]
#: What a stage gives: one tensor (B, ...), or a tuple of them.
Activation = Tensor | tuple[Tensor, ...]
#: Most tensors in such a tuple.
MOST_TENSORS = 8


@dataclass(frozen=True)
class Form:
    """What a piece of a network gives for one image: shapes without the batch, and whether in a tuple.

    A tuple of one tensor is a tuple: its activation is flat.
    """

    shapes: tuple[Shape, ...]
    several: bool = False

    @property
    def shape(self) -> Shape:
        """Of the one activation: the tensor's own, or (features,) of all of them."""
        return (_values(self.shapes),) if self.several else self.shapes[0]

    @property
    def image(self) -> Shape | None:
        """Images of one height and width, channel after channel, are one image (C, H, W)."""
        if any(len(shape) != 3 or shape[1:] != self.shapes[0][1:] for shape in self.shapes):
            return None
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])

    def told(self) -> str:
        return f"{len(self.shapes)} tensors {self.shapes}" if self.several else f"one tensor {self.shapes[0]}"

    def zeros(self, images: int = 1) -> list[Tensor]:
        return [torch.zeros(images, *shape) for shape in self.shapes]


def _values(shapes: Sequence[Shape]) -> int:
    return sum(map(math.prod, shapes))


def several(shapes: Sequence[Shape]) -> Form:
    """Of tensors of these shapes. Raises `ModelError` for none, or too many."""
    if not 1 <= len(shapes) <= MOST_TENSORS:
        raise ModelError(f"{len(shapes)} tensors at one place: 1 to {MOST_TENSORS} can meet in a tail")
    return Form(tuple(tuple(shape) for shape in shapes), True)


def operands(activation: Activation) -> tuple[Tensor, ...]:
    """What the next piece is called with."""
    return (activation,) if isinstance(activation, Tensor) else tuple(activation)


def flat(activation: Activation) -> Tensor:
    """(B, features): the tensors flattened, one after the other."""
    return torch.cat([part.flatten(1) for part in operands(activation)], 1)


def form_of(output: Any, pair: Any, name: str) -> Form:
    """The form of what a stage gave for one image, and where that is no tensor, for two (`pair`).

    Raises `ModelError` naming the stage.
    """
    if isinstance(output, Tensor):
        if not _batched(output):
            raise ModelError(f"{name} must turn one batch (B, ...) into one tensor (B, ...)")
        return Form((tuple(output.shape[1:]),))
    if not isinstance(output, tuple | list):
        raise ModelError(
            f"{name} must turn one batch (B, ...) into one tensor (B, ...), or into a tuple of 1 to "
            f"{MOST_TENSORS} of them; it gives a {type(output).__name__}"
        )
    if not 1 <= len(output) <= MOST_TENSORS:
        raise ModelError(
            f"{name} gives a tuple of {len(output)}: give one tensor (B, ...), or a tuple of 1 to "
            f"{MOST_TENSORS} of them (torch.cat joins those that go the same way)"
        )
    for i, part in enumerate(output):
        if trouble := _trouble(part) or _moved(part, pair[i]):
            raise ModelError(
                f"{name} gives a tuple whose item {i} {trouble}: each must be a tensor of floats (B, ...)"
            )
    return several([tuple(part.shape[1:]) for part in output])


def _batched(output: Tensor) -> bool:
    """Whether it is one image's, the batch of one first."""
    return output.dim() >= 2 and output.shape[0] == 1


def _trouble(part: Any) -> str:
    """What keeps an item of a tuple from being an activation of one image, or ""."""
    if not isinstance(part, Tensor):
        return f"is a {type(part).__name__}"
    if not _batched(part):
        return f"has shape {tuple(part.shape)} for one image"
    if part.is_floating_point() and part.numel():
        return ""
    return f"holds {part.numel()} values of {part.dtype}"


def _moved(one: Tensor, two: Tensor) -> str:
    """What is wrong with an item whose images are not in dimension 0, as a recurrent layer's state, or ""."""
    kept = tuple(two.shape) == (2, *one.shape[1:])
    return "" if kept else f"has shape {tuple(two.shape)} for two images, not {(2, *one.shape[1:])}"


def check_takes(module: nn.Module, name: str, given: Form, giver: str) -> None:
    """Whether a piece can be called with what the stage before it gives. Raises `ModelError` naming both."""
    try:
        signature = inspect.signature(unwrapped(module).forward)
    except (TypeError, ValueError):  # its forward is not Python's own: running it will tell
        return
    try:
        signature.bind(*given.shapes)
    except TypeError:
        count = len(given.shapes)
        wanted = ", ".join(f"input{i + 1}" for i in range(count)) if given.several else "x"
        way_out = f"write it as forward(self, {wanted})"
        if given.several:
            way_out += f", or let {giver} give one tensor, for instance with torch.cat"
        else:
            way_out += f", or let {giver} give a tuple of tensors, one for each input"
        raise ModelError(
            f"{name} takes {_told(signature)}, but {giver} gives {given.told()}: {way_out}"
        ) from None


def _told(signature: inspect.Signature) -> str:
    every = signature.parameters.values()
    names = [p.name for p in every if p.kind is not p.KEYWORD_ONLY]
    by_name = [p.name for p in every if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    told = f"{len(names)} input{'s' * (len(names) != 1)} ({', '.join(names)})"
    return f"{told} and {', '.join(by_name)} by keyword" if by_name else told


class Flat(nn.Module):
    """A piece of a network that takes one tensor, and gives one: flat ones where there are several.

    inner  the piece; its layers, parameters and buffers are this module's own, under their own names
    given  what it is called with; where that is several tensors, `forward` takes (B, features)
    joins  it gives a tuple, whose tensors become (B, features)
    """

    def __init__(self, inner: nn.Module, given: Form, joins: bool = False) -> None:
        super().__init__()
        inner = unwrapped(inner)
        known = type(inner).__module__.startswith("torch.nn") and not isinstance(inner, nn.Sequential)
        if known or isinstance(inner, Square | Quadratic | Polynomial):
            inner = nn.Sequential(inner)  # layers are traced as layers, by the name they have in here
        # In a tuple it is no child, which would put its name before every layer's. One attribute
        # alone, since any other name may be a layer's.
        self._flat_piece = (inner, given, joins)
        for tables in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[tables] = inner.__dict__[tables]
        self.training = inner.training

    def forward(self, x: Tensor) -> Tensor:
        """(B, *given.shape) -> (B, ...)"""
        inner, given, joins = self._flat_piece
        # Not its own call, which PyTorch's tracers would look up among the children.
        made: Any = inner.forward(*_cut(x, given))
        return torch.cat([part.flatten(1) for part in made], 1) if joins else made

    def train(self, mode: bool = True) -> Flat:
        self.training = mode
        self._flat_piece[0].train(mode)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Flat:
        inner, given, joins = self._flat_piece
        made = Flat(copy.deepcopy(inner, memo), given, joins)
        for name in self.__dict__.keys() - made.__dict__.keys():  # constants that were found by tracing
            made.__dict__[name] = copy.deepcopy(self.__dict__[name], memo)
        made.training = self.training
        return made


def _cut(x: Tensor, given: Form) -> list[Tensor]:
    """(B, features) -> the tensors that it is made of. `image_of` knows these operations."""
    if not given.several:
        return [x]
    parts, at = list[Tensor](), 0
    for shape in given.shapes:
        size = math.prod(shape)
        parts.append(x.narrow(1, at, size).reshape(-1, *shape))
        at += size
    return parts


def of_flat(piece: nn.Module) -> tuple[nn.Module, Form] | None:
    """What `Flat` is around, and the tensors that this takes; None for any other module."""
    return piece._flat_piece[:2] if isinstance(piece, Flat) else None


def kind_of(module: nn.Module) -> str:
    """The name of a module's class, as its owner wrote it."""
    found = of_flat(module)
    return type(module if found is None else found[0]).__name__


def image_of(source: fx.Node) -> Shape | None:
    """The image that a traced flat activation is, where `Flat` cuts it into images of one size, else None.

    Convolutions are laid out by it (`blindtail.he.grids`).
    """
    shapes = list[Shape]()
    for part in source.users:
        if part.target == "size":  # asked for the number of images
            continue
        made = next(iter(part.users), part)
        shape: Any = tuple(made.args[1:])
        cut = len(part.users) == 1 and (part.target, made.target) == ("narrow", "reshape")
        if not cut or shape[:1] != (-1,) or part.args[1:] != (1, _values(shapes), math.prod(shape[1:])):
            return None
        shapes.append(shape[1:])
    whole = bool(shapes) and _values(shapes) == math.prod(source.meta["value"][1:])
    return Form(tuple(shapes), True).image if whole else None


def piece(module: nn.Module, given: Form, joins: bool = False) -> nn.Module:
    """A module of one tensor in and out: itself where it is one already."""
    return Flat(module, given, joins) if given.several or joins else module


__all__ = [
    "MOST_TENSORS",
    "Activation",
    "Flat",
    "Form",
    "Shape",
    "check_takes",
    "flat",
    "form_of",
    "image_of",
    "kind_of",
    "of_flat",
    "operands",
    "piece",
    "several",
]
