"""Networks whose stages give several tensors, which meet in a tail or in the next stage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.models.layers import Polynomial, Quadratic
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
CLASSES = ("a", "b", "c", "d")
#: Of what `Branches` gives, and how many values they are together.
MAIN, SKIP, FEATURES = (3, 2, 2), (2, 4, 4), 44


class Branches(nn.Module):
    """A path of two convolutions, and what goes around the second: other channels, another resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 2, 3, 2, 1), nn.Conv2d(2, 3, 3, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        skip = torch.relu(self.first(x))
        return torch.relu(self.second(skip)), skip


class Meeting(nn.Module):
    """Its second input is used only behind an activation, where scale and level are others."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act = nn.Conv2d(3, 3, 3, padding=1), Quadratic(3, a=0.4, b=0.2, c=0.1)
        self.down, self.fc = nn.Conv2d(2, 3, 3, 2, 1), nn.Linear(12, 4)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        h: Tensor = self.act(self.conv(main)) + self.down(skip)
        return self.fc(h.flatten(1))  # type: ignore[no-any-return]


class Deeper(nn.Module):
    """Joins at two levels, a polynomial of degree three, parameters of its own, `self.training`."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.cube = nn.Linear(12, 6), Polynomial([0.1, 0.5, 0.1, 0.2])
        self.side, self.act = nn.Linear(32, 6), Quadratic(a=0.3, b=0.5, c=0.0)
        self.weight, self.fc = nn.Parameter(torch.linspace(-1, 1, 6)), nn.Linear(18, 4)
        self.register_buffer("shift", torch.linspace(0, 1, 6))

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        a = self.cube(self.main(main.flatten(1))) + self.shift
        b = self.side(skip.flatten(1)) * self.weight
        b = nn.functional.dropout(b, 0.5, self.training)
        c = self.act(a + b)
        return self.fc(torch.cat([c, a - b, main.flatten(1)[:, :6]], 1))  # type: ignore[no-any-return]


class Relus(nn.Module):
    """For a refreshed tail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.again = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.down, self.fc = nn.Conv2d(2, 3, 3, 2, 1), nn.Linear(12, 4)

    def forward(self, main: Tensor, skip: Tensor) -> Tensor:
        h = torch.relu(self.conv(main))
        h = torch.relu(self.again(h) + self.down(skip))
        return self.fc(h.flatten(1))  # type: ignore[no-any-return]


class Sum(nn.Module):
    """A stage, an exit or a tail in which any number of tensors meet: one layer for each, summed."""

    def __init__(self, *widths: int, outputs: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, outputs) for width in widths)

    def forward(self, *given: Tensor) -> Tensor:
        return torch.stack([f(x.flatten(1)) for f, x in zip(self.layers, given, strict=True)], 1).sum(1)


class Slices(nn.Module):
    """So many slices of an image's values, of unequal length: 64 values in all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.ends = [0, *range(5, 5 * count, 5), 64]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        flat = x.flatten(1)
        return tuple(flat[:, a:b] for a, b in zip(self.ends, self.ends[1:], strict=False))


def parts(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "meeting",
        "stages": [Branches()],
        "exits": {0: Sum(12, 32)},
        "tails": {0: Meeting()},
        "preprocessing": PREPROCESSING,
        "class_names": CLASSES,
    }
    return {**base, **changes}


def model(**changes: Any) -> SplitModel:
    """With fixed weights, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = SplitModel.from_parts(**parts(**changes))
        for parameter in made.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    return made.eval()


def pixels(count: int, seed: int = 0) -> NDArray[np.uint8]:
    shape = PREPROCESSING.input_shape
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
