"""What a pair of tile shapes costs, counted, beside the map that is made between them."""

from __future__ import annotations

import numpy as np
import pytest

from blindtail.errors import ModelError
from blindtail.he.tile_counts import Counted, Known, Operand
from blindtail.he.tile_shapes import Look, shapes
from blindtail.he.tiled import Placed, between
from tests.tiled_cases import random_affine, random_convolution

_SLOTS, _LEVEL, _RING = 2048, 2, 4096


@pytest.mark.parametrize("seed", range(40))
def test_counts_are_those_of_the_map(seed: int) -> None:
    rng = np.random.default_rng(seed)
    layer = random_affine(rng) if seed % 3 == 0 else random_convolution(rng, seed)
    assert layer.shapes is not None
    positions = int(rng.choice([8, 16]))
    given, made = (shapes(image, Look("all", positions)) for image in layer.shapes)
    lanes, agreed = _SLOTS // positions, 0
    for _ in range(6):
        source, target = (Placed(of[int(rng.integers(len(of)))], lanes) for of in (given, made))
        read = [(layer.weight, source)] * int(rng.integers(1, 3))
        operands = [(Operand(weight), Known(placed)) for weight, placed in read]
        try:
            real = between(read, target)
        except ModelError as error:
            with pytest.raises(ModelError, match=str(error).partition(":")[2].strip()[:20]):
                Counted(operands, Known(target), _LEVEL, _RING, True)
            continue
        told = Counted(operands, Known(target), _LEVEL, _RING, True)
        assert (told.products, told.steps) == (real.products, real.steps)
        for row, baby in enumerate(told.splits.baby.tolist()):
            turns = {k * lanes for _, k in real.rotations(baby)}
            turns |= {baby * lanes} if real.giants(baby) else set()
            assert set(told.splits.turns[told.splits.high[row]].tolist()) == turns
            assert told.splits.seconds[row] >= told.floor_s - 1e-12
        agreed += 1
    assert agreed
