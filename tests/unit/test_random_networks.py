"""Random PyTorch networks, compiled and run: a slice of `bench networks`, and what that check catches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bench import networks
from bench.random_networks import ACTIVATIONS, FAMILIES, LINEAR, TWO_INPUTS, random_network
from blindtail.he.backends import settle
from blindtail.he.error_growth import _telling_rows, largest_error
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from blindtail.he.spec import TailSpec

pytestmark = pytest.mark.usefixtures("one_torch_thread")

#: On `clear`; and three more on real ciphertexts.
CLEAR, ENCRYPTED = range(50), range(500, 503)


@pytest.mark.parametrize("seed", CLEAR)
def test_a_random_network_answers_as_pytorch_does(seed: int) -> None:
    _, checked = networks.on_clear(random_network(seed), seed)
    assert checked.fault == ""


@pytest.mark.parametrize("seed", ENCRYPTED)
def test_and_on_real_ciphertexts(seed: int) -> None:
    network = random_network(seed)
    backends = ("seal", "native") if seed == ENCRYPTED[0] and settle("auto") == "native" else ("auto",)
    found = networks.check_encrypted(network, networks.compiled(network), *backends)
    assert len(found) == len(backends)
    assert {name: checked.fault for name, checked in found.items()} == dict.fromkeys(found, "")


def test_the_same_seed_gives_the_same_network() -> None:
    one, two, other = random_network(7), random_network(7), random_network(8)
    assert np.array_equal(one.logits(one.inputs), two.logits(two.inputs))
    assert (one.shape, one.families) == (two.shape, two.families)
    assert one.shape != other.shape


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_each_family_has_a_switch(family: str) -> None:
    needed = {family, "flatten", "linear"}  # wide ones end in a dense layer
    assert any(family in random_network(seed, {family}).families for seed in range(20))
    assert all(random_network(seed, {family}).families <= needed for seed in range(20))
    others = [random_network(seed, FAMILIES - {family}).families for seed in range(20)]
    assert all(family not in found - {"flatten", "linear"} for found in others)


def test_families_are_whole() -> None:
    assert frozenset(LINEAR) | frozenset(ACTIVATIONS) | {TWO_INPUTS} == FAMILIES
    with pytest.raises(ValueError, match="no families"):
        random_network(0, {"softmax"})


def _with_first_map(program: Program, change: Callable[[MapOp], MapOp]) -> Program:
    first, *rest = program.ops
    assert isinstance(first, MapOp)
    return Program(program.spec, (change(first), *rest))


def _one_weight_off(op: MapOp) -> MapOp:
    weight = op.weight.copy()
    weight[np.unravel_index(np.abs(weight).argmax(), weight.shape)] *= -1
    return replace(op, weight=weight)


CORRUPTIONS: dict[str, Callable[[Program], Program]] = {
    "scale": lambda p: _with_first_map(p, lambda op: replace(op, out_scale=op.out_scale * (1 + 2**-40))),
    "level": lambda p: _with_first_map(p, lambda op: replace(op, level=op.level - 1)),
    "step left out": lambda p: Program(p.spec, p.ops[2:]),
    "weight": lambda p: _with_first_map(p, _one_weight_off),
    "bound too tight": lambda p: Program(_quieter(p.spec), p.ops),
}


def _quieter(spec: TailSpec, times: float = 100) -> TailSpec:
    noise, worst = spec.predicted_noise / times, spec.predicted_worst_noise / times
    return replace(spec, predicted_noise=noise, predicted_worst_noise=worst)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("seed", [1, 4, 8])
def test_a_corrupted_program_is_caught(seed: int, corruption: str) -> None:
    network = random_network(seed)
    program = networks.compiled(network)
    assert network.levels > 1
    assert networks.check(network, program, seed).fault == ""
    assert networks.check(network, CORRUPTIONS[corruption](program), seed).fault != ""


def test_a_network_that_does_not_compile_is_a_fault() -> None:
    network = random_network(1)
    program, checked = networks.on_clear(replace(network, calibration=network.calibration * np.nan), 0)
    assert program is None
    assert "NaN" in checked.fault


def test_the_largest_error_is_that_of_the_noisiest_output() -> None:
    """Simulated, for a network whose loud outputs have twenty times the noise of the average over slots.

    Its powers make a few inputs, not those of the largest norm, two hundred times as noisy as the others.
    """
    network = random_network(153)
    program = networks.compiled(network)
    x = network.calibration.reshape(len(network.calibration), -1)
    loudest = _telling_rows(program, x, 8)
    want = network.logits(network.calibration[loudest])
    evaluator = networks.ClearEvaluator(program, noise_seed=0)
    errors = np.array([evaluator.logits(x[loudest]) - want for _ in range(30)])
    seen = float(np.sqrt(np.square(errors).mean(axis=0)).max())
    assert 0.6 < seen / largest_error(program, x) < 1.6
    by_norm = np.argsort(np.square(x).sum(axis=1))[::-1][:8]
    assert max(largest_error(program, x[row : row + 1]) for row in by_norm) < seen / 50
    assert (np.abs(errors) <= program.error_bounds()[0]).all()
    averaged = Program(_quieter(program.spec, 20), program.ops)
    assert (np.abs(errors) > averaged.error_bounds()[0]).any()
