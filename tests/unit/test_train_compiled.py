"""A trained network to two files in one call, with and without an objective."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from blindtail import cli
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import DataError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import NoPlan
from blindtail.he.objective import Objective
from blindtail.he.plan import costs_of
from blindtail.models.data import Images
from blindtail.models.pack import activations, plan_tails
from blindtail.models.split import SplitModel
from blindtail.train.compiled import compile_model
from blindtail.train.recipe import RECIPES
from blindtail.train.run import Splits, train
from tests.unit.test_train_owner import CLASSES, build

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model() -> SplitModel:
    torch.manual_seed(1)
    return build().eval()


@pytest.fixture(scope="module")
def images() -> Images:
    rng = np.random.default_rng(0)
    return Images(rng.integers(0, 256, (80, 3, 8, 8), dtype=np.uint8), rng.integers(0, 3, 80), CLASSES)


def test_one_call_from_a_network_to_two_files(model: SplitModel, images: Images, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compiled = compile_model(model, images, allow_unstable=True)
    compiled.save(tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    edge, cloud = EdgeBundle.open(tmp_path / "out/edge.bt"), CloudBundle.open(tmp_path / "out/cloud.bt")
    assert edge.version == cloud.version == compiled.edge.version
    assert [e.threshold for e in edge.exits] == list(compiled.calibration.thresholds)
    assert set(compiled.stability) == set(cloud.programs) == {0, 1}
    pixels = images.pixels[:5]
    want = model.logits(pixels)[-1].numpy()
    got = ClearEvaluator(cloud.programs[1]).logits(activations(model, pixels, 1))
    assert np.allclose(got, want, atol=1e-4)


def test_an_objective_is_kept_by_every_tail(model: SplitModel, images: Images) -> None:
    free = compile_model(model, images, allow_unstable=True)
    bound = min(costs_of(p).key_bytes for p in free.cloud.programs.values()) * 0.9
    wanted = Objective(at_most={"key_bytes": bound})
    planned = plan_tails(model, wanted)
    made = compile_model(model, images, objective=wanted, allow_unstable=True)
    for cut, program in made.cloud.programs.items():
        assert program.spec.key_bytes == planned[cut].costs.key_bytes <= bound
        assert made.edge.cuts[cut].key_bytes == program.spec.key_bytes


def test_what_cannot_be_is_said_before_the_work(images: Images, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 validation images are too few"):
        compile_model(build(), images.take(slice(3)))
    with pytest.raises(DataError, match="offload_share"):
        compile_model(build(), images, offload_share=1.5)
    recipe, steps = RECIPES["digits"], []
    tiny = Objective(at_most={"key_bytes": 1000})
    with pytest.raises(NoPlan, match="the least is"):
        train(recipe, Splits.load("digits", seed=0), objective=tiny, progress=lambda *at: steps.append(at))
    assert steps == []


def test_devices_of_like_have_their_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "digits", "--like", "edge.bt", "--checkpoint", "x", "--at-most", "key_bytes=5e6"]
    with pytest.raises(SystemExit) as left:
        cli.main([*arguments, "--out", str(tmp_path)])
    assert left.value.code == 2
    assert "hold their keys" in capsys.readouterr().err
