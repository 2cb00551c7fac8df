"""CKKS parameters: ring, primes, levels, and the security bound they must meet.

A *level* l ciphertext lives modulo q_0 * ... * q_l; a fresh one starts at
`max_level`. Rescaling drops the last prime and one level. Key switching uses
one special prime and one digit per prime, as SEAL does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from blindtail.errors import ModelError

#: log2 of the largest full key modulus (special prime included) at 128 bits of
#: classical security with uniform ternary secrets and sigma = 3.19. Bossuat et
#: al., "Security Guidelines for Implementing Homomorphic Encryption" (IACR
#: ePrint 2024/463), table of maximal log2 Q.
MAX_LOG2_Q_128: Mapping[int, int] = MappingProxyType(
    {1024: 26, 2048: 53, 4096: 106, 8192: 214, 16384: 430, 32768: 868}
)

#: What SEAL itself accepts at its 128-bit setting; never looser than the above.
SEAL_MAX_LOG2_Q_128: Mapping[int, int] = MappingProxyType(
    {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
)

#: Standard deviation of SEAL's error (centred binomial, clipped).
ERROR_STD = 3.2

#: Bits of primes: usually the most that a 32-bit word of `native` takes; and what may be chosen.
PRIME_BITS = 30
PRIME_SIZES = range(22, PRIME_BITS + 1)
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


def is_prime(n: int) -> bool:
    """Deterministic Miller-Rabin, exact below 3.3e24 (first twelve primes as witnesses)."""
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    d, r = n - 1, 0
    while d % 2 == 0:
        d //= 2
        r += 1
    for a in _WITNESSES:
        x = pow(a, d, n)
        if x in (1, n - 1):
            continue
        for _ in range(r - 1):
            x = x * x % n
            if x == n - 1:
                break
        else:
            return False
    return True


def ntt_primes(ring_degree: int, count: int, below: int = 1 << PRIME_BITS) -> tuple[int, ...]:
    """The `count` largest primes p < `below` with p = 1 mod 2N, descending."""
    step = 2 * ring_degree
    p = (below - 2) // step * step + 1
    found: list[int] = []
    while len(found) < count:
        if p <= step:
            raise ModelError(f"there are not {count} primes = 1 mod {step} below {below}")
        if is_prime(p):
            found.append(p)
        p -= step
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Parameters:
    """A checked CKKS parameter set. Build with `Parameters.create` or `from_json`.

    ring_degree  N, a power of two; N/2 real slots
    primes       q_0, ..., q_L: data primes, q_0 is the one that stays last
    special      the key-switching prime P
    """

    ring_degree: int
    primes: tuple[int, ...]
    special: int

    def __post_init__(self) -> None:
        n = self.ring_degree
        if n not in MAX_LOG2_Q_128:
            raise ModelError(f"ring degree {n} is not one of {sorted(MAX_LOG2_Q_128)}")
        every = (*self.primes, self.special)
        if not self.primes or len(set(every)) != len(every):
            raise ModelError("parameters need at least one data prime, all primes distinct")
        for p in every:
            if not (p > 2 * n and p < 1 << 60 and p % (2 * n) == 1 and is_prime(p)):
                raise ModelError(f"{p} is not a prime below 2^60 with p = 1 mod {2 * n}")
        if self.log2_key_modulus > MAX_LOG2_Q_128[n]:
            raise ModelError(
                f"log2 of the key modulus is {self.log2_key_modulus:.1f}, above the 128-bit bound "
                f"{MAX_LOG2_Q_128[n]} for N = {n}: use a larger ring, or a tail with fewer levels"
            )

    @classmethod
    def create(
        cls, levels: int, ring_degree: int | None = None, bits: int = PRIME_BITS, wide: int = 0
    ) -> Parameters:
        """A fast-path set: `levels` + 1 data primes and a special prime, within a factor of two below 2^30.

        bits  of the primes: fewer make uplink and keys smaller and errors larger. Below
              `PRIME_BITS`, q_0, which bounds the logits, and the special prime, by which the noise
              of key switching is divided, are almost twice as large as the others
        wide  data primes besides, of the lowest levels, that are so large too; with fewer bits alone

        Without `ring_degree`, the smallest ring that is 128-bit secure. Raises
        `ModelError` when none is.
        """
        if levels < 0:
            raise ModelError(f"a program cannot consume {levels} levels")
        if bits not in PRIME_SIZES:
            raise ModelError(f"primes have {PRIME_SIZES[0]} to {PRIME_SIZES[-1]} bits, not {bits}")
        count = levels + 2
        larger = 2 + max(0, min(wide, levels - 1)) if bits < PRIME_BITS and count > 2 else 0
        for n in [ring_degree] if ring_degree else sorted(MAX_LOG2_Q_128):
            if n not in MAX_LOG2_Q_128:
                raise ModelError(f"ring degree {n} is not one of {sorted(MAX_LOG2_Q_128)}")
            if count * bits + larger > MAX_LOG2_Q_128[n] and ring_degree is None:
                continue
            if n < 2048:
                continue
            try:
                primes = ntt_primes(n, count - larger, 1 << bits)
                pair = ntt_primes(n, larger, 2 * primes[-1]) if larger else ()
            except ModelError:
                continue
            if primes[-1] < 1 << (bits - 1) or (pair and pair[-1] <= primes[0]):
                continue
            if pair:
                return cls(n, (*pair[1:], *primes), pair[0])
            # The largest prime is the special one: mod-down noise shrinks with it.
            return cls(n, primes[1:], primes[0])
        raise ModelError(
            f"no ring up to {max(MAX_LOG2_Q_128)} carries {levels} levels at 128 bits: "
            "cut the network later, or use fewer squares"
        )

    @property
    def slots(self) -> int:
        return self.ring_degree // 2

    @property
    def max_level(self) -> int:
        return len(self.primes) - 1

    @property
    def log2_key_modulus(self) -> float:
        return math.log2(self.special) + sum(map(math.log2, self.primes))

    @property
    def key_primes(self) -> tuple[int, ...]:
        """Data primes and, last, the special prime: SEAL's order."""
        return (*self.primes, self.special)

    def galois_element(self, step: int) -> int:
        """The automorphism X -> X^g that rotates slots left by `step` (SEAL's generator 3)."""
        return pow(3, step % self.slots, 2 * self.ring_degree)

    def turn_element(self, turn: int) -> int:
        """The Galois element of a turn of the slots, by `turn` to the left.

        A negative turn, ~t (= -1 - t), rotates by t and conjugates: X -> X^-g.
        """
        if turn >= 0:
            return self.galois_element(turn)
        return 2 * self.ring_degree - self.galois_element(~turn)

    def to_json(self) -> dict[str, Any]:
        return {"ring_degree": self.ring_degree, "primes": list(self.primes), "special": self.special}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Parameters:
        primes: Sequence[int] = data["primes"]
        return cls(int(data["ring_degree"]), tuple(int(p) for p in primes), int(data["special"]))
