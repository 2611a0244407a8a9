"""A network of a checkpoint or of an ONNX file, its quantised twin, and what is different about that."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from checkpoint import save_checkpoint
from classify import load_classifier
from command_line import UsageError
from datasets import build_dataset, collate_readable
from engine import Evaluation, measure, name_unreadable
from flags import get_args_parser
from int8 import is_quantized, quantize_model, stored
from onnx_file import is_onnx
from pictures import EvalTransform, PictureError

PASSES = 15  # forward passes that are timed, of each network in turn
COMPARED = 32  # pictures whose logits are compared


@dataclass(frozen=True)
class Network:
    """A network that gives logits of prepared pictures, (b, 3, h, w), and what is said of it.

    Attributes:
        source: the file or repository that it is of.
        names: class names by number for people; folder_names: those that class folders may have, None if unknown.
        size: of its pictures, (height, width) in pixels.
        weights: bytes of its weights, in fp32 unless it is quantised.
        operators: of an ONNX file, whether it runs with this project's own, in words.
    """

    model: nn.Module
    source: str
    name: str
    names: list[str]
    folder_names: list[str] | None
    size: tuple[int, int]
    transform: EvalTransform
    weights: int
    operators: str | None = None


def open_network(
    source: str, model_name: str | None, num_classes: int | None, img_size: int | tuple[int, int] | None
) -> Network:
    """Open a checkpoint or an ONNX file.

    Raises:
        UsageError, CheckpointError, LabelError, OnnxError: it cannot be used; one sentence says why.
    """
    if is_onnx(source):
        return _open_onnx(source, model_name, num_classes, img_size)
    classifier = load_classifier(model_name, source, num_classes=num_classes, img_size=img_size)
    return Network(
        model=classifier.model,
        source=source,
        name=classifier.model_name,
        names=classifier.names,
        folder_names=classifier.own_names,
        size=classifier.shape[1:],
        transform=classifier.transform,
        weights=sum(value.numel() * value.element_size() for value in classifier.model.state_dict().values()),
    )


def _open_onnx(
    source: str, model_name: str | None, num_classes: int | None, img_size: int | tuple[int, int] | None
) -> Network:
    from onnx_classifier import refuse_others, transform_of
    from onnx_network import OnnxNetwork
    from onnx_session import open_session

    model = open_session(source, threads=torch.get_num_threads())
    refuse_others(model, model_name=model_name, num_classes=num_classes, img_size=img_size)
    network = OnnxNetwork(model)
    return Network(
        network, source, model.name, model.class_names, network.folder_names, model.size, transform_of(model),
        Path(source).stat().st_size, _operators(model.custom_ops),
    )  # fmt: skip


def _operators(library: Path | None) -> str:
    return "without this project's operators" if library is None else f"with this project's operators ({library})"


def write_quantized(network: Network, output: Path, scheme: str, calibration: Callable[[], Iterator[Tensor]]) -> None:
    """Write what a network is quantised to.

    Args:
        calibration: called once for batches of prepared pictures if the scheme is static.
    Raises:
        UsageError, CheckpointError, PictureError: it cannot be done, or written; one sentence says why.
    """
    batches = calibration() if scheme == "static" else None
    if is_onnx(network.source):
        from onnx_int8 import quantize_onnx

        arrays = None if batches is None else (batch.numpy() for batch in batches)
        return quantize_onnx(Path(network.source), output, scheme=scheme, calibration=arrays)
    if is_quantized(network.model.state_dict()):
        raise UsageError(f"{network.source} is quantized already: name the checkpoint that it was made of")
    try:
        model = quantize_model(copy.deepcopy(network.model), scheme, batches or ())
    except PictureError:
        raise
    except ValueError as error:
        raise UsageError(f"{network.source} cannot be quantized: {error}") from error
    height, width = network.size
    contents = {
        "model": stored(model),
        "class_names": network.folder_names,
        "model_name": network.name,
        "img_size": height if height == width else [height, width],
    }
    save_checkpoint(output, {key: value for key, value in contents.items() if value is not None})


def compare(before: Network, after: Network, loader: DataLoader[Any] | None) -> None:
    """Print size, speed, logits and, if there is a loader, accuracy of both networks.

    Raises:
        DataError: not one picture can be read.
    """
    sizes = before.weights, Path(after.source).stat().st_size
    print(f"size: {_megabytes(sizes[0])} before, {_megabytes(sizes[1])} after, ratio {sizes[1] / sizes[0]:.3f}")
    times = _time(before, after)
    print(
        f"one picture: {1000 * times[0]:.1f} ms before, {1000 * times[1]:.1f} ms after, ratio "
        f"{times[1] / times[0]:.3f} (medians of {PASSES} passes in turn, {torch.get_num_threads()} threads)"
    )
    if before.operators is not None:
        alike = before.operators == after.operators
        print(f"measured {before.operators}" + ("" if alike else f" before, {after.operators} after"))
    _print_differences(before, after, loader)
    if loader is None:
        print("accuracy: not measured, as there is no --data-path")
        return
    results = [_evaluate(network, loader, label) for network, label in ((before, "Before"), (after, "After"))]
    for result, word in zip(results, ("before", "after"), strict=True):
        print(f"{word}: {result.summary()}, {result.pictures} pictures")
    print(f"accuracy: {results[1].acc1 - results[0].acc1:+.3f} points of Acc@1")
    name_unreadable(results[1])


def _evaluate(network: Network, loader: DataLoader[Any], label: str) -> Evaluation:
    return measure(loader, network.model, "cpu", label=label)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"


def evaluation_pictures(network: Network, data_path: str, batch_size: int) -> DataLoader[Any]:
    """The pictures that `main.py --eval --data-path` takes, in order, as the network takes them.

    Raises:
        DataError: they cannot be had, or are of other classes than the network's.
    """
    args: argparse.Namespace = get_args_parser().parse_args([])
    height, width = network.size
    args.data_path, args.input_size = data_path, height if height == width else (height, width)
    dataset: Any
    dataset, _ = build_dataset(False, args, class_names=network.folder_names, num_classes=len(network.names))
    dataset.transform = network.transform
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate_readable)


@torch.inference_mode()
def _time(*networks: Network) -> list[float]:
    """The median seconds of a forward pass of one picture, of each network; their passes alternate."""
    batch = torch.zeros(1, 3, *networks[0].size)
    times: list[list[float]] = [[] for _ in networks]
    for index in range(PASSES + 2):
        for own, network in zip(times, networks, strict=True):
            start = time.perf_counter()
            network.model(batch)
            if index >= 2:  # what comes before warms up
                own.append(time.perf_counter() - start)
    return [median(own) for own in times]


@torch.inference_mode()
def _print_differences(before: Network, after: Network, loader: DataLoader[Any] | None) -> None:
    if loader is None:
        pictures = torch.randn(2, 3, *before.size, generator=torch.Generator().manual_seed(0))
        kind = "random"
    else:
        pictures, kind = _first_pictures(loader), "evaluated"
    one, other = before.model(pictures), after.model(pictures)
    print(
        f"logits of {len(pictures)} {kind} pictures: at most {float((one - other).abs().max()):.4f} apart, "
        f"on a range of {float(one.max() - one.min()):.4f}"
    )


def _first_pictures(loader: DataLoader[Any]) -> Tensor:
    batches: list[Tensor] = []
    for images, *_ in loader:
        batches.append(images)
        if sum(map(len, batches)) >= COMPARED:
            break
    return torch.cat(batches)[:COMPARED]
