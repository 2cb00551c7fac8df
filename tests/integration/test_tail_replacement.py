"""The owner trains the tail on, the operator rolls it out, and no device is touched: all encrypted."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blindtail.rpc import INSECURE_LOOPBACK
from blindtail.train.recipe import RECIPES
from blindtail.train.run import Splits, train
from blindtail.train.tail import train_tail
from cloud.local import LocalCell
from cloud.operator_client import OperatorClient
from edge.pair import ModelPair
from edge.runtime import EdgeRuntime

pytestmark = pytest.mark.timeout(120)
RECIPE = replace(RECIPES["digits"], epochs=2)
IMAGES = 12


def test_a_retrained_tail_is_rolled_out_to_devices_that_hold_the_old_pair(tmp_path: Path) -> None:
    splits = Splits.load("digits", seed=0)
    first = train(RECIPE, splits)
    first.save(tmp_path / "first")
    # Enough steps to change what the tail says on some image.
    longer = replace(RECIPE, epochs=6, peak_rate=3 * RECIPE.peak_rate)
    second = train_tail(longer, splits, tmp_path / "first" / "model.safetensors", first.edge)
    second.save(tmp_path / "second")
    edge_bt = tmp_path / "first" / "edge.bt"
    pairs = {name: ModelPair.open(edge_bt, tmp_path / name / "cloud.bt") for name in ("first", "second")}
    images = splits.test.pixels[:IMAGES]
    activations = pairs["first"].run_head(images).activations
    logits = {name: torch.from_numpy(pair.clear_tail(activations)) for name, pair in pairs.items()}
    wanted = {name: torch.softmax(found, 1).numpy() for name, found in logits.items()}
    assert abs(wanted["first"] - wanted["second"]).max() > 0.05  # the two can be told apart

    with (
        LocalCell([tmp_path / "first" / "cloud.bt"], state_dir=tmp_path / "cell") as cell,
        OperatorClient(cell.address, INSECURE_LOOPBACK) as operator,
        EdgeRuntime.open(
            edge_bt,
            cell.address,
            credentials="insecure-loopback",
            policy="cloud-only",
            state_dir=tmp_path / "edge",
        ) as device,
    ):
        assert device.wait_ready(60)

        def ask(name: str) -> Counter[str]:
            """How many answers are `name`'s, of all images."""
            found: Counter[str] = Counter()
            for index, image in enumerate(images):
                answer = device.infer(image)
                assert answer.route == "tail"
                errors = {n: abs(answer.probabilities - p[index]).max() for n, p in wanted.items()}
                nearest = min(errors, key=lambda n: errors[n])
                assert errors[nearest] < 1e-2
                found["other" if errors[name] > 1e-2 else name] += 1
            return found

        assert ask("first") == {"first": IMAGES}
        (cut,) = first.edge.cuts
        operator.push(tmp_path / "second" / "cloud.bt")
        operator.canary(first.edge.model, second.cloud.version, 1.0)
        assert ask("second") == {"second": IMAGES}
        operator.rollback(first.edge.model)
        assert ask("first") == {"first": IMAGES}
        assert device.status().tails[cut].registrations == 1  # nothing was noticed, nothing sent again
