"""Places where a network can be cut: whether the tail after each runs encrypted, and what it costs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import fx

from blindtail.errors import ModelError
from blindtail.he.bases import MAX_WIDTH
from blindtail.models import findings
from blindtail.models.findings import Finding
from blindtail.models.network import Network, Outcome, most_levels
from blindtail.models.plans import (
    DENSE,
    MOST_DENSE_ENTRIES,
    Plan,
    dense_plan,
    plan,
    tail_module,
    too_large,
)
from blindtail.models.tracing import first_line
from blindtail.progress import Progress, Span

Shape = tuple[int, ...]
#: (plans made, plans to make, the cut that is planned)
#: Random inputs where no calibration data is given.
RANDOM_INPUTS = 16


@dataclass(frozen=True)
class Cut:
    """A candidate: head up to here at the edge, tail after it encrypted.

    verdict   "runs" as it is, "rewrite" (after the rewrites of `rewrites`), or "edge" (`problems` say why)
    depth     levels that the tail consumes, rewrites made
    worthwhile  False where a later cut costs less and hides the same weights
    plan      what it costs, rewrites made; None where it cannot run or `note` says why not
    """

    name: str
    shape: Shape
    values: int
    depth: int
    verdict: str
    rewrites: tuple[str, ...]
    problems: tuple[str, ...]
    worthwhile: bool
    plan: Plan | None = None
    note: str = ""
    surprising: bool = (
        False  # the compiler refused what was read as able to run, with these weights or at all
    )

    def to_json(self) -> dict[str, Any]:
        found = {k: getattr(self, k) for k in ("name", "values", "depth", "verdict", "worthwhile", "note")}
        return {
            **found,
            "shape": list(self.shape),
            "rewrites": list(self.rewrites),
            "problems": list(self.problems),
            "plan": None if self.plan is None else self.plan.to_json(),
        }


@dataclass
class Draft:
    """A cut before it has a plan: the walk as it is, and with all rewrites made."""

    node: fx.Node
    plain: Outcome
    changed: Outcome
    problems: tuple[str, ...]  # that no rewrite mends

    @property
    def verdict(self) -> str:
        if self.problems:
            return "edge"
        return "rewrite" if self.plain.problems else "runs"

    @property
    def walk(self) -> Outcome:
        return self.plain if self.verdict == "runs" else self.changed


def draft(network: Network, node: fx.Node, broken: Mapping[str, Finding]) -> Draft:
    plain, changed = network.follow(node, rewritten=False), network.follow(node, rewritten=True)
    problems = [p.text for p in changed.problems]
    wide = network.width(node) > MAX_WIDTH
    square = next((n for n in changed.levels if findings.values_squared(network, n) > MAX_WIDTH), None)
    if wide or square is not None:
        values = network.width(node) if wide or square is None else findings.values_squared(network, square)
        where = "at the cut" if wide or square is None else f"into {network.told(square)}"
        problems.append(
            f"too wide: {values} values {where}, a tail holds {MAX_WIDTH}: cut later, or pool before it"
        )
    if changed.depth > most_levels():
        problems.append(
            f"too deep: {changed.depth} levels for {changed.squares} squares, the largest 128-bit ring holds "
            f"{most_levels()}: cut later"
        )
    if node.meta["value"][:1] != (2,) or node.meta["third"][:1] != (3,):
        problems.append("the activation here has no batch in dimension 0: keep the batch first")
    if network.unsteady:
        problems.append(f"its forward {network.unsteady}: leave the batch alone, for instance flatten(1)")
    if network.order[node] < network.same_after:
        lines = ", ".join(sorted({d.line for d in network.traced.decisions}))
        problems.append(
            f"its forward branches on the values of an activation after here ({lines}): cut after that, so "
            "that it stays at the edge, or write it as a plain chain of layers"
        )
    for tail_node in network.after(node):
        sources = [tail_node, *(n for n in tail_node.all_input_nodes if n.op == "get_attr")]
        for path in (str(n.target) for n in sources if n.op in ("call_module", "get_attr")):
            found = [f for f in broken.values() if findings.holds(path, f.layer)]
            problems += [f"{f.layer}: {f.reason}; {f.advice or f.rewrite}" for f in found]
    return Draft(node, plain, changed, tuple(dict.fromkeys(problems)))


def something_left(network: Network, node: fx.Node) -> bool:
    return any(not network.moves(n) for n in network.after(node) if n in network.reaching)


def planned(
    network: Network,
    drafts: Sequence[Draft],
    samples: Mapping[fx.Node, NDArray[np.float64]],
    plans: bool,
    named: bool,
    progress: Progress | None,
    calibrated: bool,
) -> list[Cut]:
    made, whole = [], Span.of(progress)
    for draft, part in whole.over(drafts):
        part.at(0.0, network.name(draft.node))
        (own,) = part.parts(1, name=f"{network.name(draft.node)}: ")
        made.append(_plan_one(network, draft, samples, plans, named, calibrated, own))
    return whole.ended(made)


def _plan_one(
    network: Network,
    draft: Draft,
    samples: Mapping[fx.Node, NDArray[np.float64]],
    plans: bool,
    named: bool,
    calibrated: bool,
    span: Span,
) -> Cut:
    node, walk, verdict = draft.node, draft.walk, draft.verdict
    problems, note, found, surprising = list(draft.problems), "", None, False
    shape = tuple(int(n) for n in node.meta["value"][1:])
    if verdict != "edge" and plans:
        note = too_large(network, node, walk, named)
        values = samples.get(node, _normal(network.width(node)))
        try:
            if note and network.natural(node) and _entries(walk, network) <= MOST_DENSE_ENTRIES:
                found, note = dense_plan(walk.widths, network.width(network.output)), DENSE
            elif not note:
                tail = tail_module(network, node, walk if verdict == "rewrite" else None)
                found, trouble = plan(tail, shape, values, own_weights=verdict == "runs", progress=span)
                if trouble and calibrated:
                    verdict, note, surprising = "rewrite", trouble, True
                elif trouble:
                    note = f"with these weights and random inputs: {trouble}"
        except ModelError as error:
            verdict, surprising = "edge", True
            problems.append(first_line(error))
        except (RuntimeError, MemoryError) as error:
            note = f"not planned: {first_line(error)}"
    rewrites = [network.told(n) for n in (*walk.rewritten, *walk.left_out)]
    if verdict == "rewrite":
        rewrites += ["output"] * (not network.plain_output)
    return Cut(
        name=network.name(node),
        shape=shape,
        values=network.width(node),
        depth=walk.depth,
        verdict=verdict,
        rewrites=tuple(dict.fromkeys(rewrites)),
        problems=tuple(problems),
        worthwhile=network.natural(node),
        plan=found,
        note=note,
        surprising=surprising,
    )


def _entries(walk: Outcome, network: Network) -> int:
    """Entries of a tail's maps, were they dense."""
    sizes = [*walk.widths, network.width(network.output)]
    return sum(a * b for a, b in itertools.pairwise(sizes))


def _normal(width: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).standard_normal((RANDOM_INPUTS, width))
