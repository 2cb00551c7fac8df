"""The native backend's run: the same bytes whatever it runs on, and nothing bad gets past it."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blindtail.errors import ConfigError, ContainerError, EvaluationFailed, KeysMissing
from blindtail.he import container, native_backend
from blindtail.he.backends import Keys, open_evaluator, settle
from blindtail.he.container import HEADER_BYTES
from blindtail.he.native_backend import NativeEvaluator
from blindtail.he.packing import pack_bits
from blindtail.he.params import ntt_primes
from blindtail.he.program import Program
from blindtail.he.secret import Decryptor, Encryptor, SecretKey
from tests.he_cases import CASES, Case, activations, program

native = pytest.importorskip("blindtail.he._native")


@dataclass
class Client:
    case: Case
    program: Program
    sent: Path
    folder: Path
    encryptor: Encryptor
    decryptor: Decryptor

    def opened(self, **choices: object) -> tuple[NativeEvaluator, Keys]:
        evaluator = NativeEvaluator(self.program, **choices)  # type: ignore[arg-type]
        prepared = self.folder / f"prepared-{choices}"
        evaluator.prepare_keys(self.sent, prepared)
        return evaluator, evaluator.load_keys(prepared)

    def request(self, seed: int = 1) -> bytes:
        x = activations(self.case, self.case.lanes, seed)
        return self.encryptor.encrypt(x if self.case.lanes > 1 else x[0])


def client_of(case: Case, folder: Path) -> Client:
    compiled = program(case)
    secret = SecretKey.generate(compiled.spec, folder / "keys")
    spec = compiled.spec
    return Client(case, compiled, folder / "keys", folder, Encryptor(spec, secret), Decryptor(spec, secret))


@pytest.fixture(scope="module", params=CASES, ids=str)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    return client_of(request.param, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Client:
    return client_of(CASES[1], tmp_path_factory.mktemp("native"))


def test_every_choice_gives_the_same_bytes(client: Client) -> None:
    request = client.request()
    choices: list[dict[str, object]] = [{"instructions": name} for name in native.instruction_sets()]
    choices += [{"threads": threads} for threads in (2, 3, 4)]
    choices += [{"word_bits": 64}, {"threads": 3, "word_bits": 64}]
    replies = set()
    for choice in choices:
        evaluator, keys = client.opened(**choice)
        replies.add(evaluator.evaluate(keys, request))
        replies.add(evaluator.evaluate(keys, request))  # nothing of a run stays behind
    assert len(replies) == 1
    assert len(native.instruction_sets()) >= 1


def test_two_evaluators_in_threads_give_the_bytes_of_one(small: Client) -> None:
    requests = [small.request(seed) for seed in range(4)]
    one, keys = small.opened()
    want = [one.evaluate(keys, request) for request in requests] * 10
    found: dict[int, list[bytes]] = {}

    def work(index: int) -> None:
        evaluator = NativeEvaluator(small.program)
        found[index] = [evaluator.evaluate(keys, request) for request in requests * 10]

    # A shared evaluator too: its calls take turns.
    def share(index: int) -> None:
        found[index] = [one.evaluate(keys, request) for request in requests * 10]

    threads = [threading.Thread(target=f, args=(i,)) for i, f in enumerate((work, work, share, share))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] == want for i in range(4)] == [True] * 4


def test_other_threads_run_meanwhile(small: Client) -> None:
    """The GIL is free for the whole run: a counter in Python goes on."""
    evaluator, keys = small.opened(instructions="portable", word_bits=64)  # the slowest there is
    request = small.request()
    stop, gaps = threading.Event(), [0.0]

    def count() -> None:
        last = time.perf_counter()
        while not stop.is_set():
            now = time.perf_counter()
            gaps[0], last = max(gaps[0], now - last), now
            time.sleep(0)

    thread = threading.Thread(target=count)
    took_s: list[float] = []
    thread.start()
    for _ in range(20):
        start = time.perf_counter()
        evaluator.evaluate(keys, request)
        took_s.append(time.perf_counter() - start)
    stop.set()
    thread.join()
    # Had a run held the GIL, no gap could be shorter than a run. (A busy machine makes gaps of its own,
    # so this compares with all runs together.)
    assert gaps[0] < sum(took_s) / 2


def seed_of(request: bytes) -> bytes:
    return request[HEADER_BYTES : HEADER_BYTES + container.SEED_BYTES]


def test_a_ticket_gives_the_bytes_of_a_whole_run(client: Client) -> None:
    requests = [client.request(seed) for seed in range(3)]
    choices: list[dict[str, object]] = [{"instructions": name} for name in native.instruction_sets()]
    for choice in [*choices, {"threads": 2}, {"threads": 3}]:
        evaluator, keys = client.opened(**choice)
        want = [evaluator.evaluate(keys, request) for request in requests]
        tickets = [evaluator.make_ticket(keys, seed_of(request)) for request in requests]
        assert all(ticket.memory_bytes > 0 for ticket in tickets)
        for i in (1, 0, 2):  # in another order, with whole runs between
            assert evaluator.evaluate(keys, requests[i], tickets[i]) == want[i]
            assert evaluator.evaluate(keys, requests[i]) == want[i]


def test_a_ticket_is_for_its_request_keys_and_evaluator(small: Client) -> None:
    evaluator, keys = small.opened()
    request, other = small.request(1), small.request(2)
    ticket = evaluator.make_ticket(keys, seed_of(request))
    again = evaluator.load_keys(small.folder / "prepared-{}")
    wide, wide_keys = small.opened(word_bits=64)
    for one, its_keys, container_bytes in (
        (evaluator, keys, other),
        (evaluator, again, request),
        (wide, wide_keys, request),
    ):
        with pytest.raises(EvaluationFailed):
            one.evaluate(its_keys, container_bytes, ticket)
    for seed in (b"", bytes(63), bytes(65)):
        with pytest.raises(EvaluationFailed):
            evaluator.make_ticket(keys, seed)
    assert evaluator.evaluate(keys, request, ticket) == evaluator.evaluate(keys, request)


@pytest.mark.parametrize("backend", ["seal", "clear"])
def test_other_backends_make_no_tickets(backend: str) -> None:
    evaluator = open_evaluator(backend, program(CASES[0]))
    assert not evaluator.makes_tickets
    with pytest.raises(EvaluationFailed, match="no tickets"):
        evaluator.make_ticket(Keys(None, 0), bytes(64))


def resealed(data: bytes, at: int, replacement: bytes) -> bytes:
    """Bytes of the body replaced, the checksum made right again."""
    body = bytearray(data[HEADER_BYTES:])
    body[at : at + len(replacement)] = replacement
    head = data[: HEADER_BYTES - 32]
    return head + hashlib.sha256(head + bytes(body)).digest() + bytes(body)


def residues(count: int, value: int, width: int) -> bytes:
    return pack_bits(np.full(count, value, np.uint64), width)


def test_a_residue_that_is_not_below_its_prime_is_refused(small: Client) -> None:
    evaluator, keys = small.opened()
    spec = small.program.spec
    width = spec.parameters.primes[0].bit_length()
    request = small.request()
    good = evaluator.evaluate(keys, request)
    for value, ok in ((spec.parameters.primes[0] - 1, True), (spec.parameters.primes[0], False)):
        changed = resealed(request, container.SEED_BYTES, residues(8, value, width))
        if ok:
            evaluator.evaluate(keys, changed)
            continue
        with pytest.raises(ContainerError, match="residue"):
            evaluator.evaluate(keys, changed)
    assert evaluator.evaluate(keys, request) == good


def test_a_key_with_a_residue_that_is_not_below_its_prime_is_refused(small: Client, tmp_path: Path) -> None:
    evaluator = NativeEvaluator(small.program)
    width = small.program.spec.parameters.primes[0].bit_length()
    data = small.sent.read_bytes()
    value = small.program.spec.parameters.primes[0]
    (tmp_path / "bad").write_bytes(resealed(data, container.SEED_BYTES, residues(8, value, width)))
    with pytest.raises(ContainerError, match="residue"):
        evaluator.prepare_keys(tmp_path / "bad", tmp_path / "prepared")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_prepared_keys_of_another_kind_are_missing_keys(small: Client, tmp_path: Path) -> None:
    evaluator, _ = small.opened()
    wide = NativeEvaluator(small.program, word_bits=64)
    prepared = tmp_path / "prepared"
    size = evaluator.prepare_keys(small.sent, prepared)
    assert prepared.stat().st_size == size
    with pytest.raises(KeysMissing, match="upload"):
        wide.load_keys(prepared)
    data = prepared.read_bytes()
    for bad in (data[:-1], data + b"\0", data[:4096], data[:10], b""):
        prepared.write_bytes(bad)
        with pytest.raises(KeysMissing, match="upload"):
            evaluator.load_keys(prepared)
    # Keys of no evaluator, or of the other word size, run nothing.
    for material in (None, wide.load_keys(_prepared(wide, small, tmp_path)).material):
        with pytest.raises(EvaluationFailed):
            evaluator.evaluate(Keys(material, 0), small.request())


def _prepared(evaluator: NativeEvaluator, client: Client, folder: Path) -> Path:
    evaluator.prepare_keys(client.sent, folder / "other")
    return folder / "other"


def test_keys_stay_readable_after_their_file_has_gone(small: Client, tmp_path: Path) -> None:
    evaluator, _ = small.opened()
    prepared = _prepared(evaluator, small, tmp_path)
    keys = evaluator.load_keys(prepared)
    request = small.request()
    want = evaluator.evaluate(keys, request)
    prepared.unlink()
    assert evaluator.evaluate(keys, request) == want


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_backend, "available", lambda: False)


@pytest.mark.usefixtures("not_built")
def test_without_the_extension_seal_is_used() -> None:
    assert settle("auto") == "seal"
    assert open_evaluator("auto", program(CASES[0])).name == "seal"
    with pytest.raises(ConfigError, match=r"not built.*compiler.*seal"):
        settle("native")
    with pytest.raises(ConfigError, match="not built"):
        open_evaluator("native", program(CASES[0]))


def test_with_it_native_is_used() -> None:
    assert settle("auto") == "native"
    evaluator = open_evaluator("auto", program(CASES[0]))
    assert isinstance(evaluator, NativeEvaluator)
    assert evaluator.instructions == native.instruction_sets()[0]
    assert evaluator.plain_bytes > 0


@pytest.mark.parametrize("threads", [0, 257])
def test_a_number_of_threads_has_bounds(small: Client, threads: int) -> None:
    evaluator, keys = small.opened(threads=threads)
    with pytest.raises(EvaluationFailed):
        evaluator.evaluate(keys, small.request())


def test_large_primes_run_on_wide_words() -> None:
    large = list(ntt_primes(8192, 2, 1 << 60))
    assert native.Tail(13, large).word_bits == 64
    assert native.Tail(13, list(ntt_primes(8192, 2))).word_bits == 32
    # 32-bit words reduce nothing between primes: theirs must be of one size.
    (small,) = ntt_primes(8192, 1, 1 << 20)
    assert native.Tail(13, [small, *ntt_primes(8192, 1)]).word_bits == 64
    for bad in ([large[0]], [large[0], large[0]], [large[0], 1 << 59], [large[0], large[1] - 2], []):
        with pytest.raises(ValueError, match="prime"):
            native.Tail(13, bad)
    with pytest.raises(ValueError, match="avx9"):
        native.Tail(13, list(ntt_primes(8192, 2)), "avx9")
