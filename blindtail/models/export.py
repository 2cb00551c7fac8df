"""One ONNX graph per stage and exit: batch of one, static shapes, deterministic bytes."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import onnx
import torch
from torch import nn

from blindtail.errors import ModelError
from blindtail.models.split import SplitModel

OPSET = 17


def export_graph(module: nn.Module, input_shape: tuple[int, ...], name: str) -> bytes:
    """`module` in evaluation mode as ONNX: float32 "input" (1, *input_shape) -> "output".

    The same module gives the same bytes. Raises `ModelError` when a layer has no
    ONNX form.
    """
    return _export(module, [("input", input_shape)], name)


def export_values(module: nn.Module, values: Sequence[tuple[str, int]], name: str) -> bytes:
    """`module` as ONNX, taking the flat values of these names and widths: float32 (1, width) each."""
    return _export(module, [(value, (width,)) for value, width in values], name)


def _export(module: nn.Module, inputs: Sequence[tuple[str, tuple[int, ...]]], name: str) -> bytes:
    module = copy.deepcopy(module).float().eval()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with tempfile.TemporaryDirectory(prefix="blindtail-onnx-") as folder:
        path = Path(folder) / "graph.onnx"
        try:
            logger.setLevel(logging.ERROR)
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")  # the exporter's own deprecation notices
                torch.onnx.export(
                    module,
                    tuple(torch.zeros(1, *shape) for _, shape in inputs),
                    path,
                    input_names=[given for given, _ in inputs],
                    output_names=["output"],
                    opset_version=OPSET,
                    do_constant_folding=True,
                    dynamo=False,
                )
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{name} cannot be exported to ONNX: {reason}. Use layers that ONNX knows"
            ) from error
        finally:
            logger.setLevel(level)
        content = path.read_bytes()
    graph = onnx.load_from_string(content)
    graph.graph.name = name
    graph.doc_string = ""
    for node in graph.graph.node:
        node.doc_string = ""  # source lines and paths of the machine that exported
        del node.metadata_props[:]
    onnx.checker.check_model(graph)
    return bytes(graph.SerializeToString(deterministic=True))


def export_head(model: SplitModel) -> dict[str, bytes]:
    """Graphs "stage0", "stage1", ... and "exit0", ... (by index of the exit).

    Each takes and gives one tensor: after a stage that gives several, the flat activation (1, features).
    """
    graphs: dict[str, bytes] = {}
    shape: tuple[int, ...] = model.preprocessing.input_shape
    for i, info in enumerate(model.stage_infos):
        graphs[f"stage{i}"] = export_graph(model.stage(i), shape, f"stage{i}")
        shape = info.output_shape
    for index, after in enumerate(model.exits_after):
        shape = model.stage_infos[after].output_shape
        graphs[f"exit{index}"] = export_graph(model.exit(after), shape, f"exit{index}")
    return graphs
