"""What an edge does between the segments of a refreshed tail, as `edge.bt` holds it.

Values are named by where they come from: "x0" is the activation at the cut, "x3" what
goes into segment 3, "y3" what comes out of it, all flat. Interlude i takes some of those
known by then, x0 to xi and y0 to yi, and gives x(i+1); one behind the last segment gives the
logits. It is an ONNX graph with these names as inputs, float32 (1, n) each, and *free of
weights*: the tail's weights stay in the cloud, so a graph that carries more numbers than
activations need (a bound, a slope) is refused, whoever made the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from blindtail.errors import BundleError, ModelError
from blindtail.he.spec import TailSpec, check_chain

#: Constants of one graph: numbers (a clamp's bound, GELU's factors), each alone in its tensor, ...
MOST_NUMBERS = 64
#: ... and whole numbers (shapes, axes, paddings, places of a slice), in short lists.
MOST_WHOLE_IN_LIST, MOST_WHOLE = 16, 1024
#: A graph without weights is small, and its tensors have few axes.
MOST_GRAPH_BYTES, MOST_AXES = 1 << 20, 8

_VALUE = re.compile(r"[xy](0|[1-9][0-9]?)")
#: ONNX's types of whole numbers and truth values; bytes of an element of float32 and float64.
_WHOLE, _SIZES = frozenset({2, 3, 4, 5, 6, 7, 9, 12, 13}), {1: 4, 11: 8}
_DEPTH = 8


def graph_name(cut: int, index: int) -> str:
    """Of the graph behind segment `index` of the tail at `cut`."""
    return f"interlude{cut}.{index}"


@dataclass(frozen=True, slots=True)
class RefreshedTail:
    """One refreshed tail as an edge sees it. Checked when it is made; raises `ModelError`.

    specs       of its segments, in order
    interludes  the names of each interlude's inputs, in order: one behind every segment but the last,
                or behind the last one too
    """

    specs: tuple[TailSpec, ...]
    interludes: tuple[tuple[str, ...], ...]

    def __post_init__(self) -> None:
        check_chain(self.specs)
        if len(self.interludes) not in (len(self.specs) - 1, len(self.specs)):
            raise ModelError("a refreshed tail has an interlude between each two segments")
        for index, names in enumerate(self.interludes):
            known = all(_VALUE.fullmatch(name) and int(name[1:]) <= index for name in names)
            if not names or not known or len(set(names)) != len(names):
                raise ModelError(f"interlude {index} takes {list(names)}, which are not all known by then")

    @property
    def ends_in_interlude(self) -> bool:
        """Whether logits come out of an interlude rather than of the last segment."""
        return len(self.interludes) == len(self.specs)

    def width(self, value: str) -> int:
        """Of a value by its name."""
        spec = self.specs[int(value[1:])]
        return spec.features if value[0] == "x" else spec.outputs

    def check_graphs(self, cut: int, graphs: Mapping[str, bytes]) -> None:
        """Raises `ModelError` for a graph that holds weights."""
        for index in range(len(self.interludes)):
            check_weight_free(graph_name(cut, index), graphs[graph_name(cut, index)])

    def to_json(self) -> dict[str, Any]:
        return {
            "segments": [spec.to_json() for spec in self.specs],
            "interludes": [list(names) for names in self.interludes],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RefreshedTail:
        """Raises `BundleError` for what cannot be, and what a malformed structure gives."""
        specs = tuple(TailSpec.from_json(spec) for spec in data["segments"])
        interludes = tuple(tuple(str(name) for name in names) for names in data["interludes"])
        try:
            return cls(specs, interludes)
        except ModelError as error:
            raise BundleError(f"a refreshed tail is damaged ({error}): compile the model again") from error


def check_weight_free(name: str, graph: bytes) -> None:
    """Raises `ModelError` for an ONNX graph that holds weights, or more than an activation's constants.

    Reads the protobuf wire format itself: neither a device nor a cell has the `onnx` package.
    """
    if len(graph) > MOST_GRAPH_BYTES:
        raise ModelError(f"{name} has {len(graph)} bytes: an interlude without weights is far smaller")
    numbers = whole = text = 0
    try:
        for count, is_float, inside in _constants(graph, "model", 0):
            if inside == "text":
                text += count
            elif is_float:
                numbers += count
                if count > 1:
                    raise ModelError(
                        f"{name} holds a tensor of {count} numbers: weights of a tail stay in the cloud "
                        f"({inside}); compile the model again"
                    )
            else:
                whole += count
                if count > MOST_WHOLE_IN_LIST:
                    raise ModelError(
                        f"{name} holds a list of {count} whole numbers: no activation needs that"
                    )
    except (IndexError, ValueError) as error:
        raise ModelError(f"{name} is no ONNX graph: build edge.bt again") from error
    if numbers > MOST_NUMBERS or whole > MOST_WHOLE:
        raise ModelError(
            f"{name} holds {numbers} numbers and {whole} whole ones: no activation needs so many"
        )
    if text > MOST_TEXT_IN_ALL:
        raise ModelError(f"{name} holds {text} bytes of names and texts: no activation needs so many")


# Fields of onnx.proto3 by message: number -> what is inside. Whatever is not named is skipped, but
# its bytes are counted as text: names and documentation are bounded by `MOST_TEXT`.
_INSIDE: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse", 11: "skip", 12: "skip", 13: "skip"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
#: Longest name, text or unknown field, and all of a graph: strings could carry weights too.
MOST_TEXT, MOST_TEXT_IN_ALL = 256, 32 << 10


def _constants(data: bytes, message: str, depth: int) -> Iterator[tuple[int, bool, str]]:
    """(numbers, whether they are floats, where) of every constant inside a message."""
    if depth > _DEPTH:
        raise ValueError("nested too deeply")
    if message == "tensor":
        yield from _tensor(data)
        return
    listed = 0
    for field, _, value in _fields(data):
        inside = _INSIDE[message].get(field)
        if inside == "skip" and isinstance(value, bytes):  # shapes and types of values
            yield _text(value, 8 * MOST_TEXT)
        elif inside is not None and isinstance(value, bytes):
            yield from _constants(value, inside, depth + 1)
        elif message == "attribute" and field in (2, 3):
            if isinstance(value, bytes):
                raise ValueError("one number, as bytes")
            yield (1, field == 2, message)
        elif message == "attribute" and field in (7, 8):  # packed or one by one
            size = 4 if field == 7 else 1
            count = len(value) // size if isinstance(value, bytes) else 1
            listed += count
            yield (count, field == 7, message)
        else:
            yield _text(value, MOST_TEXT)
    if listed > MOST_WHOLE_IN_LIST:
        raise ModelError("an interlude's graph holds a long list of numbers")


def _tensor(data: bytes) -> Iterator[tuple[int, bool, str]]:
    dims, axes, kind, held, parts = 1, 0, 0, 0, list[bytes]()
    for field, _, value in _fields(data):
        if field == 1:
            for size in _varints(value) if isinstance(value, bytes) else (value,):
                dims, axes = dims * size, axes + 1
                if axes > MOST_AXES:
                    raise ModelError(f"an interlude's tensor has more than {MOST_AXES} axes")
        elif field == 2 and isinstance(value, int):
            kind = value
        elif field in (4, 5, 6, 7, 9, 10, 11, 13, 14):  # every place for content, external files too
            held += len(value) if isinstance(value, bytes) else 1
            if isinstance(value, bytes):
                parts.append(value)
        else:
            yield _text(value, MOST_TEXT)
    # What the shape says and what is there: neither may be larger than the other lets on.
    count = max(dims, -(-held // 8))
    if _repeats(parts, _SIZES.get(kind, 0), dims):
        count = 1  # one number many times over, as the scale of a norm without weights
    yield count, kind not in _WHOLE, "a tensor"


def _text(value: int | bytes, most: int) -> tuple[int, bool, str]:
    """What a field that holds no constant adds to a graph's text, in bytes."""
    size = len(value) if isinstance(value, bytes) else 8
    if size > most:
        raise ModelError("an interlude's graph holds a text that is too long")
    return size, False, "text"


def _repeats(parts: list[bytes], size: int, count: int) -> bool:
    """Whether a tensor's only content is one element of `size` bytes, `count` times."""
    # The lengths first: a file may name any count, and what it names is not to be allocated.
    return (
        len(parts) == 1 and size > 0 and len(parts[0]) == size * count and parts[0] == parts[0][:size] * count
    )


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """(field, wire type, value) of a protobuf message. Raises `IndexError`, `ValueError`."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, wire = tag >> 3, tag & 7
        value: int | bytes
        if wire == 0:
            value, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            value, at = int.from_bytes(data[at : at + size], "little"), at + size
        elif wire == 2:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        else:
            raise ValueError("a wire type that protobuf has no more")
        if at > len(data):
            raise ValueError("a field ends behind its message")
        yield field, wire, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than 64 bits")


def _varints(data: bytes) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


__all__ = ["RefreshedTail", "check_weight_free", "graph_name"]
