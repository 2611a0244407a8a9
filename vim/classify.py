"""Load a trained model once and name what is in pictures; needs no training code."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoint, CheckpointError, load_weights
from command_line import DEFAULT_MODEL
from flags import UsageError
from labels import class_names_for
from model_setup import (
    blank_batch,
    build_model,
    input_shape,
    patch_grid,
    pick_device,
    place,
    read_checkpoint_for,
    refuse_failures,
)
from pictures import EvalTransform, PictureError, eval_transform, open_picture


@dataclass(frozen=True)
class Prediction:
    """One class with its probability (0 to 1)."""

    index: int
    label: str
    probability: float


@dataclass(frozen=True)
class Result:
    """What became of one picture: its predictions, likeliest first, or the error that prevented them."""

    source: str
    picture: Image.Image | None = None
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None


@dataclass(frozen=True)
class Classifier:
    """A model with what it needs to go from a picture to names.

    Attributes:
        model_name: its registered name.
        source: where its weights are from; None: they are random.
        resized: rows of the position embedding in the checkpoint and in the model, where they differ.
        shape: (channels, height, width) of its input, in pixels.
        dtype: of its weights and activations, a name of torch's.
    """

    model: nn.Module
    model_name: str
    source: str | None
    resized: tuple[int, int] | None
    names: list[str]
    shape: tuple[int, int, int]
    transform: EvalTransform
    device: torch.device
    dtype: str = "float32"

    def blank_batch(self, batch_size: int) -> Tensor:
        """Return an input of grey pictures, (batch, channels, height, width), to time the model with."""
        return blank_batch(batch_size, self.shape, self.device, self.dtype)

    def run(self, batch: Tensor) -> Tensor:
        """Return the probabilities, (batch, classes) in fp32, of a batch of transformed pictures.

        Raises:
            UsageError: the model cannot run on it, for want of memory or of the requested backend.
        """
        with refuse_failures(batch), torch.inference_mode():
            return self.model(batch.to(self.device, getattr(torch, self.dtype))).float().softmax(-1)


def load_classifier(
    model_name: str | None,
    checkpoint_source: str | None,
    *,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    labels_file: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
) -> Classifier:
    """Build the model, load its weights and find the names of its classes.

    Args:
        model_name: registered name; None: the checkpoint's, else Vim-Tiny.
        checkpoint_source: file, address or Hugging Face repository; None: random weights.
        num_classes: rows of the classifier; None: the checkpoint's, else 1000.
        img_size: pixels, one number or (height, width); None: the checkpoint's, else the model's.
        labels_file: see `labels.class_names_for`.
        device: torch's name of it.
        dtype: "float32" or "bfloat16", of weights and activations.
    Raises:
        UsageError, CheckpointError, LabelError: it cannot be done; one sentence says why.
    """
    target = pick_device(device)
    checkpoint = read_checkpoint_for(model_name, checkpoint_source) if checkpoint_source else None
    if checkpoint is not None:
        model_name = model_name or checkpoint.model_name
        img_size = img_size or checkpoint.img_size
    model_name = model_name or DEFAULT_MODEL
    num_classes = _class_count(checkpoint, num_classes)
    model = build_model(model_name, num_classes, img_size)
    given_names = checkpoint.class_names if checkpoint else None
    names = class_names_for(num_classes, labels_file=labels_file, checkpoint_names=given_names)
    resized = None
    if checkpoint is not None:
        grid = patch_grid(model, checkpoint.img_size)
        resized = load_weights(model, checkpoint.model, source_grid=grid).resized
    shape = input_shape(model, img_size)
    return Classifier(
        model=place(model, target, dtype),
        model_name=model_name,
        source=checkpoint.source if checkpoint else None,
        resized=resized,
        names=names,
        shape=shape,
        transform=eval_transform((shape[1], shape[2])),
        device=target,
        dtype=dtype,
    )


def _class_count(checkpoint: Checkpoint | None, asked: int | None) -> int:
    """Return the number of classes; what was asked for must be what the checkpoint has."""
    held = checkpoint.num_classes if checkpoint else 0
    if checkpoint is not None and not held and asked is None:
        raise CheckpointError(
            f"{checkpoint.source} holds no classifier (head.weight), so it cannot name what is in a picture."
        )
    if held and asked is not None and asked != held:
        raise UsageError(
            f"--num_classes is {asked} but the checkpoint has {held} classes; leave --num_classes away, "
            "it is read from the checkpoint."
        )
    return held or asked or 1000


def classify(classifier: Classifier, sources: Sequence[str], *, top: int = 5, batch_size: int = 1) -> Iterator[Result]:
    """Yield a result for every source, in order, as batches are done; a bad picture does not stop the others.

    Args:
        sources: paths or addresses; "-" is standard input.
        top: number of predictions, at most the number of classes.
        batch_size: pictures per forward pass.
    """
    for start in range(0, len(sources), batch_size):
        opened = [_open(source) for source in sources[start : start + batch_size]]
        tensors = [classifier.transform(result.picture) for result in opened if result.picture is not None]
        rows = iter(classifier.run(torch.stack(tensors)) if tensors else ())
        for result in opened:
            yield result if result.picture is None else _name(classifier, result, next(rows), top)


def _open(source: str) -> Result:
    try:
        if source == "-" and (sys.stdin is None or sys.stdin.isatty()):
            raise PictureError("Nothing was piped into standard input; for example: cat cat.jpg | ... --image -.")
        return Result(source, open_picture(sys.stdin.buffer if source == "-" else source))
    except PictureError as error:
        return Result(source, error=str(error))


def _name(classifier: Classifier, opened: Result, probabilities: Tensor, top: int) -> Result:
    if not bool(probabilities.isfinite().all()):
        message = f"The model's scores for {opened.source!r} are not finite numbers; the weights may be damaged."
        return Result(opened.source, error=message)
    best = probabilities.topk(min(top, len(classifier.names)))
    predictions = tuple(
        Prediction(index, classifier.names[index], probability)
        for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
    return Result(opened.source, opened.picture, predictions)
