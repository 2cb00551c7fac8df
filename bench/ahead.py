"""Tickets in `bench he`: what an evaluation takes once its seed's share has been computed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from bench.interleave import Run, clocked, summary
from bench.rows import Row, row
from bench.tails import Client
from blindtail.he.container import HEADER_BYTES, SEED_BYTES

#: Seconds online, at most.
TARGETS_S = {"A": 0.010, "B": 0.002, "C": 0.008}


def ticket_runs(client: Client, requests: Sequence[bytes]) -> dict[str, Run]:
    """Runs with a ticket ("online") and of making one ("ticket"); none where a backend makes none.

    Raises `RuntimeError` when a reply by ticket is not the reply without.
    """
    evaluator, keys = client.evaluator, client.keys
    if not evaluator.makes_tickets:
        return {}
    seeds = [request[HEADER_BYTES : HEADER_BYTES + SEED_BYTES] for request in requests]
    tickets = [evaluator.make_ticket(keys, seed) for seed in seeds]
    for request, ticket in zip(requests, tickets, strict=True):
        if evaluator.evaluate(keys, request, ticket) != evaluator.evaluate(keys, request):
            raise RuntimeError("a ticket changed a reply")

    def online(i: int) -> bytes:
        at = i % len(requests)
        return evaluator.evaluate(keys, requests[at], tickets[at])

    return {
        "online": clocked(online),
        "ticket": clocked(lambda i: evaluator.make_ticket(keys, seeds[i % len(seeds)])),
    }


def ticket_rows(net: str, seconds: Mapping[str, list[float]]) -> Iterator[Row]:
    for name, what in (
        ("online", "native with a ticket, eval_online_s"),
        ("ticket", "native, making a ticket"),
    ):
        if name in seconds:
            yield row(
                f"{net}: {what}",
                statistics.median(seconds[name]),
                "s",
                target=TARGETS_S.get(net) if name == "online" else None,
                **summary(seconds[name]),
            )
