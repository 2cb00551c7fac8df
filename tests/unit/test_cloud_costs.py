"""A cell's predictions: measured once for a machine, kept, and never in the way."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from blindtail.errors import ConfigError
from blindtail.he.calibration import Calibration
from blindtail.he.cost import REFERENCE, Reference
from blindtail.he.params import Parameters
from blindtail.metrics import CloudMetrics
from cloud.config import CloudConfig
from cloud.costs import Costs, Machine
from cloud.evaluators import LocalPool, Work
from cloud.gateway import Gateway
from tests.cloud_cases import program
from tests.model_cases import bundle_of, other_shape

FACTOR = 7.0


def made_up() -> Calibration:
    """A machine on which everything takes seven times as long as on the reference core."""
    one = REFERENCE["native"]
    slow = Reference(
        *(FACTOR * s for s in (one.transform_s, one.key_pair_s, one.limb_pass_s, one.request_s, one.expand_s))
    )
    return Calibration(((1_000_000, slow),), took_s=0.1)


class Bench:
    """Counts what it is asked to measure, and fails on request."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.threads: list[int] = []
        self.error: Exception | None = None

    def __call__(self, parameters: Parameters, **settings: Any) -> Calibration:
        self.calls.append({"parameters": parameters, **settings})
        self.threads.append(threading.get_ident())
        if self.error is not None:
            raise self.error
        return made_up()


def machine() -> Machine:
    return {"model name": "one", "instructions": "avx2", "module": "1"}


def costs(folder: Path, bench: Bench, **settings: Any) -> Costs:
    given = {"backend": "native", "threads": 1, "budget_s": 1.0, "machine": machine, **settings}
    return Costs(
        folder, given.pop("backend"), given.pop("threads"), given.pop("budget_s"), calibrate=bench, **given
    )


def test_predictions_are_measured_once_for_the_same_parameters(tmp_path: Path) -> None:
    bench, made = Bench(), program()
    found = costs(tmp_path, bench)
    assert found.predicted_s(made) == made.predicted_s("native")  # nothing was measured
    found.measure([made])
    assert found.predicted_s(made) == pytest.approx(FACTOR * made.predicted_s("native"))
    found.measure([made])
    assert len(bench.calls) == 1
    found.measure([made, other_shape()])  # has another number of primes
    assert [call["parameters"] for call in bench.calls] == [
        made.spec.parameters,
        other_shape().spec.parameters,
    ]


def test_what_was_measured_is_kept_for_the_same_machine_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bench, made = Bench(), program()
    with caplog.at_level(logging.INFO):
        costs(tmp_path, bench).measure([made])
    assert caplog.text.count("calibrated for N =") == 1
    again = costs(tmp_path, bench)
    again.measure([made])
    assert len(bench.calls) == 1
    assert again.predicted_s(made) == pytest.approx(FACTOR * made.predicted_s("native"))
    for settings in (
        {"machine": lambda: {**machine(), "model name": "another"}},
        {"machine": lambda: {**machine(), "module": "2"}},
        {"threads": 2},
    ):
        before = len(bench.calls)
        costs(tmp_path, bench, **settings).measure([made])
        assert len(bench.calls) == before + 1
        costs(tmp_path, bench, **settings).measure([made])
        assert len(bench.calls) == before + 1


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "\x00"])
def test_a_damaged_file_is_measured_over(tmp_path: Path, content: str) -> None:
    bench, made = Bench(), program()
    (tmp_path / "calibration.json").write_text(content)
    costs(tmp_path, bench).measure([made])
    assert len(bench.calls) == 1
    assert json.loads((tmp_path / "calibration.json").read_text())["format"] == 1


def test_the_budget_is_shared(tmp_path: Path) -> None:
    bench = Bench()
    costs(tmp_path, bench, clock=lambda: 0.0).measure([program(), other_shape()])
    assert [call["budget_s"] for call in bench.calls] == [0.5, 1.0]  # the first took no time


@pytest.mark.parametrize("settings", [{"budget_s": 0.0}, {"backend": "seal"}, {"backend": "clear"}])
def test_nothing_is_measured_where_there_is_nothing_to_measure(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    bench, made = Bench(), program()
    found = costs(tmp_path, bench, **settings)
    found.measure([made])
    assert not bench.calls
    assert not list(tmp_path.iterdir())
    assert found.predicted_s(made) == made.predicted_s(settings.get("backend", "native"))


@pytest.mark.parametrize("error", [ConfigError("nothing credible"), RuntimeError("out of memory")])
def test_a_failure_leaves_the_reference(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    bench, made = Bench(), program()
    bench.error = error
    found = costs(tmp_path, bench)
    found.measure([made])
    assert found.predicted_s(made) == made.predicted_s("native")
    assert "reference constants" in caplog.text
    bench.error = None
    found.measure([made])  # a cell does not try for ever
    assert len(bench.calls) == 1


def test_a_state_directory_that_is_gone_costs_nothing_but_the_file(tmp_path: Path) -> None:
    made = program()
    found = costs(tmp_path / "gone", Bench())
    found.measure([made])
    assert found.predicted_s(made) == pytest.approx(FACTOR * made.predicted_s("native"))


def test_a_cell_measures_before_its_evaluators_and_its_queue_counts_in_it(tmp_path: Path) -> None:
    bench, bundle = Bench(), bundle_of("1")
    made = bundle.programs[0]
    started: list[int] = []

    class Pool(LocalPool):
        async def start(self) -> None:
            started.append(len(bench.calls))
            await super().start()

    async def run() -> None:
        config = CloudConfig(backend="clear", state_dir=tmp_path)
        gateway = Gateway(
            config,
            [bundle],
            lambda registry: Pool(registry.programs, "clear", 1, 1_000_000),
            CloudMetrics(CollectorRegistry()),
        )
        gateway.costs = costs(tmp_path, bench)
        await gateway.start()
        try:
            (name,) = gateway.registry.programs
            assert started == [1]
            assert bench.threads[0] != threading.get_ident()  # not on the loop
            work = Work(name, tmp_path / "keys", b"", "1")
            waiting = gateway.queue.submit("somebody", work, 1.0)
            assert gateway.queue.backlog_s() == pytest.approx(FACTOR * made.predicted_s("native"))
            waiting.cancel()
        finally:
            await gateway.close()

    asyncio.run(run())


def test_the_setting_is_checked() -> None:
    with pytest.raises(ConfigError, match="calibrate_s must be 0"):
        CloudConfig(calibrate_s=-1.0)
