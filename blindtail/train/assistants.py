"""Teacher assistants: which chain of networks, from a large teacher down, makes the best student.

Each network of a path is distilled from the one before it (`blindtail.train.losses.Distillation`).
Source: Mirzadeh et al., Improved Knowledge Distillation via Teacher Assistant, AAAI 2020.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from itertools import combinations, pairwise

from blindtail.errors import ConfigError

#: Names of networks, the teacher's first.
Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Network:
    """A network by its name; `size` is any measure of what it can learn, parameters as a rule."""

    name: str
    size: float


@dataclass(frozen=True)
class Best:
    """The path whose student is best, that student's accuracy, and of everything that was trained."""

    path: Path
    accuracy: float
    trained: Mapping[Path, float]


def paths(
    teacher: Network, candidates: Iterable[Network], student: Network, *, most: int | None = None
) -> tuple[Path, ...]:
    """Every path from teacher to student, through `most` assistants at the most; the direct one first.

    Sizes fall along a path: from assistant to assistant strictly; one may be as large as the teacher
    or as small as the student (a ReLU network before a polynomial one). k candidates of different
    sizes give 2^k paths. Raises `ConfigError` for a candidate outside the two, and for equal names.
    """
    between = sorted(candidates, key=lambda network: (-network.size, network.name))
    names = [teacher.name, student.name, *(network.name for network in between)]
    if len(set(names)) < len(names):
        raise ConfigError(f"networks of a path need names of their own: {', '.join(names)}")
    for network in between:
        if not teacher.size >= network.size >= student.size:
            raise ConfigError(
                f"assistant {network.name!r} has size {network.size:g}: it must lie between "
                f"the student's {student.size:g} and the teacher's {teacher.size:g}"
            )
    count = len(between) if most is None else min(most, len(between))
    return tuple(
        (teacher.name, *(network.name for network in chosen), student.name)
        for length in range(count + 1)
        for chosen in combinations(between, length)
        if all(a.size > b.size for a, b in pairwise(chosen))
    )


def best_path(
    paths: Sequence[Path], accuracy_of: Callable[[Path], float], *, exhaustive: bool = True
) -> Best:
    """The path that ends in the most accurate student; the shorter, then the earlier one of equals.

    accuracy_of  given the beginning of a path, two networks or more: trains its last one from the one
                 before, and returns its accuracy (on validation images). It is called once for each
                 beginning that occurs, always after that without the last network, whose weights it
                 may keep. The teacher is trained already.
    exhaustive   True: all paths, 2^(k+1) - 1 trainings for all paths through k candidates. False: the
                 best chain to each network, by dynamic programming, which takes it that the best
                 teacher of its kind teaches best: (k+1)(k+2)/2 trainings.

    All paths run from the same teacher to the same student. Raises `ConfigError` where not.
    """
    ends = {(path[0], path[-1]) for path in paths if len(path) >= 2}
    if len(ends) != 1 or any(len(path) < 2 for path in paths):
        raise ConfigError("give paths of two networks or more, all from one teacher to one student")
    trained: dict[Path, float] = {}

    def accuracy(path: Path) -> float:
        for length in range(2, len(path) + 1):
            beginning = path[:length]
            if beginning not in trained:
                trained[beginning] = accuracy_of(beginning)
        return trained[path]

    whole = list(paths) if exhaustive else _chains(paths, accuracy)
    best = max(whole, key=lambda path: (accuracy(path), -len(path)))
    return Best(best, trained[best], trained)


def _chains(paths: Sequence[Path], accuracy: Callable[[Path], float]) -> list[Path]:
    """The given paths that are the best chain to their last assistant, and the student after it."""
    beginnings = {path[:length] for path in paths for length in range(2, len(path) + 1)}
    before: dict[str, set[str]] = {}
    for path in paths:
        for name, after in pairwise(path):
            before.setdefault(after, set()).add(name)
    try:
        order = tuple(TopologicalSorter(before).static_order())
    except CycleError as error:
        raise ConfigError("two networks come in both orders on these paths: sizes must fall") from error
    best: dict[str, Path] = {paths[0][0]: (paths[0][0],)}
    for name in order:
        chains = [(*best[last], name) for last in sorted(before.get(name, ())) if last in best]
        chains = [chain for chain in chains if chain in beginnings]
        if name == paths[0][-1]:
            _check_any(chains)
            return sorted(chains, key=paths.index)
        if chains:
            best[name] = max(chains, key=lambda path: (accuracy(path), -len(path)))
    raise AssertionError("a path ends in its student")


def _check_any(chains: Sequence[Path]) -> None:
    if not chains:
        raise ConfigError("none of these paths goes on from a best chain: give all of them")


__all__ = ["Best", "Network", "Path", "best_path", "paths"]
