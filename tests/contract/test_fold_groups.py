"""Wide groups, few keys, gathered convolutions: real ciphertexts keep the bound for every choice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from bench.tails import random_layers
from blindtail.he.backends import open_evaluator
from blindtail.he.compiler import compile_tail
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Affine, Layer
from blindtail.he.native_backend import available
from blindtail.he.normal import normalised
from blindtail.he.operations import MapOp
from blindtail.he.secret import Decryptor, Encryptor, SecretKey
from blindtail.models.layers import Square

BACKENDS = ("seal", *(("native",) if available() else ()))


def _convolutional(stride: int, windows: int) -> list[Layer]:
    torch.manual_seed(0)
    convolution = nn.Conv2d(1, 4, 7, stride=stride)
    tail = nn.Sequential(convolution, Square(), nn.Flatten(), nn.Linear(4 * windows, 16))
    return fold_tail(tail, (1, 28, 28))


NETS = {
    "few keys": (random_layers((128, 64, 32, 10)), 1, 9_000_000),
    "wide groups": (random_layers((128, 64, 32, 10)), 1, 200_000_000),
    "a convolution": (_convolutional(3, 64), 1, None),
    "two images": (_convolutional(6, 16), 2, None),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETS)
def test_every_choice_keeps_its_bound(name: str, backend: str, tmp_path: Path) -> None:
    made, lanes, budget = NETS[name]
    assert isinstance(made[0], Affine)
    features = made[0].weight.shape[1]
    x = np.random.default_rng(3).uniform(0, 1, (40, features))
    compiled = compile_tail(made, x, lanes=lanes, key_budget_bytes=budget)
    maps = [op for op in compiled.ops if isinstance(op, MapOp)]
    widest = max(len(group) for op in maps for group in op.folds)
    assert (widest > 1) == (name != "few keys")
    assert (maps[0].stride > 1) == (name in ("a convolution", "two images"))
    secret = SecretKey.generate(compiled.spec, tmp_path / "keys")
    evaluator = open_evaluator(backend, compiled)
    evaluator.prepare_keys(tmp_path / "keys", tmp_path / "prepared")
    keys = evaluator.load_keys(tmp_path / "prepared")
    encryptor, decryptor = Encryptor(compiled.spec, secret), Decryptor(compiled.spec, secret)
    of_bound = []
    for batch in x[: 4 * lanes].reshape(4, lanes, features):
        request = encryptor.encrypt(batch if lanes > 1 else batch[0])
        got = np.atleast_2d(decryptor.decrypt(evaluator.evaluate(keys, request)))
        want = normalised(made)(batch)
        of_bound.append((np.abs(got - want) / compiled.error_bounds()).ravel())
    assert np.concatenate(of_bound).max() <= 1
    assert 1 / np.median(np.concatenate(of_bound)) <= 32
