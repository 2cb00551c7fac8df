"""Programs that are no chain: skip connections and polynomials, on every backend."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.tails import Client
from blindtail.he import noise
from blindtail.he.assemble import activation_ops
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.elementwise import ProductOp, ScaleOp, SumOp
from blindtail.he.layers import Affine, FloatArray, Layer, Polynomial, Quadratic, Skip, outputs
from blindtail.he.native_backend import NativeEvaluator, available
from blindtail.he.normal import Activation, Normal, levels, normalised
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.recover import layers_of

BACKENDS = ["seal", *(["native"] if available() else [])]
FEATURES = 40


def _polynomial(rng: np.random.Generator, size: int, degree: int) -> Polynomial:
    falling = (np.arange(degree + 1)[:, None] + 1) ** 1.5
    return Polynomial(rng.normal(size=(degree + 1, size)) / falling, f"poly{degree}")


def _tail(
    widths: tuple[int, ...], degrees: tuple[int, ...], skips: dict[int, tuple[int, ...]]
) -> list[Layer]:
    """skips: map -> how many values further back it reads as well."""
    rng = np.random.default_rng([*widths, *degrees])
    made: list[Layer] = []
    for i, (inputs, rows) in enumerate(itertools.pairwise(widths)):
        weights = [(0, inputs), *((back, widths[i - back]) for back in skips.get(i, ()))]
        parts = [rng.normal(size=(rows, size)) / np.sqrt(size * len(weights)) for _, size in weights]
        joined = tuple(Skip(back, part) for (back, _), part in zip(weights[1:], parts[1:], strict=True))
        made.append(Affine(parts[0], rng.normal(size=rows) / 8, f"map{i}", skips=joined))
        if i == len(degrees):
            break
        made.append(
            Quadratic(np.ones(rows), rng.normal(size=rows) / 4, np.zeros(rows), f"square{i}")
            if degrees[i] == 2
            else _polynomial(rng, rows, degrees[i])
        )
    return made


CASES = {
    "skip": ((FEATURES, 32, 24, 10), (2, 2), {1: (1,), 2: (1,)}),
    "input to the end": ((FEATURES, 64, 32, 10), (2, 2), {2: (2,)}),
    "both": ((FEATURES, 32, FEATURES, 7), (3, 2), {1: (1,), 2: (1, 2)}),
    "degree 3": ((FEATURES, 32, 10), (3,), {}),
    "degree 4": ((FEATURES, 32, 10), (4,), {}),
    "degree 5": ((FEATURES, 48, 10), (5,), {}),
    "degree 7": ((FEATURES, 32, 10), (7,), {}),
    "two cubics": ((FEATURES, 32, 16, 10), (3, 3), {}),
}


@lru_cache
def _made(name: str) -> tuple[Normal, FloatArray, Program]:
    layers = _tail(*CASES[name])
    x = np.random.default_rng(3).uniform(-1, 1, (120, FEATURES))
    return normalised(layers), x, compile_tail(layers, x)


@pytest.mark.parametrize("name", CASES)
def test_the_program_computes_the_layers(name: str) -> None:
    normal, x, program = _made(name)
    want = outputs(_tail(*CASES[name]), x)[-1]
    assert np.allclose(normal(x), want, atol=1e-12 * np.abs(want).max())
    assert np.allclose(ClearEvaluator(program).logits(x[:20]), want[:20], atol=1e-9)
    assert program.depth == normal.depth
    assert not program.is_chain
    error = np.abs(ClearEvaluator(program, noise_seed=1).logits(x[:20]) - want[:20])
    assert 0 < error.max() < program.error_bounds().max()


@pytest.mark.parametrize("name", CASES)
def test_errors_stay_within_their_bounds(name: str) -> None:
    normal, x, program = _made(name)
    client = Client.of(program, *BACKENDS)
    # A bound is of the noisiest row and backend: elsewhere it says little of how loose it is.
    noise_seeds = [ClearEvaluator(program, noise_seed=seed).logits(x) - normal(x) for seed in range(4)]
    noisiest = int(np.square(noise_seeds).mean(axis=(0, 2)).argmax())
    rows = np.concatenate([x[:3], np.repeat(x[noisiest : noisiest + 1], 3, axis=0)])
    want, bounds, errors = normal(rows), program.error_bounds(), list[FloatArray]()
    for backend in BACKENDS:
        for row, logits in zip(rows, want, strict=True):
            got = client.decryptor.decrypt(client.evaluate(backend, client.encryptor.encrypt(row)))
            errors.append(np.abs(got - logits))
            assert (errors[-1] <= bounds[0]).all(), backend
    assert np.median(bounds[0] / np.max(errors, axis=0)) < 64, "the bound is loose"


@pytest.mark.parametrize("name", CASES)
def test_the_slot_that_key_switching_hits_has_what_the_last_folds_add(name: str) -> None:
    """Nothing averages it, and nothing comes after: on `seal` it is a key's own bias of one logit."""
    _, _, program = _made(name)
    spec, last = program.spec, program.ops[-1]
    assert isinstance(last, MapOp)
    excess, merged = 0.0, 1
    for group in reversed(last.folds):
        excess += noise.keyswitch_peak(spec.parameters, 0) * len(group) * merged**2
        merged *= len(group) + 1
    copies = spec.parameters.slots / spec.reply.period
    least = math.sqrt(excess) / copies / spec.reply.scale
    assert spec.predicted_worst_noise >= 0.999 * math.hypot(spec.predicted_noise, least)


