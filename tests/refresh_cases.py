"""A small network with ReLU and max pooling, packed as a refreshed tail."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.models.pack import pack
from blindtail.models.refresh import Refresh
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

SHAPE, CLASSES = (1, 8, 8), 4
#: Of the tail: convolution, then two linear layers.
TRIPS = 3


@functools.cache
def model() -> SplitModel:
    torch.manual_seed(3)
    tail = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.Tanh(),
        nn.Linear(16, CLASSES),
    )
    made = SplitModel(
        "small",
        [nn.Identity()],
        {0: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))},
        {0: tail},
        Preprocessing(SHAPE, (0.5,), (0.25,)),
        [f"class {i}" for i in range(CLASSES)],
    )
    return made.eval()


def images(count: int = 48, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


@functools.cache
def packed() -> tuple[EdgeBundle, CloudBundle]:
    return pack(
        model(), images(), temperatures=(1.0,), thresholds=(0.9,), metrics={}, version="1", refresh=Refresh()
    )


def saved(folder: Path) -> tuple[Path, Path]:
    edge, cloud = packed()
    edge.save(folder / "edge.bt")
    cloud.save(folder / "cloud.bt")
    return folder / "edge.bt", folder / "cloud.bt"


@torch.no_grad()
def expected(pixels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Logits (n, classes) of the network itself."""
    x: Tensor = torch.from_numpy(model().preprocessing.apply(pixels))
    return model().tails["0"](x).double().numpy()  # type: ignore[no-any-return]
