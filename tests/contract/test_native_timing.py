"""The native module's own clock: every part gives as many times as asked for."""

from __future__ import annotations

import pytest

from bench import kernels
from blindtail.he.params import Parameters

native = pytest.importorskip("blindtail.he._native")


@pytest.mark.parametrize("word_bits", [32, 64])
def test_every_part_is_timed(word_bits: int) -> None:
    primes = list(Parameters.create(kernels.LEVELS[4096], 4096).key_primes)
    timer = native.Timer(12, primes, word_bits=word_bits, rotations=3)
    for part in ("ntt", "inverse", "automorphism", "rotation", "hoisted", "shared", "square"):
        seconds = timer.run(part, 4)
        assert len(seconds) == 4
        assert all(0 < s < 60 for s in seconds)
    stages = timer.stages(1_000_000, rotations=2, diagonals=3, times=4)
    assert len(stages) == 4
    assert all(len(one) == 8 and all(0 < s < 60 for s in one) for one in stages)
    with pytest.raises(ValueError, match="no more than there are keys"):
        timer.stages(1_000_000, rotations=4, diagonals=1, times=1)
    assert min(timer.run("shared", 3)) > min(timer.run("ntt", 3))
    with pytest.raises(ValueError, match="no such part"):
        timer.run("nothing", 1)


def test_plans_that_cannot_be_are_refused() -> None:
    primes = list(Parameters.create(2, 8192).key_primes)  # three data primes: a plan ends in a map at level 1
    with pytest.raises(ValueError, match="even number of data primes"):
        native.Timer(13, primes)
    with pytest.raises(ValueError, match="at least one thread"):
        native.Timer(12, list(Parameters.create(1, 4096).key_primes), threads=0)
    with pytest.raises(ValueError, match="at least one rotation"):
        native.Timer(12, list(Parameters.create(1, 4096).key_primes), rotations=0)
