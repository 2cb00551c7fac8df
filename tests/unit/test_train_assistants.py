"""Paths through teacher assistants: which there are, and which is best."""

from __future__ import annotations

import random
from itertools import chain, combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blindtail.errors import ConfigError
from blindtail.train.assistants import Network, Path, best_path, paths

TEACHER, STUDENT = Network("T", 100), Network("S", 1)


def candidates(count: int) -> list[Network]:
    """a, b, c, ... from large to small."""
    return [Network(chr(ord("a") + i), 90 - 10 * i) for i in range(count)]


class Trainer:
    """Accuracies drawn from a path's name; notes what is trained, and that the one before it was."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.calls = list[Path]()

    def accuracy(self, path: Path) -> float:
        return random.Random(f"{self.seed}/{'-'.join(path)}").random()

    def __call__(self, path: Path) -> float:
        assert len(path) == 2 or path[:-1] in self.calls, "a network is taught by one that is not trained"
        assert path not in self.calls, "a network is trained twice"
        self.calls.append(path)
        return self.accuracy(path)


def test_all_paths_from_teacher_to_student() -> None:
    found = paths(TEACHER, reversed(candidates(2)), STUDENT)
    assert found == (("T", "S"), ("T", "a", "S"), ("T", "b", "S"), ("T", "a", "b", "S"))
    assert paths(TEACHER, [], STUDENT) == (("T", "S"),)
    assert len(paths(TEACHER, candidates(5), STUDENT)) == 32
    assert [len(p) for p in paths(TEACHER, candidates(3), STUDENT, most=1)] == [2, 3, 3, 3]


def test_assistants_of_one_size_do_not_teach_each_other() -> None:
    found = paths(TEACHER, [Network("a", 50), Network("b", 50), Network("c", 1)], STUDENT)
    assert ("T", "a", "c", "S") in found
    assert ("T", "b", "c", "S") in found
    assert not any("a" in path and "b" in path for path in found)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([Network("a", 200)], "'a' has size 200"),
        ([Network("a", 0.5)], "between"),
        ([Network("T", 50)], "names of their own"),
    ],
)
def test_candidates_that_cannot_be_assistants(wrong: list[Network], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        paths(TEACHER, wrong, STUDENT)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 5), seed=st.integers(0, 10_000))
def test_the_best_of_all_paths(count: int, seed: int) -> None:
    trainer = Trainer(seed)
    found = best_path(paths(TEACHER, candidates(count), STUDENT), trainer)
    names = "abcdefg"[:count]
    subsets = chain.from_iterable(combinations(names, k) for k in range(count + 1))
    brute = {("T", *subset, "S"): trainer.accuracy(("T", *subset, "S")) for subset in subsets}
    assert found.accuracy == max(brute.values())
    assert brute[found.path] == found.accuracy
    assert len(trainer.calls) == 2 ** (count + 1) - 1
    assert set(found.trained) == set(trainer.calls)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(0, 6), seed=st.integers(0, 10_000))
def test_best_chains_are_fewer_trainings(count: int, seed: int) -> None:
    """By dynamic programming; the same again as a recursion."""
    trainer = Trainer(seed)
    found = best_path(paths(TEACHER, candidates(count), STUDENT), trainer, exhaustive=False)
    assert len(trainer.calls) == (count + 1) * (count + 2) // 2
    order = ["T", *"abcdefg"[:count], "S"]
    best: list[Path] = [("T",)]
    for name in order[1:]:
        best.append(max(((*path, name) for path in best), key=trainer.accuracy))
    assert found.path == best[-1]
    assert found.accuracy == trainer.accuracy(best[-1])


def test_chains_find_the_best_where_better_teachers_teach_better() -> None:
    """Each step loses the square of how much smaller it makes the network: many small steps are best."""
    sizes = {n.name: n.size for n in (TEACHER, STUDENT, *candidates(4))}

    def accuracy(path: Path) -> float:
        return -sum((sizes[a] / sizes[b] - 1) ** 2 for a, b in pairwise(path))

    every = paths(TEACHER, candidates(4), STUDENT)
    found = best_path(every, accuracy, exhaustive=False)
    assert found.path == best_path(every, accuracy).path == ("T", "a", "b", "c", "d", "S")


def test_of_equals_the_shorter_path() -> None:
    every = paths(TEACHER, candidates(3), STUDENT)
    assert best_path(every, lambda _: 0.5).path == ("T", "S")
    assert best_path(every, lambda _: 0.5, exhaustive=False).path == ("T", "S")


def test_paths_that_do_not_belong_together() -> None:
    for wrong in ([], [("T",)], [("T", "S"), ("U", "S")], [("T", "S"), ("T", "R")]):
        with pytest.raises(ConfigError, match="one teacher to one student"):
            best_path(wrong, Trainer())
    both_orders = [("T", "a", "b", "S"), ("T", "b", "a", "S")]
    with pytest.raises(ConfigError, match="both orders"):
        best_path(both_orders, Trainer(), exhaustive=False)
    assert best_path(both_orders, Trainer()).path in both_orders
