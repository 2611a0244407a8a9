#!/usr/bin/env python3
"""Quantize a model to int8, and say what that does to its size, its speed and its accuracy.

python vim/quantize.py --checkpoint vim_tiny.pth --output vim_tiny_int8.safetensors --data-path imagenet
python vim/quantize.py --checkpoint vim_tiny.pth --output vim_tiny_int8.safetensors --scheme static --calibrate pictures
python vim/quantize.py --checkpoint vim_tiny.onnx --output vim_tiny_int8.onnx --data-path imagenet
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from command_line import Errors, UsageError, add_kernel_flags, add_size_flag, note, positive, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from quantize_measure import Network

# torch takes seconds to import, so it is imported only once the command line is known to be right.

SCHEMES = ("dynamic", "static")
ENDINGS = (".safetensors", ".pth", ".onnx")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Quantize a Vision Mamba or VMamba, of a checkpoint or of an ONNX file, to int8; then compare.",
        epilog="Exit code: 0, or 2 if the command cannot be carried out.",
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="WEIGHTS",
        help="file (.pth, .safetensors), https address or Hugging Face repository; or an .onnx file")  # fmt: skip
    add("--output", required=True, metavar="FILE",
        help="the file to write: .safetensors or .pth, or of an .onnx file .onnx")  # fmt: skip
    add("--scheme", choices=SCHEMES, default=SCHEMES[0],
        help="dynamic: each row of a layer's inputs is rounded by its own largest number, or in an ONNX file all rows "
        "of a batch by their range; static: all inputs by a step found on pictures (default: dynamic)")  # fmt: skip
    add("--calibrate", nargs="+", default=[], metavar="PICTURE",
        help="what static steps are found on, pictures of the model's kind: files, glob patterns, folders; of a folder "
        "without pictures those of its sub-folders, as DIR/CLASS/*.jpg or DIR/train/CLASS/*.jpg")  # fmt: skip
    add("--calibration-size", type=positive, default=128, metavar="N",
        help="use at most N of these, evenly picked (default: 128)")  # fmt: skip
    add("--data-path", metavar="DIR",
        help="measure the accuracy before and after on the pictures that `main.py --eval` takes from here "
        "(DIR/val/CLASS/*.jpg)")  # fmt: skip
    add("--model", metavar="NAME", help="registered name (default: the checkpoint's)")
    add("--num_classes", "--num-classes", type=positive, metavar="N",
        help="classes of the head (default: the checkpoint's)")  # fmt: skip
    add("--batch-size", type=positive, default=16, metavar="N",
        help="pictures per forward pass in calibration and evaluation (default: 16)")  # fmt: skip
    add_size_flag(parser)
    add_kernel_flags(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot be done, before anything slow is imported.

    Raises:
        UsageError: names the flag and what it got.
    """
    output, is_onnx = Path(args.output), args.checkpoint.lower().endswith(".onnx")
    if not args.checkpoint.strip():
        raise UsageError("--checkpoint is empty: name the file, address or repository to quantize")
    if is_onnx and args.backend != "auto":
        raise UsageError(f"--backend chooses kernels of torch's: leave --backend {args.backend} away for an ONNX file")
    if output.suffix.lower() not in (ENDINGS[-1:] if is_onnx else ENDINGS[:-1]):
        expected = "in .onnx, as --checkpoint does" if is_onnx else "in .safetensors or .pth"
        raise UsageError(f"--output must end {expected}, got {args.output}")
    if output.is_dir() or not output.parent.is_dir():
        raise UsageError(
            f"--output {output} is a folder" if output.is_dir() else f"--output: no folder {output.parent}"
        )
    if Path(args.checkpoint).is_file() and output.exists() and output.samefile(args.checkpoint):
        raise UsageError(f"--output {output} is the checkpoint itself, which stays: write to another file")
    if args.scheme == "static" and not args.calibrate:
        raise UsageError("--scheme static finds its steps on pictures: name some with --calibrate, or say dynamic")
    if args.scheme == "dynamic" and args.calibrate:
        raise UsageError("--calibrate is for --scheme static: a dynamic one measures the pictures that it is used on")


def quantize_and_compare(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, LabelError, PictureError, DataError, OnnxError: it cannot be done; one sentence.
    """
    import torch

    from model_setup import chosen_backend
    from quantize_measure import compare, evaluation_pictures, open_network, write_quantized

    if args.threads:
        torch.set_num_threads(args.threads)
    with chosen_backend(args.backend):
        note(f"reading {args.checkpoint}")
        before = open_network(args.checkpoint, args.model, args.num_classes, args.img_size)
        loader = evaluation_pictures(before, args.data_path, args.batch_size) if args.data_path else None
        note(f"quantizing {before.name}, {args.scheme}")
        write_quantized(before, Path(args.output), args.scheme, lambda: _calibration(args, before))
        after = open_network(args.output, None, None, None)
        compare(before, after, loader)
    return 0


def _calibration(args: argparse.Namespace, network: Network) -> Iterator[Tensor]:
    """Yield batches of prepared pictures, with a line of progress."""
    import torch

    from pictures import open_picture
    from progress import Progress

    sources = _calibration_sources(args.calibrate)
    count = min(len(sources), args.calibration_size)
    chosen = [sources[i * len(sources) // count] for i in range(count)]
    progress = Progress("Calibration", count)
    for start in range(0, count, args.batch_size):
        batch = [network.transform(open_picture(source)) for source in chosen[start : start + args.batch_size]]
        yield torch.stack(batch)
        progress.advance(len(batch))
    progress.close()


def _calibration_sources(named: Sequence[str]) -> list[str]:
    """What `find_pictures` finds; of a folder without pictures, what its sub-folders have, or those in them."""
    from pictures import find_pictures

    found: list[str] = []
    for source in named:
        own, level = find_pictures([source]), [source]
        for _ in range(2):
            if own != [source] or not Path(source).is_dir():
                break
            level = [str(inner) for folder in level for inner in _folders_in(folder)]
            own = [path for folder in level for path in find_pictures([folder]) if path != folder] or own
        found += own
    return list(dict.fromkeys(found))


def _folders_in(folder: str) -> list[Path]:
    """Its sub-folders, sorted, but those that are hidden; none if it cannot be read."""
    try:
        return sorted(inner for inner in Path(folder).iterdir() if inner.is_dir() and not inner.name.startswith("."))
    except OSError:
        return []


def environment(args: argparse.Namespace) -> Errors:
    """Import what the work needs; an `environment` of `run_script`."""
    from command_line import torch_environment

    check(args)
    errors = torch_environment(args)
    from class_match import DataError
    from onnx_file import OnnxError

    return *errors, DataError, OnnxError


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), quantize_and_compare, arguments, environment)


if __name__ == "__main__":
    sys.exit(run())
