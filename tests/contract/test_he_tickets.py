"""Tickets: encrypted with one, a message decrypts as ever; with a second message it never encrypts."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blindtail.errors import InputError, StateError
from blindtail.he import container, noise, sealio
from blindtail.he.seal_backend import SealEvaluator
from blindtail.he.secret import Decryptor, Encryptor, SecretKey, Ticket
from tests.he_cases import CASES, Case, activations, program


@dataclass
class Owner:
    case: Case
    folder: Path
    secret: SecretKey
    encryptor: Encryptor

    def activation(self, seed: int = 1) -> Any:
        x = activations(self.case, self.case.lanes, seed)
        return x if self.case.lanes > 1 else x[0]

    def opened(self, data: bytes) -> Any:
        """The slots of an encrypted activation, decrypted by SEAL itself."""
        spec, api = program(self.case).spec, sealio.api()
        seal = sealio.SealContext.of(spec.parameters)
        (read,) = container.read_ciphertexts(spec, data)
        stream = sealio.ciphertext_stream(
            seal.parms_ids[spec.input_level], spec.input_scale, True, read.c0, seed=read.seed
        )
        ct = sealio.load_into(api.Ciphertext(), seal.context, stream)
        plain = api.Plaintext()
        api.Decryptor(seal.context, self.secret._key).decrypt(ct, plain)
        if spec.input_layout.imaginary is not None:
            return np.asarray(seal.encoder.decode_complex(plain))
        return np.asarray(seal.encoder.decode_double(plain))


def owner_of(case: Case, folder: Path) -> Owner:
    spec = program(case).spec
    secret = SecretKey.generate(spec, folder / "keys")
    return Owner(case, folder, secret, Encryptor(spec, secret))


@pytest.fixture(scope="module", params=(CASES[1], CASES[4]), ids=str)
def owner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return owner_of(request.param, tmp_path_factory.mktemp("tickets"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Owner:
    return owner_of(CASES[1], tmp_path_factory.mktemp("small"))


def test_a_container_made_with_a_ticket_is_one_like_any_other(owner: Owner) -> None:
    spec = program(owner.case).spec
    x, ticket = owner.activation(), owner.encryptor.ticket()
    seed = ticket.seed
    data = owner.encryptor.encrypt(x, ticket)
    assert len(data) == spec.uplink_bytes == len(owner.encryptor.encrypt(x))
    assert container.read_ciphertexts(spec, data)[0].seed == seed
    assert ticket.used
    # Its noise has the size of a fresh encryption's: more than five sizes off in no slot.
    error = owner.opened(data) - spec.input_layout.place(x)
    error = np.concatenate([error.real, *([error.imag] if np.iscomplexobj(error) else [])])
    size = np.sqrt(noise.fresh(spec.parameters)) / spec.input_scale
    assert np.abs(error).max() < 6 * size
    assert 0.9 < error.std() / size < 1.1


def test_the_reply_decrypts_within_the_bound_of_one_without(owner: Owner) -> None:
    compiled = program(owner.case)
    evaluator = SealEvaluator(compiled)
    evaluator.prepare_keys(owner.folder / "keys", owner.folder / "prepared")
    keys = evaluator.load_keys(owner.folder / "prepared")
    decryptor, x = Decryptor(compiled.spec, owner.secret), owner.activation()
    got, want = (
        decryptor.decrypt(evaluator.evaluate(keys, owner.encryptor.encrypt(x, ticket)))
        for ticket in (owner.encryptor.ticket(), None)
    )
    clear = np.abs(want).max()
    assert np.abs(got - want).max() < 1e-3 * max(1.0, clear)


def test_message_and_ticket_add_up_modulo_each_prime(small: Owner) -> None:
    spec = program(small.case).spec
    ticket = small.encryptor.ticket()
    assert ticket._c0 is not None
    before = ticket._c0.copy()
    assert before.shape == (spec.input_level + 1, spec.parameters.ring_degree)
    assert before.nbytes == (spec.input_level + 1) * spec.parameters.ring_degree * 8
    x = small.activation()
    (plain,) = small.encryptor._encoded(x)
    message = sealio.parse_plaintext(sealio.saved_members(plain), spec.input_level + 1)
    assert [plain.data(i) for i in range(0, message.size, 999)] == message.reshape(-1)[::999].tolist()
    c0 = container.read_ciphertexts(spec, small.encryptor.encrypt(x, ticket))[0].c0
    for row, prime in enumerate(spec.parameters.primes[: spec.input_level + 1]):
        assert ((before[row] + message[row]) % np.uint64(prime) == c0[row]).all()


def test_a_second_message_is_refused_and_every_ticket_is_another(small: Owner) -> None:
    ticket = small.encryptor.ticket()
    small.encryptor.encrypt(small.activation(), ticket)
    for seed in (1, 2):  # not even the same message again
        with pytest.raises(StateError, match="take another"):
            small.encryptor.encrypt(small.activation(seed), ticket)
    assert ticket._c0 is None
    assert len({small.encryptor.ticket().seed for _ in range(20)}) == 20


def test_threads_at_one_ticket_encrypt_one_message(small: Owner) -> None:
    """An encryptor is for one thread; what a ticket promises, it promises to all."""
    primes = small.encryptor._primes
    message = np.zeros((len(primes), program(small.case).spec.parameters.ring_degree), np.uint64)

    def use(ticket: Ticket, gate: threading.Barrier, number: int, done: list[str]) -> None:
        gate.wait(10)
        try:
            ticket._cover(small.encryptor, message + np.uint64(number), primes)
            done.append("covered")
        except StateError:
            done.append("refused")

    for _ in range(20):
        ticket, gate, done = small.encryptor.ticket(), threading.Barrier(8), list[str]()
        threads = [threading.Thread(target=use, args=(ticket, gate, i, done)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert sorted(done) == ["covered", *["refused"] * 7]


def test_a_refused_activation_and_a_stranger_use_nothing_up(small: Owner) -> None:
    ticket = small.encryptor.ticket()
    bad = small.activation()
    bad[0] = np.nan
    with pytest.raises(InputError):
        small.encryptor.encrypt(bad, ticket)
    stranger = Encryptor(program(small.case).spec, small.secret)
    with pytest.raises(StateError, match="another key's"):
        stranger.encrypt(small.activation(), ticket)
    assert not ticket.used


@pytest.mark.parametrize("attempt", [pickle.dumps, copy.copy, copy.deepcopy], ids=lambda f: f.__name__)
def test_a_ticket_is_not_copied(small: Owner, attempt: Callable[[Any], Any]) -> None:
    ticket = small.encryptor.ticket()
    with pytest.raises(TypeError, match="one message"):
        attempt(ticket)
    assert repr(ticket) == str(ticket) == "Ticket(...)"
    assert not hasattr(ticket, "__dict__")


def test_a_fork_does_not_double_a_ticket(small: Owner) -> None:
    ticket = small.encryptor.ticket()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    primes = small.encryptor._primes
    message = np.zeros((len(primes), 1), np.uint64)

    def use() -> None:
        try:
            ticket._cover(small.encryptor, message, primes)
            sender.send("covered")
        except StateError:
            sender.send("refused")

    child = context.Process(target=use)
    child.start()
    assert receiver.poll(20)
    assert receiver.recv() == "refused"
    child.join(10)
