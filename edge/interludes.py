"""Between the round trips of a refreshed tail: what was decrypted, and what is encrypted next.

What an edge sends must not depend on whether a reply opened well: a device that stopped
there would tell whoever sent the reply how its noise or its values fell out. So a value
that is not finite, or too large for the next segment, is replaced, every round trip is made
with bytes of its usual size, and only the answer is thrown away (docs/threat-model.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import BundleError
from blindtail.he.spec import TailSpec
from blindtail.interludes import graph_name
from edge.executor import session_options

FloatArray = NDArray[np.float64]
#: Larger values than any reply can hold; as float32 they are still finite.
_MOST = 1e30


class Interludes:
    """The graphs of a bundle's refreshed tails, loaded. Thread-safe. Raises `BundleError`."""

    def __init__(self, bundle: EdgeBundle, *, threads: int = 1) -> None:
        self._bundle = bundle
        options = session_options(threads)
        self._graphs: dict[tuple[int, int], _Graph] = {}
        for cut, tail in bundle.refreshed.items():
            for i, names in enumerate(tail.interludes):
                last = i + 1 == len(tail.specs)
                wanted = len(bundle.class_names) if last else tail.specs[i + 1].features
                widths = {name: tail.width(name) for name in names}
                self._graphs[cut, i] = _Graph(bundle, graph_name(cut, i), widths, wanted, options)

    def begin(self, cut: int, activation: NDArray[Any]) -> Values:
        """For one offload at `cut`; the activation there, any shape."""
        graphs = {i: graph for (at, i), graph in self._graphs.items() if at == cut}
        return Values(self._bundle.segments(cut), graphs, activation.reshape(-1).astype(np.float64))


class Values:
    """What one offload has seen so far, by name ("x0", "y0", "x1", ...), flat. For one thread.

    strange  the activation cannot be encrypted, or some reply did not open as it should: the logits
             are no answer
    """

    def __init__(
        self, specs: tuple[TailSpec, ...], graphs: Mapping[int, _Graph], activation: FloatArray
    ) -> None:
        self._specs, self._graphs = specs, graphs
        self._logits: FloatArray | None = None
        self.strange = False
        # An activation that cannot be encrypted must not show in what is sent either.
        self._known = {"x0": self._bounded(activation, largest_input(specs[0]), specs[0].features)}

    def input(self, segment: int) -> FloatArray:
        """(features,) of a segment, all those before it having been opened."""
        return self._known[f"x{segment}"]

    def opened(self, segment: int, values: FloatArray) -> None:
        """What was decrypted of a segment, (outputs,): the next segment's input, or the logits, follow."""
        values = np.asarray(values, np.float64).reshape(-1)
        if segment + 1 == len(self._specs) and segment not in self._graphs:
            self._logits = values
            return
        self._known[f"y{segment}"] = self._bounded(values, _MOST, self._specs[segment].outputs)
        graph = self._graphs.get(segment)
        assert graph is not None  # a bundle has an interlude behind every segment but the last
        try:
            found = graph(self._known)
        except Exception:  # whatever it is: not a reason to stop where others would see it
            self.strange, found = True, np.zeros(0)
        if segment + 1 == len(self._specs):
            self._logits = found
            return
        spec = self._specs[segment + 1]
        self._known[f"x{segment + 1}"] = self._bounded(found, largest_input(spec), spec.features)

    @property
    def logits(self) -> FloatArray:
        """(classes,), all segments having been opened."""
        assert self._logits is not None
        return self._logits

    def _bounded(self, values: FloatArray, limit: float, size: int) -> FloatArray:
        if values.shape != (size,):
            self.strange = True
            return np.zeros(size)
        good = np.isfinite(values) & (np.abs(values) <= limit)
        if good.all():
            return values
        self.strange = True
        return np.where(good, values, 0.0)


def largest_input(spec: TailSpec) -> float:
    """The largest |value| that can be encrypted for a segment, a hair less."""
    return 0.999 * spec.largest_input


class _Graph:
    """One interlude: float32 (1, n) inputs of these widths by name, one output of `wanted` values.

    Run once when it is loaded, so that the first request pays for no allocation.
    """

    def __init__(
        self,
        bundle: EdgeBundle,
        name: str,
        widths: Mapping[str, int],
        wanted: int,
        options: ort.SessionOptions,
    ) -> None:
        try:
            self._session = ort.InferenceSession(
                bundle.onnx[name], sess_options=options, providers=["CPUExecutionProvider"]
            )
            given = {i.name for i in self._session.get_inputs()}
            (made,) = self._session.get_outputs()
            self._given, self._output = sorted(given), made.name
            found = self({value: np.zeros(width) for value, width in widths.items()})
            if found.shape != (wanted,):
                raise ValueError(f"gives {found.shape}")
        except Exception as error:  # ONNX Runtime raises many types of its own
            raise BundleError(
                f"the graph {name!r} of model {bundle.model} cannot be loaded: build edge.bt again"
            ) from error

    def __call__(self, known: Mapping[str, FloatArray]) -> FloatArray:
        inputs = {name: known[name].astype(np.float32)[None] for name in self._given}
        (found,) = self._session.run([self._output], inputs)
        return np.asarray(found, np.float64).reshape(-1)


__all__ = ["Interludes", "Values", "largest_input"]
