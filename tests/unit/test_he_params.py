from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blindtail.errors import ModelError
from blindtail.he.layout import GARBAGE, ZERO, Layout, expand_runs, runs
from blindtail.he.params import (
    MAX_LOG2_Q_128,
    SEAL_MAX_LOG2_Q_128,
    Parameters,
    is_prime,
    ntt_primes,
)


def test_the_bound_is_never_looser_than_seals_own() -> None:
    assert all(MAX_LOG2_Q_128[n] <= SEAL_MAX_LOG2_Q_128[n] for n in MAX_LOG2_Q_128)


def test_primes_are_prime_and_fast() -> None:
    sieve = np.ones(20_000, bool)
    sieve[:2] = False
    for i in range(2, 142):
        if sieve[i]:
            sieve[i * i :: i] = False
    assert [is_prime(n) for n in range(20_000)] == sieve.tolist()
    for n in (4096, 8192, 16384):
        for p in ntt_primes(n, 7):
            assert 1 << 29 < p < 1 << 30
            assert p % (2 * n) == 1


@pytest.mark.parametrize(("levels", "ring"), [(1, 4096), (2, 8192), (5, 8192), (6, 16384), (12, 16384)])
def test_the_smallest_secure_ring_is_taken(levels: int, ring: int) -> None:
    made = Parameters.create(levels)
    assert made.ring_degree == ring
    assert made.log2_key_modulus <= MAX_LOG2_Q_128[ring]
    assert len(made.primes) == levels + 1
    assert made.special > max(made.primes)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Parameters.create(40), "cut the network later"),
        (lambda: Parameters.create(6, 8192), "128-bit bound"),
        (lambda: Parameters.create(1, 5000), "ring degree"),
        (lambda: Parameters.create(-1), "cannot consume"),
        (lambda: Parameters(8192, (65537,), 65537), "distinct"),
        (lambda: Parameters(8192, (1073643521,), 1073692675), "not a prime"),
        (lambda: Parameters(8192, ((1 << 61) - 1,), 1073692673), "not a prime"),
    ],
)
def test_insecure_or_broken_parameters_are_refused(build: object, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        build()  # type: ignore[operator]


def test_galois_elements_are_seals() -> None:
    p = Parameters.create(1)
    assert p.galois_element(1) == 3
    assert p.galois_element(-1) * 3 % (2 * p.ring_degree) == 1
    assert math.isclose(p.log2_key_modulus, 90, abs_tol=0.01)
    assert Parameters.from_json(p.to_json()) == p


@given(st.lists(st.integers(GARBAGE, 40), max_size=200))
def test_runs_are_lossless(values: list[int]) -> None:
    assert expand_runs(runs(tuple(values))) == tuple(values)


@given(st.integers(0, 3), st.integers(0, 2**32 - 1))
def test_a_layout_gives_back_what_was_placed(log_lanes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lanes, size = 1 << log_lanes, int(rng.integers(1, 9))
    content = np.concatenate([np.arange(size), rng.integers(GARBAGE, size, 32 - size)])
    layout = Layout(size, lanes, tuple(rng.permutation(content).tolist()))
    x = rng.normal(size=(lanes, size))
    slots = layout.place(x)
    assert slots.shape == (32 * lanes,)
    assert np.allclose(layout.read(slots), x)
    undefined = np.repeat(layout.index < 0, lanes)
    assert (slots[undefined] == 0).all()
    assert Layout.from_json(layout.to_json()) == layout


def test_imaginary_parts_are_placed_beside_the_real_ones() -> None:
    layout = Layout(3, 2, (0, 1, ZERO, 0), (2, ZERO, ZERO, 2))
    slots = layout.place(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert slots.tolist() == [1 + 3j, 4 + 6j, 2, 5, 0, 0, 1 + 3j, 4 + 6j]
    assert Layout.from_json(layout.to_json()) == layout
    assert Layout.from_json(layout.to_json()) != Layout(3, 2, (0, 1, ZERO, 0))
    with pytest.raises(ModelError, match="what goes in"):
        layout.read(slots)
    for content, imaginary in (
        ((0, 1), (2,)),
        ((0, GARBAGE), (1, 1)),
        ((0, 0), (GARBAGE, 1)),
        ((0, 0), (1, 3)),
    ):
        with pytest.raises(ModelError, match="elements or zero, one for each position"):
            Layout(3, 1, content, imaginary)


def test_turns_below_zero_conjugate() -> None:
    p = Parameters.create(1)
    assert [p.turn_element(t) for t in (0, 1, 5)] == [p.galois_element(t) for t in (0, 1, 5)]
    for t in (0, 1, 7):
        assert (p.turn_element(~t) + p.galois_element(t)) % (2 * p.ring_degree) == 0


def test_a_layout_that_misses_an_element_cannot_be_read() -> None:
    layout = Layout(3, 1, (0, 1, ZERO, GARBAGE))
    with pytest.raises(ModelError, match="does not hold"):
        layout.read(np.zeros(4))
    with pytest.raises(ModelError, match="expected"):
        layout.place(np.zeros(4))
    with pytest.raises(ModelError, match="outside"):
        Layout(2, 1, (0, 1, 2, 0))
