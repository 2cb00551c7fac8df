"""A network as a command line names it: file.py:NAME or package.module:NAME; the owner's code is run."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blindtail.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def shape(text: str) -> tuple[int, ...]:
    """ "3,32,32" or "3x32x32" -> one image's shape. Raises `ConfigError`."""
    try:
        found = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise ConfigError(f"--input {text}: give one image's shape without the batch, for instance 3,32,32")
    return found


def module(where: str) -> nn.Module:
    """What MODEL names: a module, or what a class or function of that name gives. Raises `ConfigError`."""
    from torch import nn

    found = _named(where)
    if not isinstance(found, nn.Module):
        if not callable(found):
            raise ConfigError(f"{where} is a {type(found).__name__}: name an nn.Module, or what makes one")
        with _owners_code(where, "without arguments; write a function that fills them in"):
            found = found()
    if not isinstance(found, nn.Module):
        raise ConfigError(f"{where} gives a {type(found).__name__}, not an nn.Module")
    return found


def network(where: str, shapes: list[tuple[int, ...]]) -> tuple[nn.Module, list[tuple[int, ...]]]:
    """The network that MODEL names, and input shapes; a `SplitModel` brings its own. Raises `ConfigError`."""
    from torch import nn

    from blindtail.models.split import SplitModel

    found = module(where)
    if isinstance(found, SplitModel):
        shapes = shapes or [found.preprocessing.input_shape]
        if found.cuts:
            last = found.cuts[-1]
            found = nn.Sequential(*(found.stage(i) for i in range(last + 1)), found.tail(last))
    return found, given(shapes)


def given(shapes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Raises `ConfigError` for none."""
    if not shapes:
        raise ConfigError("say what the network takes: --input with one image's shape, for instance 3,32,32")
    return shapes


def _named(where: str) -> Any:
    source, colon, name = where.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(f"{where}: write file.py:NAME or package.module:NAME, for instance net.py:WardNet")
    file = _module_of(source)
    try:
        return getattr(file, name)
    except AttributeError:
        there = [key for key, value in vars(file).items() if _is_network(value, file.__name__)]
        names = f"; networks there: {', '.join(there)}" if there else ""
        raise ConfigError(f"{source} has no {name}{names}") from None


def _is_network(value: Any, module: str) -> bool:
    from torch import nn

    own = isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module
    return own or isinstance(value, nn.Module)


def _module_of(source: str) -> Any:
    if not source.endswith(".py"):
        with _owners_code(source, "import"), _on_path(Path.cwd()):
            return importlib.import_module(source)
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"there is no file {source}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    held = sys.modules.get(path.stem)
    sys.modules[path.stem] = loaded  # data classes and type hints look themselves up
    try:
        with _owners_code(source, "import"), _on_path(path.resolve().parent):
            spec.loader.exec_module(loaded)
    finally:
        if held is not None:
            sys.modules[path.stem] = held
    return loaded


@contextlib.contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


@contextlib.contextmanager
def _owners_code(where: str, doing: str) -> Iterator[None]:
    """What the owner's code prints goes to stderr; what it raises becomes one line. Raises `ConfigError`."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except (Exception, SystemExit) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        raise ConfigError(f"{where} cannot be loaded ({doing}): {told}") from error


def load_weights(network: nn.Module, path: Path) -> None:
    """Of a .safetensors file into a network, strictly. Raises `ConfigError`."""
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        raise ConfigError(
            f"{path.name} is a pickle, which may run code: save the weights with "
            "safetensors.torch.save_file(net.state_dict(), 'net.safetensors')"
        )
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path} cannot be read as safetensors: {error}") from error
    except RuntimeError as error:
        raise ConfigError(f"{path.name} does not fit this network: {' '.join(str(error).split())}") from error


def array(path: Path) -> Any:
    """Of a .npy file. Raises `ConfigError`."""
    import numpy as np

    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as an array (numpy.save makes one): {error}") from error


__all__ = ["array", "given", "load_weights", "module", "network", "shape"]
