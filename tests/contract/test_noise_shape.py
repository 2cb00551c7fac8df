"""Why error bounds widen when few copies are averaged: a rounding error meets the secret.

With one key, a slot's variance follows the secret's value at that slot, squared: an
exponential, so the mean over c copies has a squared coefficient of variation of
1 / c over the slots. If all slots were alike it would be 0.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from bench.tails import Client, random_layers
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine
from blindtail.he.normal import normalised
from tests.he_cases import Case, activations, program, rewritten_logits


@pytest.mark.parametrize(
    ("case", "copies", "low", "high"),
    [(Case((80, 146, 226), lanes=8), 2, 0.35, 0.70), (Case((64, 32, 10), lanes=16), 16, 0.0, 0.25)],
    ids=("two copies", "sixteen copies"),
)
def test_variance_differs_between_slots_as_the_secret_does(
    case: Case, copies: int, low: float, high: float
) -> None:
    compiled = program(case)
    assert compiled.spec.parameters.slots // compiled.spec.reply.period == copies
    client, x, n = Client.of(compiled), activations(case, case.lanes), 40
    want = rewritten_logits(case, x)
    errors = np.array(
        [
            client.decryptor.decrypt(client.evaluator.evaluate(client.keys, client.encryptor.encrypt(x)))
            - want
            for _ in range(n)
        ]
    ).reshape(n, -1)
    # The first slots carry the key switching's excess besides: another effect, bounded apart.
    bounds = compiled.error_bounds().ravel()
    errors = errors[:, bounds < 1.05 * bounds.min()]
    variance = errors.var(axis=0, ddof=1)
    spread = variance.var() / variance.mean() ** 2
    sampling = 2 / (n - 1)  # of a normal sample's variance
    assert low <= (spread - sampling) / (1 + sampling) <= high
    within = (errors - errors.mean(axis=0)) / errors.std(axis=0, ddof=1)
    assert 2.6 < (within**4).mean() / (within**2).mean() ** 2 < 3.2  # one slot's errors are normal


def test_logits_much_smaller_than_one_keep_their_bound() -> None:
    """A scale that grows as logits shrink would pass q_0, which SEAL refuses."""
    *rest, last = random_layers((64, 32, 10))
    assert isinstance(last, Affine)
    small = [*rest, replace(last, weight=last.weight / 1000, bias=last.bias / 1000)]
    x = activations(Case((64, 32, 10)), 4)
    compiled = compile_tail(small, x)
    want = normalised(small)(x)
    assert np.abs(want).max() < 0.05
    assert compiled.spec.reply.scale < compiled.spec.parameters.primes[0]
    client = Client.of(compiled)
    for values, logits in zip(x, want, strict=True):
        got = client.decryptor.decrypt(
            client.evaluator.evaluate(client.keys, client.encryptor.encrypt(values))
        )
        assert (np.abs(got - logits) <= compiled.error_bounds().ravel()).all()
