"""The report of a check: one file for people, one for programs, named after the card."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu.findings import Findings, Rows

FORMAT = 1  # of the JSON file; grows when a field changes its meaning


def file_name(card: str) -> str:
    """A card's name as that of a file without its ending: "NVIDIA H200" is gpu_nvidia-h200."""
    return "gpu_" + (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") or "unknown")


def table(rows: Rows) -> str:
    """The rows as a Markdown table, in columns that can be read as they are."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * max(3, width) for width in widths], *rows[1:]]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def markdown(content: Mapping[str, Any]) -> str:
    """The whole report for people: where it ran, how each step ended, the ratios asked for, what each step found."""
    machine, steps = content["machine"], content["steps"]
    found = {name: Findings.from_json(step) for name, step in steps.items()}
    lines = [f"# scripts/gpu_check on {machine['card'] or 'a machine without a GPU'}", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items() if value]
    ended: Rows = [["step", "result", "seconds", "date", "commit"]]
    for name, step in steps.items():
        ended.append([name, found[name].status, f"{step['seconds']:.0f}", step["date"], _commit(step["commit"])])
    lines += ["", table(ended), ""]
    bounds = [bound for each in found.values() for bound in each.bounds]
    if bounds:
        rows: Rows = [["asked for", "at most", "aim", "measured", "holds"]]
        for bound in bounds:
            aim = "" if bound.aim is None else f"{bound.aim:g}"
            rows.append([bound.statement, f"{bound.must:g}", aim, f"{bound.measured:.2f}", bound.verdict])
        lines += [table(rows), ""]
    if content["not_run"]:
        lines += [f"Not run, since it needs a GPU: {', '.join(content['not_run'])}.", ""]
    for name, each in found.items():
        lines += [f"## {name}", ""]
        if each.skipped is not None:
            lines += [f"SKIPPED: {each.skipped}.", ""]
        lines += [f"- {note}" for note in each.notes] + [""] * bool(each.notes)
        for title, rows in each.tables.items():
            lines += [f"### {title}", "", table(rows), ""]
        for failure in each.failures:
            lines += ["FAILED:", "", "```", failure, "```", ""]
    lines.append("Times are medians of interleaved rounds with the middle half in brackets; MB are 10^6 bytes.")
    return "\n".join(lines) + "\n"


def _commit(commit: Mapping[str, Any]) -> str:
    return "" if commit["id"] is None else commit["id"][:12] + (" and changes" if commit["dirty"] else "")


def with_earlier(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content with the steps that an earlier report of the same card has and this one did not run."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return content
    if earlier.get("format") != FORMAT or earlier["machine"]["card"] != content["machine"]["card"]:
        return content
    merged = earlier["steps"] | content["steps"]
    return {**content, "steps": merged, "not_run": [name for name in content["not_run"] if name not in merged]}


def write(content: dict[str, Any], folder: Path, name: str) -> Path:
    """Write both files, each whole or not at all; the one for people.

    Raises:
        OSError: one cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{name}.json"
    content = with_earlier(content, target)
    for path, text in ((target, json.dumps(content, indent=1) + "\n"), (target.with_suffix(".md"), markdown(content))):
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return target.with_suffix(".md")
