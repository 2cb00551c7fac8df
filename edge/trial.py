"""A policy on trial: it decides on synthetic inputs of every kind before it meets a real one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from blindtail.bundle import EdgeBundle
from blindtail.errors import ConfigError
from blindtail.records import Action, Decision, DecisionContext, ExitSeen, LatencyEstimate
from orchestrator.policy import Policy, make_policy

_CONFIDENCES = (0.0, 0.5, 0.9, 1.0)
#: (deadline, time gone), seconds.
_TIMES = ((None, 0.01), (1.0, 0.01), (0.05, 0.01), (0.01, 1.0))
_OFFLOADS = (LatencyEstimate(0.0, 0.0), LatencyEstimate(0.02, 0.04, 50), LatencyEstimate(2.0, 9.0, 3))


def policy_for(bundle: EdgeBundle, name: str, parameters: Mapping[str, Any] | None = None) -> Policy:
    """The policy of that name, made for this model and tried.

    Raises `ConfigError` that says why this edge cannot follow it: an unknown policy or
    parameter (of a newer release), a number of thresholds that is not the model's, a
    cut that it does not have, or a decision that makes no sense.
    """
    try:
        policy = make_policy(name, parameters, thresholds=[e.threshold for e in bundle.exits])
    except Exception as error:  # whatever a parameter of a strange kind brings about
        raise ConfigError(str(error) or type(error).__name__) from error
    _check_cut(bundle, parameters or {})
    for context in contexts(bundle):
        try:
            decision = policy.decide(context)
        except Exception as error:
            raise ConfigError(
                f"policy {name} fails after stage {context.stage}: {type(error).__name__}: {error}"
            ) from error
        _check(bundle, name, context, decision)
    return policy


def contexts(bundle: EdgeBundle) -> Iterator[DecisionContext]:
    """What a policy can come to see of this model: some hundred combinations."""
    exit_after = {e.after_stage: i for i, e in enumerate(bundle.exits)}
    stages = len(bundle.stages)
    for stage in range(stages):
        indices = [i for after, i in sorted(exit_after.items()) if after <= stage]
        cut_here, later = stage in bundle.cuts, any(after > stage for after in exit_after)
        for sure, (deadline_s, elapsed_s), ready in itertools.product(_CONFIDENCES, _TIMES, (True, False)):
            seen = tuple(ExitSeen(i, sure, sure / 2, 1.0 - sure) for i in indices)
            for offload in _OFFLOADS if cut_here and ready else (None,):
                yield DecisionContext(
                    stage=stage,
                    stages=stages,
                    exits=seen,
                    exit_here=exit_after.get(stage),
                    cut_here=cut_here,
                    tail_ready=ready,
                    elapsed_s=elapsed_s,
                    deadline_s=deadline_s,
                    offload=offload,
                    next_exit=LatencyEstimate(0.001, 0.002, 9) if later else None,
                    cut_ahead=any(cut > stage for cut in bundle.cuts),
                    ticket=offload is not None and offload.samples > 0,
                    eval_online_s=0.001 if cut_here else None,
                    eval_total_s=0.004 if cut_here else None,
                )


def _check_cut(bundle: EdgeBundle, parameters: Mapping[str, Any]) -> None:
    cut = parameters.get("cut")
    if cut is not None and cut not in bundle.cuts:
        known = ", ".join(map(str, sorted(bundle.cuts))) or "none"
        raise ConfigError(f"model {bundle.model} has no cut after stage {cut}; cuts: {known}")


def _check(bundle: EdgeBundle, name: str, context: DecisionContext, decision: object) -> None:
    where = f"policy {name}, after stage {context.stage},"
    if not isinstance(decision, Decision) or not isinstance(decision.action, Action):
        raise ConfigError(f"{where} gives no decision but {type(decision).__name__}")
    if decision.action is Action.OFFLOAD and not context.can_offload:
        raise ConfigError(f"{where} offloads where no tail can answer")
    index = decision.exit_index
    if decision.action is Action.EXIT and index is not None and index not in {e.index for e in context.exits}:
        raise ConfigError(f"{where} answers from exit {index}, which it has not seen")
