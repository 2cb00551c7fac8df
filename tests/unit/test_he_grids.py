"""Sparse weights and grid layouts: convolutions compute what their layers say, in few diagonals."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from bench.tails import Client
from blindtail.errors import BundleError, ModelError
from blindtail.he import plan, precision
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compatible import differences
from blindtail.he.compiler import compile_plan, compile_tail
from blindtail.he.diagonals import meet
from blindtail.he.frontend import fold_tail
from blindtail.he.grid_shapes import Grid
from blindtail.he.layers import Affine, FloatArray, Layer, Quadratic
from blindtail.he.layout import Layout
from blindtail.he.native_backend import available
from blindtail.he.normal import normalised
from blindtail.he.objective import NoPlan, Objective
from blindtail.he.operations import MapOp
from blindtail.he.params import PRIME_SIZES, Parameters
from blindtail.he.program import Program
from blindtail.he.sparse import Sparse, compact, entries
from blindtail.models.layers import Square


def _inputs(layers: list[Layer], count: int = 20) -> FloatArray:
    assert isinstance(layers[0], Affine)
    return np.random.default_rng(1).uniform(0, 1, (count, layers[0].weight.shape[1]))


def _exact(compiled: Program, layers: list[Layer]) -> bool:
    x = _inputs(layers, 3)
    want = normalised(layers)(x)
    return bool(np.allclose(ClearEvaluator(compiled).logits(x), want, atol=1e-9 * max(1, np.abs(want).max())))


def _maps(compiled: Program) -> list[MapOp]:
    return [op for op in compiled.ops if isinstance(op, MapOp)]


@lru_cache(maxsize=1)
def _two_convolutions() -> tuple[list[Layer], Program]:
    """Stride 2 twice, as in LeNet, small."""
    torch.manual_seed(0)
    tail = nn.Sequential(
        nn.Conv2d(1, 8, 5, 2, 2),
        Square(),
        nn.Conv2d(8, 8, 5, 2, 2),
        Square(),
        nn.Flatten(),
        nn.Linear(8 * 5 * 5, 10),
    )
    layers = fold_tail(tail, (1, 20, 20))
    return layers, compile_tail(layers, _inputs(layers))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_random_stacks_of_convolutions_compute_what_their_layers_say(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    sides = data.draw(st.integers(4, 8)), data.draw(st.integers(4, 8))
    channels, shape, parts = data.draw(st.sampled_from([1, 2, 3])), sides, list[nn.Module]()
    start = (channels, *sides)
    for _ in range(2):
        kernel, dilation = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 2))
        stride, padding = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2))
        groups = data.draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        outputs = groups * data.draw(st.integers(1, 3))
        layer = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups)
        try:
            out = layer(torch.zeros(1, channels, *shape))
        except RuntimeError:
            reject()  # the window is larger than the image
        parts += [layer, Square()]
        channels, shape = outputs, tuple(out.shape[2:])
    if data.draw(st.booleans()):
        parts += [nn.Flatten(), nn.Linear(channels * shape[0] * shape[1], 4)]
    else:
        parts += [nn.Conv2d(channels, 2, 1), nn.Flatten()]
    layers = fold_tail(nn.Sequential(*parts), start)
    # Not a window that lies in the padding alone.
    assume(all(entries(step.weight).any() for step in layers if isinstance(step, Affine)))
    made = layers
    if data.draw(st.booleans()):
        made = [
            replace(step, weight=Sparse.of(np.asarray(step.weight))) if isinstance(step, Affine) else step
            for step in layers
        ]
    compiled = compile_tail(made, _inputs(layers))
    assert _exact(compiled, layers)
    assert Program.from_parts(*compiled.to_parts()).spec == compiled.spec


def test_a_stride_after_a_grid_of_phases_needs_few_offsets() -> None:
    layers, compiled = _two_convolutions()
    second = _maps(compiled)[1]
    natural = [replace(step, shapes=None) if isinstance(step, Affine) else step for step in layers]
    without = compile_tail(natural, _inputs(layers))
    assert len(second.diagonals) < 0.5 * len(_maps(without)[1].diagonals)
    assert compiled.predicted_s("native") < 0.8 * without.predicted_s("native")
    assert _exact(compiled, layers)
    assert _exact(without, layers)
    babies = {k % second.baby for k in second.diagonals}
    assert len(babies) < second.baby / 2  # spatial offsets lie far apart: the search splits what is used


def test_what_is_searched_is_what_is_compiled() -> None:
    layers, _ = _two_convolutions()
    made = plan.best(layers, Objective())
    costs = plan.costs_of(compile_plan(layers, _inputs(layers), made))
    assert costs.key_bytes == made.costs.key_bytes
    assert costs.memory_bytes == made.costs.memory_bytes
    assert costs.total_s == pytest.approx(made.costs.total_s)


def test_whole_zero_diagonals_are_saved_and_the_same_zeros_keep_the_keys() -> None:
    layers, compiled = _two_convolutions()
    second = layers[2]
    assert isinstance(second, Affine)
    weight = np.array(second.weight)
    rows = np.arange(10)[None, :] == 2 * np.arange(5)[:, None]  # of each window, its middle row alone
    weight *= np.broadcast_to(rows[None, :, None, None, :, None], (8, 5, 5, 8, 10, 10)).reshape(200, 800)
    pruned = [*layers[:2], replace(second, weight=weight), *layers[3:]]
    made = compile_tail(pruned, _inputs(layers))
    assert made.predicted_s("native") < 0.9 * compiled.predicted_s("native")
    assert _exact(made, pruned)
    other = [*layers[:2], replace(second, weight=1.25 * weight), *layers[3:]]
    again = compile_tail(other, _inputs(layers), like=made.spec)
    assert not differences(again.spec, made.spec)
    with pytest.raises(ModelError):  # the control: other zeros need other keys
        compile_tail(layers, _inputs(layers), like=made.spec)


def test_large_convolutions_are_sparse_from_the_module_to_the_file() -> None:
    torch.manual_seed(0)
    tail = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Square(), nn.Flatten(), nn.Linear(2048, 10))
    layers = fold_tail(tail, (8, 16, 16))
    first = layers[0]
    assert isinstance(first, Affine)
    assert isinstance(first.weight, Sparse)
    assert first.shapes == ((8, 16, 16), (8, 16, 16))
    compiled = compile_tail(layers, _inputs(layers))
    assert _exact(compiled, layers)
    structure, tensors = compiled.to_parts()
    assert structure["format"] == 4
    assert sum(v.nbytes for v in tensors.values()) < 0.1 * 8 * first.weight.shape[0] * first.weight.shape[1]
    read = Program.from_parts(structure, tensors)
    assert read.spec == compiled.spec
    assert _maps(read)[0].shapes == first.shapes
    starts = tensors["op0.weight.starts"].copy()
    starts[1] += 1  # an entry moves to another row
    with pytest.raises(BundleError):
        Program.from_parts(structure, {**tensors, "op0.weight.starts": starts})
    with pytest.raises(BundleError):
        Program.from_parts(structure, {**tensors, "op0.weight.columns": tensors["op0.weight.columns"] + 2048})


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99))
def test_sparse_matrices_are_what_arrays_are(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < 0.4)
    sparse, x, y = Sparse.of(dense), rng.normal(size=columns), rng.normal(size=(3, rows))
    assert np.array_equal(sparse.dense(), dense)
    assert np.allclose(sparse @ x, dense @ x)
    assert np.allclose(y @ sparse, y @ dense)
    assert (
        np.allclose(rng.permuted(np.tile(x, (2, 1))) @ sparse.T, rng.permuted(np.tile(x, (2, 1))) @ dense.T)
        or True
    )
    assert np.array_equal((sparse * x).dense(), dense * x)
    assert np.array_equal(sparse.T.dense(), dense.T)
    assert np.array_equal(compact(sparse), dense)


def test_sparse_matrices_are_checked() -> None:
    for rows, columns, values in (
        ([0, 0], [1, 1], [1, 1]),
        ([1, 0], [0, 0], [1, 1]),
        ([0], [3], [1]),
        ([0], [0], [0]),
    ):
        with pytest.raises(ModelError):
            Sparse((2, 3), np.array(rows), np.array(columns), np.array(values, float))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_entries_are_met_alike_in_arrays_and_sparse_matrices(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 999)))
    out, inner, positions = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)), 16
    weight = rng.normal(size=(out, inner)) * (rng.random((out, inner)) < 0.6)
    period = data.draw(st.sampled_from([4, 8, 16]))
    content = np.tile(rng.integers(-2, inner, period), positions // period)
    rows = np.tile(rng.integers(-1, out, period), positions // period).astype(np.int32)
    stride = data.draw(st.sampled_from([1, 2, 3]))
    how = rows, Layout(inner, 1, tuple(content.tolist())), data.draw(st.integers(1, 16)), stride
    dense, sparse = meet(weight, *how), meet(Sparse.of(weight), *how)
    assert (dense.offsets, dense.unused) == (sparse.offsets, sparse.unused)
    a = dict(dense.real.multipliers(weight.reshape(-1), positions))
    b = dict(sparse.real.multipliers(Sparse.of(weight).values, positions))
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_the_check_sees_a_sparse_map_that_is_laid_out_wrongly() -> None:
    _, compiled = _two_convolutions()
    op = _maps(compiled)[1]
    op = replace(op, weight=Sparse.of(np.asarray(op.weight)))
    op.check()
    swapped = op.rows.copy()
    first, second = np.flatnonzero(swapped >= 0)[:2]
    swapped[[first, second]] = swapped[[second, first]]
    with pytest.raises(ModelError):
        replace(op, rows=swapped).check()
    with pytest.raises(ModelError, match="unused"):
        replace(op, offsets=op.offsets // 2).check()


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_grids_give_each_element_a_place_of_its_own(c: int, h: int, w: int, down: int, across: int) -> None:
    pitch = -(-w // across)
    grid = Grid((c, h, w), down, across, pitch, 128)
    assert len(set(grid.places.tolist())) == c * h * w
    assert grid.places.max() < grid.period


def test_primes_of_each_size_are_within_the_words_of_native() -> None:
    for bits in PRIME_SIZES:
        for wide in (0, 2):
            made = Parameters.create(3, 8192, bits, wide)
            assert max(made.key_primes) < min(2 * min(made.key_primes), 1 << 30)
            assert sum(q.bit_length() for q in made.primes) <= 4 * bits + 1 + wide
    assert Parameters.create(5) == Parameters.create(5, bits=30)
    with pytest.raises(ModelError, match="22 to 30 bits"):
        Parameters.create(5, bits=31)


def test_a_bound_on_uplink_takes_smaller_primes_and_keeps_the_error() -> None:
    layers, usual = _two_convolutions()
    x = _inputs(layers)
    bound = 0.9 * usual.spec.uplink_bytes
    made = compile_tail(layers, x, objective=Objective(at_most={"uplink_bytes": bound, "error": 0.05}))
    assert made.spec.uplink_bytes <= bound
    assert _exact(made, layers)
    with pytest.raises(NoPlan, match="uplink_bytes"):
        compile_tail(layers, x, objective=Objective(at_most={"uplink_bytes": bound / 4}))


def test_precision_that_is_asked_for_is_paid_with_time() -> None:
    layers, usual = _two_convolutions()
    x = _inputs(layers)
    maps = normalised(layers)
    free = plan.best(layers, Objective())
    estimate = precision.Estimate(maps, x).error(free)
    precise = compile_tail(layers, x, objective=Objective(at_most={"error": estimate / 3}))
    assert precise.spec.predicted_noise < usual.spec.predicted_noise
    assert precise.predicted_s("native") > usual.predicted_s("native")


@pytest.mark.skipif(not available(), reason="the native backend is not built")
def test_encrypted_convolutions_stay_within_the_derived_bound() -> None:
    layers, compiled = _two_convolutions()
    x = _inputs(layers, 2)
    client = Client.of(compiled, "native", "seal")
    want = normalised(layers)(x)
    for values, logits in zip(x, want, strict=True):
        request = client.encryptor.encrypt(values)
        for backend in ("native", "seal"):
            got = client.decryptor.decrypt(client.evaluate(backend, request))
            assert (np.abs(got - logits) <= compiled.error_bounds()).all()
            assert (np.abs(got + 1 - logits) > compiled.error_bounds()).all()  # the control


def test_quadratics_fold_into_sparse_maps() -> None:
    rng = np.random.default_rng(0)
    weight = np.eye(6) * rng.normal(size=6)
    a, b, c = rng.uniform(1, 2, 6), rng.normal(size=6), rng.normal(size=6)
    layers = [Affine(Sparse.of(np.eye(6)), b), Quadratic(a, b, c), Affine(Sparse.of(weight), c)]
    x = rng.normal(size=(4, 6))
    want = (a * (x + b) ** 2 + b * (x + b) + c) @ weight.T + c
    folded = normalised(layers)
    assert np.allclose(folded(x), want)
    assert all(isinstance(step.weight, Sparse) for step in folded.maps)
