#!/usr/bin/env python3
"""Write a model as ONNX, for any runtime, or as an archive of torch.export, and compare its numbers with PyTorch's.

python vim/export_onnx.py --checkpoint vim_tiny.pth --output vim_tiny.onnx
python vim/export_onnx.py --model vmamba_tiny_s2l5 --checkpoint vmamba_tiny.pth --output vmamba_tiny.onnx --scan steps
python vim/export_onnx.py --checkpoint vim_tiny.pth --output vim_tiny.pt2
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    DEFAULT_MODEL,
    Errors,
    UsageError,
    add_kernel_flags,
    add_size_flag,
    note,
    pip_install,
    positive,
    run_script,
    torch_environment,
)

if TYPE_CHECKING:
    from torch import Tensor

    from classify import Classifier
    from onnx_session import OnnxModel

# torch takes seconds to import, so it is imported only once the command line is known to be right.

SCHEMES = ("chunks", "steps")
ONNX, ARCHIVE = ".onnx", ".pt2"
METADATA = "metadata.json"  # in an archive
LEAST_OPSET = 18
STAGES = 4
BATCHES = (1, 3)  # of the random pictures that the file is compared on


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description="Write a Vision Mamba or VMamba as an ONNX file (.onnx) or as an archive of torch.export (.pt2), "
        "for any batch of pictures of one size, and compare its numbers with PyTorch's.",
        epilog="An archive holds this project's ops: import mamba_ssm before torch.export.load reads it, and load only "
        "archives that you trust. Exit code: 0, 1 if the file's logits differ from PyTorch's by more than the "
        "tolerance (the file stays), 2 if the command cannot be carried out.",
    )
    add = parser.add_argument
    add("--output", required=True, metavar="FILE", help="the file to write; ends in .onnx or .pt2")
    add("--checkpoint", default="", metavar="WEIGHTS",
        help="file (.pth, .safetensors), https address or Hugging Face repository; without it the weights "
        "are random")  # fmt: skip
    add("--model", metavar="NAME", help=f"registered name (default: the checkpoint's, else {DEFAULT_MODEL})")
    add("--num_classes", "--num-classes", type=positive, metavar="N",
        help="classes of the head (default: the checkpoint's, else 1000)")  # fmt: skip
    add("--labels", metavar="FILE", help="names of the classes: one per line, a JSON list, or JSON {index: name}")
    add("--image", nargs="+", default=[], metavar="PICTURE", help="pictures to compare on, beside random ones")
    add("--tolerance", type=_tolerance, default=1e-4, metavar="T",
        help="largest difference of a logit from PyTorch's (default: 1e-4)")  # fmt: skip
    onnx = parser.add_argument_group("of ONNX files alone").add_argument
    onnx("--scan", choices=SCHEMES,
        help="how the scans are written, both exact for any decay: chunks is the fastest in ONNX Runtime, four tokens "
        "or a row of a picture at a time; steps is the smallest graph, one Scan node for all directions, a token at a "
        f"time (default: {SCHEMES[0]})")  # fmt: skip
    onnx("--inline", action="store_true",
        help="write the scans' definitions in their place, for runtimes that know no functions; ONNX Runtime's library "
        "of this project's operators is of no use to such a file")  # fmt: skip
    onnx("--weights", choices=("inside", "beside"), help="where the weights are kept: in the file, or in FILE.data "
        "beside it, as a model of 2 GB or more must be (default: inside)")  # fmt: skip
    onnx("--opset", type=positive, metavar="N", help="of ONNX, 18 or later (default: 18)")
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
    from int8 import is_quantized
    from model_setup import chosen_backend

    path = Path(args.output)
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
    if is_quantized(classifier.model.state_dict()):
        raise UsageError(
            f"{args.checkpoint} is in int8 already: export the checkpoint that it was made from, and give that file to "
            "vim/quantize.py"
        )
    if not args.checkpoint:
        note("warning: no --checkpoint was given, so the weights are random and the file's predictions mean nothing")
    batches = [*_random_pictures(classifier), *_real_pictures(classifier, args.image)]
    _stage(2, f"exporting {classifier.model_name}, which takes up to two minutes")
    with chosen_backend(args.backend):
        write = _write_onnx if path.suffix == ONNX else _write_archive
        write(classifier, path, args, time.monotonic())
        _stage(4, "comparing with PyTorch")
        ways = _ways_to_run_onnx if path.suffix == ONNX else _ways_to_run_archive
        worst = [_compare(classifier, name, run, batches) for name, run in ways(path, args.threads)]
    within = max(worst) <= args.tolerance
    print(
        f"{'within' if within else 'OUT OF'} the tolerance of {args.tolerance:g}: largest difference {max(worst):.2e}"
    )
    return 0 if within else 1


def _stage(number: int, text: str) -> None:
    note(f"[{number}/{STAGES}] {text}")


def environment(args: argparse.Namespace) -> Errors:
    """Refuse what cannot be done, then import what the work needs; an `environment` of `run_script`."""
    path = Path(args.output)
    if path.suffix not in (ONNX, ARCHIVE):
        raise UsageError(f"--output must end in {ONNX} or {ARCHIVE}, got {args.output}")
    if path.is_dir() or not path.parent.is_dir():
        raise UsageError(f"--output {path} is a folder" if path.is_dir() else f"--output: no folder {path.parent}")
    for name in ("scan", "opset", "weights", "inline"):
        if path.suffix == ARCHIVE and getattr(args, name):
            raise UsageError(f"--{name} is of ONNX files alone, and --output {path} is an archive of torch.export")
    if path.suffix == ONNX:
        _require_packages()
        _require_opset(args.opset)
    from onnx_file import OnnxError, is_onnx

    if is_onnx(args.checkpoint):
        raise UsageError(f"{args.checkpoint} is an ONNX file already: --checkpoint takes the weights that it is of")
    return *torch_environment(args), OnnxError


def _require_packages() -> None:
    """Raise UsageError before any work if what the export or the comparison needs is missing."""
    import importlib.util

    needed = ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"the export needs {' and '.join(missing)}: run {pip_install(' '.join(missing))}")


def _require_opset(opset: int | None) -> None:
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and not LEAST_OPSET <= opset <= newest:
        raise UsageError(
            f"--opset must be from {LEAST_OPSET} to {newest}, which the installed onnx ends with, got {opset}"
        )


def _random_pictures(classifier: Classifier) -> list[tuple[str, Tensor]]:
    import torch

    draw = torch.Generator().manual_seed(0)
    return [(f"random, batch {size}", torch.randn(size, *classifier.shape, generator=draw)) for size in BATCHES]


def _real_pictures(classifier: Classifier, sources: list[str]) -> list[tuple[str, Tensor]]:
    """One batch of each picture; all found and opened before the export, which takes long."""
    from pictures import find_pictures, open_picture

    names = find_pictures(sources) if sources else []
    return [(name, classifier.transform(open_picture(name))[None]) for name in names]


def _description(classifier: Classifier) -> dict[str, str]:
    """What a user of the file must know: classes by number, and how pictures are prepared."""
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
    # Folders of pictures are called by the checkpoint's own names, which may be others than those for people.
    own = {} if classifier.own_names is None else {"checkpoint_names": json.dumps(classifier.own_names)}
    return {
        **own,
        "model_name": classifier.model_name,
        "class_names": json.dumps(classifier.names, ensure_ascii=False),
        "preprocessing": json.dumps(steps),
        "weights": "random" if classifier.source is None else classifier.source,
    }


def _write_onnx(classifier: Classifier, path: Path, args: argparse.Namespace, start: float) -> None:
    import torch

    from checkpoint_sources import first_line
    from mamba_ssm.ops.export import export_onnx

    scheme, example = args.scan or SCHEMES[0], torch.zeros(1, *classifier.shape)
    try:
        program = export_onnx(
            classifier.model, example, scheme=scheme, opset=args.opset or LEAST_OPSET, functions=not args.inline
        )
    except (ValueError, RuntimeError) as error:
        raise UsageError(f"{classifier.model_name} cannot be exported: {first_line(error)}") from error
    program.model.metadata_props.update({**_description(classifier), "scan": scheme})
    _stage(3, f"writing {path}, after {time.monotonic() - start:.0f} s")
    if args.weights == "beside":
        size = _write_with_weights_beside(program, path)
    else:
        _write(path, lambda file: program.save(file, external_data=False))
        size = path.stat().st_size
    nodes = sum(1 for _ in program.model.graph.all_nodes())
    defining = sum(sum(1 for _ in function.all_nodes()) for function in program.model.functions.values())
    of_functions = f" and {defining} in definitions" if defining else ""
    _, height, width = classifier.shape
    beside = f" with {path.name}.data, which must keep its name" if args.weights == "beside" else ""
    note(f"{path}: {nodes} nodes{of_functions}, {size / 1e6:.1f} MB{beside}, any batch of {height} x {width} pixels")


def _write_with_weights_beside(program: Any, path: Path) -> int:
    """Write the file and, beside it, FILE.data; the bytes of both."""
    from checkpoint import CheckpointError

    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        # The graph names its weights' file, so both have their last names here already.
        written = [Path(folder, f"{path.name}.data"), Path(folder, path.name)]
        try:
            program.save(written[1], external_data=True)
            for file in written:
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
            return sum(file.replace(path.with_name(file.name)).stat().st_size for file in written)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    from checkpoint import write_whole

    write_whole(path, write)


def _write_archive(classifier: Classifier, path: Path, args: argparse.Namespace, start: float) -> None:
    import torch

    from checkpoint_sources import first_line

    example = torch.zeros(2, *classifier.shape)  # a batch of one would be taken for a size that is always one
    sizes = ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    try:
        with torch.no_grad():
            program = torch.export.export(classifier.model, (example,), dynamic_shapes=sizes)
    except Exception as error:  # of torch's many own classes
        raise UsageError(f"{classifier.model_name} cannot be exported: {first_line(error)}") from error
    _stage(3, f"writing {path}, after {time.monotonic() - start:.0f} s")
    said = {METADATA: json.dumps(_description(classifier), ensure_ascii=False)}

    archive = io.BytesIO()  # on a full disk torch's own writer ends the process
    torch.export.save(program, archive, extra_files=said)
    _write(path, lambda file: file.write_bytes(archive.getbuffer()))
    _, height, width = classifier.shape
    note(f"{path}: {path.stat().st_size / 1e6:.1f} MB, any batch of {height} x {width} pixels")


def _ways_to_run_onnx(path: Path, threads: int | None) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    """ONNX Runtime alone and, if it was built and the file has its operators, with this project's library."""
    import torch

    from onnx_session import open_session

    models = {"onnxruntime": open_session(path, threads=threads, custom_ops="none")}
    fast = open_session(path, threads=threads)
    if fast.custom_ops is not None:
        models["onnxruntime with this project's operators"] = fast

    def runs(model: OnnxModel) -> Callable[[Tensor], Tensor]:
        return lambda batch: torch.from_numpy(model.run(batch.numpy()))

    return [(name, runs(model)) for name, model in models.items()]


def _ways_to_run_archive(path: Path, threads: int | None) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
    import torch

    return [("the archive", torch.export.load(path).module())]


def _compare(
    classifier: Classifier, way: str, run: Callable[[Tensor], Tensor], batches: list[tuple[str, Tensor]]
) -> float:
    """Print how far the file's logits are from PyTorch's; return the largest difference."""
    import torch

    worst = 0.0
    for name, batch in batches:
        with torch.inference_mode():
            found, expected = run(batch), classifier.model(batch)
        error = (found - expected).abs().max().item()
        same = found.argmax(1).equal(expected.argmax(1))
        print(f"{way}, {name}: largest difference {error:.2e} of logits up to {expected.abs().max().item():.3g}, "
              f"the {'same' if same else 'NOT the same'} first class", flush=True)  # fmt: skip
        worst = max(worst, error) if error == error else float("inf")
    return worst


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), export_and_compare, arguments, environment)


if __name__ == "__main__":
    sys.exit(run())
