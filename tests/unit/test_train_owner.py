"""The model owner's way: own modules, own images in folders, two cuts, from pixels to two files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.models.layers import Quadratic, Square
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from blindtail.train.recipe import JointCrossEntropy, Recipe
from blindtail.train.run import Splits, train

pytestmark = pytest.mark.timeout(120)
CLASSES = ("red", "green", "blue")


class OwnersNetwork(nn.Module):
    """A network as its owner wrote it, before blindtail."""

    def __init__(self) -> None:
        super().__init__()
        self.block1 = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.ReLU())
        self.block2 = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block2(self.block1(x))
        return out


def build() -> SplitModel:
    net = OwnersNetwork()
    return SplitModel.from_parts(
        name="owner",
        stages=[net.block1, net.block2],
        stage_names=("block1", "block2"),
        exits={1: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))},
        tails={
            0: nn.Sequential(
                nn.Conv2d(4, 4, 3, 2, 1), nn.BatchNorm2d(4), Quadratic(4), nn.Flatten(), nn.Linear(16, 3)
            ),
            1: nn.Sequential(nn.Flatten(), nn.Linear(24, 8), Square(), nn.Linear(8, 3)),
        },
        preprocessing=Preprocessing(input_shape=(3, 8, 8), mean=(0.5,) * 3, std=(0.25,) * 3),
        class_names=CLASSES,
    )


def write_images(root: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 40), ("validation", 20), ("test", 20)):
        for channel, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (8, 8, 3), dtype=np.uint8)
                pixels[..., channel] += 100
                Image.fromarray(pixels).save(folder / f"{i:03}.png")


def test_from_the_owners_modules_and_images_to_two_files(tmp_path: Path) -> None:
    write_images(tmp_path / "images")
    recipe = Recipe(
        name="owner",
        data="folder",
        build=build,
        objective=JointCrossEntropy(exit_weights=(0.5,), distill=0.5),
        epochs=12,
        batch=20,
        peak_rate=2e-2,
    )
    splits = Splits.from_folder(tmp_path / "images", build())
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [120, 60, 60]
    trained = train(recipe, splits)
    trained.save(tmp_path / "out")
    edge, cloud = EdgeBundle.open(tmp_path / "out/edge.bt"), CloudBundle.open(tmp_path / "out/cloud.bt")
    assert trained.report["metrics"]["test"]["tail"] >= 0.9
    assert [s.name for s in edge.stages] == ["block1", "block2"]
    assert sorted(edge.cuts) == sorted(cloud.programs) == [0, 1]
    assert [edge.cuts[cut].features for cut in (0, 1)] == [4 * 4 * 4, 6 * 2 * 2]
    assert edge.cuts[0].program_id != edge.cuts[1].program_id
    assert sorted(edge.onnx) == ["exit0", "stage0", "stage1"]


def test_an_owners_checkpoint_moves_into_the_split_model() -> None:
    torch.manual_seed(0)
    net, fresh = OwnersNetwork().eval(), OwnersNetwork()
    fresh.load_state_dict(net.state_dict())
    model = SplitModel.from_parts(
        name="owner",
        stages=[fresh.block1, fresh.block2],
        exits={1: nn.Sequential(nn.Flatten(), nn.Linear(24, 3))},
        tails={1: nn.Sequential(nn.Flatten(), nn.Linear(24, 3))},
        preprocessing=Preprocessing(input_shape=(3, 8, 8), mean=(0.0,) * 3, std=(1.0,) * 3),
        class_names=CLASSES,
    ).eval()
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(model.head(x, 1), net(x))
