"""What an edge knows of an encrypted tail: everything but its weights.

A `TailSpec` travels in `edge.bt`. It fixes parameters, how to lay the
activation out in slots, which evaluation keys to make and at which level each
is used, and how the reply is laid out. `program_id` ties it to exactly one
program in `cloud.bt`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from blindtail.errors import BundleError, ModelError
from blindtail.he.layout import MOST_CIPHERTEXTS, Layout
from blindtail.he.params import Parameters

#: The Galois element no rotation has: stands for the relinearisation key.
RELINEARISE = 0

#: Segments that one refreshed tail may have.
MOST_SEGMENTS = 64

#: |value| * scale stays below the modulus over this when it is encrypted.
_ROOM = 4.0


@dataclass(frozen=True, slots=True)
class KeyNeed:
    """One evaluation key: a Galois element, or RELINEARISE, and the highest level used."""

    element: int
    level: int


@dataclass(frozen=True, slots=True)
class ReplyForm:
    """How encrypted logits travel: level 0, coefficient form.

    The message repeats with `period` slots, so it lies in the subring of
    polynomials in X^(N / 2 period): `2 * period` coefficients of c0 are sent.
    c1 is sent without its lowest `c1_dropped_bits` bits.
    """

    period: int
    c1_dropped_bits: int
    scale: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A program's place in a refreshed tail, whose segments share parameters and keys (`he.segments`).

    `lead`: program id of the first segment, under which keys are made and kept; empty for that one itself.
    """

    index: int
    count: int
    lead: str


