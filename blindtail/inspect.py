"""`blindtail inspect FILE.bt`: what a model costs to run, before any key exists."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blindtail.bundle import CloudBundle, EdgeBundle, sniff

if TYPE_CHECKING:
    from rich.console import RenderableType

    from blindtail.he.program import Program
    from blindtail.he.spec import TailSpec

#: Backend whose cost model gives the predicted seconds.
PREDICT_FOR = "native"


def register(app: typer.Typer) -> None:
    """Add the command `inspect`."""
    app.command("inspect", no_args_is_help=True)(inspect_command)


def inspect_command(
    file: Annotated[Path, typer.Argument(help="An edge.bt or a cloud.bt.", metavar="FILE.bt")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a .bt file holds and what it costs to run.

    An edge.bt: stages, early exits and, for each cut where the network may go on
    encrypted, the CKKS parameters, the evaluation keys to make and upload once,
    and the bytes of every request and reply.

    A cloud.bt: besides, depth, levels, rotations and predicted seconds of each
    operation of the encrypted tail. It holds weights; the tables show none.

    \b
      blindtail inspect edge.bt
      blindtail inspect cloud.bt --json
    """
    report = describe(file)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console

    console = Console()
    for part in render(report):
        console.print(part)


def describe(path: Path) -> dict[str, Any]:
    """Everything `inspect` shows, as JSON. Raises `BundleError`."""
    return (
        describe_edge(EdgeBundle.open(path))
        if sniff(path) == "edge"
        else describe_cloud(CloudBundle.open(path))
    )


def describe_edge(bundle: EdgeBundle) -> dict[str, Any]:
    return {
        "kind": "edge",
        "model": bundle.model,
        "version": bundle.version,
        "classes": list(bundle.class_names),
        "input_shape": list(bundle.preprocessing.input_shape),
        "edge_budget": dict(bundle.edge_budget),
        "stages": [
            {"name": s.name, "macs": s.macs, "bytes": s.bytes, "output_shape": list(s.output_shape)}
            for s in bundle.stages
        ],
        "exits": [
            {
                "name": e.name,
                "after_stage": e.after_stage,
                "macs": e.macs,
                "bytes": e.bytes,
                "temperature": e.temperature,
                "threshold": e.threshold,
            }
            for e in bundle.exits
        ],
        "metrics": dict(bundle.metrics),
        "cuts": {
            str(cut): {
                **describe_spec(spec),
                **_stated_seconds(bundle, cut),
                **_chain([describe_spec(s) for s in bundle.segments(cut)]),
            }
            for cut, spec in sorted(bundle.cuts.items())
        },
    }


def _stated_seconds(bundle: EdgeBundle, cut: int) -> dict[str, Any]:
    """What the compiler predicted: an edge.bt has no operations to predict from."""
    stated = bundle.metrics.get("predicted_eval_s")
    seconds = stated.get(str(cut)) if isinstance(stated, dict) else None
    return {} if seconds is None else {"predicted_s": float(seconds), "predicted_for": PREDICT_FOR}


def describe_cloud(bundle: CloudBundle) -> dict[str, Any]:
    return {
        "kind": "cloud",
        "model": bundle.model,
        "version": bundle.version,
        "cuts": {
            str(cut): {
                **describe_program(program),
                **_chain([describe_program(p) for p in bundle.segments(cut)]),
            }
            for cut, program in sorted(bundle.programs.items())
        },
    }


def _chain(segments: list[dict[str, Any]]) -> dict[str, Any]:
    """Of a refreshed tail: all segments, and what one offload takes in total."""
    if len(segments) == 1:
        return {}
    totals = {name: sum(s[name] for s in segments) for name in ("uplink_bytes", "reply_bytes")}
    if all("predicted_s" in s for s in segments):
        totals["predicted_s"] = sum(s["predicted_s"] for s in segments)
    return {"round_trips": len(segments), "outputs": segments[-1]["outputs"], **totals, "segments": segments}


def describe_spec(spec: TailSpec) -> dict[str, Any]:
    """The public half of one encrypted tail: sizes in bytes, moduli in bits."""
    rotations = sum(1 for key in spec.keys if key.element != 0)
    return {
        "program_id": spec.program_id,
        "features": spec.features,
        "outputs": spec.outputs,
        "lanes": spec.lanes,
        "input_ciphertexts": spec.input_ciphertexts,
        "output_ciphertexts": spec.output_ciphertexts,
        "ring_degree": spec.parameters.ring_degree,
        "log2_key_modulus": round(spec.parameters.log2_key_modulus, 2),
        "levels": len(spec.parameters.primes),
        "depth": spec.input_level,
        "evaluation_keys": len(spec.keys),
        "rotation_keys": rotations,
        "key_bytes": spec.key_bytes,
        "uplink_bytes": spec.uplink_bytes,
        "reply_bytes": spec.reply_bytes,
        "predicted_noise": spec.predicted_noise,
    }


