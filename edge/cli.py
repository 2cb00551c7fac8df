"""`blindtail edge` and `blindtail infer`: the device engineer's commands."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from blindtail.bundle import EdgeBundle
from blindtail.config import assignments, load_config
from blindtail.errors import ConfigError, InputError
from blindtail.records import Answer
from edge.config import EdgeConfig

#: How long one image waits for an orchestrator; the policy it sent last holds without it.
_ATTACH_S = 3.0

Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings (see edge.config.EdgeConfig); flags win over it."),
]
Cloud = Annotated[
    str | None,
    typer.Option(
        "--cloud", help="host:port of the cloud, several with commas. Without it, exits alone answer."
    ),
]
Orchestrator = Annotated[
    str | None,
    typer.Option("--orchestrator", help="host:port of who hands down policies and objectives."),
]
Plaintext = Annotated[
    bool,
    typer.Option("--plaintext", help="No TLS. Accepted for a cloud and an orchestrator on this host only."),
]
Ca = Annotated[
    Path | None, typer.Option("--ca", help="PEM of the authority that signed the cloud's certificate.")
]
Certificate = Annotated[Path | None, typer.Option("--certificate", help="PEM of this device's certificate.")]
Key = Annotated[Path | None, typer.Option("--key", help="PEM of this device's private key.")]
PolicyName = Annotated[
    str | None,
    typer.Option(
        "--policy",
        help="deadline (offload when it can be had in time; default), threshold (offload when unsure), "
        "edge-only, or cloud-only.",
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="A parameter of the policy, e.g. thresholds=0.8. Repeatable."
    ),
]
Deadline = Annotated[
    float | None, typer.Option("--deadline", help="Seconds that an answer may take; default: no deadline.")
]
StateDir = Annotated[
    Path | None, typer.Option("--state-dir", help="Where keys are kept; default ~/.local/state/blindtail.")
]
Uplink = Annotated[
    float | None,
    typer.Option(
        "--uplink-bps", help="The uplink in bits per second: keys are sent at less than half of it."
    ),
]
Backend = Annotated[str | None, typer.Option("--backend", help="seal, or clear (no encryption: tests only).")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def register(app: typer.Typer) -> None:
    """Add the commands `edge` and `infer`."""
    app.command("edge", no_args_is_help=True)(edge_command)
    app.command("infer", no_args_is_help=True)(infer_command)


def infer_command(
    model: Annotated[Path, typer.Argument(metavar="EDGE.bt", help="The edge's half of a model.")],
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="A PNG, JPEG or .npy file, or NAME:INDEX of a test set (fashion:7, digits:0).",
        ),
    ],
    cloud: Cloud = None,
    orchestrator: Orchestrator = None,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    policy: PolicyName = None,
    parameters: Parameters = None,
    deadline: Deadline = None,
    state_dir: StateDir = None,
    uplink_bps: Uplink = None,
    backend: Backend = None,
    wait: Annotated[
        float | None,
        typer.Option(
            "--wait", help="Seconds to wait for keys and session before answering; 0 = answer at once."
        ),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Classify one image and say how the answer came about.

    The head runs here. A sure early exit answers at once; otherwise, with a
    cloud given, the activation is encrypted and the tail answers on the
    ciphertext. If that fails or would be late, the best exit answers, and the
    output says so.

    The first use of a model with a cloud makes keys (a second) and uploads
    them (some megabytes); later ones find them in the state directory.

    \b
      blindtail infer edge.bt photo.png
      blindtail infer edge.bt fashion:7 --cloud 127.0.0.1:50051 --plaintext
      blindtail infer edge.bt photo.png --cloud cloud.example:50051 \\
          --ca ca.pem --certificate me.pem --key me.key --deadline 0.5 --json
    """
    from edge.runtime import EdgeRuntime

    tls = _tls(ca, certificate, key)
    settings = _settings(
        config,
        model=model,
        cloud=cloud,
        orchestrator=orchestrator,
        plaintext=plaintext or None,
        policy=policy,
        policy_parameters=assignments(parameters) if parameters else None,
        deadline_s=deadline,
        state_dir=state_dir,
        uplink_bps=uplink_bps,
        backend=backend,
        ready_timeout_s=wait,
        **tls,
    )
    bundle = EdgeBundle.open(settings.model)
    pixels, true_label = _one_image(bundle, image)
    # One image has no quiet moment before it.
    with EdgeRuntime.open(bundle, **{**settings.runtime_settings(), "tickets": 0}) as runtime:
        if settings.orchestrator is not None:
            runtime.wait_attached(min(_ATTACH_S, settings.ready_timeout_s))
        if settings.cloud is not None and settings.ready_timeout_s:
            with _spinner("making and uploading keys, or finding them in place"):
                runtime.wait_ready(settings.ready_timeout_s)
        answer = runtime.infer(pixels)
        status = runtime.status()
    from edge.app import answer_fields

    problems = {cut: t.problem for cut, t in status.tails.items() if t.problem}
    if as_json:
        fields = {"image": image, "label": true_label, **answer_fields(answer)}
        followed = {"policy": status.policy, "orchestrator": status.orchestrator}
        print(json.dumps({**fields, **followed, "problems": problems}, indent=2))
        return
    print(_describe(answer, bundle))
    if status.orchestrator:
        whose = f"version {status.policy_version}" if status.policy_version else "this device's own"
        print(f"policy {status.policy}, {whose}; orchestrator {status.orchestrator}")
    for cut, problem in problems.items():
        print(f"tail at cut {cut}: {problem}", file=sys.stderr)


