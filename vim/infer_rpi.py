#!/usr/bin/env python3
"""Name what is in pictures, on a Raspberry Pi or any other machine.

python vim/infer_rpi.py --image cat.jpg --checkpoint vim_tiny.pth
python vim/infer_rpi.py --image cat.jpg --checkpoint vmamba_tiny.pth --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import DEFAULT_MODEL, add_run_flags, note, positive, run_script

if TYPE_CHECKING:
    from classify import Classifier, Result

# torch takes seconds to import, so it is imported only once the command line is known to be right.


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
        help="file (.pth, .safetensors), https address or Hugging Face repository; without it the weights "
        "are random and the predictions mean nothing")  # fmt: skip
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
    add_run_flags(parser)
    return parser


def classify_and_print(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code.

    Raises:
        UsageError, CheckpointError, LabelError, PictureError: nothing can be done; one sentence says why.
    """
    import torch

    from classify import classify, load_classifier
    from drawing import plan_outputs
    from model_setup import backend_that_runs, chosen_backend
    from pictures import find_pictures

    sources = find_pictures(args.image)
    outputs = plan_outputs(args.output, sources) if args.output else {}
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
    backend = backend_that_runs(args.backend, classifier.device)
    _describe(classifier, backend, torch.get_num_threads())
    report = _start_report(classifier, backend, torch.get_num_threads())
    failures = 0
    with chosen_backend(args.backend):
        if args.benchmark:
            _benchmark(classifier, args, report)
        for result in classify(classifier, sources, top=args.topk, batch_size=args.batch_size):
            failures += not _deliver(result, args, outputs, report, many=len(sources) > 1)
    if args.json:
        print(json.dumps(report, indent=2))
    return 0 if not failures else 1 if failures < len(sources) else 2


def _describe(classifier: Classifier, backend: str, threads: int) -> None:
    """Say on standard error what will run."""
    from causal_conv1d.backend.machine import has_fast_bf16
    from model_setup import published_weights

    millions = sum(weight.numel() for weight in classifier.model.parameters()) / 1e6
    _, height, width = classifier.shape
    note(
        f"model: {classifier.model_name}, {millions:.2f} M parameters, {len(classifier.names)} classes, "
        f"{height} x {width} pixels"
    )
    note(f"device: {classifier.device}, {classifier.dtype}, {threads} threads, backend {backend}")
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


def _start_report(classifier: Classifier, backend: str, threads: int) -> dict[str, Any]:
    return {
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


def _benchmark(classifier: Classifier, args: argparse.Namespace, report: dict[str, Any]) -> None:
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
    return run_script(build_parser(), classify_and_print, arguments)


if __name__ == "__main__":
    sys.exit(run())
