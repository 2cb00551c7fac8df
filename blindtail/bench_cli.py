"""`blindtail bench`: the benchmarks of a checkout. An installed package has none: they are never shipped."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import typer

from blindtail.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command `bench`."""
    app.command(
        "bench",
        # Everything after the name is the benchmark's own, --help included.
        context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    )(bench_command)


def bench_command(ctx: typer.Context) -> None:
    """Measure it, in a checkout: every number we quote.

    `blindtail bench list` names them; `blindtail bench he --json` measures the encrypted tail.
    """
    root = checkout()
    if root is None:
        raise ConfigError(
            "benchmarks run from a checkout: change to the folder of one, which has bench/ in it"
        )
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: what lies in the current folder is not imported by accident.
    command = [sys.executable, "-P", "-m", "bench", *ctx.args]
    raise typer.Exit(subprocess.call(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}))


def checkout() -> Path | None:
    """The folder whose bench/ is ours: around this package, or the current one."""
    for folder in (Path(__file__).resolve().parents[1], Path.cwd()):
        if all((folder / "bench" / name).is_file() for name in ("__main__.py", "rows.py")):
            return folder
    return None
