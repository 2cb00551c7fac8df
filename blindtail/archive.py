"""The container of `.bt` files: a zip with exactly one valid byte form.

Members are stored (never compressed) in one order with one time stamp, the zip
comment holds the manifest's SHA-256, and the manifest holds every other
member's. Reading rebuilds the file from its members and compares, so that every
changed byte, in data or in zip headers, is noticed.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from blindtail.errors import BlindtailError, BundleError, ModelError
from blindtail.he.spec import canonical_json

FORMAT_VERSION = 2
#: Of files with refreshed tails, which releases before them must not take for whole ones.
REFRESH_FORMAT_VERSION = 3
MAX_FILE_BYTES = 1 << 30
MAX_MANIFEST_BYTES = 16 << 20
MAX_MEMBERS = 257
_MANIFEST = "manifest.json"
#: An owner's two files, and a cell's own file of one program.
_FORMS = ("blindtail-edge", "blindtail-cloud", "blindtail-program")
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_T = TypeVar("_T")


def _pack(manifest: bytes, members: Mapping[str, bytes]) -> bytes:
    """The one form of these members: stored, manifest first, then by name, fixed time stamps."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, data in ((_MANIFEST, manifest), *sorted(members.items())):
            info = zipfile.ZipInfo(name, _ZIP_TIME)
            info.create_system = 3  # the same bytes on every operating system
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
        archive.comment = b"blindtail " + hashlib.sha256(manifest).hexdigest().encode()
    return buffer.getvalue()


def write(
    path: Path,
    form: str,
    data: Mapping[str, Any],
    members: Mapping[str, bytes],
    format_version: int = FORMAT_VERSION,
) -> None:
    """Write atomically (a temporary file beside it, then a rename); equal input gives equal bytes."""
    hashes = {name: hashlib.sha256(blob).hexdigest() for name, blob in members.items()}
    manifest = {**data, "format": form, "format_version": format_version, "sha256": hashes}
    try:
        text = canonical_json(manifest)
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelError(f"the model's description cannot be written as JSON: {error}") from error
    blob = _pack(text, members)
    if len(blob) > MAX_FILE_BYTES or len(text) > MAX_MANIFEST_BYTES or len(members) >= MAX_MEMBERS:
        raise ModelError(f"{path.name}: the model is too large for a .bt file")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        blob = file.read(MAX_FILE_BYTES + 1)
    if len(blob) > MAX_FILE_BYTES:
        raise BundleError(f"larger than {MAX_FILE_BYTES >> 20} MiB")
    return blob


def _unpack(blob: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Bytes -> manifest and other members, every hash checked."""
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(blob)) as archive:
        infos = archive.infolist()
        if not 1 <= len(infos) <= MAX_MEMBERS:
            raise BundleError("not a blindtail file")
        for info in infos:
            # Stored members cannot expand: what they hold is bounded by the file's size.
            if info.compress_type != zipfile.ZIP_STORED or info.file_size > len(blob):
                raise BundleError(f"member {info.filename!r} is compressed or larger than the file")
            if info.filename in members:
                raise BundleError(f"member {info.filename!r} appears twice")
            members[info.filename] = archive.read(info)
    text = members.pop(_MANIFEST, None)
    if text is None or len(text) > MAX_MANIFEST_BYTES:
        raise BundleError("it has no manifest")
    manifest = json.loads(text, parse_constant=_no_constant)
    if not isinstance(manifest, dict) or manifest.get("format") not in _FORMS:
        raise BundleError("not a blindtail file")
    if manifest.get("format_version") not in (FORMAT_VERSION, REFRESH_FORMAT_VERSION):
        raise BundleError(
            f"format version {manifest.get('format_version')!r}, this blindtail reads {FORMAT_VERSION} "
            f"and {REFRESH_FORMAT_VERSION}"
        )
    hashes = manifest["sha256"]
    if set(hashes) != set(members):
        raise BundleError(f"unknown or missing members {sorted(set(hashes) ^ set(members))}")
    for name, data in members.items():
        if hashlib.sha256(data).hexdigest() != hashes[name]:
            raise BundleError(f"member {name!r} does not match its SHA-256")
    if _pack(text, members) != blob:
        raise BundleError("its zip structure was changed")
    return manifest, members


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _named(form: str) -> str:
    half = form.removeprefix("blindtail-")
    return f"{'an' if half[0] in 'aeiou' else 'a'} {half}.bt file"


def decode(path: Path, wanted: str, build: Callable[[Mapping[str, Any], Mapping[str, bytes]], _T]) -> _T:
    """Read, check everything, and `build` from manifest and members. Raises only `BundleError`."""

    def work() -> _T:
        manifest, members = _unpack(_read(path))
        if manifest["format"] != wanted:
            raise BundleError(f"this is {_named(manifest['format'])}, {_named(wanted)} is needed")
        return build(manifest, members)

    return _guard(path, work)


def _guard(path: Path, work: Callable[[], _T]) -> _T:
    """Run `work`; whatever goes wrong on hostile bytes becomes one `BundleError` naming the file."""
    try:
        return work()
    except FileNotFoundError as error:
        raise BundleError(f"{path}: no such file; `blindtail train` makes a pair of .bt files") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror})") from error
    except BlindtailError as error:
        raise BundleError(f"{path.name}: {error}. Copy the file again, or ask the model's owner") from error
    except Exception as error:  # zipfile, json and safetensors raise many types on damaged bytes
        raise BundleError(
            f"{path.name}: damaged ({type(error).__name__}). Copy the file again, or ask the model's owner"
        ) from error


def kind(path: str | Path) -> str:
    """The `format` of an intact `.bt` file. Raises `BundleError`."""
    path = Path(path)
    return str(_guard(path, lambda: _unpack(_read(path))[0]["format"]))
