"""Stages that give several tensors: shapes, errors, tracing, graphs, answers on ciphertexts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, fx, nn

from bench.tails import Client
from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import ModelError
from blindtail.he.clear import ClearEvaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, outputs
from blindtail.models.export import export_head
from blindtail.models.layers import Square
from blindtail.models.lint import lint, lint_refreshed, rewritten_tail, split
from blindtail.models.pack import activations, held_activations, pack
from blindtail.models.refresh import Refresh, refresh_tail, split_tail
from blindtail.models.several import Flat, flat, several
from blindtail.models.split import SplitModel
from edge.executor import HeadExecutor
from tests.meeting_cases import (
    FEATURES,
    MAIN,
    SKIP,
    Branches,
    Deeper,
    Meeting,
    Relus,
    Slices,
    Sum,
    model,
    parts,
    pixels,
)

pytestmark = pytest.mark.usefixtures("one_torch_thread")

PACKED: dict[str, Any] = {"temperatures": (1.0,), "thresholds": (0.9,), "metrics": {}}


class Gives(nn.Module):
    """A stage that gives what it is told, of an image."""

    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


# -- the model ---------------------------------------------------------------------------


def test_a_tuple_is_one_flat_activation() -> None:
    made = model()
    x = torch.rand(3, 1, 8, 8)
    main, skip = made.head(x, 0)
    assert (main.shape, skip.shape) == ((3, *MAIN), (3, *SKIP))
    assert made.stage_infos[0].output_shape == (FEATURES,)
    assert (made.forms[0].shapes, made.forms[0].several) == ((MAIN, SKIP), True)
    assert made.features(0) == FEATURES
    exit_, tail = made(x)
    assert torch.equal(exit_, made.exits["0"](main, skip))
    assert torch.equal(tail, made.tails["0"](main, skip))
    row = torch.cat([main.flatten(1), skip.flatten(1)], 1)
    assert torch.equal(flat((main, skip)), row)
    assert torch.equal(made.stage(0)(x), row)
    assert torch.equal(made.tail(0)(row), tail)
    assert torch.equal(made.exit(0)(row), exit_)
    assert made.tail_macs(0) == 3 * 4 * 27 + 3 * 4 * 18 + 12 * 4
    given = activations(made, pixels(5), 0)
    assert given.shape == (5, FEATURES)
    assert np.allclose(held_activations(pack(made, pixels(40), **PACKED)[0], pixels(5), 0), given, atol=1e-6)


def test_tensors_meet_in_the_next_stage_too() -> None:
    made = model(
        stages=[Branches(), Sum(12, 32, outputs=6), Slices(1)],
        exits={0: Sum(12, 32), 1: nn.Linear(6, 4)},
        tails={0: Meeting(), 1: nn.Sequential(nn.Linear(6, 4))},
    )
    assert [info.output_shape for info in made.stage_infos] == [(FEATURES,), (6,), (6,)]
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(made.head(x, 1), made.stages[1](*made.head(x, 0)))  # type: ignore[arg-type]
    assert torch.equal(made.stage(1)(made.stage(0)(x)), made.head(x, 1))  # type: ignore[arg-type]
    # A tuple of one is a tuple: its activation is flat.
    assert made.forms[2].several
    assert isinstance(made.head(x, 2), tuple)


def test_one_tensor_is_what_it_was() -> None:
    """The very modules: nothing that is stored of such a network can differ."""
    made = SplitModel.from_parts(
        **parts(
            stages=[nn.Conv2d(1, 2, 3), nn.Flatten()],
            exits={0: nn.Sequential(nn.Flatten(), nn.Linear(72, 4))},
            tails={1: nn.Linear(72, 4)},
        )
    )
    assert made.stage(0) is made.stages[0]
    assert made.stage(1) is made.stages[1]
    assert made.exit(0) is made.exits["0"]
    assert made.tail(1) is made.tails["1"]
    assert [info.output_shape for info in made.stage_infos] == [(2, 6, 6), (72,)]
    assert isinstance(made.head(torch.rand(1, 1, 8, 8), 0), Tensor)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tails": {0: nn.Linear(44, 4)}}, r"tails\.0 takes 1 input \(input\), but stages\.0 gives 2 tensors "
            r"\(\(3, 2, 2\), \(2, 4, 4\)\): write it as forward\(self, input1, input2\), or let stages\.0"),
        ({"exits": {0: nn.Sequential(nn.Flatten(), nn.Linear(44, 4))}}, r"exits\.0 takes 1 input"),
        ({"stages": [Branches(), nn.Flatten()]}, r"stages\.1 takes 1 input.*stages\.0 gives 2 tensors"),
        ({"stages": [nn.Flatten()], "exits": {0: nn.Linear(64, 4)}},
            r"tails\.0 takes 2 inputs \(main, skip\), but stages\.0 gives one tensor \(64,\): .*a tuple"),
        ({"stages": [Meeting()]}, r"stages\.0 takes 2 inputs.*preprocessing gives one tensor"),
        ({"tails": {0: Sum(12, 31)}}, r"layer tails\.0\.layers\.1 refuses its input; tails\.0 is given 2 t"),
        ({"tails": {0: Gives(lambda x: x)}}, r"tails\.0 takes 1 input \(x\)"),
        ({"stages": [Gives(lambda x: ())]}, r"stages\.0 gives a tuple of 0: give one tensor \(B, \.\.\.\)"),
        ({"stages": [Slices(9)]}, r"stages\.0 gives a tuple of 9: .*1 to 8"),
        ({"stages": [Gives(lambda x: (x, None))]}, r"stages\.0 gives a tuple whose item 1 is a NoneType"),
        ({"stages": [Gives(lambda x: (x, (x, x)))]}, r"item 1 is a tuple"),
        ({"stages": [Gives(lambda x: (x, x.sum()))]}, r"item 1 has shape \(\) for one image"),
        ({"stages": [Gives(lambda x: (x.repeat(2, 1, 1, 1), x))]}, r"item 0 has shape \(2, 1, 8, 8\)"),
        ({"stages": [Gives(lambda x: (x, x.reshape(1, -1)))]},
            r"item 1 has shape \(1, 128\) for two images, not \(2, 64\): each must be a tensor"),
        ({"stages": [Gives(lambda x: (x, x.long()))]}, r"item 1 holds 64 values of torch\.int64"),
        ({"stages": [Gives(lambda x: (x, x[:, :0]))]}, r"item 1 holds 0 values"),
        ({"stages": [Gives(lambda x: {"main": x})]}, r"stages\.0 must turn .* a tuple of 1 to 8.*a dict"),
        ({"exits": {0: Gives(lambda x: x)}, "stages": [nn.Flatten()]}, r"exits\.0 gives \(64,\)"),
        ({"tails": {0: Gives(lambda x: (x, x))}, "stages": [nn.Linear(8, 4)], "exits": {0: Sum(32)}},
            r"tails\.0 gives 2 tensors .*: give the logits \(B, classes\) alone"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        SplitModel.from_parts(**parts(**changes))


def test_eight_tensors_meet() -> None:
    widths = [5] * 7 + [29]
    made = model(stages=[Slices(8)], exits={0: Sum(*widths)}, tails={0: Sum(*widths)})
    assert made.features(0) == 64
    x = torch.rand(2, 1, 8, 8)
    assert torch.equal(made.stage(0)(x), x.flatten(1))
    (only,) = fold_tail(made.tail(0), (64,))
    assert np.allclose(only(x.flatten(1).double().numpy()), made(x)[1].detach().numpy(), atol=1e-6)


# -- tracing -----------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [Meeting, Deeper])
def test_folded_layers_equal_torch(tail: type[nn.Module]) -> None:
    module = model(tails={0: tail()}).tails["0"]
    layers = fold_tail(module, (MAIN, SKIP))
    names = [layer.name for layer in layers]
    assert names[0] in ("conv", "main")  # as the owner knows them
    x = torch.randn(6, FEATURES, dtype=torch.float64)
    main, skip = x[:, :12].reshape(-1, *MAIN), x[:, 12:].reshape(-1, *SKIP)
    want = module.double().eval()(main, skip).detach().numpy()
    assert np.allclose(outputs(layers, x.numpy())[-1], want, atol=1e-9)
    # Positive control: the same values in the other order are another activation.
    turned = torch.cat([x[:, 12:], x[:, :12]], 1).numpy()
    assert not np.allclose(outputs(layers, turned)[-1], want, atol=1e-2)


class _Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.a(x)
        return h * h + self.b(y)


def test_a_module_that_is_traced_already_is_a_tail() -> None:
    module = _Product()
    again = fx.symbolic_trace(module)
    one, two = fold_tail(module, [(5,), (6,)]), fold_tail(again, [(5,), (6,)])
    x = np.random.default_rng(0).normal(size=(3, 11))
    assert np.allclose(outputs(one, x)[-1], outputs(two, x)[-1])


class _SameSize(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.act, self.fc = Square(), nn.Linear(64, 4)

    def forward(self, *x: Tensor) -> Tensor:
        left, right = x if len(x) == 2 else (x[0][:, :2], x[0][:, 2:])
        rows = left.shape[0]  # asked for the number of images, as people do
        h = self.act(self.a(left)) + self.b(right)
        return self.fc(h.reshape(rows, -1))  # type: ignore[no-any-return]


def test_images_of_one_size_are_laid_out_as_one_image() -> None:
    """They cost what their channels beside each other cost in one tensor."""
    tail, values = _SameSize(), np.random.default_rng(0).normal(size=(30, 80))
    layers, joined = fold_tail(tail, [(2, 4, 4), (3, 4, 4)]), fold_tail(tail, (5, 4, 4))
    assert isinstance(layers[0], Affine)
    assert isinstance(joined[0], Affine)
    assert layers[0].shapes == joined[0].shapes == ((5, 4, 4), (4, 4, 4))
    one, two = compile_tail(layers, values), compile_tail(joined, values)
    assert one.spec.program_id == two.spec.program_id
    found = fold_tail(model().tail(0), (FEATURES,))
    assert isinstance(found[0], Affine)
    assert found[0].shapes is not None
    assert found[0].shapes[0] == (FEATURES,)  # of two sizes: no image


def test_inputs_of_a_tail_are_counted_and_bounded() -> None:
    with pytest.raises(
        ModelError, match=r"a tail takes 2 inputs \(main, skip\), but the cut gives 3 tensors"
    ):
        fold_tail(Meeting(), [MAIN, SKIP, SKIP])
    with pytest.raises(ModelError, match="9 tensors at one place: 1 to 8"):
        fold_tail(Sum(*[3] * 9), [(3,)] * 9)
    with pytest.raises(ModelError, match=r"takes one input.*takes main, skip: let the stage.*tuple"):
        fold_tail(Meeting(), (FEATURES,))
    with pytest.raises(ModelError, match="takes 20000 values"):
        fold_tail(Sum(10_000, 10_000), [(10_000,), (10_000,)])


def test_a_flat_piece_keeps_modes_and_weights() -> None:
    tail = Deeper().train()
    piece = Flat(tail, several([MAIN, SKIP]))
    assert piece.training
    assert dict(piece.named_parameters()).keys() == dict(tail.named_parameters()).keys()
    piece.eval()
    assert not tail.training
    assert not tail.cube.training
    copied = copy.deepcopy(piece)
    with torch.no_grad():
        tail.weight.add_(1.0)
    x = torch.rand(2, FEATURES)
    assert not torch.allclose(copied(x), piece(x))
    assert copied.double()(x.double()).dtype == torch.float64


class _Names(nn.Module):
    """Layers by the names of what a flat piece is made with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.given, self.joins = nn.Linear(5, 4), nn.Linear(6, 4), nn.Sequential(nn.Linear(4, 3))
        self.table = torch.linspace(-1, 1, 4)  # a plain tensor

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.inner(x) * self.table
        return self.joins(h * h + self.given(y))  # type: ignore[no-any-return]


