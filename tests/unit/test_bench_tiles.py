"""The bench of tiles: a convolution takes the rotations of its borders."""

from __future__ import annotations

import pytest

from bench.tiles import ERROR, ROTATIONS, convolution


def test_a_convolution_of_tiles_takes_the_rotations_of_its_borders() -> None:
    pytest.importorskip("blindtail.he._native")
    found = {row["name"].split(": ")[1]: row for row in convolution(1, 1)}
    assert found["rotations"]["value"] == ROTATIONS
    assert "1176" in found["rotations"]["note"]
    assert found["tiles"]["value"] == 49
    assert found["products"]["value"] == 49 * 25
    assert found["largest error of a pixel"]["value"] <= ERROR
