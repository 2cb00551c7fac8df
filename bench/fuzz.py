"""Coverage-guided fuzzing of the C++ that reads what others send: ten minutes, shared by all targets.

Under the address and undefined behaviour sanitizers, from the inputs in native/fuzz/corpus alone. An input
that crashes a target stays in ./crash-TARGET and ends that target's run. `--quick`: 20 seconds.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time

from bench.results import ROOT
from bench.rows import Row, row

SOURCES = (
    "native/src/*",
    "native/fuzz/*",
    "native/fuzz/corpus/*/*",
    "native/CMakeLists.txt",
    "bench/fuzz.py",
)
PIN_CPU = False
_SECONDS, _QUICK_SECONDS = 600, 20
#: The last such line of a run: inputs tried, edges covered, and inputs kept.
_REPORT = re.compile(
    r"^#(\d+)\s+(?:INITED|pulse|NEW|REDUCE|DONE)\s+cov: (\d+) ft: \d+ corp: (\d+)", re.MULTILINE
)


def rows(args: argparse.Namespace) -> list[Row]:
    subprocess.run(["make", "--no-print-directory", "build/fuzz"], cwd=ROOT, check=True, stdout=sys.stderr)
    targets = sorted(path.stem for path in (ROOT / "native" / "fuzz").glob("*_fuzz.cpp"))
    each = (_QUICK_SECONDS if args.quick else _SECONDS) // len(targets)
    made: list[Row] = []
    for target in targets:
        made += _fuzz(target, each)
    return made


def _fuzz(target: str, seconds: int) -> list[Row]:
    """One target's run, from its checked-in corpus."""
    print(f"{target}, {seconds} s", file=sys.stderr, flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as finds:  # the first folder is written to by some drivers
        command = [f"build/fuzz/{target}", f"-max_total_time={seconds}", "-max_len=8192"]
        done = subprocess.run(
            [*command, finds, f"native/fuzz/corpus/{target}"],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            check=False,
        )
    took = time.monotonic() - started
    crashed = done.returncode != 0
    if crashed:
        print(done.stdout, file=sys.stderr, flush=True)
    reports = _REPORT.findall(done.stdout)
    if not reports and not crashed:
        raise RuntimeError(f"{target} said nothing of its run:\n{done.stdout}")
    runs, edges, kept = (int(word) for word in reports[-1]) if reports else (0, 0, 0)
    return [
        row(
            f"{target}: crashes",
            int(crashed),
            "1",
            target=0,
            n=runs,
            note=f"crash-{target}" if crashed else "",
        ),
        row(f"{target}: inputs tried", runs, "1", note=f"{kept} kept"),
        row(f"{target}: edges covered", edges, "1", n=runs),
        row(f"{target}: time", took, "s", n=runs),
    ]
