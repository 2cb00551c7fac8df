"""Shapes of tile tensors: what lies where, how they are written, which sums leave them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.tails import Conv, folded
from blindtail.errors import ModelError
from blindtail.he.layout import GARBAGE, MOST_CIPHERTEXTS, ZERO
from blindtail.he.tiled import Placed, between
from blindtail.he.tiles import Axis, TileShape

_TILES = st.sampled_from((1, 2, 4, 8))
_AXES = st.one_of(
    st.builds(Axis, st.integers(1, 9), _TILES, st.sampled_from(("", "~"))),
    st.builds(Axis, st.just(1), _TILES, st.sampled_from(("*", "?"))),
)
#: Of two or three axes, with as many tiles and few enough positions.
SHAPES = (
    st.lists(_AXES, min_size=1, max_size=4)
    .filter(lambda axes: math.prod(axis.tiles for axis in axes) <= MOST_CIPHERTEXTS)
    .filter(lambda axes: math.prod(axis.tile for axis in axes) <= 512)
    .map(lambda axes: TileShape(tuple(axes)))
)


def looked_up(shape: TileShape) -> NDArray[np.int64]:
    """Content written down from the definition, coordinate by coordinate."""
    found = np.full((shape.tiles, shape.positions), ZERO)
    for tile, outer in enumerate(np.ndindex(*(axis.tiles for axis in shape.axes))):
        for position, inner in enumerate(np.ndindex(*(axis.tile for axis in shape.axes))):
            element, undefined = 0, False
            for axis, t, p in zip(shape.axes, outer, inner, strict=True):
                if axis.kind in ("*", "?"):
                    undefined |= axis.kind == "?" and p > 0
                    continue
                i = p * axis.tiles + t if axis.kind == "~" else t * axis.tile + p
                element = element * axis.size + i if i < axis.size and element >= 0 else ZERO
            found[tile, position] = GARBAGE if undefined else element
    return found


@settings(max_examples=80, deadline=None)
@given(SHAPES)
def test_every_element_is_where_the_definition_says(shape: TileShape) -> None:
    content = shape.content()
    assert content.shape == (shape.tiles, shape.positions)
    np.testing.assert_array_equal(content, looked_up(shape))
    copies = math.prod(axis.tile for axis in shape.axes if axis.kind == "*")
    assert (np.bincount(content[content >= 0], minlength=shape.size) == copies).all()
    # Sums by rotations are of the same element along */t and ?/t alike.
    summed = math.prod(axis.tile for axis in shape.axes if axis.kind in ("*", "?"))
    rows = shape.rows()
    assert (np.bincount(rows[rows >= 0], minlength=shape.size) == summed).all()
    assert (rows[content >= 0] == content[content >= 0]).all()


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.sampled_from((1, 2, 4)))
def test_what_is_placed_is_read(shape: TileShape, lanes: int) -> None:
    x = np.random.default_rng(0).normal(size=(lanes, shape.size))
    layout = shape.layout(lanes)
    slots = layout.place(x)
    assert slots.shape == (shape.tiles * shape.positions * lanes,)
    np.testing.assert_allclose(layout.read(slots), x, rtol=1e-12)
    tiles = layout.tiles(shape.positions * lanes)
    assert len(tiles) == shape.tiles
    parts = [tile.place(x) for tile in tiles]
    np.testing.assert_array_equal(np.concatenate(parts), slots)
    # The second half of a tensor twice as long lies in the imaginary parts.
    if not shape.defined:
        with pytest.raises(ModelError, match="imaginary parts"):
            shape.halved(lanes)
        return
    both = np.concatenate([x, -2 * x], axis=1)
    np.testing.assert_array_equal(shape.halved(lanes).place(both), slots * (1 - 2j))


@settings(max_examples=40, deadline=None)
@given(SHAPES)
def test_a_shape_is_read_as_it_is_written(shape: TileShape) -> None:
    assert TileShape.parse(str(shape)) == shape
    assert TileShape.parse(f"  {str(shape).replace(',', ' , ')} ") == shape


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("4/2, 3", "written"),
        ("[4/2", "written"),
        ("", "written"),
        ("[]", "'' is no axis"),
        ("[4/2,]", "'' is no axis"),
        ("[4/2, x/2]", "'x/2' is no axis"),
        ("[4/2, ~4/2]", "'~4/2' is no axis"),
        ("[4/2, 4*/2]", r"'4\*/2' is no axis"),
        ("[4/2, -4/2]", "'-4/2' is no axis"),
        ("[4/2, 4/2/2]", "'4/2/2' is no axis"),
        ("[4/2, 1234567890/2]", "'1234567890/2' is no axis"),
        ("[4/2, 9/3]", "9/3: a tile has a power of two"),
        ("[4/2, ?/0]", r"\?/0: a tile has a power of two"),
        ("[4/2, 0/2]", "0/2: an axis has 1 element"),
        ("[65/1]", "65 tiles"),
        ("[13/2, 20~/2]", "70 tiles"),
    ],
)
def test_what_is_no_shape_is_refused_by_name(text: str, told: str) -> None:
    with pytest.raises(ModelError, match=told):
        TileShape.parse(text)


def test_sums_are_held_everywhere_along_the_first_axis_alone() -> None:
    def folds(text: str) -> tuple[tuple[int, int], ...]:
        return TileShape.parse(text).folds()

    assert folds("[*/4, 6/2, ?/8]") == ((16, 2), (1, 3))
    assert folds("[3/1, */4, 6/2]") == ((2, 2),)  # nothing of a tile comes before it
    assert folds("[*, 6/2, ?]") == ()
    for text in ("[6/2, */4]", "[?/2, */4, 6/2]", "[*/2, 3~/2, */2]"):
        with pytest.raises(ModelError, match="first axis alone; write"):
            folds(text)
    assert folds("[6/2, ?/4]") == ((1, 2),)


def test_an_interleaved_convolution_rotates_for_borders_alone() -> None:
    """The first layer of HeLayers' example: 28 x 28 images, 5 x 5 taps, tiles of 4 x 4 places."""
    conv = Conv(np.random.default_rng(0).normal(size=(1, 1, 5, 5)), np.zeros(1), 1, 28, 2)
    placed = Placed(TileShape.parse("[*/256, 28~/4, 28~/4]"), 1)
    made = between([(folded(conv).weight, placed)], placed)
    tiles, taps = 49, 25
    assert (len(made.rows), made.products) == (tiles, tiles * taps)
    # Each tile's own place needs no rotation; all others would, were a neighbour's pixel elsewhere.
    assert made.products - tiles == 1176
    assert len(made.rotations(placed.shape.positions)) == 72
    assert made.giants(placed.shape.positions) == 0
    assert made.steps == ()
    # Not interleaved, neighbours are at other places of the same tile.
    plain = Placed(TileShape.parse("[*/256, 28/4, 28/4]"), 1)
    assert len(between([(folded(conv).weight, plain)], plain).rotations(4096)) > 400
