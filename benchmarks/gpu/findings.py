"""What a step of the check found out: for people as tables and sentences, for programs as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Rows = list[list[str]]


@dataclass
class Bound:
    """A ratio that was asked for.

    Attributes:
        statement: what is divided by what. must: the largest ratio that keeps it. aim: a smaller one to work towards.
        measured: the median.
    """

    statement: str
    must: float
    measured: float
    aim: float | None = None

    @property
    def verdict(self) -> str:
        if not self.measured <= self.must:  # NaN fails too
            return "NO"
        return "yes" if self.aim is None or self.measured > self.aim else "yes, the aim too"


@dataclass
class Findings:
    """What one step, or one part of it, has to tell.

    Attributes:
        tables: a header and lines each, by title. measured: the numbers, for programs.
        bounds: ratios that were asked for. One that is missed is told; it is no failure.
        notes: sentences for people. failures: sentences; one of them fails the step.
        skipped: why nothing was done, as a clause.
    """

    tables: dict[str, Rows] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    bounds: list[Bound] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def status(self) -> str:
        if self.failures:
            return "FAILED"
        return "passed" if self.skipped is None else "SKIPPED"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "status": self.status}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Findings:
        fields = {name: value for name, value in content.items() if name in cls.__dataclass_fields__}
        return cls(**{**fields, "bounds": [Bound(**each) for each in fields.get("bounds", ())]})


def join(parts: Sequence[Findings]) -> Findings:
    """What the parts of one step found, as one: lines of tables with one title and header follow each other."""
    whole = Findings()
    for part in parts:
        for title, rows in part.tables.items():
            known = whole.tables.setdefault(title, rows[:1])
            known += rows[1:]
        for name, value in part.measured.items():
            known_value = whole.measured.get(name)
            whole.measured[name] = [*known_value, *value] if isinstance(known_value, list) else value
        whole.bounds += part.bounds
        whole.failures += part.failures
        whole.notes += part.notes
        if part.skipped is not None:
            whole.notes.append(f"SKIPPED: {part.skipped}.")
    if parts and all(part.skipped is not None for part in parts):
        whole.skipped = "; ".join(dict.fromkeys(filter(None, (part.skipped for part in parts))))
    return whole
