"""TOML and flags become a checked frozen dataclass once, at the door.

    config = load_config(CloudConfig, Path("cloud.toml"), {"port": 50051})

The dataclass is the schema: field names, type hints and defaults. Supported
hints: bool, int, float, str, Path, enums (by value), Literal, `X | None`,
tuple/list of these, `dict[str, X]`, and nested frozen dataclasses (a TOML
table). A class checks ranges in its own `__post_init__` by raising
`ConfigError` or `ValueError`.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from blindtail.errors import ConfigError

T = TypeVar("T")

_NONE = type(None)
#: A settings file is small; a larger one is the wrong file.
MAX_CONFIG_BYTES = 1_000_000


def load_config(cls: type[T], path: Path | None, overrides: Mapping[str, Any] | None = None) -> T:
    """Build `cls` from a TOML file and from flags; flags win.

    path       TOML file, or None for defaults and flags alone
    overrides  values by field name; a value of None means "flag not given".
               Nested fields are written with dots ("queue.limit").

    Relative paths in a file are relative to the file's folder; those of flags
    to the working directory. Raises `ConfigError` naming the field, what it
    should be, and the file.
    """
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise TypeError(f"{cls!r} is not a dataclass")
    table: dict[str, Any] = {}
    source = "the command line"
    if path is not None:
        source = str(path)
        table = read_toml(path)
        _rebase(cls, table, path.resolve().parent)
    for name, value in (overrides or {}).items():
        if value is not None:
            _put(table, name, value)
    return build(cls, table, where="", source=source)


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises `ConfigError` naming it."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ConfigError(
                f"{path} is larger than {MAX_CONFIG_BYTES:,} bytes: this is not a settings file"
            )
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"there is no settings file {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read the settings file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file in UTF-8") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        inner = table.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"setting {parent!r} is a value, so {name!r} cannot be set inside it")
        table = inner
    table[last] = value


def _rebase(cls: type[Any], table: dict[str, Any], folder: Path) -> None:
    """Make the paths written in a file relative to the file's folder."""
    hints = typing.get_type_hints(cls)
    for name, value in table.items():
        if name not in hints:
            continue
        table[name] = _rebase_value(hints[name], value, folder)


def _rebase_value(hint: Any, value: Any, folder: Path) -> Any:
    options = [a for a in _alternatives(hint) if a is not _NONE]
    if isinstance(value, str) and Path in options and str not in options:
        return folder / Path(value).expanduser()
    if isinstance(value, list):
        item = [get_args(o)[0] for o in options if get_origin(o) in (tuple, list) and get_args(o)]
        return [_rebase_value(item[0], v, folder) for v in value] if item else value
    if isinstance(value, dict):
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                _rebase(option, value, folder)
    return value


def build(cls: type[T], table: Mapping[str, Any], where: str, source: str) -> T:
    """`cls` from a table's values.

    where   what its settings' names begin with in messages, dots included
    source  of the table: a file's name

    Raises `ConfigError` as `load_config` does.
    """
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for name in table:
        if name not in fields:
            raise ConfigError(unknown_setting(where + str(name), str(name), list(fields), where, source))
    values: dict[str, Any] = {}
    for name, value in table.items():
        values[name] = _convert(hints[name], value, where + name, source)
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{source}: setting {where + missing[0]!r} is missing and has no default")
    try:
        return cls(**values)
    except ConfigError as error:
        # The class names the field; say also where the value came from.
        raise ConfigError(f"{source}: {error}") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{source}: {where.rstrip('.') or cls.__name__}: {error}") from error


def assignments(pairs: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE pairs of a flag `--set`; a value is JSON, or text when it is no JSON.

    Raises `ConfigError`.
    """
    result: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--set takes NAME=VALUE, not {pair!r}")
        try:
            result[name.strip()] = json.loads(value)
        except ValueError:
            result[name.strip()] = value
    return result


def unknown_setting(full: str, name: str, known: list[str], where: str, source: str) -> str:
    """The message for a name that is not among `known`, with the closest one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = (
        f"did you mean {where + close[0]!r}?"
        if close
        else f"known settings: {', '.join(sorted(known)) or 'none'}"
    )
    return f"{source}: unknown setting {full!r}; {hint}"


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _convert(hint: Any, value: Any, name: str, source: str) -> Any:
    """`value` as `hint`, or `ConfigError`. Never guesses: "8" is no int, True is no int."""
    for option in _alternatives(hint):
        found, result = _try(option, value, name, source)
        if found:
            return result
    raise ConfigError(
        f"{source}: setting {name!r} must be {_describe(hint)}, not {_kind(value)} ({_short(value)})"
    )


def _try(hint: Any, value: Any, name: str, source: str) -> tuple[bool, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True, value
    if hint is _NONE:
        return value is None, None
    if origin is Literal:
        return any(value == a and type(value) is type(a) for a in args), value
    if origin in (tuple, list):
        return _try_sequence(origin, args, value, name, source)
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            return False, None
        item = args[1] if args else Any
        return True, {str(k): _convert(item, v, f"{name}.{k}", source) for k, v in value.items()}
    if not isinstance(hint, type):
        raise TypeError(f"{name}: settings of type {hint!r} are not supported")
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return True, value
        if isinstance(value, Mapping):
            return True, build(hint, value, f"{name}.", source)
        return False, None
    if issubclass(hint, enum.Enum):
        if isinstance(value, hint):
            return True, value
        match = [m for m in hint if m.value == value]
        return bool(match), match[0] if match else None
    return _try_scalar(hint, value)


def _try_scalar(hint: type, value: Any) -> tuple[bool, Any]:
    if hint is bool:
        return isinstance(value, bool), value
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if hint is float:
        ok = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return ok, float(value) if ok else None
    if hint is str:
        return isinstance(value, str), value
    if issubclass(hint, Path):
        ok = isinstance(value, str | Path) and str(value) != ""
        return ok, Path(value).expanduser() if ok else None
    return isinstance(value, hint), value


def _try_sequence(origin: Any, args: tuple[Any, ...], value: Any, name: str, source: str) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, None
    if origin is tuple and args and args[-1] is not Ellipsis:
        if len(args) != len(value):
            return False, None
        kinds: list[Any] = list(args)
    else:
        kinds = [args[0] if args else Any] * len(value)
    items = [
        _convert(kind, v, f"{name}[{i}]", source)
        for i, (kind, v) in enumerate(zip(kinds, value, strict=True))
    ]
    return True, tuple(items) if origin is tuple else items


def _describe(hint: Any) -> str:
    names = []
    for option in _alternatives(hint):
        if option is _NONE:
            continue
        origin, args = get_origin(option), get_args(option)
        if origin is Literal:
            names.append("one of " + ", ".join(repr(a) for a in args))
        elif origin in (tuple, list):
            names.append(f"a list of {_describe(args[0]) if args else 'values'}")
        elif origin in (dict, Mapping) or dataclasses.is_dataclass(option):
            names.append("a table")
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            names.append("one of " + ", ".join(repr(m.value) for m in option))
        else:
            names.append(_NAMES.get(option, getattr(option, "__name__", str(option))))
    return " or ".join(names)


_NAMES: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    Path: "a path",
}


def _kind(value: Any) -> str:
    for kind, text in (
        (bool, "true or false"),
        (int, "a whole number"),
        (float, "a number"),
        (str, "a text"),
        (list, "a list"),
        (dict, "a table"),
    ):
        if isinstance(value, kind):
            return text
    return type(value).__name__


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


__all__ = ["assignments", "build", "load_config", "read_toml", "unknown_setting"]
