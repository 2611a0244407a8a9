"""What the commands of this folder share: flags, loading a network, pictures in folders, files written whole."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import DEFAULT_MODEL, note, pip_install, positive, thread_count

if TYPE_CHECKING:
    from classify import Classifier

RANDOM = ("", "-")  # what stands for "no checkpoint" in a list of them

# What imports torch, `flags` too, is imported only once the command line is known to be right.


def add_run_flags(parser: argparse.ArgumentParser, *, size: str = "--img-size") -> None:
    """Add the flags that every command has: size of the pictures, device, threads."""
    add = parser.add_argument
    add(*dict.fromkeys((size, "--img-size")), dest="img_size", type=positive, nargs="+", metavar="PIXELS",
        help="side of the model's square input, or height and width (default: the model's own)")  # fmt: skip
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: cpu)")
    add("--threads", type=thread_count, metavar="N", help="CPU threads (default: torch's choice)")


def read_size(values: Sequence[int] | None) -> int | tuple[int, int] | None:
    """Return one number as it is and two as (height, width); None for none.

    Raises:
        UsageError: they are more than two.
    """
    from flags import UsageError

    if values is None:
        return None
    if len(values) > 2:
        raise UsageError(f"--img-size takes one number (a square) or two (height and width), got {len(values)}")
    return values[0] if len(values) == 1 else (values[0], values[1])


def set_threads(count: int | None) -> None:
    """Let torch use this many CPU threads; None: as many as it likes."""
    import torch

    if count:
        torch.set_num_threads(count)


def pair_up(names: Sequence[str] | None, checkpoints: Sequence[str] | None) -> list[tuple[str | None, str | None]]:
    """Return (model, checkpoint) for every network that --model and --checkpoint ask for; None: not said.

    Raises:
        UsageError: there are several models, but not as many checkpoints.
    """
    from flags import UsageError

    files: Sequence[str | None] = checkpoints or [None] * len(names or [None])
    if names is None:
        return [(None, checkpoint) for checkpoint in files]
    if len(files) != len(names):
        raise UsageError(
            f"--checkpoint names {len(files)} and --model {len(names)}; give one checkpoint for each model, "
            "- for random weights"
        )
    return list(zip(names, files, strict=True))


def load_network(
    name: str | None,
    checkpoint: str | None,
    img_size: int | tuple[int, int] | None,
    device: str,
    *,
    weights_matter: bool = True,
) -> Classifier:
    """Build a network and load its weights, and say what was loaded; random weights are said aloud if they matter.

    Its transform takes the whole shorter side of a picture. For the other arguments and the errors see
    `classify.load_classifier`.
    """
    import dataclasses

    from classify import load_classifier
    from pictures import eval_transform

    source = None if checkpoint in RANDOM else checkpoint
    network = load_classifier(name, source, img_size=img_size, device=device)
    _, height, width = network.shape
    note(f"model: {network.model_name}, {height} x {width} pixels, on {network.device}")
    if network.source is None and weights_matter:
        note(f"warning: no --checkpoint was given, so the weights of {network.model_name} are random")
    elif network.source is not None:
        note(f"weights: {network.source}")
    return dataclasses.replace(network, transform=eval_transform((height, width), crop_ratio=1.0))


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turn what a function says to impossible arguments into a UsageError."""
    from checkpoint_sources import first_line
    from flags import UsageError

    try:
        yield
    except UsageError:
        raise
    except (ValueError, AssertionError) as error:
        raise UsageError(first_line(error)) from error


@contextmanager
def running(network: Classifier) -> Iterator[None]:
    """Turn a failure to run a network on a picture into a UsageError."""
    import torch

    from model_setup import refuse_failures

    with refuse_failures(torch.empty(1, *network.shape, device="meta")), one_sentence():
        yield


def pictures_under(source: str) -> list[str]:
    """Return the pictures of a folder, those of its sub-folders if it has none itself, or of a glob pattern.

    Raises:
        UsageError: there are none.
    """
    from flags import UsageError
    from pictures import PICTURE_SUFFIXES, find_pictures

    found = [path for path in find_pictures([source]) if Path(path).is_file()]
    if not found and Path(source).is_dir():
        deep = (path for path in Path(source).rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file())
        found = sorted(str(path) for path in deep)
    if not found:
        raise UsageError(f"There are no pictures in {source!r}; name a folder of pictures, or a pattern in quotes.")
    return found


def figure_class() -> Any:
    """Return matplotlib's Figure, which needs no display.

    Raises:
        UsageError: matplotlib is not installed.
    """
    from checkpoint_sources import first_line
    from flags import UsageError

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"drawing needs matplotlib ({first_line(error)}); {pip_install('matplotlib')} installs it"
        ) from error
    return Figure


def write_figure(figure: Any, path: Path) -> None:
    """Write a figure in the format that the path's ending names: whole, or not at all.

    Raises:
        UsageError: it cannot be written.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    from drawing import write_picture
    from flags import UsageError

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    try:
        write_picture(Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB"), path)
    except OSError as error:
        raise UsageError(f"Cannot write {str(path)!r}: {error.strerror or error}.") from error


MODEL_HELP = f"registered name, of Vim, VMamba or timm (default: the checkpoint's, else {DEFAULT_MODEL})"
CHECKPOINT_HELP = "file (.pth, .safetensors), https address or Hugging Face repository (default: random weights)"
