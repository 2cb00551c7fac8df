"""Preprocessing: the arithmetic, and every image that must be refused."""

from __future__ import annotations

import numpy as np
import pytest

from blindtail.errors import InputError, ModelError
from blindtail.preprocessing import Preprocessing


def test_uint8_is_scaled_then_normalised_per_channel() -> None:
    p = Preprocessing(input_shape=(3, 2, 2), mean=(0.0, 0.5, 1.0), std=(1.0, 0.5, 2.0))
    x = p.apply(np.full((3, 2, 2), 255, np.uint8))
    assert x.shape == (1, 3, 2, 2)
    assert x.dtype == np.float32
    assert x[0, :, 0, 0].tolist() == [1.0, 1.0, 0.0]
    assert p.apply(np.zeros((5, 3, 2, 2), np.uint8)).shape == (5, 3, 2, 2)


def test_float_pixels_are_not_scaled_again() -> None:
    p = Preprocessing(input_shape=(1, 2, 2), mean=(0.5,), std=(0.25,), dtype="float32")
    assert p.apply(np.full((1, 2, 2), 0.75, np.float32)).max() == 1.0


@pytest.mark.parametrize(
    ("dtype", "image", "words"),
    [
        ("uint8", np.zeros((2, 2), np.uint8), "shape"),
        ("uint8", np.zeros((2, 2, 1), np.uint8), "shape"),
        ("uint8", np.zeros((1, 1, 2, 2, 1), np.uint8), "shape"),
        ("uint8", np.zeros((1, 2, 2), np.float32), "uint8 pixels, got float32"),
        ("uint8", np.zeros((1, 2, 2), bool), "uint8 pixels"),
        ("uint8", "no image", "shape"),
        ("float32", np.zeros((1, 2, 2), np.float64), "float32 pixels"),
        ("float32", np.full((1, 2, 2), np.nan, np.float32), "NaN"),
        ("float32", np.full((1, 2, 2), np.inf, np.float32), "NaN or infinite"),
        ("float32", np.full((1, 2, 2), 255.0, np.float32), r"\[0, 1\]"),
    ],
)
def test_bad_images_are_refused(dtype: str, image: object, words: str) -> None:
    p = Preprocessing(input_shape=(1, 2, 2), mean=(0.0,), std=(1.0,), dtype=dtype)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=words):
        p.apply(image)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "fields",
    [
        {"input_shape": (1, 2)},
        {"input_shape": (0, 2, 2)},
        {"input_shape": (1, 1 << 20, 1 << 20)},
        {"mean": (0.0, 0.0)},
        {"std": (0.0,)},
        {"std": (float("nan"),)},
        {"dtype": "float64"},
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, object]) -> None:
    base = {"input_shape": (1, 2, 2), "mean": (0.0,), "std": (1.0,), **fields}
    with pytest.raises(ModelError):
        Preprocessing(**base)  # type: ignore[arg-type]


def test_json_round_trip() -> None:
    p = Preprocessing(input_shape=(3, 4, 5), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0), dtype="float32")
    assert Preprocessing.from_json(p.to_json()) == p
