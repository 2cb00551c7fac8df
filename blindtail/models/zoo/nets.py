"""The shipped networks, read top to bottom. Shapes in comments leave the batch out."""

from __future__ import annotations

from torch import nn

from blindtail.models.data import FASHION_CLASSES
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing


def _stage(before: int, after: int) -> nn.Sequential:
    """Half the resolution: 3x3 convolution with stride 2, batch norm (folded on export), ReLU."""
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
    )


def _tail(features: int, width: int, classes: int, dropout: float) -> nn.Sequential:
    """features - width - x^2 - classes. Batch norm keeps the square's input near unit size."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(features, width, bias=False),
        nn.BatchNorm1d(width),
        Square(),
        nn.Dropout(dropout),
        nn.Linear(width, classes),
    )


def fashion() -> SplitModel:
    """Fashion-MNIST: 1x28x28 -> two convolution stages -> 784 values at the cut."""
    return SplitModel.from_parts(
        name="fashion",
        stages=[
            _stage(1, 16),  # 16x14x14, 28,224 MACs
            _stage(16, 16),  # 16x7x7, 112,896 MACs
        ],
        exits={
            0: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(784, 10)),  # 16x7x7 -> 10
            1: nn.Sequential(nn.Flatten(), nn.Linear(784, 10)),
        },
        tails={1: _tail(784, 128, 10, dropout=0.05)},
        preprocessing=Preprocessing(input_shape=(1, 28, 28), mean=(0.2862,), std=(0.3531,)),
        class_names=FASHION_CLASSES,
    )


def digits() -> SplitModel:
    """scikit-learn's digits, 1x8x8, for tests: 64 values at the cut, trained in seconds."""
    return SplitModel.from_parts(
        name="digits",
        stages=[
            _stage(1, 8),  # 8x4x4
            nn.Sequential(nn.Conv2d(8, 4, 3, padding=1), nn.ReLU()),  # 4x4x4
        ],
        exits={
            0: nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32, 10)),  # 8x2x2 -> 10
            1: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
        },
        tails={1: _tail(64, 32, 10, dropout=0.0)},
        preprocessing=Preprocessing(input_shape=(1, 8, 8), mean=(0.305,), std=(0.376,)),
        class_names=tuple(str(d) for d in range(10)),
    )
