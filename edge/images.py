"""Images for the commands: a file, a folder with classes, or a known data set."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import EdgeBundle
from blindtail.errors import DataError

_KNOWN = ("fashion", "digits")


def read_file(bundle: EdgeBundle, path: Path) -> NDArray[Any]:
    """One image (C, H, W) from a .npy array or a picture (PNG, JPEG), in the model's dtype.

    A picture is read as grey for one channel and as RGB for three; it must have
    the model's height and width. Raises `DataError`. Shape and dtype of an array
    are checked by `infer`.
    """
    if path.suffix.lower() == ".npy":
        try:
            array: NDArray[Any] = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} is missing or no .npy array of numbers") from error
        return array
    from PIL import Image, UnidentifiedImageError

    channels, height, width = bundle.preprocessing.input_shape
    if channels not in (1, 3):
        raise DataError(f"a picture has 1 or 3 channels, this model takes {channels}: give a .npy array")
    try:
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("L" if channels == 1 else "RGB"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path} is missing or no picture: give a PNG, a JPEG or a .npy array") from error
    if pixels.shape[:2] != (height, width):
        raise DataError(
            f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, "
            f"the model takes {width} x {height}: resize it"
        )
    planes = pixels[np.newaxis] if channels == 1 else pixels.transpose(2, 0, 1)
    return to_dtype(bundle, np.ascontiguousarray(planes))


def read_set(bundle: EdgeBundle, data: str, split: str = "test") -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Images (n, C, H, W) in the model's dtype, and labels (n,).

    data  "fashion", "digits", or a folder with a sub-folder of images per class

    Raises `DataError`.
    """
    from blindtail.models.data import load, load_folder

    if data in _KNOWN:
        if split not in ("train", "validation", "test"):
            raise DataError(f"unknown split {split!r}: choose train, validation or test")
        images = load(data, split)  # type: ignore[arg-type]
    else:
        images = load_folder(data, bundle.preprocessing.input_shape, bundle.class_names)
    if images.pixels.shape[1:] != bundle.preprocessing.input_shape:
        raise DataError(
            f"images of {data} have shape {images.pixels.shape[1:]}, "
            f"model {bundle.model} takes {bundle.preprocessing.input_shape}"
        )
    return to_dtype(bundle, images.pixels), images.labels


def to_dtype(bundle: EdgeBundle, pixels: NDArray[np.uint8]) -> NDArray[Any]:
    """uint8 pixels as the model takes them: as they are, or float32 in [0, 1]."""
    return pixels if bundle.preprocessing.dtype == "uint8" else (pixels / 255.0).astype(np.float32)
