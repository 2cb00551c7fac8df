"""The process that looks at a stranger's key container: `python -m cloud.keycheck`.

Reads one JSON line on standard input (`Order`), checks hash and content, writes
the form that evaluators load, prints one JSON line and ends. Limits on memory,
time and file size are set before anything is parsed; a crash here costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from blindtail.errors import BlindtailError, ContainerError, EvaluationFailed

#: A prepared file may be larger than its container (64-bit words for 30-bit residues, both halves).
_GROWTH = 16


@dataclass(frozen=True, slots=True)
class Order:
    """`bundle` holds the one program; `sha256` is hex; limits in seconds and bytes."""

    bundle: str
    backend: str
    source: str
    target: str
    sha256: str
    cpu_s: int
    memory_bytes: int


def run(order: Order, timeout_s: float) -> int:
    """Checks in a child process; blocks. Returns the bytes of the prepared file.

    Raises `ContainerError` (the reason is public) or `EvaluationFailed` (a limit
    was hit, or the check itself failed).
    """
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    if "TMPDIR" in os.environ:
        environment["TMPDIR"] = os.environ["TMPDIR"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "cloud.keycheck"],
            input=json.dumps(asdict(order)).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
        answer = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    except subprocess.TimeoutExpired as error:
        raise EvaluationFailed(f"checking the keys took longer than {timeout_s:.0f} s") from error
    except (OSError, ValueError) as error:
        raise EvaluationFailed("the keys could not be checked; the cloud's log says why") from error
    if "bytes" in answer:
        return int(answer["bytes"])
    if answer.get("refused"):
        raise ContainerError(str(answer["refused"])[:500])
    raise EvaluationFailed("the keys could not be checked: a limit was hit, or the check failed")


def check(order: Order) -> int:
    """In the child. Raises `ContainerError`."""
    # Late: the limits hold while these load, and the parent need not load them.
    from blindtail.bundle import open_program
    from blindtail.he.backends import open_evaluator

    digest = hashlib.sha256()
    with open(order.source, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    if digest.hexdigest() != order.sha256:
        raise ContainerError(
            "the keys that arrived do not have the hash that was announced: upload them again"
        )
    program = open_program(Path(order.bundle))
    return open_evaluator(order.backend, program).prepare_keys(Path(order.source), Path(order.target))


def main() -> int:
    order = Order(**json.loads(sys.stdin.readline()))
    size = os.stat(order.source).st_size
    os.nice(5)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (order.cpu_s, order.cpu_s + 1))
    resource.setrlimit(resource.RLIMIT_DATA, (order.memory_bytes, order.memory_bytes))
    # SIGXFSZ is ignored by Python: a write beyond the limit fails with EFBIG.
    resource.setrlimit(resource.RLIMIT_FSIZE, (size * _GROWTH + (1 << 20),) * 2)
    try:
        answer: dict[str, object] = {"bytes": check(order)}
    except ContainerError as error:
        answer = {"refused": str(error)}
    except (BlindtailError, OSError, MemoryError) as error:
        answer = {"failed": type(error).__name__}
    print(json.dumps(answer), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
