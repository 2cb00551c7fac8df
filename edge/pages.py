"""Reports as files: JSON, and one HTML page that loads nothing from anywhere."""

from __future__ import annotations

import base64
import html
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border-bottom: 1px solid #ddd; padding: .25em .8em; text-align: right }
td:first-child, th:first-child { text-align: left }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em }
img { max-width: 100%; border: 1px solid #eee; margin: .5em 0 }
.small { color: #666; font-size: .9em }
"""


def write_text(path: Path, text: str) -> None:
    """Atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_reports(folder: Path, report: Mapping[str, Any], page: str) -> None:
    """`report.json` and `report.html` in `folder`."""
    write_text(folder / "report.json", json.dumps(report, indent=2, allow_nan=False) + "\n")
    write_text(folder / "report.html", page)


def page(title: str, parts: Iterable[str]) -> str:
    body = "\n".join(parts)
    return (
        f"<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(h)}</th>" for h in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(v)}</td>" for v in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>\n{body}</table>"


def paragraph(text: str, small: bool = False) -> str:
    return f"<p{' class=small' if small else ''}>{escape(text)}</p>"


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def picture(path: Path, caption: str) -> str:
    """A PNG inside the page itself."""
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f"<figure><img alt='{escape(caption)}' src='data:image/png;base64,{data}'></figure>"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.1f} ms"


def verify_page(report: Mapping[str, Any]) -> str:
    """The page of `blindtail verify`."""
    error = report["logit_error"]
    accuracies, areas = report["accuracy"], report["auroc"]
    parts = [
        paragraph(
            f"{report['images']} images, cut after stage {report['cut']}, backend {report['backend']}. "
            f"Encrypted and clear labels agree on {percent(report['agreement'])}."
        ),
        heading("Accuracy"),
        table(
            ("answered by", "accuracy", "AUROC"),
            [
                (
                    name.replace("_", ", "),
                    percent(value),
                    "-" if areas[name] is None else f"{areas[name]:.4f}",
                )
                for name, value in accuracies.items()
            ],
        ),
        heading("Precision of the encrypted tail"),
        table(
            ("what", "value"),
            [
                ("largest error of a logit", f"{error['max']:.4g}"),
                ("mean error of a logit", f"{error['mean']:.4g}"),
                ("predicted standard deviation", f"{error['predicted_std']:.4g}"),
                ("smallest clear margin", f"{error['smallest_clear_margin']:.4g}"),
                ("evaluation, p50", milliseconds(report["evaluation_s"]["p50"])),
                ("uplink per request", f"{report['uplink_bytes']:,} bytes"),
                ("reply per request", f"{report['reply_bytes']:,} bytes"),
                ("evaluation keys, once", f"{report['key_bytes']:,} bytes"),
            ],
        ),
        heading("Disagreements"),
    ]
    if report["disagreements"]:
        columns = (
            "image",
            "class",
            "clear_class",
            "clear_margin",
            "encrypted_class",
            "encrypted_margin",
            "max_logit_error",
        )
        parts.append(
            table(
                [c.replace("_", " ") for c in columns],
                [
                    [f"{row[c]:.4g}" if isinstance(row[c], float) else row[c] for c in columns]
                    for row in report["disagreements"]
                ],
            )
        )
        parts.append(paragraph("Margin: the largest logit less the second largest.", small=True))
    else:
        parts.append(paragraph("None."))
    parts.append(machine_line(report))
    return page(f"{report['model']} {report['version']}: encrypted against clear", parts)


def machine_line(report: Mapping[str, Any]) -> str:
    m, v = report["machine"], report["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in v.items())
    return paragraph(f"{m['processor']}, {m['cores']} cores; {packages}.", small=True)
