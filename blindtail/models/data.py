"""Data sets as plain arrays: uint8 images (n, C, H, W) and labels (n,). No torch here.

`load("fashion", "test")` and both digits splits need nothing but this package
and scikit-learn; Fashion-MNIST's training images are found or fetched as
`blindtail.models.fetch` says. `load_folder` reads the owner's own images.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from blindtail.errors import DataError
from blindtail.models.fetch import FashionSource

Split = Literal["train", "validation", "test"]
NAMES = ("fashion", "digits")
FASHION_CLASSES = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_VALIDATION = {"fashion": 5_000, "digits": 250}
_DIGITS_TEST = 360
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})


@dataclass(frozen=True)
class Images:
    """A labelled set: pixels uint8 (n, C, H, W), labels int64 (n,), one name per class."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.pixels.ndim != 4 or self.pixels.dtype != np.uint8 or len(self.pixels) != len(self.labels):
            raise DataError("a data set holds uint8 pixels (n, C, H, W) and one label for each image")
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise DataError(f"labels must lie in 0..{len(self.class_names) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Any) -> Images:
        """The images at `index` (a slice or an index array), in that order."""
        return Images(self.pixels[index], self.labels[index], self.class_names)


def load(name: str, split: Split, *, seed: int = 0, source: FashionSource | None = None) -> Images:
    """One split of a known data set, "fashion" (28x28) or "digits" (8x8).

    The validation split is taken from the training data by `seed`; the test
    split of "fashion" is the official one, in its order, and does not depend on
    `seed`. Raises `DataError` when the data set is unknown, missing or damaged.
    """
    if split not in ("train", "validation", "test"):
        raise DataError(f"unknown split {split!r}: use train, validation or test")
    if name == "fashion":
        return _fashion(split, seed, source or FashionSource())
    if name == "digits":
        return _digits(split, seed)
    raise DataError(f"unknown data set {name!r}: use one of {', '.join(NAMES)}, or a folder of images")


def _validation_index(name: str, count: int, split: Split, seed: int) -> NDArray[np.int64]:
    order = np.random.default_rng(seed).permutation(count)
    held = _VALIDATION[name]
    return order[:held] if split == "validation" else order[held:]


def _fashion(split: Split, seed: int, source: FashionSource) -> Images:
    part = "t10k" if split == "test" else "train"
    images = source.read(f"{part}-images-idx3-ubyte.gz")
    labels = source.read(f"{part}-labels-idx1-ubyte.gz")
    # IDX: a header of 16 (images) or 8 (labels) bytes, then raw uint8; contents are checked by hash.
    pixels = np.frombuffer(images, np.uint8, offset=16).reshape(-1, 1, 28, 28)
    every = Images(pixels, np.frombuffer(labels, np.uint8, offset=8).astype(np.int64), FASHION_CLASSES)
    if split == "test":
        return every
    return every.take(_validation_index("fashion", len(every), split, seed))


def _digits(split: Split, seed: int) -> Images:
    from sklearn.datasets import load_digits

    raw = load_digits()
    pixels = np.round(raw.images * (255.0 / 16.0)).astype(np.uint8)[:, None]
    every = Images(pixels, raw.target.astype(np.int64), tuple(str(d) for d in range(10)))
    # A fixed test split: the same images whatever the seed of training and validation.
    order = np.random.default_rng(20_240_101).permutation(len(every))
    if split == "test":
        return every.take(order[:_DIGITS_TEST])
    rest = every.take(order[_DIGITS_TEST:])
    return rest.take(_validation_index("digits", len(rest), split, seed))


def load_folder(
    folder: str | Path,
    input_shape: tuple[int, int, int],
    class_names: tuple[str, ...] | None = None,
) -> Images:
    """PNG and JPEG images, one sub-folder per class, as a labelled set.

    input_shape  (C, H, W) that the model takes: C = 1 reads images as grey, 3 as
                 RGB; every image must already be H x W pixels
    class_names  default: the sub-folders' names, sorted; otherwise every
                 sub-folder must be one of them

    Images come sorted by class and file name. Raises `DataError` naming the
    folder or file that is missing, damaged, or of a wrong size.
    """
    root = Path(folder)
    channels, height, width = input_shape
    if channels not in (1, 3):
        raise DataError(f"images in folders have 1 or 3 channels; this model takes {channels}")
    if not root.is_dir():
        raise DataError(f"{root} is no folder: give one with a sub-folder of images for each class")
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise DataError(f"{root} has no sub-folders: put the images of each class into one of its own")
    names = class_names or tuple(found)
    for name in found:
        if name not in names:
            raise DataError(
                f"{root / name}: {name!r} is no class of the model; its classes are {', '.join(names)}"
            )
    pixels: list[NDArray[np.uint8]] = []
    labels: list[int] = []
    for name in found:
        for path in sorted((root / name).iterdir()):
            if path.suffix.lower() in _SUFFIXES and path.is_file():
                pixels.append(_read_image(path, channels, height, width))
                labels.append(names.index(name))
    if not pixels:
        raise DataError(f"{root} holds no PNG or JPEG image in its sub-folders")
    return Images(np.stack(pixels), np.asarray(labels, np.int64), names)


def _read_image(path: Path, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            size = image.size
            image.verify()  # a PNG's checksums up to its end; decoding alone forgives a cut file
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            # The header tells the size: a wrong one is refused before any pixel is decoded.
            if size == (width, height):
                array = np.asarray(image.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    except (OSError, EOFError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is damaged or no PNG or JPEG image: replace or remove it") from error
    if size != (width, height):
        raise DataError(
            f"{path} is {size[0]} x {size[1]} pixels, the model takes {width} x {height}: resize it"
        )
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))