@pytest.mark.parametrize("name", ["both", "degree 5"])
def test_a_program_survives_its_file(name: str) -> None:
    program = _made(name)[2]
    again = Program.from_parts(*program.to_parts())
    assert again.spec == program.spec
    assert again.content_id == program.content_id
    x = _made(name)[1][:3]
    assert np.array_equal(ClearEvaluator(again).logits(x), ClearEvaluator(program).logits(x))


@pytest.mark.parametrize("name", CASES)
def test_the_layers_come_back(name: str) -> None:
    normal, x, program = _made(name)
    layers = layers_of(program)
    assert np.allclose(outputs(layers, x)[-1], normal(x), atol=1e-9)
    again = compile_tail(layers, x)
    assert np.allclose(ClearEvaluator(again).logits(x[:3]), normal(x[:3]), atol=1e-9)


@pytest.mark.skipif(not available(), reason="the native backend was not built")
def test_threads_words_and_tickets_change_nothing() -> None:
    _, x, program = _made("both")
    client = Client.of(program, "native")
    ticket = client.encryptor.ticket()
    container = client.encryptor.encrypt(x[0], ticket)
    alone = client.evaluate("native", container)
    made = client.evaluator.make_ticket(client.keys, ticket.seed)
    assert client.evaluator.evaluate(client.keys, container, made) == alone
    for evaluator in (NativeEvaluator(program, threads=3), NativeEvaluator(program, instructions="portable")):
        assert evaluator.evaluate(_loaded(evaluator, client), container) == alone


def _loaded(evaluator: NativeEvaluator, client: Client) -> object:
    return client.keys  # prepared keys are the same for every evaluator of a program


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 17), st.integers(0, 2**32), st.booleans())
def test_polynomials_take_the_least_levels(degree: int, seed: int, sparse: bool) -> None:
    rng = np.random.default_rng(seed)
    coefficients = _polynomial(rng, 5, degree).coefficients.copy()
    if sparse:
        coefficients[1:-1] *= rng.random((degree - 1, 1)) < 0.5
    layers = [Affine(np.eye(5), np.zeros(5)), Polynomial(coefficients), Affine(np.eye(5), np.zeros(5))]
    normal = normalised(layers)
    x = rng.uniform(-1, 1, (8, 5))
    want = sum(c * x**k for k, c in enumerate(coefficients))
    assert np.allclose(
        normal(x), want, atol=1e-9 * max(1, np.abs(coefficients).max() / np.abs(coefficients[-1]).min())
    )
    (activation,) = normal.activations
    least = (degree).bit_length() if degree & (degree - 1) or degree == 1 else None
    assert least is None or activation.levels == least
    if activation.coefficients is None:
        return
    ops = activation_ops(activation, 10)
    assert 10 - min(op.out_level for op in ops) == activation.levels
    products = sum(not isinstance(op, SumOp | ScaleOp) for op in ops)
    assert products <= degree  # of two ciphertexts
    assert activation.levels == levels(activation.degree, activation.monic)


def test_a_leading_coefficient_is_taken_out_where_that_saves_a_level() -> None:
    lead = np.array([[0.0], [1.0], [0.5], [0.2], [2.0]])
    dense = Affine(np.ones((1, 1)), np.zeros(1))
    (activation,) = normalised([dense, Polynomial(lead), dense]).activations
    assert (activation.degree, activation.levels) == (4, 2)
    lead[-1] = 1e-6  # its inverse would blow the others up
    (activation,) = normalised([dense, Polynomial(lead), dense]).activations
    assert (activation.degree, activation.levels) == (4, 3)


def test_joins_share_their_rescaling() -> None:
    """A map of two values is one operation: no level and no key for joining them."""
    program = _made("skip")[2]
    joined = [op for op in program.ops if len(op.backs) > 1]
    assert len(joined) == 2
    assert program.depth == 5
    assert not any(isinstance(op, ProductOp) for op in program.ops)


def test_a_square_is_an_activation_without_coefficients() -> None:
    assert Activation("square").levels == 1
