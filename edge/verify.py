"""`blindtail verify`: encrypted against clear answers on the owner's own images."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from blindtail.errors import ConfigError
from blindtail.he.program import Program
from blindtail.machine import machine, versions
from edge.stats import Floats, Ints, accuracy, auroc, quantiles, softmax, top_margin

if TYPE_CHECKING:
    from edge.pair import ModelPair

#: Called with (what is being done, done, total).
Progress = Callable[[str, int, int], None]


def register(app: typer.Typer) -> None:
    """Add the command `verify`."""
    app.command("verify", no_args_is_help=True)(verify_command)


def verify_command(
    edge_bt: Annotated[Path, typer.Argument(help="The edge's half.", metavar="EDGE.bt")],
    cloud_bt: Annotated[Path, typer.Argument(help="The cloud's half.", metavar="CLOUD.bt")],
    data: Annotated[
        str,
        typer.Option(
            "--data", help="A folder with a sub-folder of images for each class, or 'fashion' or 'digits'."
        ),
    ],
    split: Annotated[
        str, typer.Option("--split", help="Which part of a known data set: validation or test.")
    ] = "test",
    images: Annotated[
        int, typer.Option("--images", min=1, help="How many images, drawn evenly from the whole set.")
    ] = 200,
    cut: Annotated[
        int | None, typer.Option("--cut", help="Index of the stage after which to cut; default the last cut.")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            "--backend",
            help="native or seal (encrypted; auto: the first there is), or clear (checks the layout).",
        ),
    ] = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for report.json and report.html.")] = Path(
        "out/verify"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare encrypted with clear answers of one model on your own images.

    Runs the head in the clear, encrypts each activation, evaluates the tail on
    the ciphertext in this process, decrypts, and compares with the same tail in
    the clear. Needs both files, so it is the model owner's command. Keys live in
    a temporary folder and are deleted.

    The report says how often the labels agree, accuracy and AUROC of both,
    the largest error of a logit, and for every disagreement how far apart the two
    best classes were.

    \b
      blindtail verify edge.bt cloud.bt --data my-validation-images
      blindtail verify edge.bt cloud.bt --data fashion --images 500 --json
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    from edge.pages import verify_page, write_reports
    from edge.pair import ModelPair

    pair = ModelPair.open(edge_bt, cloud_bt, cut)
    pixels, labels = read_images(pair, data, split, images)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(step: str, done: int, total: int) -> None:
            if step not in tasks:
                tasks[step] = bars.add_task(step, total=total)
            bars.update(tasks[step], completed=done)

        report = verify(pair, pixels, labels, backend=backend, progress=progress)
    report["data"] = data
    write_reports(out, report, verify_page(report))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for line in summary_lines(report):
        typer.echo(line)
    typer.echo(f"report: {out / 'report.json'} and {out / 'report.html'}")


def read_images(pair: ModelPair, data: str, split: str, count: int) -> tuple[NDArray[Any], Ints]:
    """At most `count` images (n, C, H, W) in the model's dtype, and labels (n,), spread over the set."""
    from edge.images import read_set

    pixels, labels = read_set(pair.edge, data, split)
    if not 0 <= int(labels.max(initial=0)) < len(pair.edge.class_names):
        raise ConfigError(f"{data} has more classes than the model, which has {len(pair.edge.class_names)}")
    if count >= len(labels):
        return pixels, labels
    # Evenly spread: sets are often sorted by class.
    chosen = np.linspace(0, len(labels) - 1, count).round().astype(np.int64)
    return pixels[chosen], labels[chosen]


