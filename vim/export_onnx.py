#!/usr/bin/env python3
"""Write a model as ONNX, for any runtime, and compare what it says with PyTorch.

python vim/export_onnx.py --checkpoint vim_tiny.pth --output vim_tiny.onnx
python vim/export_onnx.py --model vmamba_tiny_s2l5 --checkpoint vmamba_tiny.pth --output vmamba_tiny.onnx --scan steps
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import DEFAULT_MODEL, add_kernel_flags, add_size_flag, note, pip_install, positive, run_script

if TYPE_CHECKING:
    from torch import Tensor

    from classify import Classifier

# torch takes seconds to import, so it is imported only once the command line is known to be right.

SCHEMES = ("chunks", "steps")
STAGES = 4
BATCHES = (1, 3)  # of the random pictures that the file is compared on


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Write a Vision Mamba or VMamba as an ONNX file and compare its numbers with PyTorch's.",
        epilog="Exit code: 0, 1 if the file's logits differ from PyTorch's by more than the tolerance, 2 if the "
        "command cannot be carried out.",
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the file to write; ends in .onnx")
    add("--checkpoint", default="", metavar="WEIGHTS",
        help="file (.pth, .safetensors), https address or Hugging Face repository; without it the weights "
        "are random")  # fmt: skip
    add("--model", metavar="NAME", help=f"registered name (default: the checkpoint's, else {DEFAULT_MODEL})")
    add("--num_classes", "--num-classes", type=positive, metavar="N",
        help="classes of the head (default: the checkpoint's, else 1000)")  # fmt: skip
    add("--labels", metavar="FILE", help="names of the classes: one per line, a JSON list, or JSON {index: name}")
    add("--scan", choices=SCHEMES, default=SCHEMES[0],
        help="how the scans are written, both exact: chunks in few large operators, steps as the smallest graph "
        f"(default: {SCHEMES[0]})")  # fmt: skip
    add("--opset", type=positive, default=18, metavar="N", help="of ONNX, 18 or later (default: 18)")
    add("--image", nargs="+", default=[], metavar="PICTURE", help="pictures to compare on, beside random ones")
    add("--tolerance", type=_tolerance, default=1e-4, metavar="T",
        help="largest difference of a logit from PyTorch's (default: 1e-4)")  # fmt: skip
    add_size_flag(parser)
    add_kernel_flags(parser)
    return parser


def _tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number from 0 on, got {text!r}")
    return value


def export_and_compare(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, LabelError, PictureError: nothing can be done; one sentence says why.
    """
    import torch

    from classify import load_classifier
    from model_setup import chosen_backend

    path = _checked_output(args.output)
    _require_packages()
    if args.threads:
        torch.set_num_threads(args.threads)
    _stage(1, "reading the model")
    classifier = load_classifier(
        args.model,
        args.checkpoint or None,
        num_classes=args.num_classes,
        img_size=args.img_size,
        labels_file=args.labels,
    )
    if not args.checkpoint:
        note("warning: no --checkpoint was given, so the weights are random and the file's predictions mean nothing")
    batches = [*_random_pictures(classifier), *_real_pictures(classifier, args.image)]
    _stage(2, f"exporting {classifier.model_name}, which takes up to two minutes")
    start = time.monotonic()
    with chosen_backend(args.backend):
        program = _export(classifier, args.scan, args.opset)
        _describe(program.model, classifier, args.scan)
        _stage(3, f"writing {path}, after {time.monotonic() - start:.0f} s")
        _write(program, path)
        _stage(4, "comparing with PyTorch")
        return _compare(classifier, path, batches, args.tolerance)


def _stage(number: int, text: str) -> None:
    note(f"[{number}/{STAGES}] {text}")


def _checked_output(text: str) -> Path:
    from flags import UsageError

    path = Path(text)
    if path.suffix.lower() != ".onnx":
        raise UsageError(f"--output must end in .onnx, got {text}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {text} is a folder" if path.is_dir() else f"--output: no folder {path.parent}")
    return path


def _require_packages() -> None:
    """Raise UsageError before any work if what the export or the comparison needs is missing."""
    import importlib.util

    from flags import UsageError

    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the export needs {' and '.join(missing)}: run {pip_install(' '.join(missing))}")


def _random_pictures(classifier: Classifier) -> list[tuple[str, Tensor]]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [(f"random, batch {size}", torch.randn(size, *classifier.shape, generator=draw)) for size in BATCHES]


def _real_pictures(classifier: Classifier, sources: list[str]) -> list[tuple[str, Tensor]]:
    """One batch of each picture; all found and opened before the export, which takes long."""
    from pictures import find_pictures, open_picture

    names = find_pictures(sources) if sources else []
    return [(name, classifier.transform(open_picture(name))[None]) for name in names]


def _export(classifier: Classifier, scheme: str, opset: int) -> Any:
    import torch

    from checkpoint_sources import first_line
    from flags import UsageError
    from mamba_ssm.ops.export import export_onnx

    try:
        return export_onnx(classifier.model, torch.zeros(1, *classifier.shape), scheme=scheme, opset=opset)
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{classifier.model_name} cannot be exported: {first_line(error)}") from error


def _describe(graph: Any, classifier: Classifier, scheme: str) -> None:
    """Put into the file what a user of it must know: classes by number, and how pictures are prepared."""
    from pictures import IMAGENET_MEAN, IMAGENET_STD

    _, height, width = classifier.shape
    steps = {
        "size": [height, width],
        "crop_ratio": classifier.transform.crop_ratio,
        "interpolation": "bicubic",
        "channels": "RGB",
        "scale": 1 / 255,
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
    }
    graph.metadata_props.update(
        {
            "model_name": classifier.model_name,
            "class_names": json.dumps(classifier.names, ensure_ascii=False),
            "preprocessing": json.dumps(steps),
            "scan": scheme,
            "weights": "random" if classifier.source is None else classifier.source,
        }
    )


def _write(program: Any, path: Path) -> None:
    from checkpoint import write_whole

    write_whole(path, lambda file: program.save(file, external_data=False))
    nodes = sum(1 for _ in program.model.graph.all_nodes())
    note(f"{path}: {nodes} nodes, {path.stat().st_size / 1e6:.1f} MB, any batch")


def _compare(classifier: Classifier, path: Path, batches: list[tuple[str, Tensor]], tolerance: float) -> int:
    """Print how far the file's logits are from PyTorch's; return 1 if one is too far."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for name, batch in batches:
        (found,) = session.run(None, {"input": batch.numpy()})
        with torch.inference_mode():
            expected = classifier.model(batch)
        error = (torch.from_numpy(found) - expected).abs().max().item()
        same = torch.from_numpy(found).argmax(1).equal(expected.argmax(1))
        print(f"{name}: largest difference {error:.2e} of logits up to {expected.abs().max().item():.3g}, "
              f"the {'same' if same else 'NOT the same'} first class", flush=True)  # fmt: skip
        worst = max(worst, error) if error == error else float("inf")
    within = worst <= tolerance
    print(f"{'within' if within else 'OUT OF'} the tolerance of {tolerance:g}: largest difference {worst:.2e}")
    return 0 if within else 1


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), export_and_compare, arguments)


if __name__ == "__main__":
    sys.exit(run())
