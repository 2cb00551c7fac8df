"""SplitModel: shapes, costs, checks that name the layer, and the owner's checkpoint."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from blindtail.errors import InputError, ModelError
from blindtail.models.layers import Square
from blindtail.models.split import SplitModel
from blindtail.models.zoo import bundle_paths, nets
from blindtail.preprocessing import Preprocessing

PREPROCESSING = Preprocessing(input_shape=(1, 8, 8), mean=(0.5,), std=(0.25,))


def parts(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "small",
        "stages": [
            nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU()),
            nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1)),
        ],
        "exits": {0: nn.Sequential(nn.Flatten(), nn.Linear(32, 4))},
        "tails": {1: nn.Sequential(nn.Flatten(), nn.Linear(12, 5), Square(), nn.Linear(5, 4))},
        "preprocessing": PREPROCESSING,
        "class_names": ("a", "b", "c", "d"),
    }
    return {**base, **changes}


def test_forward_gives_exits_then_tails() -> None:
    model = SplitModel.from_parts(**parts())
    outputs = model(torch.zeros(3, 1, 8, 8))
    assert [tuple(o.shape) for o in outputs] == [(3, 4), (3, 4)]
    assert model.exits_after == (0,)
    assert model.cuts == (1,)
    assert model.head(torch.zeros(3, 1, 8, 8), 1).shape == (3, 3, 2, 2)
    assert model.features(1) == 12


def test_costs_are_counted_by_hand() -> None:
    model = SplitModel.from_parts(**parts())
    first, second = model.stage_infos
    assert (first.macs, first.bytes) == (2 * 16 * 9, 4 * (2 * 9 + 2))
    assert (second.macs, second.bytes) == (3 * 4 * 2 * 9, 4 * (3 * 2 * 9 + 3))
    assert model.edge_budget() == {
        "macs": first.macs + second.macs + 32 * 4,
        "bytes": first.bytes + second.bytes + 4 * (32 * 4 + 4),
    }
    assert model.tail_macs(1) == 12 * 5 + 5 * 4


def test_grouped_and_batch_normed_layers_are_counted() -> None:
    stage = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
    )
    exit_ = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))
    model = SplitModel.from_parts(**parts(stages=[stage], exits={0: exit_}, tails={}))
    assert model.stage_infos[0].macs == 4 * 64 * 9 + 4 * 64 * 9
    assert model.stage_infos[0].bytes == 4 * (
        (36 + 4) + (36 + 4) + 4 * 4
    )  # batch norm: 2 weights, 2 statistics


def test_the_fashion_network_stays_within_its_edge_budget() -> None:
    model = nets.fashion()
    assert sum(s.macs for s in model.stage_infos) == 141_120
    assert model.edge_budget()["macs"] <= 160_000
    assert model.features(1) == 784


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"exits": {2: nn.Flatten()}}, "exit after stage 2"),
        ({"tails": {-1: nn.Flatten()}}, "cut after stage -1"),
        ({"tails": {1: nn.Sequential(nn.Flatten(), nn.Linear(13, 4))}}, r"tails\.1\.1"),
        ({"tails": {1: nn.Sequential(nn.Flatten(), nn.Linear(12, 5))}}, "4 classes"),
        ({"exits": {0: nn.Sequential(nn.Linear(31, 4))}}, r"exits\.0\.0"),
        ({"stages": [nn.Conv2d(3, 2, 3), nn.ReLU()]}, r"stages\.0"),
        ({"stages": []}, "at least one stage"),
        ({"exits": {}}, "one exit"),
        ({"stage_names": ("only",)}, "1 names for 2 stages"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        SplitModel.from_parts(**parts(**changes))


def test_building_leaves_training_mode_and_hooks_as_they_were() -> None:
    stage = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.BatchNorm2d(2))
    stage[1].eval()
    SplitModel.from_parts(**parts(stages=[stage], exits=parts()["exits"], tails={}))
    assert stage.training
    assert not stage[1].training
    assert not stage[0]._forward_hooks
    assert not stage[0]._forward_pre_hooks


def test_a_checkpoint_loads_and_a_wrong_one_is_refused() -> None:
    model = SplitModel.from_parts(**parts())
    again = SplitModel.from_parts(**parts(state=model.state_dict()))
    x = torch.rand(2, 1, 8, 8)
    assert all(torch.equal(a, b) for a, b in zip(model(x), again(x), strict=True))
    with pytest.raises(ModelError, match="does not fit"):
        SplitModel.from_parts(**parts(state={"nothing": torch.zeros(1)}))


def test_modules_of_an_existing_network_keep_their_weights() -> None:
    body = nn.Sequential(nn.Conv2d(1, 2, 3, 2, 1), nn.ReLU())
    before = body[0].weight.detach().clone()
    model = SplitModel.from_parts(**parts(stages=[body, parts()["stages"][1]]))
    assert torch.equal(model.stages[0][0].weight, before)  # type: ignore[index]


def test_logits_take_raw_pixels_and_restore_the_mode() -> None:
    model = SplitModel.from_parts(**parts()).train()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 1, 8, 8), dtype=np.uint8)
    rows = model.logits(pixels, batch=3)
    assert [tuple(r.shape) for r in rows] == [(7, 4), (7, 4)]
    assert model.training
    with pytest.raises(InputError):
        model.logits(pixels.astype(np.float32))


def test_a_network_that_does_not_ship_is_refused() -> None:
    with pytest.raises(ModelError, match="blindtail train"):
        bundle_paths("nothing")
