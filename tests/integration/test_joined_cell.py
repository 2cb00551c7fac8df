"""Tails with joins, from the network to a real cell's answers over gRPC.

One has a connection around a cubic activation; in the other two tensors meet that the head gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from blindtail.bundle import CloudBundle
from blindtail.he.native_backend import available
from blindtail.models.layers import Polynomial
from blindtail.models.pack import pack
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from cloud.local import LocalCell
from edge.executor import softmax
from edge.runtime import EdgeRuntime
from tests import meeting_cases

SHAPE, CLASSES = (1, 8, 8), 4


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 1, 3, padding=1), nn.Linear(64, CLASSES)
        self.act = Polynomial([0.0, 0.5, 0.2, 0.1])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.act(self.conv(x))).flatten(1))  # type: ignore[no-any-return]


def _model() -> SplitModel:
    torch.manual_seed(5)
    return SplitModel(
        "joined",
        [nn.Identity()],
        {0: nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES))},
        {0: _Residual()},
        Preprocessing(SHAPE, (0.5,), (0.25,)),
        [f"class {i}" for i in range(CLASSES)],
    ).eval()


def _images(count: int, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


BACKENDS = ["clear", "seal", *(["native"] if available() else [])]


@pytest.mark.parametrize(
    ("backend", "make"),
    [*((backend, _model) for backend in BACKENDS), (BACKENDS[-1], meeting_cases.model)],
)
def test_answers_are_pytorchs(backend: Any, make: Callable[[], SplitModel], tmp_path: Path) -> None:
    model, pixels = make(), _images(4, seed=1)
    edge, cloud = pack(model, _images(60, 0), temperatures=(1.0,), thresholds=(0.9,), metrics={}, version="1")
    cloud.save(tmp_path / "cloud.bt")
    assert not CloudBundle.open(tmp_path / "cloud.bt").programs[0].is_chain
    want = model.logits(pixels)[-1].double().numpy()
    with (
        LocalCell([tmp_path / "cloud.bt"], backend=backend, state_dir=tmp_path / "cell") as cell,
        EdgeRuntime.open(
            edge,
            cell.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=tmp_path / "edge",
            backend="clear" if backend == "clear" else "seal",
        ) as runtime,
    ):
        assert runtime.wait_ready(60), runtime.status()
        answers = [runtime.infer(image, deadline_s=20) for image in pixels]
    assert [(a.route, a.fallback) for a in answers] == [("tail", None)] * 4
    for answer, logits in zip(answers, want, strict=True):
        np.testing.assert_allclose(answer.probabilities, softmax(logits), atol=0.01)
        assert answer.label == int(logits.argmax())
