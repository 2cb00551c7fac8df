"""Values outside the range that a tail was compiled for: noted on this device, and nowhere else.

The encrypted tail is right for activations and logits as large as its calibration
data gave; far beyond, values wrap around the modulus and the answer is wrong. A
note tells the device's own people: in `Answer.extra` and in `status()`. It changes
nothing that others can see. What was decrypted, and whatever follows from it, stays
here (docs/threat-model.md); so does the activation, which is private too. Hence no
metric, no report, no log line (logs are collected), no retry and no other route. Only
what a command prints at the end to whoever called it counts such answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.he.spec import TailSpec
from blindtail.he.stability import RANGE_MARGIN, logit_bound

#: Keys of `Answer.extra`: largest |value| over the calibrated one, where that is above `RANGE_MARGIN`.
ACTIVATION, LOGITS = "activation_range", "logit_range"
NOTES = (ACTIVATION, LOGITS)


class Ranges:
    """The calibrated ranges of a model's cuts; of a refreshed tail's segments, by cut and index."""

    def __init__(self, cuts: Mapping[int, Sequence[TailSpec]]) -> None:
        self._bounds = {
            (cut, index): {ACTIVATION: spec.input_bound, LOGITS: logit_bound(spec)}
            for cut, specs in cuts.items()
            for index, spec in enumerate(specs)
        }

    def note(self, kind: str, cut: int, values: NDArray[Any], segment: int = 0) -> dict[str, float]:
        """{kind: multiple of the calibrated range}, or {} where `values` (any shape) lie within the margin.

        Of values that are not finite nothing is noted: they are refused elsewhere. Logits that
        wrapped may lie anywhere, within the range too.
        """
        bound = self._bounds[cut, segment][kind]
        multiple = float(np.abs(values).max(initial=0.0)) / bound if bound > 0 else 0.0
        # Two digits: no more of a decrypted value, which carries noise of the key, than people need.
        return {kind: float(f"{multiple:.2g}")} if RANGE_MARGIN < multiple < math.inf else {}


__all__ = ["ACTIVATION", "LOGITS", "NOTES", "Ranges"]
