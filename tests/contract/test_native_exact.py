"""The native kernels give SEAL's words: every operation, random parameters, levels and residues.

Residues are uniform, in ciphertexts and keys alike: the operations are functions of
residues, and nothing here needs to decrypt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from blindtail.he import sealio
from blindtail.he.params import MAX_LOG2_Q_128, Parameters, is_prime

native = pytest.importorskip("blindtail.he._native")

U64 = NDArray[np.uint64]
PORTABLE = [(64, "portable")]
#: (word bits, instruction set): all that this processor has, for each word size.
ENGINES = [*((32, name) for name in native.instruction_sets()), *PORTABLE]


def primes_below(n: int, bits: int, rng: np.random.Generator, taken: set[int]) -> int:
    """A random prime = 1 mod 2n of exactly `bits` bits."""
    low, high = (1 << (bits - 1)) // (2 * n), (1 << bits) // (2 * n)
    for k in rng.permutation(np.arange(low, min(high, low + 4096))).tolist():
        p = k * 2 * n + 1
        if p.bit_length() == bits and p not in taken and is_prime(p):
            taken.add(p)
            return p
    raise AssertionError("no such prime")


@st.composite
def parameter_sets(draw: st.DrawFn, narrow: bool) -> Parameters:
    """SEAL accepts them: within its security bound. `narrow`: all primes in (2^29, 2^30)."""
    n = draw(st.sampled_from([2048, 4096, 8192]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    budget = MAX_LOG2_Q_128[n]
    taken: set[int] = set()
    bits: list[int] = []
    wanted = draw(st.integers(2, 6))
    while len(bits) < wanted:
        b = 30 if narrow else draw(st.integers(20, 60))
        if sum(bits) + b > budget:
            break
        bits.append(b)
    if len(bits) < 2:
        bits = [min(30, budget // 2) if not narrow else 26] * 2
    made = [primes_below(n, b, rng, taken) for b in bits]
    # SEAL wants no data prime above the special one.
    special = max(made)
    made.remove(special)
    return Parameters(n, tuple(made), special)


@dataclass
class Case:
    """SEAL, and uniform residues for one level of a parameter set."""

    parameters: Parameters
    level: int
    rng: np.random.Generator

    def __post_init__(self) -> None:
        self.seal = sealio.SealContext.of(self.parameters)
        self.evaluator = sealio.api().Evaluator(self.seal.context)

    def uniform(self, count: int, primes: tuple[int, ...]) -> U64:
        n = self.parameters.ring_degree
        rows = [self.rng.integers(0, q, (count, n), np.uint64) for q in primes]
        out = np.stack(rows, axis=1)
        # The edges of the range, where a missing reduction shows.
        out[:, :, 0], out[:, :, 1] = 0, np.asarray(primes, np.uint64) - 1
        return out

    @property
    def primes(self) -> tuple[int, ...]:
        return self.parameters.primes[: self.level + 1]

    def ciphertext(self) -> tuple[U64, Any]:
        """(2, primes, N) and SEAL's object of it."""
        words = self.uniform(2, self.primes)
        stream = sealio.ciphertext_stream(self.seal.parms_ids[self.level], 2.0, True, words[0], words[1])
        return words, sealio.load_into(sealio.api().Ciphertext(), self.seal.context, stream)

    def key(self) -> tuple[list[U64], list[list[bytes | memoryview]]]:
        digits = [self.uniform(2, self.parameters.key_primes) for _ in self.parameters.primes]
        streams = [
            sealio.ciphertext_stream(self.seal.key_parms_id, 1.0, True, words[0], words[1])
            for words in digits
        ]
        return digits, streams

    def keys(self, kind: Any, index: int, entries: int, streams: Any) -> Any:
        body = list(sealio.keyswitch_stream(self.seal.key_parms_id, entries, iter([(index, streams)])))
        header = sealio.stream_header(sum(len(part) for part in body))
        return sealio.load_into(kind, self.seal.context, [header, *body])

    def exact(self, word_bits: int, name: str) -> Any:
        log_n = self.parameters.ring_degree.bit_length() - 1
        return native.Exact(log_n, list(self.parameters.key_primes), name, word_bits)


def words_of(ciphertext: Any) -> U64:
    """(polynomials, primes, N) of a ciphertext of any size."""
    body = sealio.saved_members(ciphertext)
    *_, size, n, primes, _, _ = struct.unpack_from("<4QBQQQdQ", body)
    return np.frombuffer(body, "<u8", size * primes * n, 73 + 16 + 8).reshape(size, primes, n)


def plain_words(plain: Any, n: int) -> U64:
    body = sealio.saved_members(plain)
    (count,) = struct.unpack_from("<Q", body, 48 + 16)
    return np.frombuffer(body, "<u8", count, 48 + 16 + 8).reshape(1, -1, n)


def check(parameters: Parameters, level: int, seed: int, engines: list[tuple[int, str]]) -> None:
    case = Case(parameters, level, np.random.default_rng(seed))
    api, evaluator, n = sealio.api(), case.evaluator, parameters.ring_degree
    (a, seal_a), (b, seal_b) = case.ciphertext(), case.ciphertext()
    relin_words, relin_streams = case.key()
    relin = case.keys(api.RelinKeys(), 0, 1, relin_streams)
    step = int(case.rng.integers(1, n // 2))
    element = parameters.galois_element(step)
    galois_words, galois_streams = case.key()
    galois = case.keys(api.GaloisKeys(), (element - 1) // 2, n, galois_streams)
    plain = api.Plaintext()
    case.seal.encoder.encode(case.rng.normal(size=n // 2).tolist(), case.seal.parms_ids[level], 1e4, plain)

    want: dict[str, U64] = {}

    def run(name: str, call: Any, *arguments: Any) -> Any:
        out = api.Ciphertext()
        call(*arguments, out)
        want[name] = words_of(out)
        return out

    run("add", evaluator.add, seal_a, seal_b)
    seal_a.scale, seal_b.scale = 2.0, 2.0
    run("multiply_plain", evaluator.multiply_plain, seal_a, plain)
    product = run("multiply", evaluator.multiply, seal_a, seal_b)
    run("relinearise", evaluator.relinearize, product, relin)
    run("rotate", evaluator.rotate_vector, seal_a, step, galois)
    if level:
        run("rescale", evaluator.rescale_to_next, seal_a)
        run("mod_switch", evaluator.mod_switch_to_next, seal_a)

    for word_bits, name in engines:
        exact = case.exact(word_bits, name)
        got = {
            "add": exact.add(a, b),
            "multiply_plain": exact.multiply_plain(a, plain_words(plain, n)),
            "multiply": exact.multiply(a, b),
            "relinearise": exact.relinearise(want["multiply"], relin_words),
            "rotate": exact.rotate(a, element, galois_words),
        }
        if level:
            got |= {"rescale": exact.rescale(a), "mod_switch": exact.mod_switch(a)}
        for operation, words in want.items():
            assert np.array_equal(got[operation], words), (operation, word_bits, name)


_SETTINGS = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@_SETTINGS
@given(parameter_sets(narrow=True), st.integers(0, 5), st.integers(0, 2**32))
def test_primes_of_thirty_bits_on_every_instruction_set(
    parameters: Parameters, level: int, seed: int
) -> None:
    check(parameters, min(level, parameters.max_level), seed, ENGINES)


@_SETTINGS
@given(parameter_sets(narrow=False), st.integers(0, 5), st.integers(0, 2**32))
def test_primes_of_any_size(parameters: Parameters, level: int, seed: int) -> None:
    check(parameters, min(level, parameters.max_level), seed, PORTABLE)
