"""The tails of an owner's network, as `blindtail plan` plans them before there is a cloud.bt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from blindtail.errors import ConfigError, ModelError
from blindtail.he.compiler import check_depth
from blindtail.he.frontend import fold_tail
from blindtail.he.layers import Layer
from blindtail.models import named
from blindtail.models.cuts import Cut
from blindtail.models.lint import LintReport, lint, rewritten_tail
from blindtail.models.split import SplitModel
from blindtail.progress import Progress, Span


@dataclass(frozen=True)
class Tails:
    """layers    of each tail, folded, by what it comes after
    rewrites  layers that lint advises to write anew, which `layers` has done already
    """

    model: str
    layers: Mapping[str, Sequence[Layer]]
    rewrites: tuple[str, ...] = ()


def tails(where: str, inputs: Sequence[str], cut: str | None, progress: Progress | None = None) -> Tails:
    """Folded tails of the network that `where` names (`blindtail.models.named`).

    inputs  shapes, "3,32,32"; a `SplitModel` brings its own
    cut     a name of `LintReport.cuts`, of a `SplitModel` the number of a stage; without it the first
            cut that lint advises, of a `SplitModel` all
    progress  told of the layers that are folded

    Raises `ConfigError` with the layer's name and the way out.
    """
    shapes, whole = [named.shape(text) for text in inputs], Span.of(progress)
    found = named.module(where)
    try:
        with np.errstate(all="ignore"):  # costs do not depend on weights, which may be untrained
            if isinstance(found, SplitModel):
                return whole.ended(_of_parts(found, cut, whole))
            report = lint(found, named.given(shapes), cut=cut, plans=False)
            chosen = report.cuts[0] if cut is not None and report.cuts else _advised(report)
            layers = fold_tail(rewritten_tail(found, shapes, cut or chosen.name), chosen.shape, whole)
    except ModelError as error:
        raise ConfigError(f"{error} (`blindtail lint` shows all of it)") from error
    return Tails(report.network, {chosen.name: layers}, chosen.rewrites)


def _of_parts(model: SplitModel, cut: str | None, span: Span) -> Tails:
    numbers = {str(number): number for number in model.cuts}
    if cut is not None and cut not in numbers:
        raise ConfigError(f"--cut {cut}: {model.name} is cut after stages {', '.join(numbers)}")
    asked = [number for name, number in numbers.items() if cut in (None, name)]
    made = {
        f"stage {number}": fold_tail(model.tail(number), model.stage_infos[number].output_shape, part)
        for number, part in span.over(asked)
    }
    if not made:
        raise ModelError(f"model {model.name!r} has no tail: give SplitModel one in `tails`")
    for layers in made.values():
        check_depth(layers)
    return Tails(model.name, made)


def _advised(report: LintReport) -> Cut:
    """The first cut worth it that runs, else the first that does after rewrites. Raises `ModelError`."""
    for verdict in ("runs", "rewrite"):
        for cut in report.cuts:
            if cut.worthwhile and cut.verdict == verdict:
                return cut
    told = [f"{f.layer}: {f.reason}; {f.rewrite}" for f in report.problems]
    told += [f"after {cut.name}: {cut.problems[0]}" for cut in report.cuts[-1:] if cut.problems]
    raise ModelError(f"no tail of {report.network} can run encrypted: {'; '.join(told[:2])}")


__all__ = ["Tails", "tails"]
