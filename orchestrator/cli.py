"""`blindtail orchestrator`, and `blindtail policy` for operators."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from blindtail.config import assignments, load_config, read_toml
from blindtail.connection_options import (
    AsJson,
    Ca,
    Certificate,
    Key,
    Plaintext,
    ServerName,
    credentials_of,
)
from blindtail.errors import ConfigError
from blindtail.policy_document import Objectives, PolicyDocument
from blindtail.wire.control import PeerKind
from blindtail.wire.policies import FleetPeer, PolicyChange, PolicyEntry, PolicyState
from orchestrator.config import OrchestratorConfig
from orchestrator.policies_client import PoliciesClient
from orchestrator.texts import (
    document_text,
    entry_json,
    entry_text,
    peer_json,
    peer_text,
    plain,
    usage_json,
    usage_text,
)

#: How often `policy set --wait` looks, and how far back it looks for its version.
_POLL_S, _RECENT = 0.1, 100
#: Once all edges have answered, a rollback comes within this time or not at all.
_JUDGED_S = 4.0

Address = Annotated[str, typer.Option("--orchestrator", metavar="HOST:PORT", help="The orchestrator to ask.")]
Model = Annotated[
    str, typer.Option("--model", help="One model by name; without it, all models (set: those without own).")
]


def register(app: typer.Typer) -> None:
    """Adds the command `orchestrator` and the group `policy`."""
    app.command("orchestrator")(orchestrator_command)
    policy = typer.Typer(
        name="policy",
        help="Set and look at what edges decide by: policies, objectives, and who follows them.",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    policy.command("get")(get_command)
    policy.command("set")(set_command)
    policy.command("history")(history_command)
    policy.command("fleet")(fleet_command)
    policy.command("usage")(usage_command)
    app.add_typer(policy)


def orchestrator_command(
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings in TOML; flags win over it.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where to listen. Anything but loopback needs TLS (in --config).")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one (default).")] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Policies and sums of reports are kept here over restarts.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port (default: off).")
    ] = None,
    announce: Annotated[
        Path | None,
        typer.Option(help="Write address and pid to this JSON file once ready; removed at the end."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the announcement as one JSON line.")] = False,
) -> None:
    """Run the orchestrator, until SIGTERM or Ctrl-C.

    Edges and cells dial it and stay attached: timings, counts and load come up,
    versioned policies go down. Edges decide by themselves and go on with their last
    policy while it is away. A policy that too many edges refuse is rolled back.

    \b
    Try it:      blindtail orchestrator --port 50061
    Settings:    blindtail orchestrator --config orchestrator.toml
      host = "0.0.0.0"
      port = 50061
      state_dir = "state"
      tls = { certificate = "orchestrator.pem", key = "orchestrator.key", client_ca = "ca.pem" }
      rollback_share = 0.2
      attach = { total = 2000 }
    """
    settings = load_config(
        OrchestratorConfig,
        config,
        {
            "host": host,
            "port": port,
            "state_dir": state_dir,
            "metrics_port": metrics_port,
        },
    )
    from orchestrator.app import serve

    # Events and faults on standard error; never a peer's identity.
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("orchestrator").setLevel(logging.INFO)

    def ready(announced: Mapping[str, Any]) -> None:
        line = json.dumps(announced) if as_json else f"ready on {announced['address']}; Ctrl-C ends"
        print(line, flush=True)

    raise typer.Exit(serve(settings, announce=announce, on_ready=ready))


def get_command(
    orchestrator: Address,
    model: Model = "",
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in force now: for --model its own policy or else the default one.

    \b
      blindtail policy get --orchestrator 127.0.0.1:50061 --plaintext
    """
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    with PoliciesClient(orchestrator, credentials) as client:
        _print_entries(client.get(model), as_json, "no policy is set: edges go by their own")


