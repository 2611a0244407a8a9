"""Draw heat maps beside a picture, each with its colour scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from analyze.commands import figure_class

INK, QUIET, MARK = "#24292f", "#57606a", "#ff2d55"
PANEL = 3.0  # inches, the width of a panel without its colour scale
DOTS_PER_INCH = 110


@dataclass(frozen=True)
class HeatMap:
    """One map to draw.

    Attributes:
        title: what stands above it.
        values: (rows, columns), of the patches.
        of_picture: the patches lie as in the picture, so that the query can be marked.
    """

    title: str
    values: Tensor
    of_picture: bool = True


@dataclass(frozen=True)
class Row:
    """One row of panels: the picture with the query, and its maps.

    Attributes:
        title: what stands above the picture.
        point: x and y of the query in pixels, to mark it; None for the class token.
        maps: one panel each.
    """

    title: str
    point: tuple[int, int] | None
    maps: Sequence[HeatMap]


def draw_rows(picture: Image.Image, rows: Sequence[Row], title: str) -> Any:
    """Return a figure: the picture at the left of each row, its maps beside it, all on the picture's pixels.

    Maps without negative values are drawn from 0 up, others with 0 in the middle of a scale of two colours.

    Raises:
        UsageError: matplotlib is not installed.
    """
    columns = 1 + max(len(row.maps) for row in rows)
    tall = min(max(picture.height / picture.width, 0.4), 2.5)
    size = (PANEL * (1.22 * columns - 0.22), len(rows) * (0.86 * PANEL * tall + 0.4) + 0.5)
    figure = figure_class()(figsize=size, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK, parse_math=False)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for row, axes in zip(rows, grid, strict=True):
        axes[0].imshow(np.asarray(picture), extent=(0, picture.width, picture.height, 0))
        _dress(axes[0], row.title, row.point)
        for heat, panel in zip(row.maps, axes[1:], strict=False):
            _draw_map(figure, panel, heat, picture.size, row.point)
        for panel in axes[1 + len(row.maps) :]:
            panel.set_visible(False)
    return figure


def _draw_map(figure: Any, axes: Any, heat: HeatMap, size: tuple[int, int], point: tuple[int, int] | None) -> None:
    values = heat.values.detach().double().cpu().numpy()
    most = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())
    scale = {"cmap": "RdBu_r", "vmin": -most} if signed else {"cmap": "viridis", "vmin": 0.0}
    image = axes.imshow(values, extent=(0, size[0], size[1], 0), interpolation="nearest", vmax=most, **scale)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, aspect=20 * size[1] / size[0])
    bar.ax.tick_params(labelsize=7, colors=QUIET, length=2)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.yaxis.get_offset_text().set_fontsize(7)
    _dress(axes, heat.title, point if heat.of_picture else None)


def _dress(axes: Any, title: str, point: tuple[int, int] | None) -> None:
    """Title, ticks in pixels, and the query as a ring that shows on any colour."""
    axes.set_title(title, fontsize=9, color=INK, loc="left", parse_math=False)
    axes.tick_params(labelsize=7, colors=QUIET, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if point is not None:
        x, y = point[0] + 0.5, point[1] + 0.5
        axes.plot(x, y, marker="o", markersize=9, markerfacecolor="none", markeredgecolor="white", markeredgewidth=3.2)
        axes.plot(x, y, marker="o", markersize=9, markerfacecolor="none", markeredgecolor=MARK, markeredgewidth=1.6)
