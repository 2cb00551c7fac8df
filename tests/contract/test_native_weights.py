"""Encoded weights in a file: the replies of an evaluator that has its own, and no damage gets past it."""

from __future__ import annotations

import gc
import hashlib
import itertools
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from blindtail.he import encoded
from blindtail.he.compatible import serving_as
from blindtail.he.native_backend import NativeEvaluator
from blindtail.he.program import Program
from blindtail.he.secret import Encryptor, SecretKey
from tests.cloud_cases import activation
from tests.he_cases import CASES, Case, FloatArray, activations, program
from tests.model_cases import retrained
from tests.ticket_cases import seed_of

native = pytest.importorskip("blindtail.he._native")

#: Instructions and word size; 64-bit words have portable kernels alone.
CHOICES = [(name, 32) for name in native.instruction_sets()] + [("portable", 64)]
HEAD, DIGEST = 4096, 32


@dataclass
class Client:
    program: Program
    sent: Path
    folder: Path
    request: bytes

    @classmethod
    def of(cls, program: Program, x: FloatArray, folder: Path) -> Client:
        secret = SecretKey.generate(program.spec, folder / "sent")
        request = Encryptor(program.spec, secret).encrypt(x if len(x) > 1 else x[0])
        return cls(program, folder / "sent", folder, request)

    @classmethod
    def of_case(cls, case: Case, folder: Path) -> Client:
        return cls.of(program(case), activations(case, case.lanes), folder)

    def reply(self, evaluator: NativeEvaluator, ticket: bool = False) -> bytes:
        prepared = self.folder / f"prepared-{evaluator.word_bits}"
        if not prepared.exists():
            evaluator.prepare_keys(self.sent, prepared)
        keys = evaluator.load_keys(prepared)
        made = evaluator.make_ticket(keys, seed_of(self.request)) if ticket else None
        return evaluator.evaluate(keys, self.request, made)

    def shared(self, weights: Path, program: Program | None = None) -> NativeEvaluator:
        return NativeEvaluator(program or self.program, weights=weights)


