#!/usr/bin/env python3
"""Name what is in pictures, on a Raspberry Pi or any other machine.

python vim/infer_rpi.py --image cat.jpg --checkpoint vim_tiny.pth
python vim/infer_rpi.py --image cat.jpg --checkpoint vmamba_tiny.pth --dtype bfloat16
python vim/infer_rpi.py --image cat.jpg --checkpoint vim_tiny.onnx        (needs numpy, pillow and onnxruntime alone)
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    DEFAULT_MODEL,
    Errors,
    UsageError,
    add_run_flags,
    note,
    pip_install,
    positive,
    run_script,
    torch_environment,
)
from onnx_file import is_onnx

if TYPE_CHECKING:
    from classify import Classifier
    from onnx_classifier import OnnxClassifier
    from predictions import Result

# torch takes seconds to import, so it is imported only once the command line is known to be right, and never for ONNX.


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; its names are those of the Raspberry Pi guides."""
    parser = argparse.ArgumentParser(
        description="Name what is in pictures with Vision Mamba or VMamba.",
        epilog="Exit code: 0, 1 if some pictures failed, 2 if all did or the command cannot be carried out.",
    )
    add = parser.add_argument
    add("--image", nargs="+", required=True, metavar="PICTURE",
        help="file, folder, glob pattern, web address, - for standard input; several are fine")  # fmt: skip
    add("--checkpoint", default="", metavar="WEIGHTS",
        help="file (.pth, .safetensors), https address or Hugging Face repository, or a file of vim/export_onnx.py "
        "(.onnx); without it the weights are random and the predictions mean nothing")  # fmt: skip
    add("--model", metavar="NAME", help=f"registered name (default: the checkpoint's, else {DEFAULT_MODEL})")
    add("--num_classes", "--num-classes", type=positive, metavar="N",
        help="classes of the head (default: the checkpoint's, else 1000)")  # fmt: skip
    add("--topk", type=positive, default=5, metavar="K", help="predictions per picture (default: 5)")
    add(
        "--labels",
        metavar="FILE",
        help="names of the classes: one per line, a JSON list, or JSON {index: name}",
    )
    add("--output", metavar="PATH",
        help="write the picture with its labels drawn on it here; a folder if there are several")  # fmt: skip
    add("--json", action="store_true", help="print one JSON object, and everything else on standard error")
    add("--benchmark", type=positive, metavar="N", help="time N forward passes first")
    add = add_run_flags(parser).add_argument
    add("--runtime", choices=("auto", "torch", "onnxruntime"), default="auto",
        help="what runs the model (default: onnxruntime for ONNX files, torch for all else)")  # fmt: skip
    add("--custom-ops", default="auto", metavar="LIBRARY",
        help="this project's operators for ONNX files: a library, none, or auto: that of an installed mamba_ssm, or "
        "kernels.onnxruntime.so in the folder of this program (default: auto)")  # fmt: skip
    return parser


def on_onnxruntime(args: argparse.Namespace) -> bool:
    """Tell whether ONNX Runtime runs the model, else torch.

    Raises:
        UsageError: --runtime is not for such weights.
    """
    weights, onnx = args.checkpoint, is_onnx(args.checkpoint)
    if args.runtime == "torch" and onnx:
        raise UsageError(f"--runtime torch cannot run {weights}, which is ONNX; leave --runtime away")
    if args.runtime == "onnxruntime" and not weights:
        raise UsageError("--runtime onnxruntime needs --checkpoint FILE.onnx; vim/export_onnx.py writes such files")
    if args.runtime == "onnxruntime" and not onnx:
        there = f"{weights} is not one" if os.path.exists(os.path.expanduser(weights)) else f"there is no {weights}"
        raise UsageError(
            f"--runtime onnxruntime needs an ONNX file, and {there}; make one of a checkpoint with "
            f"`python vim/export_onnx.py --checkpoint {weights} --output {Path(weights).stem}.onnx`"
        )
    if args.custom_ops != "auto" and not onnx:
        raise UsageError("--custom-ops is for ONNX files alone; leave it away")
    return onnx


