"""Every metric that blindtail exports, declared once.

The objects that count (`blindtail.metrics.series`), docs/metrics.md and the tests
of dashboards and alert rules are all made from `TABLE`. Prefix `blindtail_`, base
units (seconds, bytes). A label is either a set of fixed values or open with a cap;
what does not fit is counted as "other", so that no peer and no file can grow the
number of series. Labels never name a client, a device, a session or a key.
"""

from __future__ import annotations

from blindtail import errors
from blindtail.metrics.metric import Label, Metric, Role

#: 1 ms to 10 s.
LATENCY_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
UPLOAD_S = (0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)

#: "ok", or the class of the error that the caller gets.
OUTCOMES = (
    "ok",
    *sorted(
        name
        for name in errors.__all__
        if isinstance(kind := getattr(errors, name), type) and issubclass(kind, errors.TailError)
    ),
)
#: `blindtail.records.Answer.fallback`.
FALLBACKS = ("deadline", "unavailable", "overloaded", "session", "keys", "evaluation", "refused")
#: `edge.tail.TailState`, by name.
TAIL_STATES = (
    "starting",
    "keys",
    "uploading",
    "checking",
    "ready",
    "joining",
    "away",
    "mismatch",
    "denied",
    "failed",
    "closed",
)
ROUTES = 16

MODEL = Label("model", cap=32)
VERSION = Label("version", cap=32)
ROUTE = Label("route", cap=ROUTES)
OUTCOME = Label("outcome", OUTCOMES)
REASON = Label("reason", FALLBACKS)
#: Of a seed: it was announced, its ticket was made; a ticket answered, its request went the normal
#: way, or no request came in time.
TICKET = Label("event", ("announced", "made", "used", "missed", "dropped"))
ACK = Label("outcome", ("applied", "refused"))
#: The evaluator's place in its cell; a cell is configured with at most 1024.
EVALUATOR = Label("evaluator", cap=1024)

_EDGE: tuple[Role, ...] = ("edge",)
_CELL: tuple[Role, ...] = ("cell",)
_ORCHESTRATOR: tuple[Role, ...] = ("orchestrator",)
_ALL: tuple[Role, ...] = ("edge", "cell", "orchestrator")

