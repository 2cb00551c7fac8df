"""Encoded weights of a cell: in its state directory, for all evaluators, and gone with their program."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

import cloud.evaluator
from blindtail.bundle import save_program
from blindtail.he.native_backend import available
from blindtail.rpc import INSECURE_LOOPBACK
from cloud.evaluator import EvaluatorActor
from cloud.keyfolder import encoded_folder, program_path
from cloud.local import LocalCell
from cloud.operator_client import OperatorClient
from tests.cloud_cases import bundle, program
from tests.model_cases import file_of, retrained

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not available(), reason="the native backend was not built"),
]


def encoded_files(root: Path) -> list[Path]:
    return sorted(encoded_folder(root, "native").iterdir())


@pytest.fixture
def cell(tmp_path: Path) -> Iterator[LocalCell]:
    with LocalCell([], backend="native", evaluators=2, state_dir=tmp_path / "state") as running:
        yield running


def mappings(path: Path) -> int:
    return Path("/proc/self/maps").read_text().count(str(path))


def test_evaluators_of_a_cell_share_a_file_until_the_model_is_dropped(
    cell: LocalCell, tmp_path: Path
) -> None:
    state = cell.config.state_dir
    one, two = (retrained(version).spec.program_id for version in "12")
    with OperatorClient(cell.address, INSECURE_LOOPBACK) as operator:
        assert encoded_files(state) == []
        operator.push(file_of(tmp_path, "1"))
        (first,) = encoded_files(state)
        assert first.name.startswith(one)
        assert first.stat().st_mode & 0o777 == 0o600
        assert mappings(first) == 2  # evaluators, in one process here
        operator.push(file_of(tmp_path, "2"))
        operator.canary("toy", "2", 0.5)  # the stand-in, "ONE:TWO", reads TWO's
        assert [path.name.partition(".")[0] for path in encoded_files(state)] == sorted((one, two))
        assert [mappings(path) for path in encoded_files(state) if path != first] == [4]
        inode = first.stat().st_ino
        cell.stop()
        cell.start()
        assert first.stat().st_ino == inode  # found, not made again
    with OperatorClient(cell.address, INSECURE_LOOPBACK) as operator:
        operator.rollback("toy")
        operator.drop("toy", "1")
        (left,) = encoded_files(state)
        assert left.name.startswith(two)
        operator.drop("toy", "2")
        assert encoded_files(state) == []


def test_a_cell_clears_away_what_another_release_left(tmp_path: Path) -> None:
    folder = encoded_folder(tmp_path, "native")
    folder.mkdir(parents=True)
    for name in (f"{program().spec.program_id}.32.0", f"{program(1).spec.program_id}.32.1", ".partial-abc"):
        (folder / name).write_bytes(b"x")
    with LocalCell([bundle()], backend="native", state_dir=tmp_path):
        (path,) = encoded_files(tmp_path)
        assert path.name.startswith(program().spec.program_id)


def test_the_actor_shares_below_the_state_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its class, in this process."""
    monkeypatch.setattr(cloud.evaluator, "end_without_raylet", lambda: None)
    monkeypatch.setattr(cloud.evaluator, "limit_threads", lambda threads: None)
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    one, two = (retrained(version).spec.program_id for version in "12")
    (tmp_path / "programs").mkdir()
    for version, program_id in (("1", one), ("2", two)):
        save_program(program_path(tmp_path, program_id), retrained(version))
    actor = EvaluatorActor(tmp_path, [one, f"{one}:{two}"], "native", 1 << 20, 1)
    assert [path.name.partition(".")[0] for path in encoded_files(tmp_path)] == sorted((one, two))
    inodes = [os.stat(path).st_ino for path in encoded_files(tmp_path)]
    other = EvaluatorActor(tmp_path, [two], "native", 1 << 20, 1)
    assert [os.stat(path).st_ino for path in encoded_files(tmp_path)] == inodes
    for held in (actor, other):
        assert all(e.shares_weights for e in held._engine._evaluators.values())  # type: ignore[attr-defined]
