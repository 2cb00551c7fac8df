"""Keys with real cryptography: made by the key process, damaged on disk, uploaded over bad connections."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.bundle import CloudBundle
from blindtail.errors import ContainerError, TailUnavailable
from blindtail.rpc import INSECURE_LOOPBACK
from cloud.local import LocalCell
from edge.cipher import open_cipher
from edge.keyfiles import KeyFiles
from edge.keys import KeyProcess
from edge.keys_child import Order, carry_out
from edge.runtime import EdgeRuntime
from edge.tail import TailState
from orchestrator.policy import CloudOnly
from tests.edge_fakes import bundle_of, image, program
from tests.scripted_cell import ScriptedCell

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def cell() -> Iterator[LocalCell]:
    with LocalCell([CloudBundle("toy", "1", {2: program()})], backend="seal") as made:
        yield made


@pytest.fixture(scope="module")
def state(cell: LocalCell, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("state")
    with opened(cell, folder) as edge:
        assert edge.wait_ready(60), edge.status()
    return folder


def opened(cell: LocalCell, state: Path, **settings: Any) -> EdgeRuntime:
    return EdgeRuntime.open(
        bundle_of(spec=program().spec),
        cell.address,
        credentials=INSECURE_LOOPBACK,
        policy=CloudOnly(),
        state_dir=state,
        **settings,
    )


def files_of(state: Path) -> KeyFiles:
    return KeyFiles(state, program().spec)


def test_encrypted_answers_equal_clear_ones(cell: LocalCell, state: Path) -> None:
    from blindtail.he.clear import ClearEvaluator

    clear = ClearEvaluator(program())
    rng = np.random.default_rng(1)
    with opened(cell, state) as edge:
        assert edge.wait_ready(60), edge.status()
        for _ in range(10):
            pixels = rng.integers(0, 256, (1, 2, 4)).astype(np.uint8)
            answer = edge.infer(pixels, deadline_s=10.0)
            assert answer.route == "tail"
            logits = clear.logits((pixels.reshape(1, -1) / 255).astype(np.float32))[0]
            expected = np.exp(logits - logits.max())
            assert answer.probabilities == pytest.approx(tuple(expected / expected.sum()), abs=1e-2)
            assert answer.uplink_bytes == program().spec.uplink_bytes
            assert answer.reply_bytes == program().spec.reply_bytes


@pytest.mark.parametrize("harm", ["flip", "cut", "empty", "other"])
def test_a_damaged_secret_key_is_replaced_with_its_whole_set(
    cell: LocalCell, state: Path, tmp_path: Path, harm: str
) -> None:
    import shutil

    mine = tmp_path / "state"
    shutil.copytree(state, mine)
    files = files_of(mine)
    old = files.find()
    assert old is not None
    data = files.secret.read_bytes()
    harmed = {
        "flip": data[:-1] + bytes([data[-1] ^ 1]),
        "cut": data[:100],
        "empty": b"",
        "other": bytes(len(data)),
    }
    files.secret.write_bytes(harmed[harm])
    with pytest.raises(ContainerError):
        files.find()
    with opened(cell, mine) as edge:
        assert edge.wait_ready(60), edge.status()
        assert edge.infer(image(1, 60), deadline_s=10.0).route == "tail"
    new = files.find()
    assert new is not None
    assert new.sha256 != old.sha256
    assert (files.directory / "damaged-1" / "secret.key").read_bytes() == harmed[harm]
    assert files.secret.stat().st_mode & 0o777 == 0o600


def test_a_secret_of_another_program_is_refused_at_once(state: Path) -> None:
    other = replace(program().spec, program_id="0" * 64)
    with pytest.raises(ContainerError, match="program"):
        open_cipher(other, files_of(state).secret, "seal")


def test_keys_made_while_the_cloud_is_away_wait_for_it(tmp_path: Path) -> None:
    order = Order(program().spec.to_json(), str(tmp_path), address=None)
    events: list[str] = []
    carry_out(order, lambda event, **_: events.append(event))
    assert events[:2] == ["waiting", "making"]
    assert events.count("made") == len(program().spec.keys)
    assert events[-1] == "keys"
    carry_out(order, lambda event, **_: events.append(event))
    assert events[-2:] == ["waiting", "keys"]  # nothing was made again


def upload(cell: ScriptedCell, state: Path, **settings: Any) -> list[str]:
    order = Order(
        program().spec.to_json(),
        str(state),
        backend="clear",
        address=cell.address,
        credentials=INSECURE_LOOPBACK,
        **settings,
    )
    events: list[str] = []
    carry_out(order, lambda event, **_: events.append(event))
    return events


def test_an_upload_that_stands_still_is_broken_off_and_resumed(tmp_path: Path) -> None:
    with ScriptedCell(program(), tmp_path) as cell:
        cell.stall_upload_after = program().spec.key_bytes // 2
        start_s = time.monotonic()
        events = upload(cell, tmp_path / "state", progress_timeout_s=1.0)
        assert events[-1] == "uploaded"
        assert 1.0 < time.monotonic() - start_s < 60.0


def test_an_upload_gives_up_when_nobody_answers(tmp_path: Path) -> None:
    with ScriptedCell(program(), tmp_path) as cell:
        pass  # it is gone again
    with pytest.raises(TailUnavailable):
        upload(cell, tmp_path / "state", give_up_s=0.5)


def test_refused_keys_are_a_lasting_failure(tmp_path: Path) -> None:
    with LocalCell([CloudBundle("toy", "1", {2: program()})], backend="clear") as clear:
        state = tmp_path / "state"
        with opened(clear, state, backend="clear") as edge:
            assert edge.wait_ready(60), edge.status()
        files = KeyFiles(state, program().spec, "clear")
        data = bytearray(files.evaluation.read_bytes())
        data[-1] ^= 1
        files.evaluation.write_bytes(data)
        files.complete()  # the manifest now vouches for bytes that no cloud takes
        with opened(clear, state, backend="clear") as edge:
            assert not edge.wait_ready(5)
            status = edge.status().tails[2]
            assert status.state in (TailState.FAILED, TailState.CHECKING, TailState.UPLOADING)
            assert edge.infer(image(1, 60), deadline_s=1.0).fallback == "unavailable"


def test_a_killed_key_process_is_reported(tmp_path: Path) -> None:
    worker = KeyProcess(lambda _: Order(program().spec.to_json(), str(tmp_path)))
    with pytest.raises(TailUnavailable, match="closed"):
        worker.run(None, lambda _: worker.close())  # at the first sign of life
    with pytest.raises(TailUnavailable, match="closed"):
        worker.run(None, lambda _: None)
