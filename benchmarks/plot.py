"""Draw how time and memory grow with the picture, from the JSON file of `scripts/bench 'resolution_*' --json FILE`."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from flags import UsageError

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")  # Okabe and Ito: for every kind of sight
INK, QUIET, FAINT = "#24292f", "#57606a", "#d0d7de"
LINE: dict[str, Any] = {"marker": "o", "markersize": 5, "linewidth": 2}
TITLE: dict[str, Any] = {"fontsize": 13, "color": INK, "loc": "left", "pad": 12}
SIZE, DOTS_PER_INCH = (12, 5), 100  # inches
MEGA = 1e6


class Point(NamedTuple):
    """One picture size: seconds (median and middle half) and bytes of peak memory beyond the imports."""

    pixels: int
    median: float
    low: float
    high: float
    added: int | None


@dataclass(frozen=True)
class Picture:
    """What is drawn: a line of points per name; bytes in use after the imports, if measured; where it was measured."""

    lines: dict[str, list[Point]]
    imports: int | None
    where: str


def read(path: Path, expected_format: int) -> Picture:
    """Read every network that the file has in two or more sizes, one picture per call.

    Raises:
        UsageError: the file cannot be read, is no such file, or has nothing to draw; one sentence says which.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"{path} cannot be read: it is no JSON file ({error})") from error
    mend = "`scripts/bench 'resolution_*' --json FILE` writes one that can"
    if not isinstance(content, dict) or content.get("format") != expected_format:
        raise UsageError(f"{path} cannot be drawn: it is no result of this version of scripts/bench; {mend}")
    try:
        picture = _picture(content)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UsageError(f"{path} cannot be drawn: something is missing in it ({error}); {mend}") from error
    if not picture.lines:
        raise UsageError(f"{path} cannot be drawn: it has nothing in two sizes of pictures or more; {mend}")
    return picture


def _picture(content: dict[str, Any]) -> Picture:
    lines: dict[str, dict[int, Point]] = {}
    imports, threads = [], set()
    for comparison in content["comparisons"]:
        for result in comparison["results"]:
            case, time, memory = result["case"], result["time"], result["memory_bytes"]
            if case["batch"] != 1:
                continue
            added = None if memory is None else memory["peak"] - memory["imports"]
            point = Point(case["pixels"], time["median"], time["low"], time["high"], added)
            lines.setdefault(result["label"], {})[point.pixels] = point
            imports += [] if memory is None else [memory["imports"]]
            threads.add(comparison["threads"])
    machine, versions = content["machine"], content["versions"]
    where = (
        f"{machine['cpu']}, {machine['torch_instruction_set']}, threads: {', '.join(map(str, sorted(threads)))}; "
        f"torch {versions['torch']}, timm {versions['timm']}"
    )
    ordered = {name: [points[pixels] for pixels in sorted(points)] for name, points in lines.items() if len(points) > 1}
    return Picture(ordered, statistics.median_low(imports) if imports else None, where)


def draw(picture: Picture, target: Path) -> None:
    """Write the picture, time on the left and peak memory on the right.

    Raises:
        UsageError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(f"drawing needs matplotlib ({error}); `pip install matplotlib` installs it") from error
    figure = Figure(figsize=SIZE, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_times(left, picture)
    _draw_memory(right, picture)
    sizes = sorted({point.pixels for points in picture.lines.values() for point in points})
    for axes in (left, right):
        _dress(axes, sizes)
    figure.supxlabel(picture.where, fontsize=9, color=QUIET)
    try:
        figure.savefig(target, format="png")
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror}") from error


def _draw_times(axes: Any, picture: Picture) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    ends = {}
    for colour, (name, points) in zip(cycle(COLOURS), picture.lines.items(), strict=False):
        sizes, low, high = ([getattr(point, field) for point in points] for field in ("pixels", "low", "high"))
        axes.fill_between(sizes, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(sizes, [point.median for point in points], color=colour, **LINE)
        ends[name] = (sizes[-1], points[-1].median, colour)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms")
    axes.set_title("Time of one forward pass of one picture", **TITLE)
    _name_lines(axes, ends)


def _draw_memory(axes: Any, picture: Picture) -> None:
    ends = {}
    for colour, (name, points) in zip(cycle(COLOURS), picture.lines.items(), strict=False):
        known = [(point.pixels, point.added / MEGA) for point in points if point.added is not None]
        if known:
            axes.plot(*zip(*known, strict=True), color=colour, **LINE)
            ends[name] = (*known[-1], colour)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f} MB")
    imports = picture.imports
    beyond = ": not measured" if imports is None else f", beyond the {imports / MEGA:,.0f} MB of the imports"
    axes.set_title(f"Peak memory{beyond}", **TITLE)
    _name_lines(axes, ends)


def _name_lines(axes: Any, ends: Mapping[str, tuple[int, float, str]]) -> None:
    """Write each name beside the end of its line: the highest one a little higher, the lowest one a little lower."""
    for rank, (name, (x, y, colour)) in enumerate(sorted(ends.items(), key=lambda item: item[1][1])):
        place = "top" if rank == 0 else "bottom" if rank == len(ends) - 1 else "center"
        axes.annotate(name, (x, y), xytext=(9, 0), textcoords="offset points", va=place if len(ends) > 1 else "center",
            color=colour, fontsize=12, fontweight="bold", annotation_clip=False)  # fmt: skip


def _dress(axes: Any, sizes: list[int]) -> None:
    """The axis of the sizes, a quiet grid, no frame."""
    axes.set_xscale("log")
    axes.set_xlim(sizes[0] * 0.93, sizes[-1] * 1.07)
    axes.set_xticks(sizes, [str(size) for size in sizes], color=INK, fontsize=8.5)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("side of the picture in pixels", color=INK)
    axes.tick_params(colors=INK, length=0)
    axes.grid(color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
