"""Where weights are met, beside trying every offset at every position."""

from __future__ import annotations

import numpy as np
import pytest

from blindtail.he.diagonals import meet
from blindtail.he.layers import FloatArray
from blindtail.he.layout import Layout
from blindtail.he.sparse import Sparse, entries

Multipliers = dict[int, FloatArray]


def _tried(
    weight: FloatArray, rows: FloatArray, parts: list[FloatArray], offsets: int, stride: int
) -> tuple[list[Multipliers], int]:
    """Multipliers by offset, of real and then imaginary parts, and how many weights are met nowhere.

    The first offset, then the first position, at which a row sees a column carries the weight, and so do
    the places where all repeats.
    """
    left = {(int(r), int(c)) for r, c in zip(*np.nonzero(weight), strict=True)}
    found = []
    for content in parts:
        n, made = len(rows), Multipliers()
        period = n
        while period % 2 == 0 and all(
            np.array_equal(a[: period // 2], a[period // 2 : period]) for a in (rows, content)
        ):
            period //= 2
        for k in range(0, offsets, stride):
            for s in range(period):
                pair = int(rows[s]), int(content[(s + k) % n])
                if pair in left:
                    left.remove(pair)
                    made.setdefault(k, np.zeros(n))[s::period] = weight[pair]
        found.append(made)
    return found, len(left)


def _drawn(rng: np.random.Generator, positions: int, low: int, high: int) -> FloatArray:
    """Numbers from `low` below `high`, repeating with a power of two of positions; often few of them."""
    period = 1 << int(rng.integers(0, positions.bit_length()))
    values = rng.integers(low, high, period)
    if rng.integers(3) == 0:
        values = np.minimum(values, rng.integers(0, 3))
    return np.tile(values, positions // period).astype(np.int32)


@pytest.mark.parametrize("seed", range(150))
def test_weights_are_met_where_trying_all_meets_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    positions = 1 << int(rng.integers(0, 8))
    out, inputs = (int(n) for n in rng.integers(1, 20, 2))
    rows = _drawn(rng, positions, -1, out)
    content = np.maximum(_drawn(rng, positions, -2, inputs), -1)
    other = _drawn(rng, positions, -1, inputs) if seed % 3 == 0 else None
    imaginary = None if other is None else tuple(other.tolist())
    layout = Layout(inputs, 1, tuple(content.tolist()), imaginary)
    weight = rng.normal(size=(out, inputs)) * (rng.random((out, inputs)) < rng.choice([0.2, 0.7, 1.0]))
    stride = min(1 << int(rng.integers(0, 3)), positions)
    offsets = max(stride, int(rng.integers(1, positions + 1)) // stride * stride)
    parts = [content] if other is None else [content, other]
    wanted, left = _tried(weight, rows, parts, offsets, stride)
    for held in (weight, Sparse.of(weight)):
        met = meet(held, rows, layout, offsets, stride)
        assert met.unused == left
        assert met.offsets == tuple(sorted({k for made in wanted for k in made}))
        for part, made in zip((met.real, met.imaginary), wanted, strict=False):
            assert part is not None
            got = dict(part.multipliers(entries(held), positions))
            assert list(got) == sorted(made)
            assert all(np.array_equal(got[k], made[k]) for k in made)
