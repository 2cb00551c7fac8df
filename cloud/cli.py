"""`blindtail cloud`: serve tails."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from blindtail.config import load_config
from cloud.config import CloudConfig


def cloud(
    models: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CLOUD.bt...", help="Models to serve, one file each, beside pushed ones."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Settings in TOML; flags win over it.")
    ] = None,
    host: Annotated[
        str | None, typer.Option(help="Where to listen. Anything but loopback needs TLS (in --config).")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one (default).")] = None,
    evaluators: Annotated[
        int | None, typer.Option(help="Evaluator processes, one core each (default 2).")
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(
            help="native, seal, or clear: readable numbers, for tests only (default: native, else seal)."
        ),
    ] = None,
    state_dir: Annotated[
        Path | None, typer.Option(help="Clients' evaluation keys are kept here over restarts.")
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics on this port (default: off).")
    ] = None,
    orchestrator: Annotated[
        str | None, typer.Option(help="host:port of the orchestrator that hears of this cell's load.")
    ] = None,
    advertise: Annotated[
        str | None, typer.Option(help="host:port that edges are told to dial; default: as they dialled.")
    ] = None,
    peers: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            metavar="ADDRESS",
            help="Another cell of yours, for clients' evaluation keys; may be repeated.",
        ),
    ] = None,
    others: Annotated[
        list[str] | None,
        typer.Option(
            "--other",
            metavar="ADDRESS",
            help="Another cell that edges are told of, for when this one goes; may be repeated.",
        ),
    ] = None,
    announce: Annotated[
        Path | None,
        typer.Option(help="Write address and processes to this JSON file once ready; removed at the end."),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(
            help="Join this running Ray cluster (host:port, or auto) with a cell on this node, instead of "
            "starting one. Needs RAY_AUTH_MODE=token."
        ),
    ] = None,
    node_ip: Annotated[
        str | None,
        typer.Option(help="With --ray-address: this node's address in the cluster, if there are several."),
    ] = None,
    peer_address: Annotated[
        str | None,
        typer.Option(
            help="With --ray-address: host:port by which the cluster's other cells dial this one for keys; "
            "its certificate must have the name. Default: the node's address."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the announcement as one JSON line.")] = False,
) -> None:
    """Serve the encrypted tails of CLOUD.bt files over gRPC, until SIGTERM or Ctrl-C.

    Starts a Ray cluster of its own on this machine with a gateway and evaluator
    processes. Whatever of it crashes is replaced; requests in flight are tried
    again. SIGTERM drains: edges move to another cell if they know one, then it
    ends; a second SIGTERM ends it at once. Edges upload their evaluation keys once; the cell can compute on
    their data but never read it.

    \b
    Try it:      blindtail cloud cloud.bt --port 50051
    Settings:    blindtail cloud --config cell.toml
      models = ["cloud.bt"]
      host = "0.0.0.0"
      port = 50051
      tls = { certificate = "cell.pem", key = "cell.key", client_ca = "edges.pem" }
      queue = { jobs = 256 }
      keys = { budget_bytes = 4000000000 }
      peers = ["other-cell.example:50051"]      clients' keys are copied there
      others = ["other-cell.example:50051"]     edges are told of it
    """
    settings = load_config(
        CloudConfig,
        config,
        {
            "models": [str(m) for m in models] if models else None,
            "host": host,
            "port": port,
            "evaluators": evaluators,
            "backend": backend,
            "state_dir": state_dir,
            "metrics_port": metrics_port,
            "orchestrator": orchestrator,
            "advertise": advertise,
            "peers": peers or None,
            "others": others or None,
        },
    )
    # Late: `--help` and a wrong setting need no Ray.
    from cloud.supervisor import serve

    console = Console(stderr=True)
    status = console.status("starting")

    def ready(announced: Mapping[str, Any]) -> None:
        status.stop()
        if as_json:
            print(json.dumps(announced), flush=True)
            return
        served = ", ".join(f"{m['model']} {m['version']}" for m in announced["models"])
        if not served:
            served = "no model yet (`blindtail model push cloud.bt` brings one)"
        count = len(announced["evaluators"])
        warning = ", IN THE CLEAR (tests only)" if announced["backend"] == "clear" else ""
        print(
            f"ready: {served} on {announced['address']}, {count} evaluators, "
            f"backend {announced['backend']}{warning}; Ctrl-C ends",
            flush=True,
        )

    status.start()
    try:
        code = serve(
            settings,
            announce=announce,
            on_ready=ready,
            on_progress=lambda text: status.update(text),
            on_loss=lambda text: console.print(f"blindtail: {text}"),
            ray_address=ray_address,
            node_ip=node_ip,
            peer_address=peer_address,
        )
    finally:
        status.stop()
    if code:
        console.print("blindtail: the cell could not be kept alive; cell.log in the state directory says why")
    raise typer.Exit(code)


def register(app: typer.Typer) -> None:
    """Adds the command `cloud`."""
    app.command("cloud")(cloud)


__all__ = ["register"]
