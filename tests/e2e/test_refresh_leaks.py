"""No secret crosses in a refreshed offload: what the edge decrypts in between is nowhere on the wire.

A real cell and a real edge talk through a link that records both directions, over every
round trip. The recorded bytes are searched for the secret key, the image, every value that the edge
saw between segments (decrypted, and about to be encrypted), the logits and the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from blindtail.he import sealio
from blindtail.he.operations import MapOp
from blindtail.he.spec import TailSpec
from blindtail.link import ShapedLink
from cloud.local import LocalCell
from edge.interludes import Values
from edge.pair import ModelPair
from edge.runtime import EdgeRuntime
from tests.e2e.leakscan import Form, Scanner, float_forms, plant, residue_forms, summary
from tests.e2e.test_leaks import _secret_forms
from tests.refresh_cases import TRIPS, images, saved

pytestmark = pytest.mark.timeout(120)
IMAGES = 1


@dataclass(frozen=True)
class Recording:
    pair: ModelPair
    up: bytes
    down: bytes
    forms: list[Form]
    sent: list[int]  # bytes of each answer's uplink


def _kept(edge: EdgeRuntime) -> list[Values]:
    """What the edge sees of each offload from now on, to the last bit."""
    begin, kept = edge._interludes.begin, list[Values]()

    def keep(cut: int, activation: np.ndarray) -> Values:
        kept.append(begin(cut, activation))
        return kept[-1]

    edge._interludes.begin = keep  # type: ignore[method-assign]
    return kept


def _polynomial_forms(spec: TailSpec, name: str, values: np.ndarray) -> list[Form]:
    """Encoded but not encrypted: what a forgotten encryption would send."""
    seal, plain = sealio.SealContext.of(spec.parameters), sealio.api().Plaintext()
    slots = spec.input_layout.place(values)
    seal.encoder.encode(slots.tolist(), seal.parms_ids[spec.input_level], spec.input_scale, plain)
    data = np.array([plain[i] for i in range(spec.parameters.ring_degree)], dtype=np.uint64)
    return residue_forms(name, data, spec.parameters.primes[0].bit_length())


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("leaks")
    pair, pixels = ModelPair.open(*saved(folder)), images(IMAGES, seed=9)
    with (
        LocalCell([folder / "cloud.bt"], state_dir=folder / "cloud") as cell,
        ShapedLink(cell.address, record=folder / "bytes") as link,
        EdgeRuntime.open(
            folder / "edge.bt",
            link.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=folder / "edge",
        ) as edge,
    ):
        assert edge.wait_ready(60), edge.status()
        kept = _kept(edge)
        answers = [edge.infer(image) for image in pixels]
    assert [(a.route, a.extra["round_trips"]) for a in answers] == [("tail", TRIPS)] * IMAGES
    (secret,) = [p for p in (folder / "edge").rglob("*") if p.is_file() and "secret" in p.name]
    forms = _secret_forms(pair, secret)
    for k, program in enumerate(pair.programs):
        for op in program.ops:
            if isinstance(op, MapOp):
                forms += float_forms(f"weights of segment {k}", op.weight)
                forms += float_forms(f"bias of segment {k}", op.bias)
    for i, values in enumerate(kept):
        forms.append(Form(f"image {i}", "<u1", pixels[i].tobytes(), 16))
        forms += float_forms(f"logits of image {i}", values.logits)
        for name, seen in values._known.items():
            forms += float_forms(f"{name} of image {i}", seen)
            if name[0] == "x":
                spec = pair.specs[int(name[1:])]
                slots = spec.input_layout.place(seen)
                forms += float_forms(f"slots of {name} of image {i}", np.ascontiguousarray(slots.real))
                forms += _polynomial_forms(spec, f"polynomial of {name} of image {i}", seen)
        forms += float_forms(f"answer {i}", np.array(answers[i].probabilities))

    def read(way: str) -> bytes:
        return b"".join(p.read_bytes() for p in sorted((folder / "bytes").glob(f"*.{way}")))

    return Recording(pair, read("up"), read("down"), forms, [a.uplink_bytes for a in answers])


@pytest.fixture(scope="module")
def scanner(recording: Recording) -> Scanner:
    return Scanner(recording.forms)


def test_the_recording_has_every_round_trip_of_one_size(recording: Recording) -> None:
    specs = recording.pair.specs
    uplink, reply = sum(s.uplink_bytes for s in specs), sum(s.reply_bytes for s in specs)
    assert recording.sent == [uplink] * IMAGES
    # Beside the keys: the probes, and each image.
    assert len(recording.up) > specs[0].key_bytes + (IMAGES + 1) * uplink
    assert len(recording.down) > (IMAGES + 1) * reply
    for spec in specs[1:]:  # each later segment is named by its program
        assert recording.up.count(spec.program_id.encode()) >= IMAGES


def test_nothing_that_was_decrypted_was_sent(recording: Recording, scanner: Scanner) -> None:
    for way, data in (("up", recording.up), ("down", recording.down)):
        hits = scanner.scan(data)
        assert not hits, f"{way}: {summary(hits)}"


def test_every_value_between_segments_would_be_found(recording: Recording, scanner: Scanner) -> None:
    """Positive controls, planted one by one into the recorded bytes themselves."""
    covered = scanner.covered()
    kinds = {(f.secret.rstrip("0123456789 "), f.form) for f in recording.forms}
    names = {f"{name} of image" for name in ("x0", "x1", "x2", "y0", "y1", "logits")}
    assert names <= {name for name, _ in kinds}
    seen: set[tuple[str, str]] = set()
    missed = []
    for form in recording.forms:
        kind = (form.secret.rstrip("0123456789 "), form.form)
        if kind in seen or (form.secret, form.form) not in covered:
            continue
        seen.add(kind)
        piece = recording.up[100_000:104_000]
        if not scanner.scan(plant(piece, form, 1001), unpack=False):
            missed.append(kind)
    assert not missed
    assert {k for k, _ in kinds} == {k for k, _ in seen}