def import_what_is_needed(args: argparse.Namespace) -> Errors:
    """Import what the model runs on, and return the errors that it may raise; see `command_line.run_script`."""
    if not on_onnxruntime(args):
        try:
            return torch_environment(args)
        except UsageError as error:
            also = "a file of vim/export_onnx.py (.onnx) needs no torch"
            raise UsageError(f"{str(error).rstrip('.')}; {also}") from error
    try:
        from labels import LabelError
        from onnx_classifier import OnnxError
        from pictures import PictureError
    except ImportError as error:
        raise UsageError(f"{error}; run {pip_install('numpy pillow onnxruntime')}") from error
    return OnnxError, LabelError, PictureError


def classify_and_print(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, OnnxError, LabelError, PictureError: nothing can be done; one sentence says why.
    """
    from drawing import plan_outputs
    from pictures import find_pictures
    from predictions import classify

    sources = find_pictures(args.image)
    outputs = plan_outputs(args.output, sources) if args.output else {}
    onnx = on_onnxruntime(args)
    classifier, report = _load_onnx(args) if onnx else _load_torch(args)
    failures = 0
    with nullcontext() if onnx else _chosen_backend(args.backend):
        if args.benchmark:
            _benchmark(classifier, args, report)
        for result in classify(classifier, sources, top=args.topk, batch_size=args.batch_size):
            failures += not _deliver(result, args, outputs, report, many=len(sources) > 1)
    if args.json:
        print(json.dumps(report, indent=2))
    return 0 if not failures else 1 if failures < len(sources) else 2


def _chosen_backend(name: str) -> Any:
    from model_setup import chosen_backend

    return chosen_backend(name)


def _load_torch(args: argparse.Namespace) -> tuple[Classifier, dict[str, Any]]:
    """Load a checkpoint; say on standard error what will run, and begin the report."""
    import torch

    from classify import load_classifier
    from model_setup import backend_that_runs

    if args.threads:
        torch.set_num_threads(args.threads)
    classifier = load_classifier(
        args.model,
        args.checkpoint or None,
        num_classes=args.num_classes,
        img_size=args.img_size,
        labels_file=args.labels,
        device=args.device,
        dtype=args.dtype,
    )
    backend, threads = backend_that_runs(args.backend, classifier.device), torch.get_num_threads()
    millions = sum(weight.numel() for weight in classifier.model.parameters()) / 1e6
    _describe_model(classifier.model_name, f", {millions:.2f} M parameters", classifier.names, classifier.shape[1:])
    note(f"device: {classifier.device}, {classifier.dtype}, {threads} threads, backend {backend}")
    _describe_weights(classifier)
    report = {
        "model": classifier.model_name,
        "checkpoint": classifier.source,
        "num_classes": len(classifier.names),
        "img_size": list(classifier.shape[1:]),
        "device": str(classifier.device),
        "dtype": classifier.dtype,
        "threads": threads,
        "backend": backend,
        "pictures": [],
    }
    return classifier, report


def _describe_model(name: str, parameters: str, names: Sequence[str], size: Sequence[int]) -> None:
    note(f"model: {name}{parameters}, {len(names)} classes, {size[0]} x {size[1]} pixels")


def _describe_weights(classifier: Classifier) -> None:
    from causal_conv1d.backend.machine import has_fast_bf16
    from model_setup import published_weights

    if classifier.dtype == "bfloat16" and classifier.device.type == "cpu" and not has_fast_bf16():
        note("note: this CPU has no instructions for bfloat16, which is slower on it than --dtype float32")
    if classifier.source is not None:
        note(f"weights: {classifier.source}")
    else:
        note(
            "warning: no --checkpoint was given, so the weights are random and the predictions mean nothing; "
            f"for ImageNet's classes try --checkpoint {published_weights(classifier.model_name)}."
        )
    if classifier.resized is not None:
        before, after = classifier.resized
        note(f"note: the position embedding was resized from {before} to {after} tokens for this picture size")


def _load_onnx(args: argparse.Namespace) -> tuple[OnnxClassifier, dict[str, Any]]:
    """Open an ONNX file; say on standard error what will run, and begin the report."""
    from onnx_classifier import load_onnx_classifier

    _refuse_flags_of_torch(args)
    classifier = load_onnx_classifier(
        args.checkpoint,
        model_name=args.model,
        num_classes=args.num_classes,
        img_size=args.img_size,
        labels_file=args.labels,
        threads=args.threads,
        custom_ops=args.custom_ops,
    )
    model = classifier.model
    _describe_model(model.name, "", classifier.names, model.size)
    note(f"device: cpu, {model.dtype}, {model.threads} threads, backend onnxruntime")
    if model.custom_ops is not None:
        note(f"operators: {model.custom_ops}")
    note(f"weights: {model.source}")
    if model.has_random_weights:
        note("warning: it was written without a checkpoint, so its weights are random and the predictions mean nothing")
    report = {
        "model": model.name,
        "checkpoint": model.source,
        "num_classes": len(classifier.names),
        "img_size": list(model.size),
        "device": "cpu",
        "dtype": model.dtype,
        "threads": model.threads,
        "backend": "onnxruntime",
        "custom_ops": None if model.custom_ops is None else str(model.custom_ops),
        "pictures": [],
    }
    return classifier, report


def _refuse_flags_of_torch(args: argparse.Namespace) -> None:
    if args.device != "cpu":
        raise UsageError(f"an ONNX file runs on the CPU here: leave --device {args.device} away")
    if args.dtype != "float32":
        raise UsageError(f"an ONNX file has its dtype in it: leave --dtype {args.dtype} away")
    if args.backend != "auto":
        raise UsageError(f"--backend chooses kernels of torch's: leave --backend {args.backend} away for an ONNX file")


def _benchmark(classifier: Any, args: argparse.Namespace, report: dict[str, Any]) -> None:
    from timing import time_repeatedly

    batch = classifier.blank_batch(args.batch_size)
    timing = time_repeatedly(lambda: classifier.run(batch), args.benchmark)
    report["benchmark"] = {"batch_size": args.batch_size, **timing.as_json()}
    if not args.json:
        print(f"Forward pass, batch {args.batch_size}: {timing.summary()}", flush=True)


def _deliver(
    result: Result, args: argparse.Namespace, outputs: dict[str, Path], report: dict[str, Any], *, many: bool
) -> bool:
    """Print or collect one result and draw its picture; return whether all of that worked."""
    error = result.error
    if error is None and result.source in outputs:
        error = _draw(result, outputs[result.source])
    entry: dict[str, Any] = {"image": result.source}
    if result.predictions:
        entry["predictions"] = [vars(prediction) for prediction in result.predictions]
    if error is not None:
        entry["error"] = error
        note(f"error: {error}")
    elif result.source in outputs:
        entry["output"] = str(outputs[result.source])
    report["pictures"].append(entry)
    if result.predictions and not args.json:
        _print_predictions(result, many)
    return error is None


def _print_predictions(result: Result, many: bool) -> None:
    if many:
        print(f"\nPicture: {result.source if result.source.isprintable() else repr(result.source)}")
    print("Top predictions:")
    for place, prediction in enumerate(result.predictions, 1):
        print(f"{place}. {prediction.label}: {prediction.probability:.4f}", flush=True)


def _draw(result: Result, path: Path) -> str | None:
    """Write the labelled picture; return the error that prevented it."""
    from drawing import draw_predictions, has_font_for, write_picture

    assert result.picture is not None
    labels = [(prediction.label, prediction.probability) for prediction in result.predictions]
    try:
        write_picture(draw_predictions(result.picture, labels), path)
    except OSError as error:
        return f"Cannot write {str(path)!r}: {error.strerror or error}."
    if not all(has_font_for(label) for label, _ in labels):
        note(f"note: no font here has every character of the labels in {path}; install one (fonts-noto-cjk)")
    return None


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), classify_and_print, arguments, import_what_is_needed)


if __name__ == "__main__":
    sys.exit(run())