def history_command(
    orchestrator: Address,
    model: Model = "",
    limit: Annotated[int, typer.Option("--limit", min=1, max=500, help="How many versions.")] = 20,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """List versions, the newest first: who set them, and what became of them."""
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    with PoliciesClient(orchestrator, credentials) as client:
        _print_entries(client.history(model, limit), as_json, "no policy was ever set")


def usage_command(
    orchestrator: Address,
    model: Model = "",
    hours: Annotated[float, typer.Option("--hours", min=0.0, help="How far back, in hours.")] = 24.0,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Show what edges have reported: answers by route, fallbacks by reason, bytes.

    \b
      blindtail policy usage --hours 1 --orchestrator 127.0.0.1:50061 --plaintext
    """
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    with PoliciesClient(orchestrator, credentials) as client:
        counts = client.usage(model, 3600 * hours)
    if as_json:
        print(json.dumps(usage_json(counts), indent=2))
    else:
        print(usage_text(counts) or f"no edge has reported an answer in the last {hours:g} hours")


def fleet_command(
    orchestrator: Address,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Show who is attached: models, policy in force, state of the tail, routes, load."""
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    with PoliciesClient(orchestrator, credentials) as client:
        peers = client.fleet()
    if as_json:
        print(json.dumps([peer_json(peer) for peer in peers], indent=2))
        return
    for peer in peers:
        print(peer_text(peer))
    kinds = [peer.hello.kind for peer in peers]
    print(f"{kinds.count(PeerKind.EDGE)} edges and {kinds.count(PeerKind.CELL)} cells attached")


def set_command(
    orchestrator: Address,
    document: Annotated[
        Path | None,
        typer.Argument(metavar="POLICY.toml", help="policy, parameters and objectives; or use the flags."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option("--policy", help="deadline, threshold, edge-only or cloud-only.")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the policy. Repeatable."),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline", help="Objective: seconds for requests that bring no deadline of their own."
        ),
    ] = None,
    model: Model = "",
    note: Annotated[str, typer.Option("--note", help="Why, for the history.")] = "",
    wait: Annotated[
        float, typer.Option("--wait", min=0.0, max=3600.0, help="Seconds to wait for the edges' answers.")
    ] = 10.0,
    plaintext: Plaintext = False,
    ca: Ca = None,
    certificate: Certificate = None,
    key: Key = None,
    server_name: ServerName = None,
    as_json: AsJson = False,
) -> None:
    """Put a new version of a policy in force, and wait for what the edges say.

    Checked before anything is stored, then by every edge against its own model. Exit
    code 1: edges refused it and it was rolled back; 2: it was not accepted.

    \b
      blindtail policy set fast.toml --orchestrator 127.0.0.1:50061 --plaintext
      blindtail policy set --policy deadline --set safety=1.2 --deadline 0.5 \\
          --note "rush hour" --orchestrator 127.0.0.1:50061 --plaintext
    """
    wanted = _document(document, policy, parameters, deadline)
    credentials = credentials_of(plaintext, ca, certificate, key, server_name)
    with PoliciesClient(orchestrator, credentials) as client:
        made = client.set(PolicyChange(model, wanted.encode(), note))
        entry, followers = _wait(client, made, wait)
        later = _undone_by(client, entry)
    rolled_back = entry.state is PolicyState.ROLLED_BACK
    if as_json:
        result = {
            **entry_json(entry),
            "following": followers,
            "rolled_back": rolled_back,
            "in_force": later.update.version if later else entry.update.version,
            "note": made.note,
        }
        print(json.dumps(result, indent=2))
    else:
        print(f"version {entry.update.version}: {document_text(entry.update.document)}")
        print(f"applied by {entry.applied} of {followers} attached edges, refused by {entry.refused}")
        if made.note:
            print(plain(made.note))
        if rolled_back and later is not None:
            print(f"{plain(later.note)}: version {later.update.version} is in force")
    raise typer.Exit(1 if rolled_back else 0)


def _document(
    path: Path | None, policy: str | None, parameters: list[str] | None, deadline: float | None
) -> PolicyDocument:
    if path is not None:
        if policy is not None or parameters or deadline is not None:
            raise ConfigError("give a file, or --policy with --set and --deadline, not both")
        return PolicyDocument.from_mapping(read_toml(path))
    if policy is None:
        raise ConfigError("say which policy: a TOML file, or --policy NAME")
    return PolicyDocument(policy, assignments(parameters or []), Objectives(deadline))


def _wait(client: PoliciesClient, made: PolicyEntry, wait_s: float) -> tuple[PolicyEntry, int]:
    """(the version as it stands, edges that should follow it), once all have applied it, or it is no
    longer in force, or the time is over. Where some refused, a rollback gets a moment to happen."""
    end_s = time.monotonic() + wait_s
    answered = False
    while True:
        recent = client.history(made.update.model, _RECENT)
        entry = next((e for e in recent if e.update.version == made.update.version), made)
        followers = _followers(client, made.update.model)
        over = entry.state is not PolicyState.ACTIVE or entry.applied >= followers
        if over or time.monotonic() >= end_s:
            return entry, followers
        if not answered and entry.applied + entry.refused >= followers:
            answered = True
            end_s = min(end_s, time.monotonic() + _JUDGED_S)
        time.sleep(_POLL_S)


def _followers(client: PoliciesClient, model: str) -> int:
    own = {entry.update.model for entry in client.get()}

    def follows(peer: FleetPeer) -> bool:
        served = peer.hello.models[0][0] if peer.hello.models else ""
        return peer.hello.kind is PeerKind.EDGE and (served == model or (not model and served not in own))

    return sum(map(follows, client.fleet()))


def _undone_by(client: PoliciesClient, entry: PolicyEntry) -> PolicyEntry | None:
    """What is in force in place of a version that was rolled back."""
    if entry.state is not PolicyState.ROLLED_BACK:
        return None
    recent = client.history(entry.update.model, _RECENT)
    return next((e for e in recent if e.note.startswith(f"rolled back from {entry.update.version}:")), None)


def _print_entries(entries: list[PolicyEntry], as_json: bool, none: str) -> None:
    if as_json:
        print(json.dumps([entry_json(entry) for entry in entries], indent=2))
        return
    for entry in entries:
        print(entry_text(entry))
    if not entries:
        print(none)


__all__ = ["register"]
