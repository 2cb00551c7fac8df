"""The native module on programs over several ciphertexts, against programs over one, word for word.

Keys and residues are uniform: an evaluation is a function of residues, and nothing here needs to decrypt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from blindtail.he.container import SEED_BYTES
from blindtail.he.packing import pack_bits
from blindtail.he.params import ntt_primes

native = pytest.importorskip("blindtail.he._native")

U64 = NDArray[np.uint64]
LOG_N, LEVEL = 11, 3
N = 1 << LOG_N
PRIMES = list(ntt_primes(N, LEVEL + 2))  # the special one last
#: Evaluation keys: Galois element and level; 0 relinearises.
KEYS = [(0, 2), (3, 3), (9, 3), (25, 1)]


@dataclass(frozen=True)
class Map:
    """Arguments of `add_map`, but for what it reads; weights from a seed."""

    level: int
    babies: tuple[tuple[int, int], ...]  # (Galois element, operand)
    giants: tuple[tuple[tuple[int, int], ...], ...]
    seed: int
    folds: tuple[tuple[int, ...], ...] = ()

    def add_to(self, tail: Any, sources: Sequence[int]) -> None:
        rng = np.random.default_rng(self.seed)
        bias = rng.uniform(-1, 1, N // 2)
        diagonals = rng.uniform(-1, 1, (sum(map(len, self.giants)), N // 2))
        tail.add_map(
            self.level,
            [element for element, _ in self.babies],
            [list(terms) for terms in self.giants],
            9 if len(self.giants) > 1 else 1,
            [list(group) for group in self.folds],
            diagonals,
            1e8,
            bias,
            1e7,
            inputs=[operand for _, operand in self.babies],
            sources=list(sources),
        )


#: Two maps of both inputs with rotations that they share in part, then outputs that read their product.
TILES = (
    Map(3, ((1, 0), (3, 0), (3, 1)), (((0, 0), (1, 1)), ((2, 2),)), 1),
    Map(3, ((3, 1), (9, 0), (9, 1)), (((0, 0), (1, 1), (2, 2)),), 2, ((3,),)),
)
OUTPUTS = (
    Map(1, ((1, 0), (25, 0)), (((0, 0), (1, 1)),), 3, ((25,),)),
    Map(1, ((25, 0), (25, 1)), (((0, 1), (1, 0)),), 4),
    Map(1, ((1, 1),), (((0, 0),),), 5),
)


def wide(outputs: Iterable[int], inputs: int = 2, group_bytes: int = 1 << 28, **choices: Any) -> Any:
    """A tail of two inputs, or of one in both places, and some of the outputs."""
    tail = native.Tail(LOG_N, PRIMES, inputs=inputs, **choices)
    second, made = inputs - 1, inputs
    for tile in TILES:
        tile.add_to(tail, [0, second])
    tail.add_product(2, [made, made + 1])
    chosen = list(outputs)
    for output in chosen:
        OUTPUTS[output].add_to(tail, [made + 2, second])
    tail.finish(8, 3, len(chosen), group_bytes)
    return tail


def uniform(rng: np.random.Generator, primes: Sequence[int]) -> U64:
    return np.stack([rng.integers(0, q, N, np.uint64) for q in primes])


def seeded(rng: np.random.Generator, primes: Sequence[int]) -> bytes:
    rows = zip(uniform(rng, primes), primes, strict=True)
    return rng.bytes(SEED_BYTES) + b"".join(pack_bits(row, q.bit_length()) for row, q in rows)


@lru_cache
def keys_of(word_bits: int) -> Any:
    """The same keys for every tail, prepared for its word size."""
    tail = native.Tail(LOG_N, PRIMES, word_bits=word_bits)
    rng = np.random.default_rng(6)
    sizes = [tail.key_bytes(level) for _, level in KEYS]
    room = np.zeros(sum(sizes) + 64, np.uint8)
    memory = room[-room.ctypes.data % 64 :][: sum(sizes)]
    at = 0
    for (element, level), size in zip(KEYS, sizes, strict=True):
        primes = [*PRIMES[: level + 1], PRIMES[-1]]
        body = b"".join(seeded(rng, primes) for _ in range(level + 1))
        tail.prepare_key(element, level, np.frombuffer(body, np.uint8), memory[at : at + size])
        at += size
    return tail.load_keys(memory, KEYS)


def run(tail: Any, c0: U64, c1: U64, threads: int = 1) -> U64:
    return np.asarray(tail.evaluate_residues(keys_of(tail.word_bits), c0, c1, threads))


@pytest.fixture(scope="module")
def residues() -> tuple[U64, U64]:
    """c0 and c1 of two ciphertexts, (2, level + 1, N) each."""
    rng = np.random.default_rng(7)
    made = [np.stack([uniform(rng, PRIMES[:-1]) for _ in range(2)]) for _ in range(2)]
    return made[0], made[1]


def test_each_output_is_that_of_a_program_of_its_own(residues: tuple[U64, U64]) -> None:
    together = run(wide((0, 1, 2)), *residues)
    alone = [run(wide((output,)), *residues) for output in range(3)]
    assert together.shape == (3, 2, N)
    assert [one.shape for one in alone] == [(2, N)] * 3
    assert np.array_equal(together, np.stack(alone))
    assert not np.array_equal(together[0], together[1])


def test_one_ciphertext_twice_is_one_that_is_read_twice(residues: tuple[U64, U64]) -> None:
    c0, c1 = (half[[0, 0]] for half in residues)
    once = run(wide((0, 1), inputs=1), c0[0], c1[0])
    assert np.array_equal(run(wide((0, 1)), c0, c1), once)
    assert not np.array_equal(run(wide((0, 1)), *residues), once)
    assert not np.array_equal(run(wide((0, 1)), *(half[::-1].copy() for half in residues)), once)


def test_maps_in_groups_give_the_words_of_maps_one_by_one(residues: tuple[U64, U64]) -> None:
    choices: list[dict[str, Any]] = [{"instructions": name} for name in native.instruction_sets()]
    found = []
    for choice in [*choices, {"word_bits": 64}]:
        groups, singly = wide((0, 1, 2), **choice), wide((0, 1, 2), group_bytes=0, **choice)
        assert (groups.groups, singly.groups) == ([2, 3], [1, 1, 1, 1, 1])
        found += [run(groups, *residues), run(groups, *residues, 3), run(singly, *residues)]
    assert all(np.array_equal(one, found[0]) for one in found)


def test_a_map_of_two_inputs_is_the_sum_of_two_maps(residues: tuple[U64, U64]) -> None:
    """Up to rounding; it uses no key, so that numbers mean something."""

    def mapped(*operands: int) -> NDArray[np.int64]:
        """One diagonal for each operand, the first and second the same in every map, and a bias."""
        tail = native.Tail(LOG_N, [*PRIMES[:2], PRIMES[-1]], inputs=2)
        terms = tuple((i, i) for i in range(len(operands)))
        Map(1, tuple((1, i) for i in range(len(operands))), (terms,), 8).add_to(tail, operands)
        tail.finish(8, 3)
        halves = (np.ascontiguousarray(half[:, :2]) for half in residues)
        found = tail.evaluate_residues(tail.load_keys(np.zeros(0, np.uint8), []), *halves)
        return np.asarray(found).astype(np.int64)

    def apart(a: NDArray[np.int64], b: NDArray[np.int64]) -> list[int]:
        half = PRIMES[0] // 2
        distances = np.abs((a - b + half) % PRIMES[0] - half).max(axis=1)
        return [int(distance) for distance in distances]

    # The first diagonal times the first input and the bias, and the second diagonal times the second input.
    total = mapped(0) + (mapped(1, 1) - mapped(1))
    assert max(apart(mapped(0, 1), total)) <= 2
    assert min(apart(mapped(0, 0), total)) > 1000


def test_bodies_and_tickets_of_two_ciphertexts() -> None:
    rng = np.random.default_rng(9)
    parts = [seeded(rng, PRIMES[:-1]) for _ in range(2)]
    tail = wide((0, 1))
    keys = keys_of(tail.word_bits)

    def body(data: bytes) -> NDArray[np.uint8]:
        return np.frombuffer(data, np.uint8)

    good = body(b"".join(parts))
    reply = tail.evaluate(keys, good)
    first, second = (wide((output,)) for output in (0, 1))
    assert reply == first.evaluate(keys, good) + second.evaluate(keys, good)
    seeds = b"".join(part[:SEED_BYTES] for part in parts)
    assert tail.evaluate_ticket(keys, good, tail.make_ticket(keys, seeds, 2), 2) == reply
    for bad in (seeds[:SEED_BYTES], seeds + b"\0", b""):
        with pytest.raises(ValueError, match="64 bytes for each"):
            tail.make_ticket(keys, bad)
    for short in (parts[0], b"".join(parts)[:-1], b"".join(parts) + b"\0"):
        with pytest.raises(native.BodyError, match="length"):
            tail.evaluate(keys, body(short))
    # The last residues of the second ciphertext.
    with pytest.raises(native.BodyError, match="residue"):
        tail.evaluate(keys, body(b"".join(parts)[:-8] + b"\xff" * 8))
    assert tail.evaluate(keys, good) == reply


@pytest.mark.parametrize("count", [0, 65])
def test_a_number_of_ciphertexts_has_bounds(count: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 64 inputs"):
        native.Tail(LOG_N, PRIMES, inputs=count)
    with pytest.raises(ValueError, match="between 1 and 64 outputs"):
        wide([1] * count)
    assert wide([1] * 64).groups == [2, 64]
