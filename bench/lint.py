"""`lint` on networks made by hand: verdicts, layers named, rewrites that run, depth as compiled, safe plans.

Twelve networks as people write them, each with what must be said of it; then
random ones (`bench.random_networks`) for the depth. The tests run the same.
`--quick` takes fewer random networks.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from bench import lint_nets as nets
from bench.lint_nets import mlp
from bench.random_networks import random_network
from bench.rows import Row, row
from blindtail.errors import ModelError
from blindtail.he.frontend import fold_tail
from blindtail.he.normal import normalised
from blindtail.he.params import MAX_LOG2_Q_128
from blindtail.models.layers import Quadratic, Square
from blindtail.models.lint import LintReport, lint, split

SOURCES = ("blindtail/he/*.py", "blindtail/models/*.py", "bench/lint*.py", "bench/random_*.py")
_RANDOM = 60
#: Rewrites of these are statements that can be run as they stand.
PASTED = ("relu and max pooling", "softmax at the end", "layer norm")
#: Costs of these take long to find, and are not asked for.
UNPLANNED = ("functions in the forward", "too deep")


@dataclass(frozen=True)
class Case:
    """A network and what must be said of it."""

    net: Callable[[], nn.Module]
    shape: tuple[int, ...]
    whole: str
    depth: int  # of the whole, rewrites made
    findings: dict[str, str] = field(default_factory=dict)  # layer -> verdict; no others
    words: tuple[str, ...] = ()  # in the reasons and rewrites
    first: str = ""  # the first cut that runs as it is, "" for none

    def made(self) -> nn.Module:
        """The network, the same every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.net()


#: Twelve networks made by hand, twelve verdicts.
TWELVE: dict[str, Case] = {
    "squares": Case(lambda: mlp(16, 8, 8, 4), (16,), "runs", 5, first="input"),
    "relu and max pooling": Case(
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 3)),
        ),
        (1, 8, 8),
        "rewrite",
        3,
        {"2": "rewrite", "3": "rewrite"},
        ("self[2] = Square()  # was ReLU", "self[3] = nn.AvgPool2d(2, 2)  # was MaxPool2d"),
        "3",
    ),
    "functions in the forward": Case(
        nets.LeNet,
        (1, 28, 28),
        "rewrite",
        9,
        {"relu": "rewrite", "max_pool2d": "rewrite"},
        ("Square()", "nn.AvgPool2d(2, 2)", "lint_nets.py:"),
        "relu@4",
    ),
    "softmax at the end": Case(
        lambda: nn.Sequential(nn.Linear(8, 4), nn.Softmax(dim=-1)),
        (8,),
        "rewrite",
        1,
        {"1": "rewrite"},
        ("self[1] = nn.Identity()", "plain logits"),
    ),
    "layer norm": Case(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), Square(), nn.Linear(8, 2)),
        (8,),
        "rewrite",
        3,
        {"1": "rewrite"},
        ("self[1] = nn.BatchNorm1d(8)  # was LayerNorm", "statistics"),
        "1",
    ),
    "a skip around activations": Case(
        lambda: nn.Sequential(nets.BasicBlock(2, 2, act=Square()), nn.Flatten(), nn.Linear(32, 3)),
        (2, 4, 4),
        "runs",
        5,
        first="input",
    ),
    "attention": Case(
        nets.Vit,
        (3, 32, 32),
        "edge",
        5,
        {
            **{f"blocks.{i}.{name}": "rewrite" for i in (0, 1) for name in ("norm1", "norm2", "mlp.1")},
            "blocks.0.attn": "edge",
            "blocks.1.attn": "edge",
            "norm": "rewrite",
        },
        ("multiplies activations with each other", "self.blocks[0].mlp[1] = Quadratic()  # was GELU"),
        "norm",
    ),
    "recurrent": Case(
        nets.Lstm, (7,), "edge", 1, {"embed": "edge", "lstm": "edge"}, ("cut the network after",), "lstm"
    ),
    "a product of activations": Case(
        nets.Gate, (4,), "edge", 1, {"mul": "rewrite"}, ("two different activations", "torch.cat"), "mul"
    ),
    "a branch on values": Case(
        nets.Branching,
        (4,),
        "edge",
        3,
        {"forward": "edge"},
        ("lint_nets.py:", "branches on the values"),
        "mul",
    ),
    "too deep": Case(
        lambda: mlp(*[4] * 15, 2), (4,), "edge", 29, {"3": "edge"}, ("29 levels", "cut after 3"), "3"
    ),
    "weights with NaN": Case(
        lambda: _poisoned(mlp(8, 8, 2), "0.weight"),
        (8,),
        "edge",
        3,
        {"0": "rewrite"},
        ("0.weight holds NaN", "checkpoint"),
        "0",
    ),
}


def _poisoned(net: nn.Module, path: str) -> nn.Module:
    with torch.no_grad():
        net.get_parameter(path).view(-1)[0] = float("nan")
    return net


@dataclass(frozen=True)
class Agreement:
    """Whether what lint says of a network is what the compiler does.

    faults    of it, in words
    runnable  cuts that run as they are, each compiled and its levels counted
    plans     that were made
    unsafe    of these, above the 128-bit bound
    """

    faults: tuple[str, ...]
    runnable: int
    plans: int
    unsafe: int