def edge_command(
    model: Annotated[
        Path | None,
        typer.Argument(metavar="[EDGE.bt]", help="The edge's half of a model (or `model` in TOML)."),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            "--data", help="fashion, digits, or a folder with a sub-folder of images for each class."
        ),
    ] = "fashion",
    split: Annotated[
        str, typer.Option("--split", help="Part of a known data set: test or validation.")
    ] = "test",
    images: Annotated[
        int | None, typer.Option("--images", min=1, help="How many images, from the first on; default all.")
    ] = None,
    actors: Annotated[
        int | None, typer.Option("--actors", help="Runtimes that answer side by side; default 1.")
    ] = None,
    cloud: Cloud = None,
    orchestrator: Orchestrator = None,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    policy: PolicyName = None,
    parameters: Parameters = None,
    deadline: Deadline = None,
    state_dir: StateDir = None,
    uplink_bps: Uplink = None,
    backend: Backend = None,
    tickets: Annotated[
        int | None,
        typer.Option(
            "--tickets",
            help="Encryptions that each actor prepares in quiet moments, so that the cloud can work "
            "ahead; default 4, 0 = none.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="File for the answers, one JSON object a line.")
    ] = None,
    announce: Annotated[
        Path | None,
        typer.Option(
            "--announce", help="File that gets cluster, actors and pids as JSON once the site is up."
        ),
    ] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            help="Serve Prometheus metrics: first actor on this port, the next one higher (default: off).",
        ),
    ] = None,
    config: Config = None,
    as_json: AsJson = False,
) -> None:
    """Run an edge site: answer a whole data set with several actors.

    Starts a Ray cluster of its own on this host (never the cloud's), N actors
    that share one set of keys, and answers images as fast as they come back.
    Every answer becomes one JSON line in --out (or on stdout with --json): index,
    true label, predicted label, route, fallback, timings, bytes. The summary at
    the end counts routes, fallbacks and accuracy.

    \b
      blindtail edge edge.bt --data fashion --images 1000
      blindtail edge edge.bt --data my-images --actors 2 --out answers.jsonl \\
          --cloud 127.0.0.1:50051 --plaintext --deadline 0.5
      blindtail edge --config site.toml --json
    """
    from edge.app import run_site
    from edge.images import read_set
    from edge.ranges import NOTES

    settings = _settings(
        config,
        model=model,
        cloud=cloud,
        orchestrator=orchestrator,
        plaintext=plaintext or None,
        policy=policy,
        policy_parameters=assignments(parameters) if parameters else None,
        deadline_s=deadline,
        state_dir=state_dir,
        uplink_bps=uplink_bps,
        backend=backend,
        actors=actors,
        tickets=tickets,
        metrics_port=metrics_port,
        **_tls(ca, certificate, key),
    )
    pixels, labels = read_set(EdgeBundle.open(settings.model), data, split)
    pixels, labels = pixels[:images], labels[:images]
    routes: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    right = outside = 0
    statuses: list[dict[str, Any]] = []
    with _lines(out, as_json) as sink, _bar(len(pixels)) as step:
        for record in run_site(settings, pixels, labels, announce=announce, statuses=statuses):
            routes[record["route"]] += 1
            right += record["predicted"] == record["label"]
            outside += record["route"] == "tail" and any(note in record["extra"] for note in NOTES)
            if record["fallback"]:
                fallbacks[record["fallback"]] += 1
            if sink is not None:
                print(json.dumps(record), file=sink, flush=True)
            step()
    answered = sum(routes.values())
    problems = sorted({t["problem"] for s in statuses for t in s["tails"].values() if t["problem"]})
    summary = {
        "answered": answered,
        "accuracy": right / answered if answered else None,
        "routes": dict(routes),
        "fallbacks": dict(fallbacks),
        "out_of_range": outside,
        "problems": problems,
    }
    if as_json:
        print(json.dumps({"summary": summary}))
    else:
        shares = ", ".join(f"{route} {count}" for route, count in sorted(routes.items()))
        print(f"{answered} answered, {right / max(1, answered):.2%} right: {shares}")
        if fallbacks:
            print("fallbacks: " + ", ".join(f"{why} {count}" for why, count in sorted(fallbacks.items())))
        if outside:
            print(f"{outside} answered by the tail outside its calibrated range: these may be wrong")
        for problem in problems:
            print(f"cloud: {problem}", file=sys.stderr)


