"""CKKS noise, predicted: variances per slot, in units of the scaled plaintext.

A noise polynomial with independent coefficients of variance s^2 gives every
slot a complex value of variance N s^2, whose real part has variance N s^2 / 2.
All functions return the variance of that real part ("slot variance"). The
secret is uniform ternary, so a coefficient has variance 2/3. Sources: Cheon et
al. (CKKS, 2017) for the operations, Costache et al. (ePrint 2020/1530) for
the average-case treatment; key switching as SEAL does it, one digit a prime.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from blindtail.he.params import ERROR_STD, Parameters

FloatArray = NDArray[np.float64]

_SECRET_VARIANCE = 2 / 3


def slot(parameters: Parameters, coefficient_variance: float) -> float:
    """Variance of a coefficient -> variance of a slot's real part."""
    return parameters.ring_degree / 2 * coefficient_variance


def encoding(parameters: Parameters) -> float:
    """Rounding a plaintext's coefficients to integers."""
    return slot(parameters, 1 / 12)


def fresh(parameters: Parameters) -> float:
    """Symmetric encryption: one error polynomial, and the encoding's rounding."""
    return slot(parameters, ERROR_STD**2) + encoding(parameters)


def rounding(parameters: Parameters) -> float:
    """Dividing by a prime: c0 and c1 are rounded, c1's rounding meets the secret."""
    return slot(parameters, (1 + parameters.ring_degree * _SECRET_VARIANCE) / 12)


def keyswitch(parameters: Parameters, level: int) -> float:
    """Rotation or relinearisation at `level`: level + 1 digits below their primes, mod-down by P."""
    n, p = parameters.ring_degree, parameters.special
    # SEAL takes digits in [0, q), not centred: their mean square is q^2 / 3.
    digits = sum(n * (q * q / 3) * ERROR_STD**2 for q in parameters.primes[: level + 1])
    return slot(parameters, digits / p**2) + rounding(parameters)


def keyswitch_peak(parameters: Parameters, level: int) -> float:
    """What the worst slot has in excess of `keyswitch`.

    Digits in [0, q) are q / 2 on average, and (q / 2)(1 + X + ... + X^(N-1)) is not
    spread evenly: at the root of unity next to 1, where slot 0 lies, it is as
    large as (q / 2)(2 N / pi). That slot's complex variance is q^2 N^3 sigma^2 / pi^2
    a digit, divided by P^2; half of it is real.
    """
    n, p = parameters.ring_degree, parameters.special
    digits = sum(float(n) ** 3 * (q * q) * ERROR_STD**2 / math.pi**2 for q in parameters.primes[: level + 1])
    return digits / p**2 / 2


def peak_shares(parameters: Parameters) -> FloatArray:
    """By slot, the share of `keyswitch_peak` that it has; 1 in slot 0.

    Slot s lies at exp(i pi e / N), e = 3^s mod 2N, where 1 + X + ... + X^(N-1) is
    as large as 1 / sin(pi e / 2N).
    """
    n = parameters.ring_degree
    exponent = np.ones(n // 2, np.int64)
    for s in range(1, n // 2):
        exponent[s] = exponent[s - 1] * 3 % (2 * n)
    shares: FloatArray = (np.sin(np.pi / (2 * n)) / np.sin(np.pi * exponent / (2 * n))) ** 2
    return shares


def truncated(parameters: Parameters, dropped_bits: int) -> float:
    """*Coefficient* variance of a reply whose c1 lost its low bits.

    The error is uniform in the cell of 2^dropped_bits values and meets the secret.
    """
    if not dropped_bits:
        return 0.0
    return 4.0**dropped_bits / 12 * parameters.ring_degree * _SECRET_VARIANCE