def test_any_name_may_be_a_layers() -> None:
    tail, x = _Names(), torch.randn(3, 11)
    layers = fold_tail(tail, [(5,), (6,)])
    want = tail(x[:, :5], x[:, 5:]).detach().numpy()
    assert np.allclose(outputs(layers, x.double().numpy())[-1], want, atol=1e-5)
    assert layers[0].name == "inner+mul"
    assert {f.layer for f in lint(tail, [(5,), (6,)]).findings} >= {"inner", "given", "joins.0"}


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x += self.fc(y)
        return x * x


def test_a_tail_may_write_over_what_it_is_given() -> None:
    (first, _, last), x = fold_tail(_InPlace(), [(5,), (6,)]), np.ones((1, 11))
    assert (first.name, last(first(x) ** 2).shape) == ("fc+iadd", (1, 5))


class _ByKeyword(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return x + y


def test_inputs_by_keyword_are_named() -> None:
    with pytest.raises(ModelError, match=r"a tail takes 1 input \(x\) and y by keyword, but the cut"):
        fold_tail(_ByKeyword(), [(5,), (5,)])


# -- compiled ----------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [Meeting, Deeper])
def test_answers_on_ciphertexts_are_pytorchs(tail: type[nn.Module], tmp_path: Path) -> None:
    made = model(tails={0: tail()})
    edge, cloud = pack(made, pixels(80), **PACKED)
    edge.save(tmp_path / "edge.bt")
    cloud.save(tmp_path / "cloud.bt")
    program = CloudBundle.open(tmp_path / "cloud.bt").programs[0]
    assert program.depth == (3 if tail is Meeting else 6)
    images = pixels(3, seed=1)
    want, bounds = made.logits(images)[-1].double().numpy(), program.error_bounds()[0]
    rows = held_activations(EdgeBundle.open(tmp_path / "edge.bt"), images, 0)
    assert (np.abs(ClearEvaluator(program, 0).logits(rows) - want) <= bounds).all()
    client = Client.of(program, "auto")
    (backend,) = client.loaded

    def answer(row: Any) -> Any:
        return client.decryptor.decrypt(client.evaluate(backend, client.encryptor.encrypt(row)))

    for row, logits in zip(rows, want, strict=True):
        assert (np.abs(answer(row) - logits) <= bounds).all()
    # Positive control: main and skip in the other order.
    assert (np.abs(answer(np.concatenate([rows[0][12:], rows[0][:12]])) - want[0]) > bounds).any()


def test_graphs_take_and_give_flat_activations() -> None:
    made = model(
        stages=[Branches(), Sum(12, 32, outputs=6)],
        exits={0: Sum(12, 32), 1: nn.Linear(6, 4)},
        tails={0: Meeting()},
    )
    graphs = export_head(made)
    assert graphs == export_head(made)
    x = np.random.default_rng(0).standard_normal((1, 1, 8, 8)).astype(np.float32)

    def run(name: str, value: Any) -> Any:
        session = ort.InferenceSession(graphs[name], providers=["CPUExecutionProvider"])
        (given,) = session.get_inputs()
        assert given.shape == list(value.shape)
        return session.run(["output"], {"input": value})[0]

    with torch.no_grad():
        both = made.head(torch.from_numpy(x), 0)
        row, last = run("stage0", x), made.stages[1](*both)
        np.testing.assert_allclose(row, flat(both).numpy(), atol=1e-6)
        np.testing.assert_allclose(run("exit0", row), made.exits["0"](*both).numpy(), atol=1e-6)
        np.testing.assert_allclose(run("stage1", row), last.numpy(), atol=1e-6)
        np.testing.assert_allclose(run("exit1", last.numpy()), made.exits["1"](last).numpy(), atol=1e-6)


def test_the_edge_runs_stages_and_exits_as_always() -> None:
    made, images = model(), pixels(2)
    head = HeadExecutor(pack(made, pixels(40), **PACKED)[0])
    head.warm_up()
    for image, logits in zip(images, made.logits(images)[0].numpy(), strict=True):
        row = head.run_stage(0, head.prepare(image))
        assert row.shape == (1, FEATURES)
        np.testing.assert_allclose(head.run_exit(0, row), logits, atol=1e-5)


# -- refreshed, lint ----------------------------------------------------------------------


def test_a_refreshed_tail_joins_a_skip_later() -> None:
    made = model(tails={0: Relus()})
    values = activations(made, pixels(60), 0)
    tail = refresh_tail(made.tail(0), (FEATURES,), values, Refresh())
    assert len(tail.programs) == 3
    known = {"x0": values[:4]}
    for k, program in enumerate(tail.programs):
        known[f"y{k}"] = ClearEvaluator(program, 0).logits(known[f"x{k}"])
        if k < len(tail.interludes):
            session = ort.InferenceSession(tail.interludes[k].onnx, providers=["CPUExecutionProvider"])
            known[f"x{k + 1}"] = np.concatenate(
                [
                    session.run(
                        None, {n: known[n][i : i + 1].astype(np.float32) for n in tail.interludes[k].inputs}
                    )[0]
                    for i in range(4)
                ]
            ).astype(np.float64)
    want = made.logits(pixels(60))[-1][:4].double().numpy()
    bounds = tail.programs[-1].error_bounds()[0]
    assert np.abs(known["y2"] - want).max() < 20 * bounds.max()


def test_images_of_one_size_fold_locally() -> None:
    tail = Flat(_SameSizeRelu().eval(), several([(2, 8, 8), (3, 8, 8)]))
    first = split_tail(tail, (320,))[0].layers[0]
    assert isinstance(first, Affine)
    assert first.shapes == ((5, 8, 8), (4, 8, 8))


class _SameSizeRelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(3, 4, 1), nn.Linear(256, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(torch.relu(self.a(x) + self.b(y)).flatten(1))  # type: ignore[no-any-return]


def test_lint_costs_the_cut_where_tensors_meet() -> None:
    made = model()
    whole = nn.Sequential(made.stage(0), made.tail(0))
    cut = lint(whole, (1, 8, 8), cut="0").cut("0")
    program = pack(made, pixels(60), **PACKED)[1].programs[0]
    assert (cut.shape, cut.verdict, cut.depth) == ((FEATURES,), "runs", program.depth)
    assert cut.plan is not None
    assert (cut.plan.uplink_bytes, cut.plan.key_bytes) == (program.spec.uplink_bytes, program.spec.key_bytes)


def test_a_network_of_several_inputs_is_linted_as_a_tail() -> None:
    tail, values = model().tails["0"], np.random.default_rng(0).normal(size=(20, FEATURES))
    report = lint(tail, [MAIN, SKIP], values)
    assert report.whole is not None
    assert (report.whole.values, report.whole.depth, report.whole.verdict) == (FEATURES, 3, "runs")
    assert "conv" in {finding.layer for finding in report.findings}
    row = torch.from_numpy(values[:2]).float()
    parted = [row[:, :12].reshape(-1, *MAIN), row[:, 12:].reshape(-1, *SKIP)]
    want = tail(*parted)
    assert torch.allclose(rewritten_tail(tail, [MAIN, SKIP], "input")(row), want, atol=1e-5)
    for after in ("input", "add"):
        head, rest = split(tail, [MAIN, SKIP], after)
        given = head(*parted)
        assert torch.allclose(rest(*(given if after == "input" else (given,))), want, atol=1e-5)
    refreshed = lint_refreshed(Relus(), [MAIN, SKIP], cut="input")[0].costs
    assert refreshed is not None
    assert refreshed.round_trips == 3
    with pytest.raises(ModelError, match="calibration data has shape"):
        lint(tail, [MAIN, SKIP], values[:, :-1])