def _settings(config: Path | None, **flags: Any) -> EdgeConfig:
    return load_config(EdgeConfig, config, flags)


def _tls(ca: Path | None, certificate: Path | None, key: Path | None) -> dict[str, Any]:
    given = {"tls.ca": ca, "tls.certificate": certificate, "tls.key": key}
    if any(given.values()) and not all(given.values()):
        raise ConfigError("mutual TLS needs all three: --ca, --certificate and --key")
    return given


def _one_image(bundle: EdgeBundle, image: str) -> tuple[Any, int | None]:
    """Pixels (C, H, W), and the true label of an image from a known data set."""
    from edge.images import read_file, read_set

    name, colon, number = image.rpartition(":")
    if colon and name in ("fashion", "digits") and number.isdecimal():
        pixels, labels = read_set(bundle, name)
        if int(number) >= len(labels):
            raise InputError(f"{name} has {len(labels)} test images: choose an index below that")
        return pixels[int(number)], int(labels[int(number)])
    return read_file(bundle, Path(image)), None


def _describe(answer: Answer, bundle: EdgeBundle) -> str:
    lines = [
        f"{answer.class_name} (class {answer.label}), confidence {answer.confidence:.3f}, by {answer.route}"
    ]
    if answer.fallback:
        lines[0] += f", in place of the tail: {answer.fallback}"
    best = sorted(enumerate(answer.probabilities), key=lambda p: -p[1])[:3]
    lines.append("best: " + ", ".join(f"{bundle.class_names[i]} {p:.3f}" for i, p in best))
    for seen in answer.exits:
        lines.append(f"exit{seen.index + 1}: confidence {seen.confidence:.3f}, margin {seen.margin:.3f}")
    for what, note in (("activation", "activation_range"), ("logits", "logit_range")):
        if note in answer.extra:
            beyond = f"{what} at {answer.extra[note]:.2f} times the calibrated range"
            lines.append(f"{beyond}: the tail may be wrong" if answer.offloaded else beyond)
    t = answer.timings
    steps = [
        (name, getattr(t, f"{name}_s"))
        for name in ("head", "exits", "decide", "encrypt", "network", "queue", "eval", "decrypt", "interlude")
    ]
    spent = ", ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in steps if seconds > 0)
    lines.append(f"{t.total_s * 1e3:.1f} ms: {spent}")
    if answer.uplink_bytes:
        lines.append(
            f"{answer.uplink_bytes / 1e3:.1f} KB up, {answer.reply_bytes / 1e3:.1f} KB back, encrypted"
            + (f", in {trips:.0f} round trips" if (trips := answer.extra.get("round_trips", 0.0)) else "")
        )
    return "\n".join(lines)


@contextmanager
def _lines(out: Path | None, as_json: bool) -> Iterator[TextIO | None]:
    """Where answers are written: the file asked for, stdout with --json alone, or nowhere."""
    if out is None:
        yield sys.stdout if as_json else None
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    # Answers are private, and so is what was decrypted for them; a file that was there keeps its
    # mode through open, and may be one that others read.
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        if out.is_file():
            os.fchmod(handle, 0o600)
        yield file


@contextmanager
def _spinner(text: str) -> Iterator[None]:
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


@contextmanager
def _bar(total: int) -> Iterator[Any]:
    """A progress bar on stderr; yields the function that counts one more."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("answering", total=total)
        yield lambda: bars.advance(task)
