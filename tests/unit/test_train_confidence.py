"""AUROC and AURC of failure prediction against their definitions, and the scores they are of."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import DataError
from blindtail.train.calibrate import softmax
from blindtail.train.confidence import SCORES, aurc, auroc, entropy, failure_prediction, margin

answers = st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=200, deadline=None)
@given(answers)
def test_auroc_is_the_chance_of_a_higher_score(found: list[tuple[int, bool]]) -> None:
    scores, correct = (np.array(column) for column in zip(*found, strict=True))
    pairs = [
        (1.0 if a > b else 0.5 if a == b else 0.0)
        for (a, right), (b, other) in itertools.product(found, found)
        if right and not other
    ]
    told = auroc(scores.astype(float), correct)
    assert told is None if not pairs else told == pytest.approx(np.mean(pairs))


@settings(max_examples=60, deadline=None)
@given(answers)
def test_aurc_is_the_mean_over_all_orders_of_equals(found: list[tuple[int, bool]]) -> None:
    scores, correct = (np.array(column) for column in zip(*found, strict=True))
    every = []
    for order in itertools.permutations(range(len(found))):
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order)):
            wrong = ~correct[list(order)]
            every.append(np.mean(np.cumsum(wrong) / np.arange(1, len(wrong) + 1)))
    assert aurc(scores.astype(float), correct) == pytest.approx(np.mean(every))


def test_scores_by_hand() -> None:
    p = np.array([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.3, 0.2]])
    assert SCORES["probability"](p) == pytest.approx([1, 1 / 3, 0.5])
    bits = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.2))
    assert entropy(p) == pytest.approx([1, 0, 1 - bits / math.log(3)], abs=1e-12)
    assert margin(p) == pytest.approx([1, 0, 0.2])
    assert margin(np.ones((2, 1))) == pytest.approx([1, 1])


def test_an_exit_that_knows_when_it_is_wrong() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 4000)
    sure = rng.random(4000) < 0.8
    signal = np.where(sure, 4.0, 0.5)[:, None] * np.eye(10)[labels]
    logits = (signal + 0.5 * rng.normal(size=(4000, 10))).astype(np.float32)
    found = failure_prediction(logits, labels)
    blind = failure_prediction(logits[rng.permutation(4000)], labels)  # the control: another image's logits
    for name in SCORES:
        told = found[name]["auroc"], blind[name]["auroc"]
        assert told[0] is not None
        assert told[1] is not None
        assert told[0] > 0.9
        assert abs(told[1] - 0.5) < 0.05
        best, own = found["best"]["aurc"], found[name]["aurc"]
        assert best is not None
        assert own is not None
        error = float((logits.argmax(1) != labels).mean())
        assert best <= own < error, "answering the surest first is better than chance"
    assert softmax(logits).shape == (4000, 10)


def test_no_answers_and_answers_all_alike() -> None:
    with pytest.raises(DataError, match="there are none"):
        aurc(np.zeros(0), np.zeros(0, bool))
    assert auroc(np.arange(3.0), np.ones(3, bool)) is None
    assert aurc(np.arange(3.0), np.ones(3, bool)) == 0.0
    assert aurc(np.zeros(4), np.array([True, False, True, False])) == pytest.approx(0.5)
