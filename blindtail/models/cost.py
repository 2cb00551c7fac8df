"""What a piece of network costs at the edge: multiply-accumulates and bytes of parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blindtail.errors import ModelError
from blindtail.models.several import Form, form_of


def _macs(module: nn.Module, output: Tensor) -> int:
    """Multiply-accumulates of one dense or convolution layer for one image; others count 0.

    Batch norm folds into its neighbour when the graph is exported; pooling and
    activations do not multiply.
    """
    per_image = output[0].numel()
    if isinstance(module, nn.Linear):
        return per_image * module.in_features
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return per_image * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return per_image * (module.out_channels // module.groups) * math.prod(module.kernel_size)
    return 0


@torch.no_grad()
def trace_cost(module: nn.Module, given: Form, name: str) -> tuple[int, Form]:
    """Run one image of zeros, each (1, *shape), through `module` in evaluation mode; two as well for a tuple.

    Returns (macs, what it gives). Raises `ModelError` naming the layer that refuses its input.
    """
    total = 0
    inside: list[str] = []

    def before(path: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, __: Any) -> None:
            inside.append(path)

        return hook

    def after(child: nn.Module, _: Any, output: Any) -> None:
        nonlocal total
        inside.pop()
        if isinstance(output, Tensor):
            total += _macs(child, output)

    handles = []
    for path, child in module.named_modules():
        handles.append(child.register_forward_pre_hook(before(f"{name}.{path}" if path else name)))
        handles.append(child.register_forward_hook(after))
    modes = [(child, child.training) for child in module.modules()]
    module.eval()
    try:
        output = module(*given.zeros())
        macs = total
        pair = None if isinstance(output, Tensor) else module(*given.zeros(2))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        where = inside[-1] if inside else name
        reason = str(error).strip().splitlines()[0]
        shapes = given.told() if given.several else given.shape
        raise ModelError(f"layer {where} refuses its input; {name} is given {shapes}: {reason}") from error
    finally:
        for handle in handles:
            handle.remove()
        for child, mode in modes:
            child.training = mode
    return macs, form_of(output, pair, name)


def count_bytes(module: nn.Module) -> int:
    """Bytes of all parameters and floating-point buffers, as float32."""
    tensors = [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]
    return 4 * sum(t.numel() for t in tensors)
