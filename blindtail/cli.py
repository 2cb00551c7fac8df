"""The command line. It knows no role: each role registers its commands.

A package adds commands through an entry point of the group
`blindtail.commands` whose value is a function `register(app: typer.Typer)`.
Errors that blindtail raises on purpose print one line on stderr; `--debug`
shows where they came from.

Exit codes: 0 done, 1 the work failed, 2 the request was wrong (usage,
settings, input or a file given), 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from blindtail.config import read_toml, unknown_setting
from blindtail.errors import BlindtailError, BundleError, ConfigError, DataError, InputError

COMMAND_GROUP = "blindtail.commands"
#: What the caller got wrong, as opposed to what failed.
_REQUEST_ERRORS = (ConfigError, InputError, BundleError, DataError)

_HELP = """Split computing with early exits and an encrypted tail.

The head of a network and its early exits run here, in the clear. When no exit
is sure enough, the activation is encrypted and the tail, held by someone else,
is evaluated on the ciphertext.

\b
  model owner      blindtail lint      what of a network can run encrypted, and where to cut
                   blindtail train     make edge.bt and cloud.bt
                   blindtail inspect   what a .bt file costs to run
                   blindtail plan      what else it could cost
                   blindtail verify    encrypted against clear answers
  operator         blindtail certs     make certificates for mutual TLS
                   blindtail cloud     serve tails
                   blindtail model     models of a cell: push, canary, roll back
                   blindtail cell      drain a cell, welcome its edges again
                   blindtail orchestrator, blindtail policy
                                       objectives and policies of all edges
                   blindtail health    is it serving?
  device engineer  blindtail infer     answer images
                   blindtail edge      run an edge site
  everyone         blindtail demo      all of it on this machine
                   blindtail bench     measure it, in a checkout
"""


def debug_enabled() -> bool:
    """True when errors should show their traceback (`--debug` or BLINDTAIL_DEBUG=1)."""
    return os.environ.get("BLINDTAIL_DEBUG", "") not in ("", "0")


def version() -> str:
    try:
        return metadata.version("blindtail")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"blindtail {version()}")
        raise typer.Exit


def _root(
    ctx: typer.Context,
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and leave."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks of errors; give it before the command.")
    ] = False,
    settings: Annotated[
        Path | None,
        typer.Option(
            "--settings",
            help="TOML with a table for each command, [train] epochs = 8, or [certs.issue] days = 90; flags "
            "win. Before the command.",
        ),
    ] = None,
) -> None:
    if debug:
        os.environ["BLINDTAIL_DEBUG"] = "1"  # child processes show theirs too
    if settings is not None:
        ctx.default_map = _defaults(settings, ctx.command)


def _defaults(path: Path, root: Any) -> dict[str, Any]:
    """Command -> parameter -> value, names checked; [certs.issue] is a command of a group.

    Raises `ConfigError`.
    """
    return _table(read_toml(path), root, "", str(path))


def _table(table: Mapping[str, Any], command: Any, where: str, source: str) -> dict[str, Any]:
    """The settings of one command or group of commands."""
    commands = dict(getattr(command, "commands", {}))
    # The root's own options come before --settings is read: they cannot be set by it.
    options = _options(command) if where else {}
    found: dict[str, Any] = {}
    for name, value in table.items():
        full = where + name
        if name in commands:
            if not isinstance(value, dict):
                raise ConfigError(f"{source}: {full} must be a table: write [{full}] above its settings")
            found[name] = _table(value, commands[name], f"{full}.", source)
        elif name in options:
            found[options[name]] = value
        else:
            raise ConfigError(unknown_setting(full, name, [*commands, *options], where, source))
    return found


def _options(command: Any) -> dict[str, str]:
    """Name in a settings file -> the parameter that gets the value."""
    return {
        option.lstrip("-").replace("-", "_"): parameter.name or ""
        for parameter in command.params
        if parameter.param_type_name == "option" and "--help" not in parameter.opts
        for option in parameter.opts
        if option.startswith("--")
    }


def build_app() -> typer.Typer:
    """The whole application: the root options and every registered command."""
    app = typer.Typer(
        name="blindtail",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_root)
    for entry in sorted(metadata.entry_points(group=COMMAND_GROUP), key=lambda e: e.name):
        try:
            register = entry.load()
        except ImportError as error:
            _register_missing(app, entry.name, error)
            continue
        register(app)
    return app


def _register_missing(app: typer.Typer, names: str, error: ImportError) -> None:
    """Commands that cannot be loaded stay visible and say why."""
    reason = f"needs the module {error.name!r}, which is not installed" if error.name else str(error)

    def unavailable(ctx: typer.Context) -> None:
        raise ConfigError(
            f"the command {ctx.info_name!r} {reason}: install blindtail with its extras, "
            "for example 'pip install blindtail[certs,cluster,train,demo]'"
        )

    for name in names.split("+"):
        app.command(
            name,
            help=f"(not available: {reason})",
            context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
        )(unavailable)


def one_line(error: BaseException) -> str:
    """An error as one line of text, control characters removed."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c for c in text if c.isprintable())


def main(argv: Sequence[str] | None = None) -> Any:
    """Entry point of the `blindtail` command. Leaves through `SystemExit`."""
    try:
        build_app()(args=None if argv is None else list(argv), prog_name="blindtail")
    except BlindtailError as error:
        if debug_enabled():
            raise
        print(f"blindtail: {one_line(error)}", file=sys.stderr)
        raise SystemExit(2 if isinstance(error, _REQUEST_ERRORS) else 1) from None
    except KeyboardInterrupt:
        print("blindtail: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if debug_enabled():
            raise
        print(
            f"blindtail: {type(error).__name__}: {one_line(error)} "
            "(an internal error; 'blindtail --debug COMMAND' shows where)",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


__all__ = ["COMMAND_GROUP", "build_app", "debug_enabled", "main", "version"]
