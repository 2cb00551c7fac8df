"""`python -m blindtail.metrics` prints docs/metrics.md; with a path, writes it there."""

from __future__ import annotations

import sys
from pathlib import Path

from blindtail.metrics.document import markdown

if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(markdown(), encoding="utf-8")
    else:
        sys.stdout.write(markdown())
