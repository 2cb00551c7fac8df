"""How often noise changes a label: the bound, the deviation it allows, and programs compiled for it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from blindtail.errors import ConfigError, ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.layers import Affine, outputs
from blindtail.he.margins import disagreement, largest_deviation
from blindtail.he.normal import normalised
from blindtail.he.objective import NoPlan, Objective
from blindtail.he.params import PRIME_SIZES
from blindtail.he.plan import costs_of
from blindtail.he.precision import candidates
from blindtail.he.program import Program
from blindtail.he.recover import layers_of
from blindtail.models.zoo import bundle_paths
from edge.pair import ModelPair


def _logits(seed: int, rows: int = 4000, classes: int = 10) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=(rows, classes))


def _changed(logits: Any, errors: Any) -> float:
    return float((np.argmax(logits + errors, axis=1) != np.argmax(logits, axis=1)).mean())


@pytest.mark.parametrize("deviation", [1e-3, 1e-2, 0.1])
@pytest.mark.parametrize("alike", [0.0, 0.9, -0.1])
def test_no_more_labels_change_than_expected_whatever_errors_have_in_common(
    deviation: float, alike: float
) -> None:
    """And not many fewer, where they have nothing in common: the bound is not loose."""
    logits, rng = _logits(0, 40_000), np.random.default_rng(1)
    covariance = np.full((10, 10), alike) + (1 - alike) * np.eye(10)
    errors = deviation * rng.multivariate_normal(np.zeros(10), covariance, len(logits))
    seen, told = _changed(logits, errors), disagreement(logits, deviation)
    spread = 4 * math.sqrt(told / len(logits))
    assert seen <= told + spread
    if not alike:
        assert seen >= told / 3 - spread


def test_a_pair_of_opposite_errors_reaches_the_bound() -> None:
    gaps = np.abs(np.random.default_rng(2).normal(size=100_000))
    logits = np.stack([gaps, np.zeros_like(gaps)], axis=1)
    one = 0.1 * np.random.default_rng(3).normal(size=len(gaps))
    assert _changed(logits, np.stack([one, -one], axis=1)) == pytest.approx(
        disagreement(logits, 0.1), rel=0.05
    )


@pytest.mark.parametrize("share", [1e-3, 1e-2, 0.2])
def test_the_largest_deviation_is_the_one_that_the_share_allows(share: float) -> None:
    """Of other images from where these rows are."""
    logits = _logits(4)
    found = largest_deviation(logits, share)
    told = disagreement(logits, found)
    assert told < share < told + 3 * math.sqrt(told / len(logits))
    assert largest_deviation(logits, share * 1.01) > found > largest_deviation(logits, share / 1.01)
    assert np.mean([disagreement(_logits(seed), found) <= share for seed in range(100, 150)]) >= 0.9


def test_sure_rows_allow_errors_beyond_their_margins() -> None:
    logits = np.tile([5.0, 0.0], (1000, 1))
    found = largest_deviation(logits, 0.4)
    assert found > 2.5
    assert disagreement(logits, found) == pytest.approx(0.4, rel=1e-6)
    assert math.isinf(largest_deviation(np.ones((1000, 1)), 0.1)), "one class is always the largest"


def test_too_few_rows_and_ties_are_refused_with_the_way_out() -> None:
    with pytest.raises(ModelError, match=r"at least 3,000 rows of calibration data, and there are 40: give"):
        largest_deviation(_logits(5, 40), 1e-3)
    tied = _logits(6, 1000)
    tied[:100] = 1.0
    with pytest.raises(ModelError, match=r"of 10\.00% of the calibration data two logits are the largest"):
        largest_deviation(tied, 0.01)
    with pytest.raises(ModelError, match=r"of 100\.00% of the calibration data"):
        largest_deviation(np.zeros((1000, 3)), 0.01)
    with pytest.raises(ConfigError, match=r"0\.001 is one in a thousand"):
        Objective(at_most={"disagreement": 1.0})
    with pytest.raises(ConfigError, match="error and disagreement can be bounded only"):
        Objective({"disagreement": 1.0})


@pytest.fixture(scope="module")
def fashion() -> tuple[Any, Any, Program]:
    """Layers of the model that ships, activations as wide as its own spread, the program in the file."""
    program = ModelPair.open(*bundle_paths("fashion")).program
    rng = np.random.default_rng(7)
    x = np.abs(rng.normal(size=(8000, program.spec.features))) * program.spec.input_bound / 4
    return layers_of(program), x, program


def test_cheaper_primes_that_keep_the_labels(fashion: tuple[Any, Any, Program]) -> None:
    layers, x, usual = fashion
    found = {
        share: compile_tail(layers, x[:4000], objective=Objective(at_most={"disagreement": share}))
        for share in (1e-3, 2e-2)
    }
    exact = outputs(layers, x[4000:])[-1]
    for share, program in found.items():
        assert costs_of(program).uplink_bytes < usual.spec.uplink_bytes
        assert (
            disagreement(exact, program.spec.predicted_noise) <= 1.5 * share
        )  # other rows than it was made for
    few, many = (found[share].spec for share in (1e-3, 2e-2))
    assert many.uplink_bytes < few.uplink_bytes
    assert many.predicted_noise > few.predicted_noise
    noisy = ClearEvaluator(found[2e-2], noise_seed=0).logits(x[4000:4800])
    changed = int((noisy.argmax(1) != exact[:800].argmax(1)).sum())
    assert 0 < changed <= 2e-2 * 800, "none would say little"
    with pytest.raises(NoPlan, match=r"as disagreement <= 0.001 asks, within the other bounds"):
        compile_tail(
            layers, x[:4000], objective=Objective(at_most={"disagreement": 1e-3, "uplink_bytes": 96_000})
        )


def test_of_plans_that_cost_the_same_the_one_with_fewer_bytes_comes_first(
    fashion: tuple[Any, Any, Program],
) -> None:
    """Seconds do not tell primes apart: where they alone count, the smallest primes that do are taken."""
    layers, x, _ = fashion
    objective = Objective(at_most={"disagreement": 0.3, "error": 1.0})
    found = [made for made, _ in candidates(normalised(layers), x[:200], objective, 1, None)]
    values = [objective.value(made.costs) for made in found]
    alike = [
        (a.costs.key_bytes, b.costs.key_bytes)
        for (a, b), (v, w) in zip(itertools.pairwise(found), itertools.pairwise(values), strict=True)
        if v == w
    ]
    assert len(alike) > 100
    assert all(first <= second for first, second in alike)
    assert found[0].parameters.primes[-1] < 1 << (PRIME_SIZES[0] + 1), "of the smallest that there are"


def test_where_margins_ask_for_more_than_there_is_the_plan_is_refused() -> None:
    weight, bias = np.ones((2, 64)), np.array([0.0, 1e-6])  # a margin that no CKKS noise stays below
    x = np.random.default_rng(8).normal(size=(3000, 64))
    with pytest.raises(NoPlan, match=r"as disagreement <= 0.001 asks.*\(the least is"):
        compile_tail([Affine(weight, bias)], x, objective=Objective(at_most={"disagreement": 1e-3}))