def verify(
    pair: ModelPair,
    pixels: NDArray[Any],
    labels: Ints,
    *,
    backend: str = "auto",
    progress: Progress = lambda step, done, total: None,
) -> dict[str, Any]:
    """The report as a dictionary. pixels (n, C, H, W), labels (n,)."""
    from blindtail.he.backends import settle

    backend = settle(backend)
    started_s = time.monotonic()
    n = len(labels)
    head = pair.run_head(pixels, lambda done: progress("head and exits", done, n))
    clear = pair.clear_tail(head.activations)
    if len(pair.specs) == 1:
        encrypted, seconds = evaluate_encrypted(pair.program, head.activations, backend, progress)
    else:
        encrypted, seconds = evaluate_refreshed(pair, head.activations, backend, progress)
    errors = np.abs(encrypted - clear).max(axis=1)
    clear_label, label = clear.argmax(axis=1), encrypted.argmax(axis=1)
    clear_margin, margin = top_margin(clear), top_margin(encrypted)
    classes = pair.edge.class_names
    disagreements = [
        {
            "image": int(i),
            "class": classes[labels[i]],
            "clear_class": classes[clear_label[i]],
            "encrypted_class": classes[label[i]],
            "clear_margin": float(clear_margin[i]),
            "encrypted_margin": float(margin[i]),
            "max_logit_error": float(errors[i]),
        }
        for i in np.flatnonzero(clear_label != label)
    ]
    exit_labels = head.exit_probabilities.argmax(axis=2)
    return {
        "model": pair.edge.model,
        "version": pair.edge.version,
        "cut": pair.cut,
        "backend": backend,
        "images": n,
        "agreement": float(np.mean(clear_label == label)),
        "disagreements": disagreements,
        "accuracy": {
            **{e.name: accuracy(exit_labels[:, i], labels) for i, e in enumerate(pair.edge.exits)},
            "tail_clear": accuracy(clear_label, labels),
            "tail_encrypted": accuracy(label, labels),
        },
        "auroc": {
            **{e.name: auroc(head.exit_probabilities[:, i], labels) for i, e in enumerate(pair.edge.exits)},
            "tail_clear": auroc(softmax(clear), labels),
            "tail_encrypted": auroc(softmax(encrypted), labels),
        },
        "logit_error": {
            "max": float(errors.max()),
            "mean": float(np.abs(encrypted - clear).mean()),
            "predicted_std": pair.specs[-1].predicted_noise,
            "smallest_clear_margin": float(clear_margin.min()),
        },
        "evaluation_s": quantiles(seconds),
        "round_trips": len(pair.specs),
        "uplink_bytes": sum(spec.uplink_bytes for spec in pair.specs),
        "reply_bytes": sum(spec.reply_bytes for spec in pair.specs),
        "key_bytes": pair.spec.key_bytes,
        "edge_budget": dict(pair.edge.edge_budget),
        "wall_s": time.monotonic() - started_s,
        "machine": machine(),
        "versions": versions(),
    }


def evaluate_encrypted(
    program: Program, activations: Floats, backend: str, progress: Progress
) -> tuple[Floats, list[float]]:
    """Encrypt, evaluate, decrypt each row of (n, features).

    Returns logits (n, classes) and the evaluator's seconds per ciphertext,
    container in to container out. Programs with several lanes take that many rows a
    ciphertext. Keys are made in a temporary folder that only this user can read.
    """
    from blindtail.he.backends import open_evaluator
    from blindtail.he.clear import ClearDecryptor, ClearEncryptor, write_clear_keys
    from blindtail.he.secret import Decryptor, Encryptor, SecretKey

    spec = program.spec
    evaluator = open_evaluator(backend, program)
    with tempfile.TemporaryDirectory(prefix="blindtail-verify-") as folder:
        sent, prepared = Path(folder) / "keys", Path(folder) / "prepared"
        encryptor: Encryptor | ClearEncryptor
        decryptor: Decryptor | ClearDecryptor
        if backend == "clear":
            encryptor, decryptor = ClearEncryptor(spec), ClearDecryptor(spec)
            write_clear_keys(spec, sent)
        else:
            secret = SecretKey.generate(spec, sent, lambda done, total: progress("keys", done, total))
            encryptor, decryptor = Encryptor(spec, secret), Decryptor(spec, secret)
        evaluator.prepare_keys(sent, prepared)
        keys = evaluator.load_keys(prepared)
        logits = np.zeros((len(activations), spec.outputs))
        seconds = []
        for start in range(0, len(activations), spec.lanes):
            rows = activations[start : start + spec.lanes]
            padded = np.zeros((spec.lanes, spec.features))
            padded[: len(rows)] = rows
            container = encryptor.encrypt(padded)
            began_s = time.perf_counter()
            reply = evaluator.evaluate(keys, container)
            seconds.append(time.perf_counter() - began_s)
            logits[start : start + len(rows)] = np.atleast_2d(decryptor.decrypt(reply))[: len(rows)]
            progress("encrypted tail", min(start + spec.lanes, len(activations)), len(activations))
    return logits, seconds


