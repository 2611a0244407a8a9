"""Draw predictions under a picture, and write it whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image, ImageDraw, ImageFont

from command_line import UsageError
from pictures import PICTURE_SUFFIXES, is_url

LONGEST_SIDE = 1600  # pixels of the drawn picture; larger ones are made smaller
MOST_LINES = 10
LEAST_WIDTH = 448  # pixels; smaller pictures are enlarged, or stand on a ground of this width

_GROUND = (22, 25, 32)
_TRACK = (46, 51, 63)
_BEST, _OTHER = (72, 199, 174), (96, 125, 160)
_BEST_TEXT, _OTHER_TEXT = (255, 255, 255), (198, 204, 215)
# Searched for in the system's folders when Pillow's own font lacks a character.
_FONT_FILES = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "msyh.ttc",
    "PingFang.ttc",
    "Arial Unicode.ttf",
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "arial.ttf",
)
_NO_CHARACTER = "\U0010fffe"  # never assigned, so every font draws its box for what it lacks


def draw_predictions(picture: Image.Image, predictions: Sequence[tuple[str, float]]) -> Image.Image:
    """Return the picture with a panel under it: a line per (label, probability), with a bar.

    Nothing of the picture is covered. It is made smaller to at most `LONGEST_SIDE` pixels, and a tiny one is
    enlarged in whole steps, so that the text can be read. Only the first `MOST_LINES` predictions are drawn.
    """
    picture = _presentable(picture)
    predictions = predictions[:MOST_LINES]
    width = max(picture.width, LEAST_WIDTH)
    size = max(15, round(width / 34))
    row = round(size * 2.05)
    margin = size
    panel = margin + row * len(predictions) + margin // 2
    canvas = Image.new("RGB", (width, picture.height + panel), _GROUND)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(canvas)
    for rank, (label, probability) in enumerate(predictions):
        top = picture.height + margin + rank * row
        _draw_row(draw, (margin, top, width - margin), size, label, probability, best=rank == 0)
    return canvas


def _presentable(picture: Image.Image) -> Image.Image:
    longest = max(picture.size)
    if longest > LONGEST_SIDE:
        width, height = (max(1, round(side * LONGEST_SIDE / longest)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    steps = min(LEAST_WIDTH // picture.width, LONGEST_SIDE // (2 * picture.height))
    return (
        picture.resize((picture.width * steps, picture.height * steps), Image.Resampling.NEAREST)
        if steps > 1
        else picture
    )


def _draw_row(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int, int],
    size: int,
    label: str,
    probability: float,
    *,
    best: bool,
) -> None:
    """Draw a line at `place` (left, top, right): label, probability at the right, bar under both."""
    left, top, right = place
    colour = _BEST_TEXT if best else _OTHER_TEXT
    figure = f"{100 * probability:.1f} %"
    figure_font = _font("0 %", size)
    figure_width = round(draw.textlength(figure, font=figure_font))
    font = _font(label, size)
    baseline = top + size
    draw.text((right, baseline), figure, font=figure_font, fill=colour, anchor="rs")
    fitting = _shorten(draw, label, font, right - left - figure_width - size)
    draw.text((left, baseline), fitting, font=font, fill=colour, anchor="ls")
    bar_top, height = top + round(size * 1.42), max(3, size // 5)
    filled = left + round((right - left) * min(max(probability, 0.0), 1.0))
    draw.rectangle((left, bar_top, right, bar_top + height), fill=_TRACK)
    if filled > left:
        draw.rectangle((left, bar_top, filled, bar_top + height), fill=_BEST if best else _OTHER)


def _shorten(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """Return as much of the text as fits into `width` pixels, with an ellipsis where something is missing."""
    if draw.textlength(text, font=font) <= width:
        return text
    low, high = 0, len(text)  # the longest beginning that fits, found by halving
    while low < high:
        middle = (low + high + 1) // 2
        if draw.textlength(text[:middle].rstrip(" ,") + "...", font=font) <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip(" ,") + "..."


def has_font_for(text: str) -> bool:
    """Tell whether a font on this machine has every character of the text."""
    return _covers(_font(text, 15), text)


def _font(text: str, size: int) -> Any:
    """Return Pillow's own font, or the first of the system's that has every character of the text."""
    own = _load(None, size)
    if _covers(own, text):
        return own
    others = (_load(file, size) for file in _FONT_FILES)
    return next((font for font in others if font is not None and _covers(font, text)), own)


@lru_cache(maxsize=64)
def _load(file: str | None, size: int) -> Any:
    try:
        return ImageFont.load_default(size) if file is None else ImageFont.truetype(file, size)
    except OSError:  # this machine has no such font
        return None


def _covers(font: Any, text: str) -> bool:
    missing = bytes(font.getmask(_NO_CHARACTER))
    return all(bytes(font.getmask(c)) != missing for c in set(text) if not c.isspace())


def plan_outputs(output: str, sources: Sequence[str]) -> dict[str, Path]:
    """Return the file for the labelled picture of each source, after making sure that it can be written.

    Args:
        output: a file for a single source; a folder, which is made if need be, for one or several. In it each
            gets its source's name with the ending .png, and a number where two would be the same.
        sources: what `pictures.find_pictures` returned.
    Raises:
        UsageError: it cannot be written, is no picture's name, or is one of the pictures themselves.
    """
    path = Path(output)
    try:
        if len(sources) > 1 or path.is_dir() or output.endswith(("/", os.sep)):
            path.mkdir(parents=True, exist_ok=True)
            folder, targets = path, _targets_in(path, sources)
        else:
            folder, targets = path.parent, {sources[0]: path}
        _check_targets(targets, sources)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except UsageError:
        raise
    except FileExistsError as error:
        raise UsageError(f"--output {output!r} is a file, but several pictures need a folder.") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(f"Cannot write to --output {output!r}: {reason}.") from error
    return targets


def _targets_in(folder: Path, sources: Sequence[str]) -> dict[str, Path]:
    targets: dict[str, Path] = {}
    for source in sources:
        name = urlsplit(source).path if is_url(source) else source
        stem = "stdin" if source == "-" else Path(name).stem or "picture"
        target, number = folder / f"{stem}.png", 2
        while target in targets.values():
            target, number = folder / f"{stem}-{number}.png", number + 1
        targets[source] = target
    return targets


def _check_targets(targets: dict[str, Path], sources: Sequence[str]) -> None:
    originals = {os.path.realpath(source) for source in sources if source != "-" and not is_url(source)}
    for target in targets.values():
        if target.suffix.lower() not in PICTURE_SUFFIXES:
            raise UsageError(f"--output {str(target)!r} must end like a picture, in .png or .jpg, or be a folder.")
        if os.path.realpath(target) in originals:
            raise UsageError(f"--output would overwrite the picture {str(target)!r} itself; name another place.")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Write the picture in the format that the path's ending names: whole, or not at all.

    Raises:
        OSError: it cannot be written there. An older file stays as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            picture.save(file, format=Image.registered_extensions()[path.suffix.lower()], quality=95)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
