"""From an image to the network's input, in numpy, the same at training time and on the edge."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import InputError, ModelError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the network's input: x = (pixel / 255 - mean) / std, per channel.

    `dtype` is what an image may be: "uint8" (0..255) or "float32" (already in
    [0, 1], hence not divided by 255). `input_shape` is (C, H, W).
    """

    input_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    dtype: Literal["uint8", "float32"] = "uint8"

    def __post_init__(self) -> None:
        channels = self.input_shape[0] if len(self.input_shape) == 3 else 0
        if channels < 1 or min(self.input_shape) < 1 or math.prod(self.input_shape) > 1 << 26:
            raise ModelError(f"preprocessing: input_shape must be (C, H, W), got {self.input_shape}")
        if self.dtype not in ("uint8", "float32"):
            raise ModelError(f"preprocessing: dtype must be uint8 or float32, got {self.dtype!r}")
        if len(self.mean) != channels or len(self.std) != channels:
            raise ModelError(f"preprocessing: give one mean and one std for each of {channels} channels")
        if not all(map(math.isfinite, (*self.mean, *self.std))) or min(self.std) <= 0:
            raise ModelError("preprocessing: mean and std must be finite, std above zero")

    def apply(self, images: NDArray[Any]) -> FloatArray:
        """(C, H, W) or (B, C, H, W) of `dtype` -> float32 (B, C, H, W).

        Raises `InputError` on a wrong shape or dtype, on NaN or infinity, and on
        float32 pixels outside [0, 1].
        """
        array = np.asarray(images)
        if array.ndim == 3:
            array = array[None]
        if array.ndim != 4 or array.shape[1:] != self.input_shape:
            raise InputError(
                f"the model takes images of shape {self.input_shape} (channels, height, width), "
                f"got {np.asarray(images).shape}: resize or transpose the image first"
            )
        if array.dtype != np.dtype(self.dtype):
            raise InputError(
                f"the model takes {self.dtype} pixels, got {array.dtype}: convert the image first"
            )
        x = array.astype(np.float32)
        if self.dtype == "uint8":
            x /= np.float32(255.0)
        elif not np.isfinite(x).all():
            raise InputError("the image holds NaN or infinite pixels: leave it out, or read it again")
        elif x.size and (x.min() < 0.0 or x.max() > 1.0):
            raise InputError("float32 pixels must lie in [0, 1]: divide by the sensor's largest value")
        shape = (1, -1, 1, 1)
        mean = np.asarray(self.mean, dtype=np.float32).reshape(shape)
        std = np.asarray(self.std, dtype=np.float32).reshape(shape)
        return np.ascontiguousarray((x - mean) / std)

    def to_json(self) -> dict[str, Any]:
        return {
            "input_shape": list(self.input_shape),
            "dtype": self.dtype,
            "mean": list(self.mean),
            "std": list(self.std),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Preprocessing:
        c, h, w = (int(v) for v in data["input_shape"])
        return cls((c, h, w), tuple(map(float, data["mean"])), tuple(map(float, data["std"])), data["dtype"])
