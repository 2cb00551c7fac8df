"""Interludes carry no weights: graphs of activations pass, whatever else is planted is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from blindtail import archive
from blindtail.bundle import EdgeBundle
from blindtail.errors import BundleError, ModelError
from blindtail.interludes import check_weight_free
from blindtail.models.export import export_values
from edge.interludes import Interludes, largest_input
from tests.refresh_cases import TRIPS, packed, saved


class Of(nn.Module):
    """An interlude on (1, 2, 4, 4)."""

    def __init__(self, made: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.made = made

    def forward(self, y: Tensor) -> Tensor:
        return self.made(y.reshape(-1, 2, 4, 4)).flatten(1)


HARMLESS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "clamp": lambda x: x.clamp(-1.5, 6.0),
    "gelu": F.gelu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "softmax": lambda x: x.softmax(1),
    "max pooling": lambda x: F.max_pool2d(F.relu(x), 3, 2, 1),
    "norm": lambda x: F.layer_norm(x, (4, 4)),
    "strided and padded": lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 1)),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_graphs_of_activations_pass(name: str) -> None:
    check_weight_free(name, export_values(Of(HARMLESS[name]), [("y0", 32)], name))


class Weighing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8))

    def forward(self, y: Tensor) -> Tensor:
        return y @ self.weight.T


def test_a_layer_with_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="weights of a tail stay in the cloud"):
        check_weight_free("planted", export_values(Weighing(), [("y0", 8)], "planted"))


def _model(*nodes: onnx.NodeProto, initializers: tuple[onnx.TensorProto, ...] = ()) -> bytes:
    y = helper.make_tensor_value_info("y0", TensorProto.FLOAT, [1, 8])
    out = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1, 8])
    body = nodes or (helper.make_node("Relu", ["y0"], ["output"]),)
    graph = helper.make_graph(list(body), "g", [y], [out], list(initializers))
    return bytes(helper.make_model(graph).SerializeToString())


WEIGHTS = np.random.default_rng(0).normal(size=40).astype(np.float32)
_RELU = helper.make_node("Relu", ["y0"], ["output"])


def _constant(**attributes: object) -> bytes:
    return _model(helper.make_node("Constant", [], ["c"], **attributes), _RELU)


def _hidden(field: Callable[[onnx.TensorProto], None]) -> bytes:
    """A tensor that says it is one number, and holds more."""
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=[])
    field(tensor)
    return _model(initializers=(tensor,))


def _branch() -> bytes:
    inner = helper.make_graph(
        [helper.make_node("Relu", ["y0"], ["o"])], "then", [], [], [numpy_helper.from_array(WEIGHTS, "w")]
    )
    return _model(helper.make_node("If", ["y0"], ["output"], then_branch=inner, else_branch=inner))


PLANTED = {
    "initializer": _model(initializers=(numpy_helper.from_array(WEIGHTS, "w"),)),
    "bytes": _model(initializers=(numpy_helper.from_array(WEIGHTS.view(np.int32), "w"),)),
    "many scalars": _model(
        initializers=tuple(numpy_helper.from_array(w, f"w{i}") for i, w in enumerate([*WEIGHTS, *WEIGHTS]))
    ),
    "constant": _constant(value=numpy_helper.from_array(WEIGHTS)),
    "floats": _constant(value_floats=[float(w) for w in WEIGHTS]),
    "ints": _constant(value_ints=[int(1e6 * w) for w in WEIGHTS]),
    "text": _constant(value_string=WEIGHTS.tobytes() * 3),
    "branch": _branch(),
    "nearly equal": _model(
        initializers=(numpy_helper.from_array(np.r_[np.ones(39), 2].astype(np.float32), "w"),)
    ),
    "raw": _hidden(lambda t: setattr(t, "raw_data", WEIGHTS.tobytes())),
    "unpacked": _hidden(lambda t: t.float_data.extend(WEIGHTS.tolist())),
    "documentation": _hidden(lambda t: setattr(t, "doc_string", WEIGHTS.tobytes().hex() * 3)),
    "bytes for a number": _constant(value_float=1.0).replace(
        b"\x15" + np.float32(1.0).tobytes(), b"\x12\x03abc"
    ),
    "texts": _model(
        *(helper.make_node("Relu", ["y0"], ["output"], doc_string="w" * 250) for _ in range(200))
    ),
    "strings": _constant(value_strings=[WEIGHTS.tobytes()] * 300),
    "axes": _hidden(lambda t: t.dims.extend([0, *(int(1e6 * abs(w)) for w in WEIGHTS)])),
    "sparse": _model(
        helper.make_node(
            "Constant",
            [],
            ["c"],
            sparse_value=helper.make_sparse_tensor(
                numpy_helper.from_array(WEIGHTS, "v"), numpy_helper.from_array(np.arange(40), "i"), [100]
            ),
        ),
        _RELU,
    ),
}


@pytest.mark.parametrize("way", PLANTED)
def test_planted_weights_are_refused(way: str) -> None:
    check_weight_free("clean", _model())
    with pytest.raises(ModelError):
        check_weight_free("planted", PLANTED[way])


_WITH_CONSTANTS = _model(
    helper.make_node("Constant", [], ["c"], value_floats=[0.5]),
    helper.make_node("Clip", ["y0", "c", "top"], ["output"]),
    initializers=(numpy_helper.from_array(np.ones((1, 3, 1), np.float32), "top"),),
)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_no_bytes_break_the_check(junk: bytes, at: int, byte: int) -> None:
    check_weight_free("whole", _WITH_CONSTANTS)
    for data in (junk, _flipped(_WITH_CONSTANTS, at, byte), _WITH_CONSTANTS[:at]):
        with suppress(ModelError):
            check_weight_free("junk", data)


@pytest.mark.parametrize("dims", [(1 << 33,), (1 << 40,), (1 << 62,), (1 << 62, 1 << 62)])
def test_a_shape_larger_than_its_content_is_refused_and_not_allocated(dims: tuple[int, ...]) -> None:
    content = np.float32(0.5).tobytes()
    tensor = TensorProto(name="c", data_type=TensorProto.FLOAT, dims=dims, raw_data=content)
    with pytest.raises(ModelError, match="weights of a tail stay in the cloud"):
        check_weight_free("huge", _model(initializers=(tensor,)))


def _flipped(data: bytes, at: int, byte: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([byte]) + data[at + 1 :]


def test_a_bundle_whose_interlude_holds_weights_is_refused(tmp_path: Path) -> None:
    edge, _ = packed()
    graphs = {**edge.onnx, "interlude0.1": PLANTED["initializer"]}
    with pytest.raises(ModelError, match=r"interlude0\.1 holds a tensor of 40 numbers"):
        replace(edge, onnx=graphs)
    # And in a file whose hashes are all right.
    members = {f"{name}.onnx": data for name, data in graphs.items()}
    archive.write(
        tmp_path / "edge.bt", "blindtail-edge", edge.describe(), members, archive.REFRESH_FORMAT_VERSION
    )
    with pytest.raises(BundleError, match="weights of a tail stay in the cloud"):
        EdgeBundle.open(tmp_path / "edge.bt")


def test_a_graph_that_does_not_fit_its_tail_is_told(tmp_path: Path) -> None:
    edge, _ = packed()
    Interludes(edge)
    for wrong in (edge.onnx["interlude0.1"], _model(), b""):  # other widths, other inputs, none at all
        with pytest.raises(BundleError, match=r"interlude0\.0"):
            Interludes(replace(edge, onnx={**edge.onnx, "interlude0.0": wrong}))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -1e30])
def test_an_activation_that_cannot_be_encrypted_does_not_show(odd: float) -> None:
    edge, _ = packed()
    spec = edge.segments(0)[0]
    activation = np.linspace(-1, 1, spec.features)
    plain = Interludes(edge).begin(0, activation)
    assert not plain.strange
    np.testing.assert_array_equal(plain.input(0), activation)
    activation[3] = odd
    values = Interludes(edge).begin(0, activation)
    assert values.strange
    assert np.isfinite(values.input(0)).all()
    assert np.abs(values.input(0)).max() <= largest_input(spec)


def test_older_releases_do_not_take_a_segment_for_a_tail(tmp_path: Path) -> None:
    edge, _ = packed()
    members = {f"{name}.onnx": data for name, data in edge.onnx.items()}
    archive.write(tmp_path / "edge.bt", "blindtail-edge", edge.describe(), members)
    with pytest.raises(BundleError, match="format version 2"):
        EdgeBundle.open(tmp_path / "edge.bt")
    saved(tmp_path)
    assert b'"format_version":3' in (tmp_path / "edge.bt").read_bytes()


def test_the_edge_file_holds_no_weight_of_the_tail() -> None:
    edge, cloud = packed()
    blobs = [data for name, data in edge.onnx.items() if name.startswith("interlude")]
    text = str(edge.describe()).encode()
    assert len(blobs) == TRIPS - 1
    weights = [op.weight.ravel() for p in cloud.segments(0) for op in p.ops if hasattr(op, "weight")]
    forms = [w[np.abs(w) > 1e-3][:50].astype(t) for w in weights for t in ("<f4", "<f8")]
    for form in forms:
        for value in form:
            assert not any(value.tobytes() in blob for blob in blobs)
            assert repr(float(value)).encode() not in text
    # The exit's weights are there, and would be found.
    assert any(len(t.raw_data) > 100 for t in onnx.load_from_string(edge.onnx["exit0"]).graph.initializer)


# -- at the edge -------------------------------------------------------------------------


def test_values_that_do_not_open_are_replaced_and_remembered() -> None:
    edge, _ = packed()
    specs = edge.segments(0)
    for odd in (np.nan, np.inf, 1e30):
        values = Interludes(edge).begin(0, np.zeros((1, 1, 8, 8), np.float32))
        opened = np.ones(specs[0].outputs)
        opened[3] = odd
        values.opened(0, opened)
        assert values.strange
        sent = values.input(1)
        assert sent.shape == (specs[1].features,)
        assert np.isfinite(sent).all()
        assert np.abs(sent).max() <= largest_input(specs[1])
    values = Interludes(edge).begin(0, np.zeros((1, 1, 8, 8), np.float32))
    values.opened(0, np.ones(specs[0].outputs))
    assert not values.strange
    np.testing.assert_allclose(values.input(1), 1.0)  # ReLU and max pooling of ones
