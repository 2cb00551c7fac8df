"""The head in plaintext: ONNX Runtime, one session per stage and per exit.

One thread per session by default: a head is small, and the edge's other cores
belong to its owner. Sessions may be used from several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import BundleError, InputError

FloatImage = NDArray[np.float32]


# The package sets ORT_DISABLE_TELEMETRY; this covers a library that was imported before us.
ort.disable_telemetry_events()


class HeadExecutor:
    """Runs stages and exits of one `EdgeBundle`. Raises `BundleError` for a damaged graph.

    prepare    image (C, H, W), checked -> preprocessed float32 (1, C, H, W)
    run_stage  float32 (1, ...) -> float32 (1, ...)
    run_exit   float32 (1, ...) -> logits (classes,) float64
    """

    def __init__(self, bundle: EdgeBundle, *, threads: int = 1) -> None:
        self._preprocessing = bundle.preprocessing
        options = session_options(threads)
        self._stages = [_Graph(bundle, f"stage{i}", options) for i in range(len(bundle.stages))]
        self._exits = [_Graph(bundle, f"exit{i}", options) for i in range(len(bundle.exits))]

    def prepare(self, image: object) -> FloatImage:
        """Checks one image and applies the model's preprocessing: float32 (1, C, H, W).

        Accepts an array of shape (C, H, W), or (H, W) for one channel, of exactly
        the model's dtype: uint8 in 0..255, or finite float32 in [0, 1]. Raises
        `InputError` with what is expected and what was given.
        """
        pre = self._preprocessing
        if not isinstance(image, np.ndarray):
            raise InputError(
                f"the model takes a numpy array of shape {pre.input_shape} and dtype {pre.dtype}, "
                f"got {type(image).__name__}: convert it with numpy.asarray first"
            )
        if image.ndim == 4:
            raise InputError(
                f"the model takes one image of shape {pre.input_shape}, got a batch of shape "
                f"{image.shape}: call infer once per image"
            )
        if (1, *image.shape) == pre.input_shape:
            image = image[np.newaxis]
        return pre.apply(image)

    def run_stage(self, index: int, x: FloatImage) -> FloatImage:
        return self._stages[index](x)

    def run_exit(self, index: int, x: FloatImage) -> NDArray[np.float64]:
        return self._exits[index](x).reshape(-1).astype(np.float64)

    def warm_up(self) -> None:
        """One pass over everything, so that the first request pays for no allocation."""
        pre = self._preprocessing
        x = self.prepare(np.zeros(pre.input_shape, dtype=pre.dtype))
        after = [x := stage(x) for stage in self._stages]
        for graph in self._exits:
            fitting = [a for a in after if graph.accepts(a)]
            if fitting:
                graph(fitting[0])


class _Graph:
    """One ONNX graph with one input and one output."""

    def __init__(self, bundle: EdgeBundle, name: str, options: ort.SessionOptions) -> None:
        try:
            self._session = ort.InferenceSession(
                bundle.onnx[name], sess_options=options, providers=["CPUExecutionProvider"]
            )
            (given,), (made,) = self._session.get_inputs(), self._session.get_outputs()
        except Exception as error:  # ONNX Runtime raises many types of its own
            raise BundleError(
                f"the graph {name!r} of model {bundle.model} cannot be loaded: build edge.bt again"
            ) from error
        self._input, self._output, self._shape = given.name, made.name, given.shape

    def accepts(self, x: FloatImage) -> bool:
        return len(self._shape) == x.ndim and all(
            not isinstance(n, int) or n == m for n, m in zip(self._shape, x.shape, strict=True)
        )

    def __call__(self, x: FloatImage) -> FloatImage:
        result: FloatImage = self._session.run([self._output], {self._input: x})[0]
        return result


def session_options(threads: int) -> ort.SessionOptions:
    """Of every graph that the edge runs."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Waiting threads must sleep: an edge device has better uses for its cycles.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def softmax(logits: NDArray[np.float64] | Sequence[float], temperature: float = 1.0) -> NDArray[np.float64]:
    """Probabilities (classes,) of logits (classes,), after temperature scaling (Guo et al., 2017)."""
    z = np.asarray(logits, dtype=np.float64) / temperature
    e = np.exp(z - z.max())
    result: NDArray[np.float64] = e / e.sum()
    return result