def evaluate_refreshed(
    pair: ModelPair, activations: Floats, backend: str, progress: Progress
) -> tuple[Floats, list[float]]:
    """As `evaluate_encrypted`, for a refreshed tail: all segments of each row, with what the edge does
    between them. Seconds are an evaluator's for all segments together."""
    from blindtail.he.backends import open_evaluator
    from edge.cipher import make_keys, open_cipher
    from edge.interludes import Interludes

    specs, programs, interludes = pair.specs, pair.programs, Interludes(pair.edge)
    kind = "clear" if backend == "clear" else "seal"
    logits, seconds = np.zeros((len(activations), len(pair.edge.class_names))), []
    with tempfile.TemporaryDirectory(prefix="blindtail-verify-") as folder:
        secret, sent, prepared = (Path(folder) / name for name in ("secret", "keys", "prepared"))
        make_keys(specs[0], secret, sent, kind, lambda done, total: progress("keys", done, total))
        cipher = open_cipher(specs[0], secret, kind, specs[1:])
        evaluators = [open_evaluator(backend, program) for program in programs]
        evaluators[0].prepare_keys(sent, prepared)
        keys = evaluators[0].load_keys(prepared)
        for i, row in enumerate(activations):
            values, spent = interludes.begin(pair.cut, row), 0.0
            for segment, evaluator in enumerate(evaluators):
                container = cipher.encrypt(values.input(segment), segment=segment)
                began_s = time.perf_counter()
                reply = evaluator.evaluate(keys, container)
                spent += time.perf_counter() - began_s
                values.opened(segment, cipher.decrypt(reply, segment=segment))
            logits[i] = values.logits
            seconds.append(spent)
            progress("encrypted tail", i + 1, len(activations))
    return logits, seconds


def summary_lines(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for a terminal."""

    def percent(value: float | None) -> str:
        return "not defined" if value is None else f"{100 * value:.2f}%"

    error, accuracies, areas = report["logit_error"], report["accuracy"], report["auroc"]
    lines = [
        f"{report['model']} {report['version']}, cut after stage {report['cut']}, "
        f"backend {report['backend']}",
        f"images                {report['images']}",
        f"labels that agree     {percent(report['agreement'])}",
    ]
    for name, value in accuracies.items():
        area = areas[name]
        text = "not defined" if area is None else f"{area:.4f}"
        lines.append(f"accuracy, AUROC       {percent(value)}, {text}  ({name.replace('_', ', ')})")
    lines.append(
        f"error of a logit      largest {error['max']:.3g}, mean {error['mean']:.3g} "
        f"(smallest clear margin {error['smallest_clear_margin']:.3g})"
    )
    for row in report["disagreements"][:10]:
        lines.append(
            f"  image {row['image']}: clear {row['clear_class']} (margin {row['clear_margin']:.3g}), "
            f"encrypted {row['encrypted_class']} (margin {row['encrypted_margin']:.3g})"
        )
    if len(report["disagreements"]) > 10:
        lines.append(f"  and {len(report['disagreements']) - 10} more, in the report")
    return lines


__all__ = ["evaluate_encrypted", "evaluate_refreshed", "read_images", "register", "verify", "verify_command"]
