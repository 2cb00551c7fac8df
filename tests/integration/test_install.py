"""Installing from the sources: with a compiler there is a native module; without one there is none, and the
package works all the same.

The whole of the native code is compiled by `make setup`; here a single file stands for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is not installed")

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("blindtail", "edge", "cloud", "orchestrator")
_LOOK = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if "ScikitBuild" not in type(f).__name__]  # the editable install
import blindtail, blindtail.he, edge, cloud, orchestrator
from pathlib import Path
assert Path(blindtail.__file__).is_relative_to(sys.argv[1]), blindtail.__file__
print(importlib.util.find_spec("blindtail.he._native") is not None)
"""
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as they are, with native code of one file."""
    folder = tmp_path_factory.mktemp("sources")
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / name)
    (folder / "native" / "src").mkdir(parents=True)
    shutil.copy2(ROOT / "native" / "CMakeLists.txt", folder / "native" / "CMakeLists.txt")
    (folder / "native" / "src" / "one.cpp").write_text("namespace blindtail { int one() { return 1; } }\n")
    (folder / "native" / "src" / "module.cpp").write_text(
        "#include <nanobind/nanobind.h>\n"
        "namespace blindtail { int one(); }\n"
        'NB_MODULE(_native, m) { m.def("one", &blindtail::one); }\n'
    )
    return folder


def install(sources: Path, target: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("BLINDTAIL_NATIVE", "CXX", "CC", "PYTHONPATH")}
    options = ("--verbose", "--disable-pip-version-check", "--no-deps", "--no-build-isolation", "--no-index")
    return subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(sources)],
        env={**kept, "SKBUILD_BUILD_DIR": str(target.with_suffix(".build")), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


def has_native(target: Path) -> bool:
    """Whether the package in `target`, which must be importable, has the native module."""
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, str(target)],
        env={**os.environ, "PYTHONPATH": str(target)},
        cwd=target,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip() == "True"


@pytest.fixture(scope="module")
def without(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Installed where every compiler fails: the folder, and what was said."""
    target = tmp_path_factory.mktemp("without")
    done = install(sources, target, CXX="/bin/false")
    assert done.returncode == 0, done.stdout
    return target, done.stdout


def test_without_a_compiler_it_is_installed_and_says_what_is_missing(without: tuple[Path, str]) -> None:
    target, said = without
    assert "NO NATIVE CODE" in said
    assert "the backend `seal`" in said
    assert not has_native(target)


def test_everything_that_the_packages_have_is_installed(without: tuple[Path, str], sources: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = (p for package in PACKAGES for p in (folder / package).rglob("*"))
        return {p.relative_to(folder).as_posix() for p in found if p.is_file() and p.suffix != ".pyc"}

    target, _ = without
    assert files(target) == files(sources)
    for name in ("blindtail/py.typed", "blindtail/pb/tail_pb2.pyi", "blindtail/models/zoo/fashion/edge.bt"):
        assert name in files(target)
    (metadata,) = target.glob("blindtail-*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    entries = (metadata / "entry_points.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for value in (*project["scripts"].values(), *project["entry-points"]["blindtail.commands"].values()):
        assert value in entries


def test_where_it_must_be_there_the_install_fails(sources: Path, tmp_path: Path) -> None:
    done = install(sources, tmp_path / "none", CXX="/bin/false", BLINDTAIL_NATIVE="required")
    assert done.returncode != 0
    assert "CMake configuration failed" in done.stdout
    assert not (tmp_path / "none" / "blindtail").exists()


def test_with_a_compiler_it_is_there(sources: Path, tmp_path: Path) -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        pytest.skip("no C++ compiler")
    # Debug: unoptimised compiles in half the time.
    done = install(sources, tmp_path, BLINDTAIL_NATIVE="required", SKBUILD_CMAKE_BUILD_TYPE="Debug")
    assert done.returncode == 0, done.stdout
    assert "NO NATIVE CODE" not in done.stdout
    assert has_native(tmp_path)
