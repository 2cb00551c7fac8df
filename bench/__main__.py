"""`python -m bench NAME [--json] [--quick]`; `all`, `list` and `evidence` besides.

The same as `blindtail bench` in a checkout.

A benchmark is a module of this folder with `rows(args) -> list[dict]` (form:
`bench.rows`), a docstring whose first line says what it measures, and, when it
starts processes of its own, `PIN_CPU = False`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

from blindtail.errors import BlindtailError, ConfigError

# One native thread, before numpy is imported: numbers are then comparable.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

_HELPERS = {"ahead", "__main__", "rows", "results", "evidence", "tails", "interleave", "peers"}
_HELPERS |= {"lint_nets", "net_rows", "random_layers", "random_networks", "refresh_nets", "tenseal_mm"}


def names() -> list[str]:
    """Every benchmark there is."""
    package = importlib.import_module("bench")
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in _HELPERS)


def run(name: str, args: argparse.Namespace, sources: Sequence[str] = ()) -> bool:
    """Runs one benchmark, prints and saves its rows; True when every target holds."""
    from bench import results
    from bench.rows import check, text

    module = importlib.import_module(f"bench.{name}")
    before = os.sched_getaffinity(0)
    if getattr(module, "PIN_CPU", True):
        os.sched_setaffinity(0, {max(before)})
    try:
        rows = module.rows(args)
    finally:
        os.sched_setaffinity(0, before)
    for row in rows:
        check(row)
    if args.save:
        results.save(name, rows, sources or _sources(name, module))
    print(json.dumps(rows, indent=1) if args.json else f"{name}\n{text(rows)}\n", flush=True)
    return all(row["holds"] is not False for row in rows)


def _sources(name: str, module: ModuleType) -> Sequence[str]:
    from bench.evidence import ITEMS

    for item in ITEMS:
        if item.bench == name:
            return item.sources
    return tuple(getattr(module, "SOURCES", (f"bench/{name}.py",)))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="blindtail bench",
        description="Every number we quote, one command each.",
    )
    parser.add_argument("name", help=f"one of: {', '.join(names())}; or all, list, evidence")
    parser.add_argument("only", nargs="*", help="with 'all': just these")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions, for a look")
    parser.add_argument("--no-save", dest="save", action="store_false", help="leave bench/results alone")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="NAME=PYTHON",
        help="he: a rival (pyhelayers, orion-v2) and its interpreter; may be repeated",
    )
    parser.add_argument("--threads", type=_threads, default=1, help="he: native threads of one evaluation")
    parser.add_argument("--nets", help="he: some of A,B,C,D,E,demo  [default: all]")
    args = parser.parse_args(arguments)
    if args.name == "list":
        print("\n".join(names()))
        return 0
    if args.name == "evidence":
        return _evidence(args)
    wanted = (args.only or names()) if args.name == "all" else [args.name]
    if unknown := sorted(set(wanted) - set(names())):
        parser.error(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(names())}")
    if args.quick or args.nets or args.threads != 1:
        args.save = False  # a quick look or a part is no result
    held = []
    for name in wanted:  # all of them, also after a missed target
        try:
            held.append(run(name, args))
        except BlindtailError as error:
            print(f"bench {name}: {error}", file=sys.stderr)
            if len(wanted) == 1:
                return 2 if isinstance(error, ConfigError) else 1
            held.append(False)
    return 0 if all(held) else 1


def _threads(text: str) -> int:
    if not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError("between 1 and 256")
    return int(text)


def _evidence(args: argparse.Namespace) -> int:
    from bench.evidence import stale

    work = stale()
    if not work:
        print("all quoted results belong to the present sources")
    good = True
    for item, reason in work:
        print(f"{item.bench}: {reason}", file=sys.stderr, flush=True)
        good &= run(item.bench, main_args(args, item.arguments), item.sources)
    return 0 if good else 1


def main_args(args: argparse.Namespace, extra: Sequence[str]) -> argparse.Namespace:
    """The options of an evidence run, with the item's own arguments."""
    made = argparse.Namespace(**vars(args))
    for word in extra:
        name, _, value = word.removeprefix("--").partition("=")
        setattr(made, name.replace("-", "_"), value or True)
    return made


if __name__ == "__main__":
    sys.exit(main())