def describe_program(program: Program) -> dict[str, Any]:
    return {
        **describe_spec(program.spec),
        "rotations": list(program.rotations),
        "predicted_s": program.predicted_s(PREDICT_FOR),
        "predicted_for": PREDICT_FOR,
        "operations": [dict(row) for row in program.op_summary()],
    }


def render(report: Mapping[str, Any]) -> list[RenderableType]:
    """The report as rich tables."""
    parts: list[RenderableType] = [
        f"[bold]{report['model']}[/bold] version {report['version']} ({report['kind']})"
    ]
    if report["kind"] == "edge":
        shape = " x ".join(map(str, report["input_shape"]))
        budget = report["edge_budget"]
        parts.append(
            f"input {shape}, {len(report['classes'])} classes; edge budget "
            f"{budget['macs']:,} multiplications, {budget['bytes']:,} bytes (head and exits)"
        )
        parts.append(_stage_table(report))
    for cut, tail in report["cuts"].items():
        parts.append(_tail_table(cut, tail))
        if "segments" in tail:
            parts.append(_segment_table(tail))
        for segment in tail.get("segments", [tail]):
            if "operations" in segment:
                parts.append(_operation_table(segment))
    return parts


def _stage_table(report: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title="Head and early exits")
    for column in ("part", "output", "MACs", "bytes", "temperature", "threshold"):
        table.add_column(column, justify="left" if column in ("part", "output") else "right")
    for i, stage in enumerate(report["stages"]):
        output = " x ".join(map(str, stage["output_shape"]))
        table.add_row(
            f"stage {i} {stage['name']}", output, f"{stage['macs']:,}", f"{stage['bytes']:,}", "", ""
        )
        for e in report["exits"]:
            if e["after_stage"] == i:
                table.add_row(
                    f"  exit {e['name']}",
                    f"{len(report['classes'])}",
                    f"{e['macs']:,}",
                    f"{e['bytes']:,}",
                    f"{e['temperature']:.3f}",
                    f"{e['threshold']:.3f}",
                )
    return table


def _tail_table(cut: str, tail: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title=f"Encrypted tail, cut after stage {cut}", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    rows = [
        ("values in, logits out", f"{tail['features']} -> {tail['outputs']}"),
        ("images per ciphertext", f"{tail['lanes']}"),
        ("ring degree N", f"{tail['ring_degree']:,}"),
        ("log2 of the key modulus (128-bit security)", f"{tail['log2_key_modulus']:.1f}"),
        ("levels (data primes)", f"{tail['levels']}"),
        ("depth (levels consumed)", f"{tail['depth']}"),
        ("rotations (keys)", f"{tail['rotation_keys']} ({tail['evaluation_keys']})"),
        ("keys, uploaded once", f"{tail['key_bytes']:,} bytes"),
        ("round trips", f"{tail.get('round_trips', 1)}"),
        ("uplink per request", f"{tail['uplink_bytes']:,} bytes"),
        ("reply per request", f"{tail['reply_bytes']:,} bytes"),
        ("predicted error of a logit (std)", f"{tail['predicted_noise']:.2g}"),
        ("program", tail["program_id"][:16]),
    ]
    if "predicted_s" in tail:
        rows[6:6] = [(f"predicted seconds ({tail['predicted_for']})", f"{tail['predicted_s']:.3f}")]
    for what, value in rows:
        table.add_row(what, value)
    return table


def _segment_table(tail: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title="Round trips: between them THE EDGE SEES THE VALUES IN THE CLEAR")
    columns = ("segment", "values in", "out", "ciphertexts", "levels", "uplink", "reply", "seconds")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for i, segment in enumerate(tail["segments"]):
        table.add_row(
            f"{i} {segment['program_id'][:8]}",
            f"{segment['features']:,}",
            f"{segment['outputs']:,}",
            f"{segment['input_ciphertexts']}, {segment['output_ciphertexts']}",
            str(segment["depth"]),
            f"{segment['uplink_bytes']:,}",
            f"{segment['reply_bytes']:,}",
            f"{segment['predicted_s']:.4f}" if "predicted_s" in segment else "",
        )
    return table


def _operation_table(tail: Mapping[str, Any]) -> RenderableType:
    from rich.table import Table

    table = Table(title="Operations")
    for i, column in enumerate(("operation", "shape", "level", "rotations", "products", "seconds")):
        table.add_column(column, justify="right" if i else "left")
    for row in tail["operations"]:
        table.add_row(
            f"{row['op']} {row['name']}",
            " x ".join(map(str, row["shape"])),
            f"{row['level_in']} -> {row['level_out']}",
            str(row["rotations"]),
            str(row["products"]),
            f"{row['predicted_s']:.4f}",
        )
    return table


__all__ = ["describe", "inspect_command", "register", "render"]
