#!/usr/bin/env python3
"""Draw effective receptive fields: which pixels the middle of a network's last map depends on.

python analyze/erf.py --model vmamba_tiny_s1l8 resnet50 --images 'imagenet/val/*/*.JPEG' --output erf.png
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "vim"), str(ROOT)]

from analyze.commands import (  # noqa: E402
    CHECKPOINT_HELP,
    MODEL_HELP,
    add_run_flags,
    figure_class,
    load_network,
    pair_up,
    pictures_under,
    read_size,
    running,
    set_threads,
    write_figure,
)
from command_line import note, positive, run_script  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from classify import Classifier
    from progress import Progress

THRESHOLDS = (0.2, 0.3, 0.5, 0.99)


@dataclass(frozen=True)
class Field:
    """The field of one network: its name, its mean score map (h, w), and the pictures it is of and without."""

    title: str
    values: Tensor
    used: int
    skipped: int


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Draw the effective receptive fields of networks side by side, and print how large they are.",
        epilog="The field is the mean over pictures of relu(gradient of the middle of the last map); it is drawn as "
        "(field ^ 0.2) / maximum. Exit code: 0, 1 if some pictures failed, 2 if the command cannot be carried out.",
    )
    add = parser.add_argument
    add("--model", nargs="+", metavar="NAME", help=f"{MODEL_HELP}; several are drawn side by side")
    add("--checkpoint", nargs="+", metavar="WEIGHTS",
        help=f"{CHECKPOINT_HELP}; one for each --model, - for random weights")  # fmt: skip
    add("--images", required=True, metavar="WHERE", help="a folder of pictures or of folders, or a pattern in quotes")
    add("--count", type=positive, default=50, metavar="N", help="pictures, drawn at random (default: 50)")
    add("--seed", type=int, default=0, metavar="N", help="of the draw (default: 0)")
    add("--thresholds", nargs="+", type=_share, default=THRESHOLDS, metavar="SHARE",
        help="shares of the total for the table (default: 0.2 0.3 0.5 0.99)")  # fmt: skip
    add("--output", required=True, metavar="PATH", help="the drawing (.png, .jpg ...)")
    add_run_flags(parser)
    return parser


def _share(text: str) -> float:
    """Read a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and 1, got {text!r}")
    return value


def draw_fields(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError: it cannot be done; one sentence says why.
    """
    from drawing import plan_outputs

    figure_class()  # says now if it is missing
    (path,) = plan_outputs(args.output, ["erf"]).values()
    set_threads(args.threads)
    pairs = pair_up(args.model, args.checkpoint)
    found = pictures_under(args.images)
    chosen = sorted(random.Random(args.seed).sample(found, min(args.count, len(found))))
    if len(found) < args.count:
        note(f"note: there are {len(found)} pictures, fewer than --count {args.count}")
    fields, failures = [], 0
    for name, checkpoint in pairs:
        network = load_network(name, checkpoint, read_size(args.img_size), args.device)
        field, unread = _field(network, chosen)
        fields.append(field)
        failures = max(failures, unread)
        del network
    write_figure(draw(fields), path)
    note(f"written: {path}")
    print_table(fields, args.thresholds)
    return 1 if failures else 0


def _field(network: Classifier, sources: Sequence[str]) -> tuple[Field, int]:
    """Return the field of a network, and how many pictures could not be read."""
    from analyze.receptive_field import mean_field
    from flags import UsageError
    from progress import Progress

    progress = Progress(network.model_name, len(sources))
    unread: list[str] = []
    for parameter in network.model.parameters():
        parameter.requires_grad_(False)
    with running(network):
        values, used, skipped = mean_field(network.model, _opened(network, sources, progress, unread))
    progress.close()
    if values is None:
        reason = "none could be read" if unread else "its gradients are not finite numbers"
        raise UsageError(f"{network.model_name} has no receptive field on these {len(sources)} pictures: {reason}")
    if skipped:
        note(f"note: {skipped} of {len(sources)} pictures were left out, for gradients that are not finite numbers")
    weights = "random weights" if network.source is None else Path(network.source).name
    return Field(f"{network.model_name}\n{weights}", values, used, skipped), len(unread)


def _opened(network: Classifier, sources: Sequence[str], progress: Progress, unread: list[str]) -> Iterator[Tensor]:
    """Yield the pictures as the network takes them; say which cannot be read, and count it in `unread`."""
    from pictures import PictureError, open_picture

    for source in sources:
        try:
            yield network.transform(open_picture(source)).to(network.device)
        except PictureError as error:
            unread.append(source)
            note(f"error: {error}")
        progress.advance(1)


def draw(fields: Sequence[Field]) -> Any:
    """Return a figure of the fields side by side, as (field ^ 0.2) / maximum on one scale from 0 to 1.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from analyze.panels import DOTS_PER_INCH, INK, QUIET
    from analyze.receptive_field import EffectiveReceptiveField

    columns = min(len(fields), 4)
    rows = -(-len(fields) // columns)
    size = (3.6 * columns + 0.9, 3.9 * rows + 0.5)
    figure = figure_class()(figsize=size, dpi=DOTS_PER_INCH, facecolor="white", layout="constrained")
    title = "effective receptive field of the middle of the last map"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    grid = figure.subplots(rows, columns, squeeze=False)
    for panel in grid.flat[len(fields) :]:
        panel.set_visible(False)
    for panel, field in zip(grid.flat, fields, strict=False):
        shown = EffectiveReceptiveField.simpnorm(field.values).numpy()
        image = panel.imshow(shown, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        panel.set_title(field.title, fontsize=9, color=INK, loc="left", parse_math=False)
        panel.tick_params(labelsize=7, colors=QUIET, length=2)
        panel.set_xlabel(f"mean of {field.used} pictures", fontsize=8, color=QUIET)
        for spine in panel.spines.values():
            spine.set_visible(False)
    bar = figure.colorbar(image, ax=grid, fraction=0.03, pad=0.02)
    bar.ax.tick_params(labelsize=7, colors=QUIET, length=2)
    bar.set_label("(field / maximum) ^ 0.2", fontsize=8, color=QUIET)
    return figure


def print_table(fields: Sequence[Field], thresholds: Sequence[float]) -> None:
    """Print for each network and share the side of the middle square that holds it, and its part of the picture."""
    from analyze.receptive_field import EffectiveReceptiveField

    for field in fields:
        height, width = field.values.shape
        print(f"{field.title.replace(chr(10), ', ')}, {height} x {width} pixels")
        print(f"{'share':>8}{'side':>8}{'area':>10}")
        for share in thresholds:
            side, area = EffectiveReceptiveField.get_rectangle(field.values, share)
            shown = f"{side:>8}{area:>10.2%}" if side is not None else f"{'-':>8}{'-':>10}"
            print(f"{share:>8.0%}{shown}")


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), draw_fields, arguments)


if __name__ == "__main__":
    sys.exit(run())