TABLE: tuple[Metric, ...] = (
    # -- every role ------------------------------------------------------------
    Metric(
        _ALL,
        "blindtail_build_info",
        "gauge",
        "1, with the role of this process and the release it runs.",
        "1",
        (Label("role", _ALL), Label("release", cap=1)),
    ),
    Metric(
        _ALL,
        "blindtail_certificate_expiry_timestamp_seconds",
        "gauge",
        "When this process's own TLS certificate ends, Unix time; absent without TLS.",
        "seconds",
        live=True,
    ),
    # -- edge ------------------------------------------------------------------
    Metric(_EDGE, "blindtail_edge_requests", "counter", "Answers, by route.", "1", (MODEL, ROUTE)),
    Metric(
        _EDGE,
        "blindtail_edge_fallbacks",
        "counter",
        "Offloads that an exit answered instead, by reason.",
        "1",
        (MODEL, REASON),
    ),
    Metric(
        _EDGE,
        "blindtail_edge_latency_seconds",
        "histogram",
        "From the call of infer to its answer, by route.",
        "seconds",
        (MODEL, ROUTE),
        LATENCY_S,
    ),
    Metric(_EDGE, "blindtail_edge_uplink_bytes", "counter", "Encrypted activations sent.", "bytes", (MODEL,)),
    Metric(_EDGE, "blindtail_edge_reply_bytes", "counter", "Encrypted logits received.", "bytes", (MODEL,)),
    Metric(
        _EDGE,
        "blindtail_edge_key_upload_seconds",
        "histogram",
        "From the start of an upload of evaluation keys until they are usable.",
        "seconds",
        (MODEL,),
        UPLOAD_S,
    ),
    Metric(
        _EDGE,
        "blindtail_edge_tail_state",
        "gauge",
        "1 for the state that the encrypted tail of a cut is in, 0 for the others.",
        "1",
        (MODEL, Label("cut", cap=16), Label("state", TAIL_STATES)),
        live=True,
    ),
    Metric(
        _EDGE,
        "blindtail_edge_policy_version",
        "gauge",
        "Version of the orchestrator's policy in force; 0 = the edge's own.",
        "1",
        (MODEL,),
        live=True,
        merge="max",
    ),
    Metric(
        _EDGE,
        "blindtail_edge_policy_updates",
        "counter",
        "Policies that came from the orchestrator, by what became of them.",
        "1",
        (MODEL, ACK),
    ),
    Metric(
        _EDGE,
        "blindtail_edge_orchestrator_attached",
        "gauge",
        "1 while the stream to the orchestrator stands; absent where none is configured.",
        "1",
        (MODEL,),
        live=True,
        merge="max",
    ),
    # -- cell ------------------------------------------------------------------
    Metric(
        _CELL,
        "blindtail_cloud_requests",
        "counter",
        "Evaluations asked for, by the version that answered (refused ones: the session's) and outcome.",
        "1",
        (MODEL, VERSION, OUTCOME),
    ),
    Metric(
        _CELL,
        "blindtail_cloud_queue_seconds",
        "histogram",
        "From the arrival of a request to the start of its evaluation.",
        "seconds",
        (),
        LATENCY_S,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluation_seconds",
        "histogram",
        "One evaluation, container in to container out.",
        "seconds",
        (MODEL,),
        LATENCY_S,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_key_uploads",
        "counter",
        "Uploads of keys by edges, by outcome.",
        "1",
        (OUTCOME,),
    ),
    Metric(
        _CELL,
        "blindtail_cloud_key_transfers",
        "counter",
        "Key sets fetched from and given to other cells, by outcome.",
        "1",
        (Label("direction", ("fetched", "given")), OUTCOME),
    ),
    Metric(
        _CELL,
        "blindtail_cloud_tickets",
        "counter",
        "Seeds that clients announced, tickets made of them ahead of requests, and how each seed ended.",
        "1",
        (MODEL, TICKET),
    ),
    Metric(
        _CELL,
        "blindtail_cloud_ticket_bytes",
        "gauge",
        "Tickets in evaluators' memory (bounded by tickets.budget_bytes).",
        "bytes",
        (MODEL,),
        live=True,
    ),
    Metric(_CELL, "blindtail_cloud_queue_depth", "gauge", "Requests that wait.", "1", live=True),
    Metric(
        _CELL, "blindtail_cloud_queue_limit", "gauge", "Requests that may wait (queue.jobs).", "1", live=True
    ),
    Metric(
        _CELL,
        "blindtail_cloud_backlog_seconds",
        "gauge",
        "Predicted evaluation time of all that waits or runs.",
        "seconds",
        live=True,
    ),
    Metric(_CELL, "blindtail_cloud_sessions", "gauge", "Sessions that are open.", "1", live=True),
    Metric(
        _CELL,
        "blindtail_cloud_key_store_bytes",
        "gauge",
        "Evaluation keys on disk, as uploaded and as prepared.",
        "bytes",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_key_store_budget_bytes",
        "gauge",
        "What prepared evaluation keys may take on disk (keys.budget_bytes).",
        "bytes",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_draining",
        "gauge",
        "1 while the cell sends its sessions away and takes no new ones.",
        "1",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_orchestrator_attached",
        "gauge",
        "1 while the stream to the orchestrator stands; absent where none is configured.",
        "1",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_model_share",
        "gauge",
        "Share of its model's other versions' requests that a version answers too: 0 none, 1 promoted.",
        "1",
        (MODEL, VERSION),
        live=True,
    ),
    Metric(_CELL, "blindtail_cloud_evaluators", "gauge", "Evaluators that are up.", "1", live=True),
    Metric(
        _CELL,
        "blindtail_cloud_evaluators_wanted",
        "gauge",
        "Evaluators that the cell is configured with.",
        "1",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluator_restarts",
        "counter",
        "Evaluators started again since the cell started.",
        "1",
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluator_evaluations",
        "counter",
        "Evaluations that the process in this place has finished.",
        "1",
        (EVALUATOR,),
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluator_key_loads",
        "counter",
        "Key sets that the process in this place has loaded from disk.",
        "1",
        (EVALUATOR,),
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluator_loaded_key_bytes",
        "gauge",
        "Keys that the process in this place holds loaded.",
        "bytes",
        (EVALUATOR,),
        live=True,
    ),
    Metric(
        _CELL,
        "blindtail_cloud_evaluator_resident_bytes",
        "gauge",
        "Memory of the process in this place, files of keys and encoded weights that it maps included. "
        "Evaluators share those: they are in memory once.",
        "bytes",
        (EVALUATOR,),
        live=True,
    ),
    # -- orchestrator ----------------------------------------------------------
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_peers",
        "gauge",
        "Attached edges and cells, by the model they run (a cell counts for each of its models).",
        "1",
        (Label("kind", ("edge", "cell")), MODEL),
        live=True,
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_policy_version",
        "gauge",
        'Version of the policy in force for a model; model "" is the one for all others.',
        "1",
        (MODEL,),
        live=True,
        merge="max",
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_policies_set",
        "counter",
        "Policies that operators sent, by what became of them.",
        "1",
        (Label("outcome", ("accepted", "refused")),),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_acks",
        "counter",
        "Edges' words on a policy.",
        "1",
        (MODEL, ACK),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_rollbacks",
        "counter",
        "Policies taken back because edges refused them.",
        "1",
        (MODEL,),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_reports",
        "counter",
        "Reports received.",
        "1",
        (Label("kind", ("edge", "cell")),),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_answers",
        "counter",
        "Answers of all edges, as they report them.",
        "1",
        (MODEL, ROUTE),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_fallbacks",
        "counter",
        "Offloads that an exit answered instead, as edges report them.",
        "1",
        (MODEL, REASON),
    ),
    Metric(
        _ORCHESTRATOR,
        "blindtail_orchestrator_stream_errors",
        "counter",
        "Streams that ended with an error, by its class.",
        "1",
        (Label("error", (*OUTCOMES[1:], "broken")),),
    ),
)


def of_role(role: Role) -> dict[str, Metric]:
    """Name -> metric, of those that a role exports."""
    return {metric.name: metric for metric in TABLE if role in metric.roles}


__all__ = ["FALLBACKS", "OUTCOMES", "TABLE", "TAIL_STATES", "of_role"]
