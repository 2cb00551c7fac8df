"""Where Fashion-MNIST's files come from: this package, the system, Debian's package, the network.

Every file is checked against the SHA-256 of its *unpacked* content, since
distributions compress the same content anew.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from blindtail.errors import DataError

SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"
ADDRESS = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
ASSETS = Path(__file__).parent / "assets" / "fashion-mnist"
_MAX_COMPRESSED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """One file's unpacked content."""

    bytes: int
    sha256: str


FILES: Mapping[str, Content] = MappingProxyType(
    {
        "train-images-idx3-ubyte.gz": Content(
            47_040_016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"
        ),
        "train-labels-idx1-ubyte.gz": Content(
            60_008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"
        ),
        "t10k-images-idx3-ubyte.gz": Content(
            7_840_016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"
        ),
        "t10k-labels-idx1-ubyte.gz": Content(
            10_008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"
        ),
    }
)


def unpack(path: Path) -> bytes:
    """Unpacked content of one of `FILES`, checked. Raises `DataError` naming the file."""
    wanted = FILES[path.name]
    try:
        with gzip.open(path, "rb") as file:
            content = file.read(wanted.bytes + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cannot be read: delete it and try again") from error
    if hashlib.sha256(content).hexdigest() != wanted.sha256:
        raise DataError(f"{path} is not the Fashion-MNIST file of that name (SHA-256 differs): delete it")
    return content


@dataclass(frozen=True, slots=True)
class FashionSource:
    """Where to look for training files, in order; each step can be pointed elsewhere.

    folder  looked at first, and alone, when the caller names one
    """

    folder: Path | None = None
    system: Path = SYSTEM_FOLDER
    cache: Path = field(default_factory=lambda: _cache_folder())
    address: str = ADDRESS
    apt_timeout_s: float = 300.0
    http_timeout_s: float = 20.0

    def read(self, name: str) -> bytes:
        """Unpacked content of one of `FILES`.

        Raises `DataError` naming every way that was tried and why it failed.
        """
        if self.folder is not None:
            path = self.folder / name
            if not path.is_file():
                raise DataError(
                    f"{self.folder} holds no {name}: give the folder with Fashion-MNIST's four .gz files"
                )
            return unpack(path)
        if (ASSETS / name).is_file():
            return unpack(ASSETS / name)
        failures: list[str] = []
        for folder in (self.system, self.cache):
            if not (folder / name).is_file():
                failures.append(f"{folder} holds no {name}")
                continue
            try:
                return unpack(folder / name)
            except DataError as error:
                failures.append(str(error))
        for fetch in (self._from_debian, self._from_address):
            try:
                fetch(name)
                return unpack(self.cache / name)
            except DataError as error:
                failures.append(str(error))
        tried = "\n".join(f"  - {failure}" for failure in failures)
        raise DataError(
            f"Fashion-MNIST's {name} was not found. There are three ways to get it:\n"
            f"  1. the system data set folder {self.system} (as root: apt-get install {DEBIAN_PACKAGE});\n"
            f"  2. Debian's package {DEBIAN_PACKAGE}, unpacked without root (needs apt-get, dpkg and a "
            "reachable mirror);\n"
            f"  3. the data set's own address {self.address}.\n"
            f"Or copy its four .gz files into a folder and pass --data FOLDER. What was tried:\n{tried}"
        )

    def _from_debian(self, name: str) -> None:
        """`apt-get download` and `dpkg -x` into the cache folder; neither needs root."""
        if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
            raise DataError("apt-get or dpkg is not on this machine")
        with tempfile.TemporaryDirectory(prefix="blindtail-data-") as scratch:
            self._command(["apt-get", "download", "-q", DEBIAN_PACKAGE], scratch)
            packages = sorted(Path(scratch).glob(f"{DEBIAN_PACKAGE}_*.deb"))
            if len(packages) != 1:
                raise DataError(f"apt-get download gave {len(packages)} packages of {DEBIAN_PACKAGE}")
            self._command(["dpkg", "-x", str(packages[0]), "tree"], scratch)
            for source in sorted(Path(scratch, "tree", *SYSTEM_FOLDER.parts[1:]).glob("*.gz")):
                if source.name in FILES:
                    self._keep(source)
        if not (self.cache / name).is_file():
            raise DataError(f"{DEBIAN_PACKAGE} holds no {name}")

    def _command(self, command: list[str], folder: str) -> None:
        environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
        shown = " ".join(command[:2])
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.apt_timeout_s,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DataError(f"{shown} did not finish ({type(error).__name__})") from error
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise DataError(f"{shown} failed: {lines[-1] if lines else 'no output'}")

    def _from_address(self, name: str) -> None:
        """Download one file with a progress bar into the cache folder."""
        url = f"{self.address.rstrip('/')}/{name}"
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with tempfile.TemporaryDirectory(prefix="blindtail-data-") as scratch:
            part = Path(scratch) / name
            try:
                with (
                    urllib.request.urlopen(url, timeout=self.http_timeout_s) as reply,
                    part.open("wb") as file,
                    Progress(*columns, transient=True) as progress,
                ):
                    length = reply.headers.get("Content-Length", "")
                    task = progress.add_task(name, total=int(length) if length.isdigit() else None)
                    while chunk := reply.read(1 << 16):
                        file.write(chunk)
                        progress.advance(task, len(chunk))
                        if file.tell() > _MAX_COMPRESSED_BYTES:
                            raise DataError(f"{url} sends more than the file's size")
            except (OSError, urllib.error.URLError, ValueError) as error:
                raise DataError(f"{url} cannot be downloaded ({error})") from error
            self._keep(part)

    def _keep(self, source: Path) -> None:
        """Check a file, then move it into the cache atomically."""
        unpack(source)
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(prefix=f".{source.name}.", dir=self.cache)
            os.close(handle)
            shutil.copyfile(source, temporary)
            os.replace(temporary, self.cache / source.name)
        except OSError as error:
            raise DataError(f"cannot write to {self.cache} ({error.strerror}): set XDG_CACHE_HOME") from error


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "blindtail" / "fashion-mnist"
