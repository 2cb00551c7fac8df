"""Batches for tests of losses, with logits by seed."""

from __future__ import annotations

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from blindtail.models.several import flat
from blindtail.models.split import SplitModel
from blindtail.models.zoo import nets
from blindtail.train.phases import Batch, Moment

IMAGES, CLASSES = 7, 5
LABELS = torch.arange(IMAGES) % CLASSES
MODEL = nets.digits()
seeds = st.integers(0, 10_000)
some = settings(max_examples=25, deadline=None)


def random(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def at(epoch: int = 0, epochs: int = 200, steps_per_epoch: int = 1) -> Moment:
    return Moment(epoch * steps_per_epoch, epochs * steps_per_epoch, epoch, epochs)


def batch(
    seed: int = 0,
    exits: int = 2,
    tails: int = 1,
    *,
    teacher: Batch | None = None,
    moment: Moment | None = None,
) -> Batch:
    """Random logits that ask for gradients; no network has been run for them."""
    logits = [random(seed * 10 + i, IMAGES, CLASSES).requires_grad_() for i in range(exits + tails)]
    images = torch.zeros(IMAGES, 1, 8, 8)
    return Batch(images, LABELS, logits[:exits], logits[exits:], {}, MODEL, moment or at(), teacher)


def taught(seed: int = 0, *, moment: Moment | None = None) -> Batch:
    return batch(seed, teacher=batch(seed + 1, moment=moment), moment=moment)


def through(model: SplitModel, images: Tensor, teacher: Batch | None = None) -> Batch:
    """A real pass through a network."""
    outputs = model(images)
    count = len(model.exits_after)
    cuts = {cut: model.head(images, cut) for cut in model.cuts}
    tensors = {cut: x if isinstance(x, Tensor) else flat(x) for cut, x in cuts.items()}
    labels = torch.zeros(len(images), dtype=torch.int64)
    return Batch(images, labels, outputs[:count], outputs[count:], tensors, model, at(), teacher)


def gradient(loss: Tensor, by: Tensor) -> Tensor:
    found = torch.autograd.grad(loss, by, allow_unused=True, retain_graph=True)[0]
    return torch.zeros_like(by) if found is None else found
