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
from benchmarks.machine import ABILITIES
from benchmarks.runner import Outcome, Result, Spread
from benchmarks.subjects import SUBJECTS

Rows = list[list[str]]
NOISY = 0.2  # middle half over median from which a result counts as disturbed
MODES = {
    "inference": "",
    "train": "forward + backward",
    "step": "forward + backward + AdamW",
    "compiled": "torch.compile",
}
QUANTITIES = {
    "seconds": "time of",
    "seconds_per_element": "time per element of",
    "peak_bytes": "peak memory of",
    "increase_bytes": "memory that calls add to the loaded",
    "scratch_bytes": "memory per thread beyond inputs and result of",
    "allocated_bytes": "memory that PyTorch allocates for a call of",
}


def label(case: Case) -> str:
    """The name of a case for people, without its input."""
    dtype = "" if case.dtype == "fp32" else case.dtype
    how = (SUBJECTS[case.subject].title, paths.TITLES[case.path], dtype, MODES[case.mode])
    return ", ".join(filter(None, how))


def input_text(case: Case) -> str:
    """The input of a case for people."""
    return f"{case.pixels} px" + (f", batch {case.batch}" if case.batch > 1 else "")


# --- tables ---------------------------------------------------------------------------------------------------------


def measurement_rows(outcomes: Sequence[Outcome]) -> Rows:
    """A header and a line per result: time with its middle half, ratio to the base, peak of the process.

    Where a comparison computes in fp64 too, how far its other results are from that.
    """
    exact = {outcome.name for outcome in outcomes if any(case.dtype == "fp64" for case in outcome.comparison.cases)}
    header = ["what", "input", "threads", "time (middle half)", "over base", "peak memory"]
    rows = [[*header, "error"] if exact else header]
    for outcome in outcomes:
        for result in outcome.results:
            is_base = result.case == outcome.comparison.base
            row = [
                label(result.case),
                input_text(result.case),
                str(outcome.comparison.threads),
                _milliseconds(result.time),
                "1 (base)" if is_base else _ratio(outcome.over_base(result)),
                "" if result.memory is None else _megabytes(result.memory.peak),
            ]
            known = result.error is not None and outcome.name in exact
            error = f"{result.error:.1e}" if known else ""
            rows.append([*row, error] if exact else row)
    return rows


def claim_rows(outcomes: Sequence[Outcome]) -> Rows:
    """A header and a line per claim: what is bounded, the bound, the aim, what was measured, whether it holds."""
    rows = [["claim", "must be at most", "aim", "measured", "holds"]]
    for outcome in outcomes:
        for claim in outcome.comparison.claims:
            measured = outcome.measured(claim)
            value = "not measured" if measured is None else _value(claim, measured)
            bounds = ["" if bound is None else _bound(claim, bound) for bound in (claim.must, claim.aim)]
            rows.append([_statement(outcome, claim), *bounds, value, _verdict(claim, measured)])
    return rows


def _statement(outcome: Outcome, claim: Claim) -> str:
    over = "" if claim.over is None else f" over {label(claim.over)}"
    threads, needs = outcome.comparison.threads, "" if claim.needs is None else f", {claim.needs}"
    return f"{QUANTITIES[claim.quantity]} {label(claim.of)}{over}, {input_text(claim.of)}, threads: {threads}{needs}"


def _verdict(claim: Claim, measured: Spread | None) -> str:
    lacks = why_not_applicable(claim)
    if lacks is not None:
        return f"does not apply: {lacks}"
    if measured is None:
        return ""
    if measured.median > claim.must:
        return "NO"
    return "yes" if claim.aim is None or measured.median > claim.aim else "yes, the aim too"


def why_not_applicable(claim: Claim) -> str | None:
    """Why a claim does not apply to this machine, as a clause; None if it does."""
    return None if claim.needs is None else ABILITIES[claim.needs]()


def _value(claim: Claim, measured: Spread) -> str:
    if claim.over is not None:
        return _ratio(measured)
    if claim.quantity == "seconds_per_element":
        return f"{1e9 * measured.median:.3f} ns ({1e9 * measured.low:.3f} to {1e9 * measured.high:.3f})"
    return _milliseconds(measured) if claim.quantity == "seconds" else _megabytes(measured.median)


def _bound(claim: Claim, bound: float) -> str:
    if claim.over is not None:
        return f"{bound:g}"
    if claim.quantity == "seconds_per_element":
        return f"{1e9 * bound:g} ns"
    return f"{1000 * bound:g} ms" if claim.quantity == "seconds" else _megabytes(bound)


def _milliseconds(spread: Spread) -> str:
    digits = 0 if spread.median >= 1 else 1 if spread.median >= 0.01 else 3
    median, low, high = (f"{1000 * value:,.{digits}f}" for value in (spread.median, spread.low, spread.high))
    return f"{median} ms ({low} to {high})"


def _ratio(spread: Spread) -> str:
    return f"{spread.median:.2f} ({spread.low:.2f} to {spread.high:.2f})"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.0f} MB" if size >= 1e7 else f"{size / 1e6:.1f} MB"


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
    kernels = machine["kernels_instruction_set"]
    where = (
        f"{machine['cpu']}, {machine['cores']} cores, torch uses {machine['torch_instruction_set']}, "
        f"{f'our compiled kernels {kernels}' if kernels else 'no compiled kernels of ours'}; "
        f"Python {versions['python']}, torch {versions['torch']}, timm {versions['timm']}; fp32 where nothing else is "
        "said. Medians of interleaved calls; MB are 10^6 bytes, peak memory is that of a fresh process, imports "
        "included."
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
        "error": result.error,
    }


def _claim_json(outcome: Outcome, claim: Claim) -> dict[str, Any]:
    measured, lacks = outcome.measured(claim), why_not_applicable(claim)
    return {
        **dataclasses.asdict(claim),
        "statement": _statement(outcome, claim),
        "measured": None if measured is None else dataclasses.asdict(measured),
        "holds": None if measured is None or lacks is not None else measured.median <= claim.must,
        "does_not_apply": lacks,
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
