"""Load a trained model once, to name what is in pictures; needs no training code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from checkpoint import Checkpoint, CheckpointError, load_weights
from command_line import DEFAULT_MODEL, UsageError
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
from other_family import is_vmamba
from pictures import EvalTransform, eval_transform
from predictions import Prediction, Result, classify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Classifier", "Prediction", "Result", "classify", "load_classifier"]


@dataclass(frozen=True)
class Classifier:
    """A model with what it needs to go from a picture to names.

    Attributes:
        model_name: its registered name.
        source: where its weights are from; None: they are random.
        resized: rows of the position embedding in the checkpoint and in the model, where they differ.
        shape: (channels, height, width) of its input, in pixels.
        dtype: of its weights and activations, a name of torch's.
        own_names: the checkpoint's class names as it has them, which folders of pictures are called by; `names` are
            for people. None: it has none.
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
    own_names: list[str] | None = None

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

    def probabilities(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return the probabilities, (b, classes) fp32, of b RGB pictures of any size; raises what `run` raises."""
        return self.run(torch.stack([self.transform(picture) for picture in pictures])).cpu().numpy()


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
        own_names=given_names,
    )


def _class_count(checkpoint: Checkpoint | None, asked: int | None) -> int:
    """Return the number of classes; what was asked for must be what the checkpoint has."""
    held = checkpoint.num_classes if checkpoint else 0
    if checkpoint is not None and not held and asked is None:
        missing = "classifier.head.weight" if is_vmamba(checkpoint.model) else "head.weight"
        raise CheckpointError(
            f"{checkpoint.source} holds no classifier ({missing}), so it cannot name what is in a picture."
        )
    if held and asked is not None and asked != held:
        raise UsageError(
            f"--num_classes is {asked} but the checkpoint has {held} classes; leave --num_classes away, "
            "it is read from the checkpoint."
        )
    return held or asked or 1000
