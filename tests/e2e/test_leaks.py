"""No secret crosses: every byte of a recorded run is searched for what must stay where it is.

A real cell and a real edge talk through a link that records both directions: keys are
made and uploaded, tickets announced, images offloaded with encryption, replies come back. Another
link records what the edge and its orchestrator say to each other. The scanner
(`leakscan`) then looks for the secret key, activations, decrypted logits, confidences, what tickets
would cover messages with, and the tail's weights in every form, and finds all of them where they
were planted.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from blindtail.he import sealio
from blindtail.he.operations import MapOp
from blindtail.he.secret import SecretKey, Ticket
from blindtail.link import ShapedLink
from cloud.local import LocalCell
from edge.pair import ModelPair
from edge.runtime import EdgeRuntime
from edge.session import RemoteTail
from edge.verify import read_images
from orchestrator.config import OrchestratorConfig
from orchestrator.local import LocalOrchestrator
from tests.e2e.leakscan import Form, Scanner, float_forms, plant, residue_forms, summary, ternary_forms

pytestmark = pytest.mark.timeout(300)
ZOO = Path(sealio.__file__).resolve().parents[1] / "models" / "zoo" / "fashion"
IMAGES = 3


@dataclass(frozen=True)
class Recording:
    pair: ModelPair
    up: bytes
    down: bytes
    control: bytes  # both directions
    forms: list[Form]
    uploads: int
    seeds: tuple[bytes, ...]  # of tickets that were announced, used or not


def _secret_forms(pair: ModelPair, path: Path) -> list[Form]:
    """The secret key as SEAL keeps it (residues, transformed), as coefficients, and as the file."""
    secret = SecretKey.load(pair.spec, path)
    primes = pair.spec.parameters.key_primes
    body = sealio.saved_members(secret._key)
    residues = np.frombuffer(body[-8 * len(primes) * pair.spec.parameters.ring_degree :], "<u8")
    residues = residues.reshape(len(primes), -1)
    assert all(int(row.max()) < p for row, p in zip(residues, primes, strict=True))
    forms = [Form("secret file", "bytes", path.read_bytes()[-len(body) :], 8)]
    for i, row in enumerate(residues):
        forms += residue_forms(f"secret residues {i}", row, primes[i].bit_length())
    ternary = _coefficients(residues[0], primes[0], pair.spec.parameters.ring_degree)
    forms += ternary_forms("secret coefficients", ternary)
    small = (ternary % primes[0]).astype(np.uint64)
    return forms + residue_forms("secret coefficient residues", small, primes[0].bit_length())


def _coefficients(ntt: np.ndarray, prime: int, n: int) -> np.ndarray:
    """Inverse of SEAL's transform (bit-reversed order, X -> psi^(2 rev(i) + 1)): the ternary secret."""
    psi = next(
        root
        for g in range(2, 100)
        if pow(root := pow(g, (prime - 1) // (2 * n), prime), n, prime) == prime - 1
    )
    psi = min(pow(psi, k, prime) for k in range(1, 2 * n, 2))  # SEAL takes the smallest primitive root
    bits = n.bit_length() - 1
    values = np.array([int(v) for v in ntt], dtype=object)
    order = [int(format(i, f"0{bits}b")[::-1], 2) for i in range(n)]
    natural = np.empty(n, dtype=object)
    natural[order] = values  # natural[i] = s(psi^(2 i + 1))
    # s(psi^(2i+1)) = sum_j (s_j psi^j) (psi^2)^(ij): an inverse cyclic transform, then untwist.
    found = _inverse_cyclic(natural, pow(psi, 2, prime), prime)
    scale, untwist = pow(n, -1, prime), pow(psi, -1, prime)
    out, power = np.empty(n, np.int64), scale
    for j in range(n):
        v = int(found[j]) * power % prime
        out[j] = v if v < prime // 2 else v - prime
        power = power * untwist % prime
    assert set(np.unique(out)) <= {-1, 0, 1}, "this is not the ternary secret"
    return out


def _inverse_cyclic(values: np.ndarray, root: int, prime: int) -> np.ndarray:
    """Unscaled inverse transform by recursion (Cooley-Tukey), exact on Python integers."""
    n = len(values)
    if n == 1:
        return values
    even = _inverse_cyclic(values[0::2], root * root % prime, prime)
    odd = _inverse_cyclic(values[1::2], root * root % prime, prime)
    inverse, w, twiddles = pow(root, -1, prime), 1, np.empty(n // 2, dtype=object)
    for i in range(n // 2):
        twiddles[i] = w
        w = w * inverse % prime
    turned = odd * twiddles % prime
    return np.concatenate([(even + turned) % prime, (even - turned) % prime])


def _weight_forms(pair: ModelPair) -> list[Form]:
    forms: list[Form] = []
    for i, op in enumerate(pair.program.ops):
        if isinstance(op, MapOp):
            forms += float_forms(f"tail weights {i}", op.weight)
            forms += float_forms(f"tail weights {i} transposed", np.ascontiguousarray(op.weight.T))
            forms += float_forms(f"tail bias {i}", op.bias)
    return forms


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("leaks")
    pair = ModelPair.open(ZOO / "edge.bt", ZOO / "cloud.bt")
    pixels, _ = read_images(pair, "fashion", "test", IMAGES)
    with (
        LocalCell([ZOO / "cloud.bt"], state_dir=folder / "cloud") as cell,
        ShapedLink(cell.address, record=folder / "bytes") as link,
        LocalOrchestrator(
            state_dir=folder / "orchestrator", config=OrchestratorConfig(report_interval_s=0.2)
        ) as orchestrator,
        ShapedLink(orchestrator.address, record=folder / "control") as control,
        orchestrator.policies() as operator,
        EdgeRuntime.open(
            ZOO / "edge.bt",
            link.address,
            orchestrator=control.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=folder / "edge",
        ) as edge,
    ):
        assert edge.wait_ready(120), edge.status()
        assert edge.wait_attached(30)
        seeds, masks = _tickets(edge)
        answers = [edge.infer(image) for image in pixels]
        end_s = time.monotonic() + 30
        while sum(c.total for c in operator.usage() if c.kind == "route") < IMAGES:
            assert time.monotonic() < end_s, "the edge has reported nothing"
            time.sleep(0.1)
    assert [a.route for a in answers] == ["tail"] * IMAGES
    (secret,) = [p for p in (folder / "edge").rglob("*") if p.is_file() and "secret" in p.name]
    head = pair.run_head(pixels)
    spec = pair.spec
    forms = _secret_forms(pair, secret) + _weight_forms(pair)
    for i, mask in enumerate(masks):
        forms += residue_forms(f"c0 of a ticket {i}", mask, spec.parameters.primes[0].bit_length())
    for i in range(IMAGES):
        forms += float_forms(f"activation {i}", head.activations[i])
        slots = spec.input_layout.place(head.activations[i])
        for part, values in (("real", slots.real), ("imaginary", slots.imag), ("complex", slots.view(float))):
            if np.any(values):  # real slots have no imaginary parts
                forms += float_forms(f"activation slots {i}, {part}", np.ascontiguousarray(values))
        forms += float_forms(f"logits {i}", pair.clear_tail(head.activations[i : i + 1])[0])
        forms += float_forms(f"image {i}", pixels[i].astype(np.float64) / 255)
        forms.append(Form(f"image {i}", "<u1", pixels[i].tobytes(), 16))
        # The answer in probabilities, and the plaintext polynomial of the activation.
        forms += float_forms(f"answer {i}", np.array(answers[i].probabilities))
        seen = [(e.confidence, e.margin, e.entropy) for e in answers[i].exits]
        forms += float_forms(f"exits {i}", np.array(seen))
        forms += _plaintext_forms(pair, f"activation polynomial {i}", head.activations[i])

    def read(way: str, link: str = "bytes") -> bytes:
        return b"".join(p.read_bytes() for p in sorted((folder / link).glob(f"*.{way}")))

    said = read("up", "control") + read("down", "control")
    return Recording(pair, read("up"), read("down"), said, forms, len(answers), seeds)


def _tickets(edge: EdgeRuntime) -> tuple[tuple[bytes, ...], list[np.ndarray]]:
    """Seeds and c0 (modulo the first and the last prime) of the tickets at hand, before any is used.

    Under a message c0 is sent; alone it never is, neither before nor after.
    """
    (tail,) = edge._tails.values()
    assert isinstance(tail, RemoteTail)
    end_s = time.monotonic() + 30
    while tail.tickets < 4:
        assert time.monotonic() < end_s, "no ticket was announced"
        time.sleep(0.01)
    held = [ticket for ticket in tail._book._announced if isinstance(ticket, Ticket)]
    assert len(held) == 4
    return tuple(t.seed for t in held), [
        t._c0[row].copy() for t in held for row in (0, -1) if t._c0 is not None
    ]


def _plaintext_forms(pair: ModelPair, name: str, activation: np.ndarray) -> list[Form]:
    """The encoded but not encrypted activation: what a forgotten encryption would send."""
    spec = pair.spec
    seal = sealio.SealContext.of(spec.parameters)
    plain = sealio.api().Plaintext()
    slots = spec.input_layout.place(activation)
    seal.encoder.encode(slots.tolist(), seal.parms_ids[spec.input_level], spec.input_scale, plain)
    n = spec.parameters.ring_degree
    data = np.array([plain[i] for i in range(n)], dtype=np.uint64)  # modulo the first prime
    return residue_forms(name, data, spec.parameters.primes[0].bit_length())


@pytest.fixture(scope="module")
def scanner(recording: Recording) -> Scanner:
    return Scanner(recording.forms)


def test_the_recording_is_whole(recording: Recording) -> None:
    spec = recording.pair.spec
    assert len(recording.up) > spec.key_bytes + recording.uploads * spec.uplink_bytes
    assert len(recording.down) > recording.uploads * spec.reply_bytes
    # Tickets were announced, and some of them used: their seeds went up once more, with a message.
    sent = [recording.up.count(seed) for seed in recording.seeds]
    assert min(sent) >= 1
    assert sum(sent) > len(sent)
    # The reports are there: their route, and the name of the learned step.
    assert b"tail" in recording.control
    assert b"offload1" in recording.control


def test_nothing_secret_was_sent(recording: Recording, scanner: Scanner) -> None:
    assert scanner.windows > 1_000_000
    ways = (("up", recording.up), ("down", recording.down), ("control", recording.control))
    for way, data in ways:
        hits = scanner.scan(data)
        assert not hits, f"{way}: {summary(hits)}"


def test_every_planted_form_is_found(recording: Recording, scanner: Scanner) -> None:
    """Positive controls, planted one by one into the recorded bytes themselves."""
    covered = scanner.covered()
    kinds = {(f.secret.rstrip("0123456789 "), f.form) for f in recording.forms}
    assert len(kinds) > 100
    seen: set[tuple[str, str]] = set()
    missed = []
    for form in recording.forms:
        kind = (form.secret.rstrip("0123456789 "), form.form)
        if kind in seen or (form.secret, form.form) not in covered:
            continue
        seen.add(kind)
        piece = recording.up[200_000:204_000]
        if not scanner.scan(plant(piece, form, 1001), unpack=False):
            missed.append(kind)
    assert not missed
    # Hardly any form may be too poor in information to be looked for.
    assert {k for k, _ in kinds} == {k for k, _ in seen}
