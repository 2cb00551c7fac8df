"""`blindtail model`: the operator's commands for the models of one or several cells."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from blindtail.cli import one_line
from blindtail.connection_options import (
    AsJson,
    Ca,
    Certificate,
    Key,
    Plaintext,
    ServerName,
    credentials_of,
)
from blindtail.errors import BlindtailError, BundleError
from blindtail.rpc import Credentials
from blindtail.wire.cell import ModelEntry
from cloud import drain_cli
from cloud.operator_client import OperatorClient

#: A push that takes longer shows a progress bar.
_QUIET_S = 2.0

Cells = Annotated[
    list[str],
    typer.Option("--cell", metavar="HOST:PORT", help="A cell to ask. Repeatable: one after another."),
]
Model = Annotated[str, typer.Argument(metavar="MODEL")]
VersionName = Annotated[str, typer.Argument(metavar="VERSION")]

models = typer.Typer(
    help="Models and versions of running cells: push, list, canary, rollback, drop. For operators.",
    no_args_is_help=True,
)


@models.command("push", no_args_is_help=True)
def push(
    files: Annotated[list[Path], typer.Argument(metavar="CLOUD.bt...", help="Files to serve.")],
    cells: Cells,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow",
            metavar="PATTERN",
            help="Identities that may use them, as 'edge:clinic-*'. Default: every edge.",
        ),
    ] = None,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Serve CLOUD.bt from now on, without a restart.

    Edges that hold its edge.bt can register at once. Requests of other versions'
    edges go on as they do: `blindtail model canary` gives it a share of them.
    Pushing a file again changes who may use it, or brings a dropped version back.

    \b
      blindtail model push cloud.bt --cell 127.0.0.1:50051 --plaintext
      blindtail model push cloud.bt --cell a.example:50051 --cell b.example:50051 \\
          --ca ca.pem --certificate me.pem --key me.key --allow 'edge:clinic-*'
    """
    for file in files:
        if not file.is_file():
            raise BundleError(f"there is no file {file}: give the path of a cloud.bt")

    def work(cell: OperatorClient) -> list[ModelEntry]:
        found: dict[tuple[str, str], ModelEntry] = {}
        for file in files:
            with _progress(f"{file.name} -> {cell.address}") as advance:
                found.update({(e.model, e.version): e for e in cell.push(file, allow or (), advance)})
        return list(found.values())

    _ask(cells, credentials_of(plaintext, ca, certificate, key, server_name), work, as_json)


@models.command("list", no_args_is_help=True)
def list_models(
    cells: Cells,
    model: Annotated[str, typer.Argument(metavar="[MODEL]")] = "",
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """What cells serve: versions, shares, requests, sessions, who may use them."""
    _ask(
        cells,
        credentials_of(plaintext, ca, certificate, key, server_name),
        lambda cell: cell.models(model),
        as_json,
    )


@models.command("canary", no_args_is_help=True)
def canary(
    model: Model,
    version: VersionName,
    share: Annotated[
        float, typer.Option("--share", help="Of the requests that VERSION can answer, 0 to 1; 1 promotes it.")
    ],
    cells: Cells,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Let VERSION answer a share of the requests of other versions' edges.

    It can answer for versions whose edges cannot tell it from their own: weights
    trained on, the tail compiled for their edge.bt. Which requests it gets follows
    from the request's id: a retry stays where it was. Edges notice nothing, and
    upload nothing.
    """
    _ask(
        cells,
        credentials_of(plaintext, ca, certificate, key, server_name),
        lambda cell: cell.canary(model, version, share),
        as_json,
    )


@models.command("rollback", no_args_is_help=True)
def rollback(
    model: Model,
    cells: Cells,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Undo the last change of MODEL's shares; again, the one before."""
    _ask(
        cells,
        credentials_of(plaintext, ca, certificate, key, server_name),
        lambda cell: cell.rollback(model),
        as_json,
    )


@models.command("drop", no_args_is_help=True)
def drop(
    model: Model,
    version: VersionName,
    cells: Cells,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Withdraw VERSION: its edges are told so, and answer from their exits.

    Requests in flight are answered first. Its edges' evaluation keys are removed.
    It stays withdrawn when the cell restarts, also when the cell's settings name
    its file; pushing the file brings it back.
    """
    _ask(
        cells,
        credentials_of(plaintext, ca, certificate, key, server_name),
        lambda cell: cell.drop(model, version),
        as_json,
    )


def _ask(
    cells: Sequence[str],
    credentials: Credentials,
    work: Callable[[OperatorClient], list[ModelEntry]],
    as_json: bool,
) -> None:
    """One cell after another; says of each what happened. Leaves with 1 when one of them failed."""
    failed = False
    answers: list[dict[str, object]] = []
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    for address in cells:
        try:
            with OperatorClient(address, credentials) as cell:
                entries = work(cell)
        except BlindtailError as error:
            failed = True
            answers.append({"cell": address, "error": type(error).__name__, "message": one_line(error)})
            console.print(f"blindtail: {address}: {one_line(error)}", markup=False)
            continue
        answers.append({"cell": address, "models": [asdict(entry) for entry in entries]})
        if not as_json:
            print(f"{address}:")
            print(_table(entries))
    if as_json:
        print(json.dumps(answers))
    if failed:
        raise typer.Exit(1)


def _table(entries: Sequence[ModelEntry]) -> str:
    """For people: one row a version."""
    if not entries:
        return "  no model: push one with `blindtail model push cloud.bt`"
    head = ("MODEL", "VERSION", "SHARE", "REQUESTS", "SESSIONS", "FROM", "ALLOWED", "CAN ANSWER FOR")
    rows = [head, *map(_row, entries)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _row(entry: ModelEntry) -> tuple[str, ...]:
    if not entry.programs:
        return (entry.model, entry.version, "-", "-", "-", "dropped", "nobody", "- (a push brings it back)")
    return (
        entry.model,
        entry.version,
        f"{entry.share:g}" if entry.share else "own",
        str(entry.requests),
        str(entry.sessions),
        "push" if entry.pushed else "settings",
        ", ".join(entry.allow) or "every edge",
        entry.compatible_with or "its own edges alone",
    )


@contextmanager
def _progress(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, once it has taken `_QUIET_S`."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(text, total=None)
    showing, shown, over = threading.Lock(), False, False

    def show() -> None:
        nonlocal shown
        with showing:
            if not over:
                bar.start()
                shown = True

    def advance(sent: int, total: int) -> None:
        bar.update(task, completed=sent, total=total)
        if sent >= total:
            bar.update(task, description=f"{text}: the cell checks and loads it")

    timer = threading.Timer(_QUIET_S, show)
    timer.daemon = True
    timer.start()
    try:
        yield advance
    finally:
        timer.cancel()
        with showing:
            over = True
            if shown:
                bar.stop()


def register(app: typer.Typer) -> None:
    """Adds the group `model`, and the commands for a cell itself."""
    app.add_typer(models, name="model")
    drain_cli.register(app)


__all__ = ["register"]
