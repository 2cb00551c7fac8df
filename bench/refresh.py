"""LeNet-5 as it is, ReLU and max pooling included: a refreshed tail end to end, one round trip a layer.

The whole network is the tail (weights by seed: costs and errors do not depend on training): a
real `blindtail cloud` process (its own Ray cluster, one evaluator) and an `EdgeRuntime` in
this process that offloads everything, over plaintext gRPC on loopback, without tickets. Errors
are those of logits against PyTorch's in float32. ResNet-20 and AlexNet's shape at full width besides, for
32 x 32 images: most of their values lie over several ciphertexts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bench.refresh_nets import alexnet, lenet5, lively, resnet20
from bench.rows import Row, row
from blindtail.bundle import EdgeBundle
from blindtail.models.pack import pack
from blindtail.models.refresh import Refresh
from blindtail.models.split import SplitModel
from blindtail.preprocessing import Preprocessing
from blindtail.records import Answer
from edge.interludes import Values
from edge.processes import Child
from edge.runtime import EdgeRuntime

#: Two processes share the machine: pinning them to one core would measure that.
PIN_CPU = False
SOURCES = ("bench/refresh.py", "blindtail/**/*.py", "edge/*.py", "cloud/*.py", "bench/refresh_nets.py")
STEPS = ("encrypt", "network", "queue", "eval", "decrypt", "interlude")
CALIBRATION, CLASSES = 256, 10
_START_S = 120.0


def rows(args: argparse.Namespace) -> list[Row]:
    """`args.quick`: fewer images, and LeNet-5 alone."""
    count = 10 if args.quick else 100
    made = _measured("LeNet-5", lenet5(), (1, 28, 28), count)
    if not args.quick:
        made += _measured("ResNet-20", resnet20(), (3, 32, 32), 20)
        made += _measured("AlexNet-shaped", alexnet(), (3, 32, 32), 20)
    return made


def _model(net: nn.Sequential, shape: tuple[int, int, int]) -> SplitModel:
    values = int(np.prod(shape))
    return SplitModel(
        "refresh",
        [nn.Identity()],
        {0: nn.Sequential(nn.Flatten(), nn.Linear(values, CLASSES))},
        {0: net},
        Preprocessing(shape, (0.5,) * shape[0], (0.25,) * shape[0]),
        [f"class {i}" for i in range(CLASSES)],
    ).eval()


def _measured(name: str, net: nn.Sequential, shape: tuple[int, int, int], count: int) -> list[Row]:
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    model = _model(lively(net), shape)  # type: ignore[arg-type]
    pixels = np.random.default_rng(0).integers(0, 256, (CALIBRATION + count, *shape), dtype=np.uint8)
    images = pixels[CALIBRATION:]
    edge, cloud = pack(
        model, pixels[:CALIBRATION], temperatures=(1.0,), thresholds=(0.9,), metrics={}, refresh=Refresh()
    )
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btbench-")))
        cloud.save(folder / "cloud.bt")
        command = ["blindtail", "cloud", str(folder / "cloud.bt"), "--evaluators", "1", "--port", "0"]
        command += ["--state-dir", str(folder / "cloud"), "--announce", str(folder / "cloud.json")]
        process = stack.enter_context(Child("cloud", command, folder / "cloud.log"))
        address = process.announcement(folder / "cloud.json", _START_S)["address"]
        answers, logits = _answers(edge, address, folder, images)
    with torch.no_grad():
        wanted = model.tails["0"](torch.from_numpy(model.preprocessing.apply(images))).double().numpy()
    predicted_s = sum(p.predicted_s("native") for p in cloud.segments(0))
    return _rows(name, edge, answers, np.abs(logits - wanted).max(), np.abs(wanted).max(), predicted_s)


def _answers(
    bundle: EdgeBundle, address: str, folder: Path, images: NDArray[np.uint8]
) -> tuple[list[Answer], NDArray[np.float64]]:
    """One answer of the tail for each image, after three to warm up, and the logits that it came from."""
    with EdgeRuntime.open(
        bundle,
        address,
        credentials="insecure-loopback",
        policy="cloud-only",
        state_dir=folder / "edge",
        tickets=0,
    ) as edge:
        if not edge.wait_ready(_START_S):
            raise RuntimeError(f"the tail was not ready: {edge.status().tails}")
        seen, begin = list[Values](), edge._interludes.begin

        def keep(cut: int, activation: NDArray[np.float32]) -> Values:
            seen.append(begin(cut, activation))
            return seen[-1]

        edge._interludes.begin = keep  # type: ignore[method-assign]
        answers = [edge.infer(image) for image in (*images[:3], *images)][3:]
    late = sum(a.route != "tail" for a in answers)
    if late:
        raise RuntimeError(f"{late} of {len(answers)} answers did not come from the tail")
    return answers, np.stack([values.logits for values in seen[3:]])


def _rows(
    name: str,
    edge: EdgeBundle,
    answers: Sequence[Answer],
    error: float,
    largest: float,
    predicted_s: float,
) -> list[Row]:
    specs, count = edge.segments(0), len(answers)
    n = specs[0].parameters.ring_degree
    eval_s = [a.timings.eval_s for a in answers]
    net = {
        "net": name,
        "backend": "native",
        "threads": 1,
        "eval_s": float(np.median(eval_s)),
        "uplink_bytes": answers[0].uplink_bytes,
        "key_bytes": specs[0].key_bytes,
        "reply_bytes": answers[0].reply_bytes,
        "max_abs_err": float(error),
    }
    total = [a.timings.total_s for a in answers]
    made = [_row(f"{name}, image in to answer out", total, f"N = {n}, one evaluator", **net)]
    made += [_row(f"{name}, {s}", [getattr(a.timings, f"{s}_s") for a in answers], "") for s in STEPS]
    made.append(row(f"{name}, eval predicted", predicted_s, "s", note="reference core, all segments"))
    made.append(row(f"{name}, round trips", len(specs), "1"))
    made.append(row(f"{name}, uplink of all", answers[0].uplink_bytes, "bytes", n=count))
    made.append(row(f"{name}, replies of all", answers[0].reply_bytes, "bytes", n=count))
    made.append(row(f"{name}, keys, uploaded once", specs[0].key_bytes, "bytes"))
    note = f"largest logit {largest:.3g}, random weights"
    made.append(row(f"{name}, max error of a logit", float(error), "1", n=count, note=note))
    return made


def _row(name: str, seconds: Sequence[float], note: str, **net: Any) -> Row:
    low, p50, p95 = np.percentile(seconds, [5, 50, 95])
    return row(f"{name}, p50", float(p50), "s", n=len(seconds), spread=float(p95 - low), note=note, **net)
