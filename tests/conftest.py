"""What holds for all tests."""

from __future__ import annotations

# First of all: it switches off ONNX Runtime's reports to its maker, which some tests load by themselves.
import blindtail  # noqa: F401
