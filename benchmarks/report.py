"""What comparisons measured, as tables for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import paths
from benchmarks.cases import Case, Claim
from benchmarks.runner import Outcome, Result, Spread
from benchmarks.subjects import SUBJECTS

Rows = list[list[str]]
NOISY = 0.2  # middle half over median from which a result counts as disturbed


def label(case: Case) -> str:
    """The name of a case for people, without its input."""
    how = paths.TITLES[case.path]
    return f"{SUBJECTS[case.subject].title}, {how}" if how else SUBJECTS[case.subject].title


# --- tables ---------------------------------------------------------------------------------------------------------


def measurement_rows(outcomes: Sequence[Outcome]) -> Rows:
    """A header and a line per result: time with its middle half, ratio to the base, peak of the process."""
    rows = [["what", "input", "threads", "time (middle half)", "over base", "peak memory"]]
    for outcome in outcomes:
        for result in outcome.results:
            case = result.case
            batch = f", batch {case.batch}" if case.batch > 1 else ""
            is_base = case == outcome.comparison.base
            rows.append(
                [
                    label(case),
                    f"{case.pixels} px{batch}",
                    str(outcome.comparison.threads),
                    _milliseconds(result.time),
                    "1 (base)" if is_base else _ratio(outcome.over_base(result)),
                    "" if result.memory is None else _megabytes(result.memory.peak),
                ]
            )
    return rows


def claim_rows(outcomes: Sequence[Outcome]) -> Rows:
    """A header and a line per claim: what is bounded, the bound, the aim, what was measured, whether it holds."""
    rows = [["claim", "must be at most", "aim", "measured", "holds"]]
    for outcome in outcomes:
        for claim in outcome.comparison.claims:
            measured = outcome.measured(claim)
            if measured is None:
                value, verdict = "not measured", ""
            else:
                value, verdict = _value(claim, measured), "yes" if measured.median <= claim.must else "NO"
            bounds = ["" if bound is None else _bound(claim, bound) for bound in (claim.must, claim.aim)]
            rows.append([_statement(claim), *bounds, value, verdict])
    return rows


def _statement(claim: Claim) -> str:
    what = "time" if claim.quantity == "seconds" else "peak memory"
    over = "" if claim.over is None else f" over {label(claim.over)}"
    return f"{what} of {label(claim.of)}{over}, {claim.of.pixels} px"


def _value(claim: Claim, measured: Spread) -> str:
    if claim.over is not None:
        return _ratio(measured)
    return _milliseconds(measured) if claim.quantity == "seconds" else _megabytes(measured.median)


def _bound(claim: Claim, bound: float) -> str:
    if claim.over is not None:
        return f"{bound:g}"
    return f"{1000 * bound:g} ms" if claim.quantity == "seconds" else _megabytes(bound)


def _milliseconds(spread: Spread) -> str:
    digits = 0 if spread.median >= 1 else 1 if spread.median >= 0.01 else 3
    median, low, high = (f"{1000 * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low} to {high})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def markdown(rows: Rows) -> str:
    """The rows as a Markdown table."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: Rows) -> str:
    """The rows as columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def summary(outcomes: Sequence[Outcome], description: dict[str, Any], as_markdown: bool) -> str:
    """Everything that is printed: where it ran, the measurements, the claims if there are any."""
    machine, versions = description["machine"], description["versions"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, torch uses {machine['torch_instruction_set']}; "
        f"Python {versions['python']}, torch {versions['torch']}, timm {versions['timm']}; fp32. Medians of "
        "interleaved calls; MB are 10^6 bytes, peak memory is that of a fresh process, imports included."
    )
    table = markdown if as_markdown else aligned
    claims = claim_rows(outcomes)
    parts = [where, table(measurement_rows(outcomes))]
    return "\n\n".join([*parts, table(claims)] if len(claims) > 1 else parts)


def noise_warnings(outcomes: Sequence[Outcome]) -> list[str]:
    """A sentence for each result whose times spread so much that something must have disturbed them."""
    sentences = []
    for outcome in outcomes:
        for result in outcome.results:
            width = (result.time.high - result.time.low) / result.time.median
            if width > NOISY:
                sentences.append(
                    f"WARNING: {outcome.name}: the middle half of the times of {label(result.case)} is "
                    f"{100 * width:.0f} % of their median wide; something disturbed them: run this again."
                )
    return sentences


# --- JSON -----------------------------------------------------------------------------------------------------------


def outcome_json(outcome: Outcome) -> dict[str, Any]:
    """One comparison, its results and its claims as JSON holds them."""
    comparison = outcome.comparison
    return {
        "name": outcome.name,
        "title": comparison.title,
        "threads": comparison.threads,
        "rounds": comparison.rounds,
        "base": dataclasses.asdict(comparison.base),
        "results": [_result_json(outcome, result) for result in outcome.results],
        "claims": [_claim_json(outcome, claim) for claim in comparison.claims],
    }


def _result_json(outcome: Outcome, result: Result) -> dict[str, Any]:
    return {
        "case": dataclasses.asdict(result.case),
        "label": label(result.case),
        "seconds": list(result.seconds),
        "time": dataclasses.asdict(result.time),
        "over_base": dataclasses.asdict(outcome.over_base(result)),
        "memory_bytes": None if result.memory is None else dataclasses.asdict(result.memory),
    }


def _claim_json(outcome: Outcome, claim: Claim) -> dict[str, Any]:
    measured = outcome.measured(claim)
    return {
        **dataclasses.asdict(claim),
        "statement": _statement(claim),
        "measured": None if measured is None else dataclasses.asdict(measured),
        "holds": None if measured is None else measured.median <= claim.must,
    }


def write_json(path: Path, description: dict[str, Any], outcomes: Sequence[Outcome]) -> None:
    """Write all of it to a file, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    content = {**description, "comparisons": [outcome_json(outcome) for outcome in outcomes]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