@pytest.fixture(scope="module", params=(CASES[1], CASES[4], CASES[5]), ids=str)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client.of_case(request.param, tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return Client.of_case(CASES[1], tmp_path_factory.mktemp("weights"))


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_a_mapped_file_gives_the_bytes_of_own_memory(client: Client, tmp_path: Path) -> None:
    files: dict[int, set[bytes]] = {32: set(), 64: set()}
    want = {client.reply(NativeEvaluator(client.program))}
    for index, (instructions, bits) in enumerate(CHOICES):
        own = NativeEvaluator(client.program, instructions=instructions, word_bits=bits)
        folder = tmp_path / str(index)
        for _ in ("made", "found"):
            mapped = NativeEvaluator(
                client.program, instructions=instructions, word_bits=bits, weights=folder
            )
            assert mapped.shares_weights
            assert not own.shares_weights
            assert mapped.plain_bytes == own.plain_bytes
            want |= {client.reply(own), client.reply(mapped), client.reply(mapped, ticket=True)}
        files[bits].add(only_file(folder).read_bytes())
    assert len(want) == 1
    # Whoever wrote it, it is the same file.
    assert [len(files[bits]) for bits in (32, 64)] == [1, 1]


def test_the_file_is_private_and_written_once(small: Client, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "weights"
    small.shared(folder)
    path = only_file(folder)
    assert path.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert encoded.program_of(path.name) == small.program.spec.program_id
    before = path.stat()
    evaluator = small.shared(folder)
    assert path.stat().st_ino == before.st_ino
    assert before.st_size == HEAD + evaluator.plain_bytes + DIGEST
    NativeEvaluator(small.program, word_bits=64, weights=folder)  # beside it, not in its place
    assert len(list(folder.iterdir())) == 2
    assert path.stat().st_ino == before.st_ino


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 0x10
    return bytes(changed)


def sealed(data: bytes) -> bytes:
    """With the digest of what is there now."""
    return data[:-DIGEST] + hashlib.sha256(data[:-DIGEST]).digest()


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "its head alone": lambda data: data[:HEAD],
    "a byte short": lambda data: data[:-1],
    "a byte long": lambda data: data + b"\0",
    "a bit of the first diagonal": lambda data: flipped(data, HEAD),
    "a bit of a bias": lambda data: flipped(data, len(data) - DIGEST - 1),
    "a bit of the digest": lambda data: flipped(data, len(data) - 1),
    "a bit of the empty rest of the head": lambda data: flipped(data, HEAD - 1),
    "two words have changed places": lambda data: (
        data[:HEAD] + data[HEAD + 4 : HEAD + 8] + data[HEAD : HEAD + 4] + data[HEAD + 8 :]
    ),
    "another magic": lambda data: sealed(b"BLTNKEY1" + data[8:]),
    "another format": lambda data: sealed(flipped(data, 8)),
    "another program": lambda data: sealed(flipped(data, 12)),
    "another word size": lambda data: sealed(flipped(data, 44)),
    "another number of maps": lambda data: sealed(flipped(data, 48)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_file_that_is_not_whole_is_made_again(
    small: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    want = small.reply(small.shared(tmp_path))
    path = only_file(tmp_path)
    good = path.read_bytes()
    damaged = DAMAGE[kind](good)
    assert damaged != good
    path.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "blindtail.he.encoded"):
        evaluator = small.shared(tmp_path)
    assert evaluator.shares_weights
    assert small.reply(evaluator) == want
    assert only_file(tmp_path).read_bytes() == good
    assert ("made again" in caplog.text) == (kind != "empty")


def test_damage_that_the_digest_did_not_tell_would_change_replies(small: Client, tmp_path: Path) -> None:
    """The control of the test above: what is in the file is what is computed with."""
    want = small.reply(small.shared(tmp_path))
    path = only_file(tmp_path)
    good = path.read_bytes()
    last_bias = len(good) - DIGEST - 4 * small.program.spec.parameters.ring_degree
    for at in (HEAD, last_bias):  # of a reply's polynomial few coefficients travel, the first among them
        path.write_bytes(sealed(flipped(good, at)))
        assert small.reply(small.shared(tmp_path)) != want
        assert path.read_bytes() != good  # taken for whole


def test_a_stand_in_reads_its_own_weights(tmp_path: Path) -> None:
    held, other = retrained("1"), retrained("2")
    stand_in = serving_as(other, held.spec)
    assert stand_in.spec.program_id == held.spec.program_id
    folder = tmp_path / "weights"
    client = Client.of(held, activation()[None], tmp_path)
    replies = set()
    for order in itertools.permutations((held, stand_in)):
        for one in order:
            mapped = client.reply(client.shared(folder, one))
            assert mapped == client.reply(NativeEvaluator(one))
            replies.add(mapped)
    assert len(replies) == 2
    assert {encoded.program_of(path.name) for path in folder.iterdir()} == {
        held.spec.program_id,
        other.spec.program_id,
    }


def test_a_folder_that_takes_no_file_is_no_fault(
    small: Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    want = small.reply(NativeEvaluator(small.program))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "blindtail.he.encoded"):
            evaluator = small.shared(folder)
        assert not evaluator.shares_weights
        assert small.reply(evaluator) == want
        assert "kept in memory" in caplog.text


def test_a_write_that_breaks_off_leaves_nothing(
    small: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blindtail.he.backends.os.fsync", full)
    evaluator = small.shared(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert not evaluator.shares_weights
    monkeypatch.undo()
    assert small.reply(small.shared(tmp_path)) == small.reply(evaluator)


def mapped_here(folder: Path) -> int:
    """Mappings of files in a folder that this process has, removed ones included."""
    return Path("/proc/self/maps").read_text().count(f"{folder}/")


def test_the_mapping_lives_as_long_as_its_evaluator(small: Client, tmp_path: Path) -> None:
    evaluators = [small.shared(tmp_path) for _ in range(2)]
    assert mapped_here(tmp_path) == 2
    want = [small.reply(evaluator) for evaluator in evaluators]
    only_file(tmp_path).unlink()
    del evaluators[0]
    gc.collect()
    assert mapped_here(tmp_path) == 1
    assert small.reply(evaluators[0]) == want[0] == want[1]
    del evaluators[0]
    gc.collect()
    assert mapped_here(tmp_path) == 0


def test_evaluators_that_start_at_once_share_one_file(client: Client, tmp_path: Path) -> None:
    start, made = threading.Barrier(4), []

    def work() -> None:
        start.wait()
        made.append(client.shared(tmp_path))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = client.reply(NativeEvaluator(client.program))
    assert all(evaluator.shares_weights for evaluator in made)
    assert [client.reply(evaluator) for evaluator in made] == [want] * 4
    only_file(tmp_path)  # and nothing half-written
