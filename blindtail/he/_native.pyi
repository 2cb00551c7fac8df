"""What the native module offers; it is there when a compiler was at hand during the install.

Sources: native/src/module.cpp. Residues are uint64, coefficients or NTT form as `sealio` has them.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

class BodyError(ValueError):
    """A container's body is not what the program expects; the message holds nothing of it."""

class Keys:
    """Evaluation keys, read in place from memory that it keeps alive."""

class Ticket:
    """What depends on one request's seed alone, computed ahead."""

    @property
    def bytes(self) -> int: ...

class Tail:
    """One program. `instructions`: "" = the best here; `word_bits`: 0 = what the primes allow; `inputs`:
    ciphertexts that it reads, at most 64.

    Everything raises `ValueError` for what cannot be.
    """

    def __init__(
        self,
        log_n: int,
        primes: Sequence[int],
        instructions: str = "",
        word_bits: int = 0,
        inputs: int = 1,
    ) -> None: ...
    def add_map(
        self,
        level: int,
        babies: Sequence[int],
        giants: Sequence[Sequence[tuple[int, int]]],
        giant: int,
        folds: Sequence[Sequence[int]],
        diagonals: NDArray[np.float64],
        plain_scale: float,
        bias: NDArray[np.float64],
        bias_scale: float,
        imaginary: NDArray[np.float64] | None = None,
        inputs: Sequence[int] = (),
        sources: Sequence[int] = (),
    ) -> None:
        """Rotations as Galois elements; giants: (index of baby, index of diagonal) by giant step;
        diagonals (count, N / 2), and their imaginary parts, if they have any.

        sources: operands, as values: the inputs come first, each step makes the next; empty: the
        one before. inputs: which operand each baby step turns; empty: the first. Maps that follow one
        another with the same sources and level share their rotations."""
    def map_bytes(self, level: int, diagonals: int) -> int:
        """Of an encoded map, its bias included: a multiple of 64."""
    def encode_map(
        self,
        level: int,
        diagonals: NDArray[np.float64],
        plain_scale: float,
        bias: NDArray[np.float64],
        bias_scale: float,
        out: NDArray[np.uint8],
        imaginary: NDArray[np.float64] | None = None,
    ) -> None:
        """To `out`, `map_bytes` long and 64-byte aligned; adds nothing."""
    def add_encoded_map(
        self,
        level: int,
        babies: Sequence[int],
        giants: Sequence[Sequence[tuple[int, int]]],
        giant: int,
        folds: Sequence[Sequence[int]],
        encoded: NDArray[np.uint8],
        inputs: Sequence[int] = (),
        sources: Sequence[int] = (),
    ) -> None:
        """As `add_map` of what `encode_map` made, read in place and kept alive; 64-byte aligned."""
    def add_square(self, level: int, sources: Sequence[int] = ()) -> None: ...
    def add_product(self, level: int, sources: Sequence[int]) -> None: ...
    def add_sum(
        self,
        level: int,
        sources: Sequence[int],
        constant: NDArray[np.float64] | None = None,
        scale: float = 1.0,
    ) -> None:
        """Of one or two values and a constant, (N / 2,) at `scale`; stays at its level."""
    def finish(self, period: int, dropped_bits: int, outputs: int = 1, group_bytes: int = 1 << 28) -> None:
        """The last `outputs` steps, at most 64, are maps at level 1: their results are the reply.

        group_bytes: memory that sums of maps which share rotations may take; 0: none share. Results
        do not depend on it."""
    @property
    def groups(self) -> list[int]:
        """How many maps each group has that shares its rotations, in order."""
    @property
    def word_bits(self) -> int: ...
    @property
    def instructions(self) -> str: ...
    @property
    def plain_bytes(self) -> int: ...
    def key_bytes(self, level: int) -> int: ...
    def prepare_key(
        self, element: int, level: int, body: NDArray[np.uint8], out: NDArray[np.uint8]
    ) -> None: ...
    def load_keys(self, memory: NDArray[np.uint8], shapes: Sequence[tuple[int, int]]) -> Keys:
        """shapes: (element, level) of the keys in memory, one after the other; 64-byte aligned."""
    def expect(self) -> None:
        """An evaluation is soon to come: threads that sleep wake up. Changes no result."""
    def evaluate(self, keys: Keys, body: NDArray[np.uint8], threads: int = 1) -> bytes: ...
    def make_ticket(self, keys: Keys, seed: bytes, threads: int = 1) -> Ticket:
        """seed: 64 bytes for each input."""
    def evaluate_ticket(
        self, keys: Keys, body: NDArray[np.uint8], ticket: Ticket, threads: int = 1
    ) -> bytes: ...
    def evaluate_residues(
        self, keys: Keys, c0: NDArray[np.uint64], c1: NDArray[np.uint64], threads: int = 1
    ) -> NDArray[np.uint64]:
        """(level + 1, N) each, NTT form -> (2, N) at level 0, coefficients.

        Several inputs lie one after the other; several outputs come as (outputs, 2, N)."""

class Exact:
    """SEAL's operations, word for word, on (polynomials, primes, N); a key is (2, key primes, N) a digit."""

    def __init__(
        self, log_n: int, primes: Sequence[int], instructions: str = "", word_bits: int = 32
    ) -> None: ...
    def add(self, a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def multiply_plain(self, a: NDArray[np.uint64], plain: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def multiply(self, a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def relinearise(self, a: NDArray[np.uint64], key: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]: ...
    def rotate(
        self, a: NDArray[np.uint64], element: int, key: Sequence[NDArray[np.uint64]]
    ) -> NDArray[np.uint64]: ...
    def rescale(self, a: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
    def mod_switch(self, a: NDArray[np.uint64]) -> NDArray[np.uint64]: ...

def instruction_sets() -> list[str]:
    """Those that this processor has, the best first."""

def version() -> str:
    """The version of the package that it was built with."""
