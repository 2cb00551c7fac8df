"""What holds for all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

# First of all: it switches off ONNX Runtime's reports to its maker, which some tests load by themselves.
import blindtail  # noqa: F401

#: What starts servers, clusters and processes of its own, and looks at the clock: one after the other.
_ALONE = ("integration", "e2e")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With two workers (`-n 2 --dist loadgroup`): one for all that must not run at the same time, and
    the others file by file, so that the fixtures of a module are made once."""
    # Demos last, when the other worker has ended: they follow the clock most of all.
    items.sort(key=lambda item: (item.path.parent.name == "e2e", item.path.name == "test_commands.py"))
    for item in items:
        folder, file = item.path.parent.name, item.path.name
        group = "alone" if folder in _ALONE else f"{folder}/{file}"
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Small tensors: threads would wait for each other longer than they compute."""
    import torch

    held = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(held)
