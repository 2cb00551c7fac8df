"""Prometheus and promtool, which no Python package brings: from PATH, or Debian's package in .tools/.

`python -m tests.tools` fetches the package with apt, as root or not, and installs
nothing: apt checks its signature, dpkg-deb unpacks it here. Where that cannot be,
tests that need it are skipped and say so; with CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".tools"
PACKAGE, PROGRAMS = "prometheus", ("prometheus", "promtool")
_TIMEOUT_S = 240


def locate(program: str) -> Path | None:
    """The program's path, or None."""
    found = shutil.which(program, path=f"{FOLDER / PACKAGE}{os.pathsep}{os.environ.get('PATH', '')}")
    return None if found is None else Path(found)


def require(program: str) -> Path:
    """For tests: the program's path, or a skipped test (with CI=true a failed one)."""
    import pytest

    found = locate(program)
    if found is not None:
        return found
    reason = f"{program} is not here: 'make tools' fetches it (Debian's package {PACKAGE})"
    refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
    return refuse(reason)


def fetch(*, own_lists: bool = False) -> str:
    """Fetches and unpacks; "" when that went well, else why not.

    own_lists  uses package lists in a temporary folder even where the machine has some
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        return f"this machine has no {missing[0]}; install {' and '.join(PROGRAMS)} where PATH finds them"
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as name:
        folder = Path(name)
        problem = "" if own_lists else _download(folder, [])
        if own_lists or problem:
            problem = _download(folder, _own_lists(folder))
        packages = sorted(folder.glob("*.deb"))
        if not packages:
            return f"apt-get did not deliver the package {PACKAGE}: {problem}"
        unpacked = folder / "unpacked"
        done = _run(["dpkg-deb", "-x", str(packages[0]), str(unpacked)], folder)
        if done.returncode:
            return f"dpkg-deb did not unpack {packages[0].name}: {done.stderr.strip()}"
        made = folder / PACKAGE
        made.mkdir()
        for program in PROGRAMS:
            (unpacked / "usr" / "bin" / program).rename(made / program)
        shutil.rmtree(FOLDER / PACKAGE, ignore_errors=True)
        made.rename(FOLDER / PACKAGE)
    return ""


def _download(folder: Path, options: list[str]) -> str:
    # As root apt would hand over to a user of its own, who may not write here.
    common = ["-q", "-o", "APT::Sandbox::User=root", "-o", "Acquire::http::Timeout=20", *options]
    if options:
        _run(["apt-get", *common, "update"], folder)  # one source that fails is no reason to stop
    done = _run(["apt-get", *common, "download", PACKAGE], folder)
    return (
        (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else ""
    )


def _own_lists(folder: Path) -> list[str]:
    (folder / "lists" / "partial").mkdir(parents=True)
    (folder / "cache" / "archives" / "partial").mkdir(parents=True)
    places = {"Dir::State::lists": folder / "lists", "Dir::Cache": folder / "cache"}
    return [word for option, path in places.items() for word in ("-o", f"{option}={path}")]


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no end after {_TIMEOUT_S} s")


def main() -> int:
    here = [locate(program) for program in PROGRAMS]
    problem = "" if all(here) else fetch(own_lists="--own-lists" in sys.argv)
    if problem:
        print(f"{problem}; tests that need Prometheus are skipped (with CI=true they fail)", file=sys.stderr)
        return 1 if os.environ.get("CI") == "true" else 0
    for program in PROGRAMS:
        print(locate(program))
    return 0


if __name__ == "__main__":
    sys.exit(main())