def rows(args: argparse.Namespace) -> list[Row]:
    random = _RANDOM // (10 if args.quick else 1)
    verdicts, agreements, rewritten, to_rewrite = 0, list[Agreement](), 0, 0
    wrong: list[str] = []
    for name, case in TWELVE.items():
        net = case.made()
        report = lint(net, case.shape, plans=name not in UNPLANNED)
        faults = right(case, report)
        verdicts += not faults
        wrong += [f"{name}: {fault}" for fault in faults]
        agreements.append(agreement(net, case.shape, report))
        if report.whole is not None and report.whole.verdict == "rewrite":
            to_rewrite += 1
            rewritten += lint(net, case.shape, cut="input").cuts[0].plan is not None
    pasted = [name for name in PASTED if runs_when_pasted(TWELVE[name])]
    for seed in range(random):
        network = random_network(seed)
        report = lint(network.module.float(), network.shape, plans=False)
        agreements.append(agreement(network.module, network.shape, report))
    odd = [fault for found in agreements for fault in found.faults]
    count, plans = sum(found.runnable for found in agreements), sum(found.plans for found in agreements)
    made = f"{len(TWELVE)} made by hand, {random} random"
    return [
        row("verdicts that are right, layers and rewrites named", verdicts, "networks", target=len(TWELVE),
            at_most=False, n=len(TWELVE), note="; ".join(wrong[:3])),
        row("to rewrite: compiled with the rewrites made", rewritten, "networks", target=to_rewrite,
            at_most=False, n=to_rewrite),
        row("rewrites pasted as they stand, then it runs", len(pasted), "networks", target=len(PASTED),
            at_most=False, n=len(PASTED)),
        row("depth predicted that is not the levels consumed", len(odd), "cuts", target=0, n=count,
            note="; ".join(odd[:3]) or f"every cut that runs, networks: {made}"),
        row("plans above the 128-bit bound", sum(found.unsafe for found in agreements), "plans", target=0,
            n=plans),
    ]  # fmt: skip


def right(case: Case, report: LintReport) -> list[str]:
    """What a report says that it must not, or does not say that it must."""
    if report.whole is None:
        return ["no verdict on the whole"]
    told = report.problems
    text = "\n".join(f"{f.line} {f.reason} | {f.rewrite} | {f.advice}" for f in told)
    first = next((cut.name for cut in report.cuts if cut.verdict == "runs"), "")
    pairs = (
        ("verdict", report.whole.verdict, case.whole),
        ("depth", report.whole.depth, case.depth),
        ("layers", {f.layer: f.verdict for f in told}, case.findings),
        ("first cut that runs", first, case.first),
    )
    faults = [f"{what} {found}, not {wanted}" for what, found, wanted in pairs if found != wanted]
    faults += [f"does not say {word!r}" for word in case.words if word not in text]
    return faults + [f"{f.layer}: no reason or no rewrite" for f in told if not (f.reason and f.rewrite)]


def agreement(net: nn.Module, shape: tuple[int, ...], report: LintReport) -> Agreement:
    """Fold the whole and every cut that runs, and compare; look at every plan."""
    faults, runnable, plans, unsafe = list[str](), 0, 0, 0
    if report.whole is not None:
        try:
            levels = normalised(fold_tail(net, shape)).depth
            wanted = "runs" if levels < 27 else "edge"
            if (report.whole.verdict, report.whole.depth) != (wanted, levels):
                faults.append(
                    f"the whole {report.whole.verdict} with {report.whole.depth} levels, not {levels}"
                )
        except ModelError as error:
            if report.whole.verdict == "runs":
                faults.append(f"the whole runs, but: {error}")
    for cut in report.cuts:
        if (cut.verdict == "edge") != bool(cut.problems):
            faults.append(f"{cut.name}: {cut.verdict}, {cut.depth} levels, problems {cut.problems}")
        if cut.plan is not None:
            plans += 1
            unsafe += cut.plan.log2_key_modulus > MAX_LOG2_Q_128[cut.plan.ring_degree]
            if not cut.plan.depth == cut.depth <= cut.plan.ring_levels:
                faults.append(f"{cut.name}: {cut.depth} levels, its plan {cut.plan.depth}")
        if cut.verdict == "runs":
            runnable += 1
            _, tail = split(net, shape, after=cut.name)
            levels = normalised(fold_tail(tail, cut.shape)).depth
            if levels != cut.depth:
                faults.append(f"{cut.name}: {cut.depth} levels predicted, {levels} consumed")
    return Agreement(tuple(faults), runnable, plans, unsafe)


def runs_when_pasted(case: Case) -> bool:
    """Whether the network runs, with as many levels as foretold, once its rewrites were run as code."""
    net = case.made()
    before = lint(net, case.shape, plans=False)
    for finding in before.problems:
        exec(finding.rewrite, {"self": net, "nn": nn, "Square": Square, "Quadratic": Quadratic})  # noqa: S102
    after = lint(net, case.shape)
    if before.whole is None or after.whole is None or after.problems:
        return False
    agreed = not agreement(net, case.shape, after).faults
    return agreed and (after.whole.verdict, after.whole.depth) == ("runs", before.whole.depth)
