"""ONNX graphs give what torch gives, and the same bytes every time."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from blindtail.errors import ModelError
from blindtail.models.export import export_graph, export_head
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets


def trained_looking(model: SplitModel) -> SplitModel:
    """Batch norm statistics that differ from their initial values."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model.eval()


def run(graph: bytes, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["output"], {"input": x})[0])


@pytest.mark.parametrize("build", [nets.fashion, nets.digits])
def test_graphs_equal_torch(build: type) -> None:
    model = trained_looking(build())
    graphs = export_head(model)
    assert sorted(graphs) == ["exit0", "exit1", "stage0", "stage1"]
    x = np.random.default_rng(0).standard_normal((1, *model.preprocessing.input_shape)).astype(np.float32)
    value, here = torch.from_numpy(x), x
    with torch.no_grad():
        for i, stage in enumerate(model.stages):
            value, here = stage(value), run(graphs[f"stage{i}"], here)
            assert here.shape == (1, *model.stage_infos[i].output_shape)
            np.testing.assert_allclose(here, value.numpy(), atol=1e-5, rtol=0)
            logits = model.exits[str(i)](value).numpy()
            np.testing.assert_allclose(run(graphs[f"exit{i}"], here), logits, atol=1e-5, rtol=0)


def test_dropout_and_training_mode_do_not_reach_the_graph() -> None:
    module = nn.Sequential(nn.Dropout(0.9), nn.Linear(4, 3)).train()
    x = np.ones((1, 4), np.float32)
    wanted = module[1](torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(run(export_graph(module, (4,), "small"), x), wanted, atol=1e-6)
    assert module.training


_SCRIPT = """
import hashlib, torch
from blindtail.models.export import export_head
from blindtail.models.zoo.nets import digits
torch.manual_seed(3)
print(hashlib.sha256(b"".join(v for _, v in sorted(export_head(digits()).items()))).hexdigest())
"""


@pytest.mark.timeout(120)
def test_bytes_are_the_same_in_another_process() -> None:
    def run(_: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", _SCRIPT], capture_output=True, text=True, timeout=60, check=True
        )

    with ThreadPoolExecutor(2) as both:
        runs = list(both.map(run, range(2)))
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.strip()) == 64
    assert runs[0].stderr == ""  # the exporter stays quiet


def test_what_onnx_does_not_know_is_refused() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(x.view(2, 2)).view(1, 2)

    with pytest.raises(ModelError, match="odd cannot be exported"):
        export_graph(Odd(), (4,), "odd")
