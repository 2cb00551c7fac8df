"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# First of all: it switches off ONNX Runtime's reports to its maker, which some tests load by themselves.
import blindtail  # noqa: F401


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other longer than they compute."""
    import torch

    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)
