"""Both halves of one model in one place: what the model's owner has, and nobody else.

`blindtail verify` and the demo compare encrypted with clear answers, so they
open edge.bt and cloud.bt together. A device in the field has no cloud.bt.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import CloudBundle, EdgeBundle
from blindtail.errors import BundleError, InputError
from blindtail.he.compatible import differences, serving_as
from blindtail.he.layers import outputs
from blindtail.he.program import Program
from blindtail.he.recover import layers_of
from blindtail.he.spec import TailSpec
from edge.executor import HeadExecutor, softmax
from edge.interludes import Interludes

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class HeadOutputs:
    """What the head gives for n images, in the clear.

    exit_probabilities  (n, exits, classes), calibrated
    activations         (n, features) at the cut
    """

    exit_probabilities: Floats
    activations: Floats


@dataclass(frozen=True)
class ModelPair:
    """An edge.bt and its cloud.bt, and the cut that is looked at."""

    edge: EdgeBundle
    cloud: CloudBundle
    cut: int

    @classmethod
    def open(cls, edge_bt: Path, cloud_bt: Path, cut: int | None = None) -> ModelPair:
        """`cut`: stage index, default the last cut. Raises `BundleError` when the files do not fit.

        A cloud.bt of a later version fits when it was compiled for this edge.bt.
        """
        edge, cloud = EdgeBundle.open(edge_bt), CloudBundle.open(cloud_bt)
        if edge.model != cloud.model:
            raise BundleError(
                f"{edge_bt} is model {edge.model}, {cloud_bt} is model {cloud.model}: use files of one model"
            )
        if not edge.cuts:
            raise BundleError(f"{edge_bt} allows no cut: there is no encrypted tail to compare")
        cut = max(edge.cuts) if cut is None else cut
        if cut not in edge.cuts or cut not in cloud.programs:
            raise InputError(f"model {edge.model} has no cut {cut}; it has {sorted(edge.cuts)}")
        ours = cloud.programs[cut].spec
        same_version = edge.version == cloud.version
        if same_version and ours.program_id != edge.cuts[cut].program_id:
            raise BundleError(
                f"{edge_bt} and {cloud_bt} hold different tails under one version: build both files again"
            )
        later = [p.spec.program_id for p in cloud.following.get(cut, ())]
        known = [spec.program_id for spec in edge.segments(cut)[1:]]
        if differences(ours, edge.cuts[cut]) or later != known:
            raise BundleError(
                f"{edge_bt} is version {edge.version}, {cloud_bt} is version {cloud.version}, and neither "
                "was made for the other: use two files that were written together"
            )
        return cls(edge, cloud, cut)

    @property
    def spec(self) -> TailSpec:
        return self.edge.cuts[self.cut]

    @property
    def specs(self) -> tuple[TailSpec, ...]:
        """Of every round trip: several for a refreshed tail."""
        return self.edge.segments(self.cut)

    @property
    def program(self) -> Program:
        """The tail, or its first segment, under the id that this edge.bt knows."""
        return serving_as(self.cloud.programs[self.cut], self.spec)

    @property
    def programs(self) -> tuple[Program, ...]:
        """Of every round trip."""
        return (self.program, *self.cloud.following.get(self.cut, ()))

    def run_head(
        self, pixels: NDArray[Any], progress: Callable[[int], None] = lambda done: None
    ) -> HeadOutputs:
        """All stages and exits on images (n, C, H, W), one by one as the edge does."""
        head = HeadExecutor(self.edge)
        exit_after = {e.after_stage: (i, e) for i, e in enumerate(self.edge.exits)}
        probabilities = np.zeros((len(pixels), len(self.edge.exits), len(self.edge.class_names)))
        activations = np.zeros((len(pixels), self.spec.features))
        for n, image in enumerate(pixels):
            x = head.prepare(image)
            for stage in range(len(self.edge.stages)):
                x = head.run_stage(stage, x)
                if stage in exit_after:
                    i, e = exit_after[stage]
                    probabilities[n, i] = softmax(head.run_exit(i, x), e.temperature)
                if stage == self.cut:
                    activations[n] = x.reshape(-1)
            progress(n + 1)
        return HeadOutputs(probabilities, activations)

    def clear_tail(self, activations: Floats) -> Floats:
        """The tail's exact logits in the clear: (n, features) -> (n, classes)."""
        x = np.atleast_2d(np.asarray(activations, np.float64))
        if len(self.specs) == 1:
            return outputs(layers_of(self.program), x)[-1]
        interludes, rows = Interludes(self.edge), []
        tails = [layers_of(program) for program in self.programs]
        for row in x:
            values = interludes.begin(self.cut, row)
            for segment, layers in enumerate(tails):
                values.opened(segment, outputs(layers, values.input(segment)[None])[-1][0])
            rows.append(values.logits)
        return np.stack(rows)
