"""Versions of one toy model: some whose edges cannot be told apart, one that differs."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blindtail.bundle import CloudBundle
from blindtail.he.compiler import compile_tail
from blindtail.he.dataflow import finish
from blindtail.he.layers import Affine
from blindtail.he.operations import MapOp
from blindtail.he.program import Program
from cloud.catalogue import Version
from tests.cloud_cases import activation, expected, program

#: How much each compatible version adds to every logit of version "1".
SHIFT = 0.25


@functools.cache
def retrained(version: str) -> Program:
    """Other weights, the same for an edge: version "3" gives the logits of "1" and 2 * SHIFT."""
    base = program()
    by = SHIFT * (int(version) - 1)
    *others, last = base.ops
    assert isinstance(last, MapOp)
    ops = (*others, replace(last, bias=last.bias + by))
    return Program(finish(ops, base.spec), ops)


@functools.cache
def other_shape() -> Program:
    """A tail without a hidden layer: other keys, other levels."""
    rng = np.random.default_rng(5)
    layer = Affine(rng.normal(size=(4, 16)) / 4, np.zeros(4), "only")
    return compile_tail((layer,), rng.uniform(0, 1, (20, 16)))


def bundle_of(version: str, *, model: str = "toy") -> CloudBundle:
    """Versions "1", "2", ... are compatible; "other" is not."""
    made = other_shape() if version == "other" else retrained(version)
    return CloudBundle(model, version, {0: made})


def version_of(version: str, *, model: str = "toy") -> Version:
    return Version.of(bundle_of(version, model=model), "clear")


def file_of(folder: Path, version: str, *, model: str = "toy") -> Path:
    path = folder / f"{model}-{version}.bt"
    bundle_of(version, model=model).save(path)
    return path


def logits_of(version: str, seed: int = 0) -> NDArray[np.float64]:
    return expected(activation(seed)) + SHIFT * (int(version) - 1)
