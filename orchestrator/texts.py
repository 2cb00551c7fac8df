"""Policies and the fleet for an operator's eyes, and as JSON. Peers' texts lose their control characters."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from blindtail.errors import ConfigError
from blindtail.policy_document import PolicyDocument
from blindtail.wire.control import CellLoad, PeerKind, Report
from blindtail.wire.policies import FleetPeer, PolicyEntry, UsageCount


def entry_json(entry: PolicyEntry) -> dict[str, Any]:
    """One version of a policy; `document` is None when this release cannot read it."""
    try:
        document: dict[str, Any] | None = PolicyDocument.decode(entry.update.document).to_json()
    except ConfigError:
        document = None
    return {
        "version": entry.update.version,
        "model": entry.update.model,
        "state": entry.state.value,
        "document": document,
        "created_unix_s": entry.created_unix_s,
        "author": entry.author,
        "note": entry.note,
        "applied": entry.applied,
        "refused": entry.refused,
    }


def entry_text(entry: PolicyEntry) -> str:
    """Two or three lines."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.created_unix_s))
    lines = [
        f"version {entry.update.version}  {_for(entry.update.model)}  {entry.state.value}",
        f"  {document_text(entry.update.document)}",
        f"  {when} by {plain(entry.author)}; applied by {entry.applied} attached, refused by {entry.refused}",
    ]
    if entry.note:
        lines.append(f"  {plain(entry.note)}")
    return "\n".join(lines)


def document_text(data: bytes) -> str:
    """ "deadline, safety = 1.2, deadline of 0.5 s"."""
    try:
        document = PolicyDocument.decode(data)
    except ConfigError:
        return "a document that this release cannot read"
    parts = [document.policy]
    parts += [f"{name} = {json.dumps(value)}" for name, value in sorted(document.parameters.items())]
    if document.objectives.deadline_s is not None:
        parts.append(f"deadline of {document.objectives.deadline_s:g} s")
    return plain(", ".join(parts))


def peer_json(peer: FleetPeer) -> dict[str, Any]:
    hello, report = peer.hello, peer.report
    load = report.load
    return {
        "kind": hello.kind.value,
        "identity": peer.identity,
        "instance": hello.instance.hex(),
        "release": hello.release,
        "models": [{"model": m, "version": v} for m, v in report.models or hello.models],
        "policy_version": hello.policy_version,
        "address": hello.address,
        "attached_s": round(peer.attached_s, 3),
        "reported_s": round(peer.reported_s, 3) if peer.reported_s >= 0 else None,
        "interval_s": report.interval_s,
        "routes": dict(report.routes),
        "fallbacks": dict(report.fallbacks),
        "steps": {s.step: {"samples": s.samples, "p50_s": s.p50_s, "p95_s": s.p95_s} for s in report.steps},
        "uplink_bytes": report.uplink_bytes,
        "reply_bytes": report.reply_bytes,
        "tail": report.tail,
        "load": None if load is None else {name: getattr(load, name) for name in CellLoad.__slots__},
    }


def peer_text(peer: FleetPeer) -> str:
    """Who it is, and what it last reported."""
    hello, report = peer.hello, peer.report
    models = ", ".join(f"{model} {version}" for model, version in report.models or hello.models)
    first = [hello.kind.value, peer.identity, models]
    if hello.kind is PeerKind.EDGE:
        first.append(f"policy {hello.policy_version}" if hello.policy_version else "its own policy")
    elif hello.address:
        first.append(f"at {hello.address}")
    first.append(f"attached for {_age(peer.attached_s)}")
    second = _edge_text(report) if hello.kind is PeerKind.EDGE else _cell_text(report.load)
    if peer.reported_s < 0:
        second = "no report yet"
    elif second:
        second += f" ({_age(peer.reported_s)} ago)"
    return plain("  ".join(first)) + "\n  " + plain(second)


def usage_json(counts: Sequence[UsageCount]) -> dict[str, dict[str, dict[str, int]]]:
    """Model -> "route", "fallback" or "bytes" -> name -> total."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for count in counts:
        kinds = found.setdefault(count.model, {"route": {}, "fallback": {}, "bytes": {}})
        kinds.setdefault(count.kind, {})[count.name] = count.total
    return found


def usage_text(counts: Sequence[UsageCount]) -> str:
    """Two or three lines a model."""
    lines = []
    for model, kinds in usage_json(counts).items():
        answers = sum(kinds["route"].values())
        shares = ", ".join(f"{name} {n} ({n / answers:.1%})" for name, n in sorted(kinds["route"].items()))
        lines.append(f"{model}  {answers} answers: {shares}")
        if kinds["fallback"]:
            lines.append(f"  fallbacks: {_counts(kinds['fallback'])}")
        up, back = kinds["bytes"].get("uplink", 0), kinds["bytes"].get("reply", 0)
        lines.append(f"  {up / 1e6:.1f} MB up, {back / 1e6:.1f} MB back")
    return "\n".join(map(plain, lines))


def plain(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _edge_text(report: Report) -> str:
    parts = [f"tail {report.tail}"] if report.tail else []
    parts.append(f"{_counts(report.routes) or 'no answers'} in {report.interval_s:.1f} s")
    if report.fallbacks:
        parts.append(f"fallbacks: {_counts(report.fallbacks)}")
    if report.uplink_bytes or report.reply_bytes:
        parts.append(f"{report.uplink_bytes / 1e3:.1f} KB up, {report.reply_bytes / 1e3:.1f} KB back")
    return "; ".join(parts)


def _cell_text(load: CellLoad | None) -> str:
    if load is None:
        return "no load reported"
    text = (
        f"{load.evaluators} evaluators ({load.restarts} restarts), {load.queue_depth} waiting "
        f"({load.backlog_s:.2f} s), {load.sessions} sessions, {load.key_store_bytes / 1e6:.1f} MB of keys"
    )
    return text + (", DRAINING" if load.draining else "")


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in sorted(counts.items()))


def _for(model: str) -> str:
    return f"for {plain(model)}" if model else "for all models without one of their own"


def _age(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


__all__ = ["document_text", "entry_json", "entry_text", "peer_json", "peer_text", "plain"]
