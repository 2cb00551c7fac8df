"""`python -m deploy.checks files|containers`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    what, *names = sys.argv[1:] or [""]
    if what == "containers":
        from deploy.checks import containers

        raise SystemExit(containers.main(names))
    if what == "files" and not names:
        from deploy.checks import files

        raise SystemExit(files.main())
    print("usage: python -m deploy.checks files | containers [edge|cloud|orchestrator]", file=sys.stderr)
    raise SystemExit(2)