@dataclass(frozen=True, slots=True)
class TailSpec:
    """The public half of a compiled tail. Immutable, checked, JSON-serialisable.

    `keys` of a segment are those of all segments together.
    """

    parameters: Parameters
    input_layout: Layout
    input_level: int
    input_scale: float
    keys: tuple[KeyNeed, ...]
    output_layout: Layout
    reply: ReplyForm
    predicted_noise: float  # standard deviation of the noisiest logit's error, in logits
    predicted_worst_noise: float  # the same for the noisiest slot
    input_bound: float  # largest |activation| seen in calibration
    program_id: str  # hex SHA-256 over the program, weights included
    segment: Segment | None = None  # None: a tail of its own

    @property
    def keys_id(self) -> str:
        """The program id under which this program's keys are made: its own, or its chain's first."""
        return self.program_id if self.segment is None else self.segment.lead or self.program_id

    @property
    def largest_input(self) -> float:
        """|value| that is encrypted stays below it: |value| * scale below a quarter of the modulus."""
        modulus = math.prod(float(q) for q in self.parameters.primes[: self.input_level + 1])
        return modulus / (_ROOM * self.input_scale)

    @property
    def features(self) -> int:
        """Length of the (flattened) activation at the cut."""
        return self.input_layout.size

    @property
    def outputs(self) -> int:
        return self.output_layout.size

    @property
    def lanes(self) -> int:
        return self.input_layout.lanes

    @property
    def input_ciphertexts(self) -> int:
        """That one activation is encrypted into."""
        return self.input_layout.slots // self.parameters.slots

    @property
    def output_ciphertexts(self) -> int:
        """That a reply holds."""
        return self.output_layout.slots // self.parameters.slots

    @property
    def uplink_bytes(self) -> int:
        """Bytes of one encrypted activation's container."""
        from blindtail.he.container import ciphertext_bytes

        return ciphertext_bytes(self)

    @property
    def reply_bytes(self) -> int:
        """Bytes of one encrypted reply's container."""
        from blindtail.he.container import reply_bytes

        return reply_bytes(self)

    @property
    def key_bytes(self) -> int:
        """Bytes of the evaluation keys' container."""
        from blindtail.he.container import key_bytes

        return key_bytes(self)

    def to_json(self) -> dict[str, Any]:
        place = self.segment
        chained = {} if place is None else {"segment": [place.index, place.count, place.lead]}
        return {
            **chained,
            "parameters": self.parameters.to_json(),
            "input_layout": self.input_layout.to_json(),
            "input_level": self.input_level,
            "input_scale": self.input_scale.hex(),
            "keys": [[k.element, k.level] for k in self.keys],
            "output_layout": self.output_layout.to_json(),
            "reply": {
                "period": self.reply.period,
                "c1_dropped_bits": self.reply.c1_dropped_bits,
                "scale": self.reply.scale.hex(),
            },
            "predicted_noise": self.predicted_noise,
            "predicted_worst_noise": self.predicted_worst_noise,
            "input_bound": self.input_bound,
            "program_id": self.program_id,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TailSpec:
        """Raises `BundleError` when a field is missing or does not fit."""
        try:
            reply = data["reply"]
            spec = cls(
                parameters=Parameters.from_json(data["parameters"]),
                input_layout=Layout.from_json(data["input_layout"]),
                input_level=int(data["input_level"]),
                input_scale=float.fromhex(data["input_scale"]),
                keys=tuple(KeyNeed(int(e), int(level)) for e, level in data["keys"]),
                output_layout=Layout.from_json(data["output_layout"]),
                reply=ReplyForm(
                    int(reply["period"]),
                    int(reply["c1_dropped_bits"]),
                    float.fromhex(reply["scale"]),
                ),
                predicted_noise=float(data["predicted_noise"]),
                predicted_worst_noise=float(data["predicted_worst_noise"]),
                input_bound=float(data["input_bound"]),
                program_id=str(data["program_id"]),
                segment=_segment(data["segment"]) if "segment" in data else None,
            )
            spec._check()
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ModelError) as error:
            raise BundleError(
                f"the description of the encrypted tail is damaged ({error}): compile the model again"
            ) from error
        return spec

    def _check(self) -> None:
        p = self.parameters
        fits = (
            _fill(self.input_layout, p.slots)
            and _fill(self.output_layout, p.slots)
            and self.input_layout.lanes == self.output_layout.lanes
            and self.output_layout.imaginary is None
            and 0 <= self.input_level <= p.max_level
            and np.isfinite(self.input_scale)
            and self.input_scale > 1
            and np.isfinite(self.reply.scale)
            and self.reply.scale > 1
            and 0 <= self.reply.c1_dropped_bits < p.primes[0].bit_length() - 4
            and 1 <= self.reply.period <= p.slots
            and p.slots % self.reply.period == 0
            and all(0 <= k.level <= p.max_level for k in self.keys)
            and all(k.element == 0 or k.element % 2 for k in self.keys)
            and all(0 <= k.element < 2 * p.ring_degree for k in self.keys)
            and len({k.element for k in self.keys}) == len(self.keys)
            and len(self.program_id) == 64
            and (self.segment is None or (_in_place(self.segment) and self.input_layout.lanes == 1))
        )
        if not fits:
            raise ModelError("its fields contradict each other")


def _fill(layout: Layout, slots: int) -> bool:
    return layout.slots % slots == 0 and layout.slots <= MOST_CIPHERTEXTS * slots


def _segment(listed: Any) -> Segment:
    index, count, lead = listed
    return Segment(int(index), int(count), str(lead))


def _in_place(segment: Segment) -> bool:
    named = len(segment.lead) == 64 and set(segment.lead) <= set("0123456789abcdef")
    return 2 <= segment.count <= MOST_SEGMENTS and (
        segment.lead == "" if segment.index == 0 else named and 0 < segment.index < segment.count
    )


def check_chain(specs: Sequence[TailSpec]) -> None:
    """Raises `ModelError` unless these are the segments of one chain, all of them and in order."""
    lead = specs[0] if specs else None
    for index, spec in enumerate(specs):
        place = spec.segment
        fits = (
            lead is not None
            and place is not None
            and (place.index, place.count) == (index, len(specs))
            and spec.keys_id == lead.program_id
            and (spec.parameters, spec.keys) == (lead.parameters, lead.keys)
        )
        if not fits:
            raise ModelError("the segments of a refreshed tail do not belong together, or one is missing")
    if len({spec.program_id for spec in specs}) != len(specs) or len(specs) < 2:
        raise ModelError("a refreshed tail has two segments at least, and no one twice")


def canonical_json(data: Mapping[str, Any]) -> bytes:
    """Sorted, compact, ASCII: the form that is hashed."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def sha256_hex(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
