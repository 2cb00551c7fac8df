"""The one training loop. Deterministic: the same recipe, data and thread count give the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from blindtail.errors import DataError, ModelError
from blindtail.models.data import Images
from blindtail.models.layers import Quadratic
from blindtail.models.split import SplitModel
from blindtail.train.recipe import Recipe

#: (steps done, steps in all, loss of the last step)
Progress = Callable[[int, int, float], None]


@contextmanager
def bounded(threads: int, seed: int) -> Iterator[None]:
    """Torch with `threads` threads and its own random state; both are restored afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, threads))
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(before)


def fit(
    recipe: Recipe,
    data: Images,
    *,
    model: SplitModel | None = None,
    threads: int = 1,
    progress: Progress | None = None,
    only_tails: bool = False,
    after_step: Callable[[], None] | None = None,
) -> SplitModel:
    """Train `recipe.build()`, or `model` when given (in place), and return it in evaluation mode.

    With `only_tails` stages and exits stay as they are, running statistics included.
    `after_step` is called after each step: masks of pruned weights are applied there.

    AdamW with a one-cycle schedule; after each step every `Quadratic` is
    projected back into what the compiler accepts. Raises `DataError` when there
    are fewer images than one batch, `ModelError` when the loss is not finite.
    """
    if len(data) < recipe.batch:
        raise DataError(f"training needs at least one batch of {recipe.batch} images, got {len(data)}")
    with bounded(threads, recipe.seed):
        if model is None:
            model = recipe.build()
        _loop(recipe, data, model, progress, only_tails, after_step)
    return model.eval()


def _loop(
    recipe: Recipe,
    data: Images,
    model: SplitModel,
    progress: Progress | None,
    only_tails: bool,
    after_step: Callable[[], None] | None,
) -> None:
    images = torch.from_numpy(model.preprocessing.apply(data.pixels))  # (n, C, H, W)
    labels = torch.from_numpy(data.labels)
    per_epoch = len(labels) // recipe.batch
    steps = recipe.epochs * per_epoch
    generator = torch.Generator().manual_seed(recipe.seed)
    trained: nn.Module = model.tails if only_tails else model
    for parameter in model.parameters():
        parameter.requires_grad_(not only_tails)
    for parameter in trained.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=recipe.peak_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.peak_rate, total_steps=steps, pct_start=recipe.warm_up
    )
    quadratics = [m for m in model.modules() if isinstance(m, Quadratic)]
    exits = len(model.exits_after)
    done = 0
    model.eval()
    trained.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(labels), generator=generator)
        for batch in order[: per_epoch * recipe.batch].view(per_epoch, recipe.batch):
            x = images[batch]
            if recipe.augment is not None:
                x = recipe.augment(x, generator)
            outputs = model(x)
            loss = recipe.objective(outputs[:exits], outputs[exits:], labels[batch])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(trained.parameters(), recipe.clip_norm)
            optimizer.step()
            schedule.step()
            for activation in quadratics:
                activation.project_()
            if after_step is not None:
                after_step()
            done += 1
            if done % 50 == 0 or done == steps:
                value = float(loss.detach())
                if value != value or value in (float("inf"), float("-inf")):
                    raise ModelError(
                        f"training diverged at step {done} of {steps}: lower the recipe's peak_rate "
                        "or its clip_norm"
                    )
                if progress is not None:
                    progress(done, steps, value)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
