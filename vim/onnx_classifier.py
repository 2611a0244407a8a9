"""Name what is in pictures with an ONNX file: what `classify.py` does, without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from command_line import UsageError
from labels import class_names_for
from onnx_session import LARGEST, OnnxError, OnnxModel, open_session
from pictures import IMAGENET_MEAN, IMAGENET_STD, LEAST_CROP_RATIO, EvalTransform, eval_transform

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class OnnxClassifier:
    """An open ONNX file with the names of its classes and the transform of its pictures."""

    model: OnnxModel
    names: list[str]
    transform: EvalTransform

    def blank_batch(self, batch_size: int) -> NDArray[np.float32]:
        """Return an input of grey pictures, (b, 3, h, w), to time the model with.

        Raises:
            OnnxError: there is not enough memory for them.
        """
        try:
            return np.zeros((batch_size, 3, *self.model.size), np.float32)
        except MemoryError as error:
            raise OnnxError(f"There is not enough memory for an input of {batch_size} pictures.") from error

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the probabilities, (b, classes) fp32, of prepared pictures, (b, 3, h, w) fp32; raises OnnxError."""
        logits = self.model.run(batch)
        with np.errstate(all="ignore"):  # of scores that are not finite, which `classify` names
            powers = np.exp(logits - logits.max(1, keepdims=True))
            return powers / powers.sum(1, keepdims=True)

    def probabilities(self, pictures: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Return the probabilities, (b, classes) fp32, of b RGB pictures of any size; raises OnnxError."""
        return self.run(np.stack([self.transform.array(picture) for picture in pictures]))


def load_onnx_classifier(
    path: str,
    *,
    model_name: str | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    labels_file: str | None = None,
    threads: int | None = None,
    custom_ops: str = "auto",
) -> OnnxClassifier:
    """Open an ONNX file; what else is asked for must be what it has.

    Args:
        path: the file.
        model_name, num_classes, img_size: see `refuse_others`.
        labels_file: see `labels.class_names_for`; None: the names in the file.
        threads, custom_ops: see `onnx_session.open_session`.
    Raises:
        UsageError, OnnxError, LabelError: it cannot be done; one sentence says why.
    """
    model = open_session(path, threads=threads, custom_ops=custom_ops)
    refuse_others(model, model_name=model_name, num_classes=num_classes, img_size=img_size)
    names = class_names_for(len(model.class_names), labels_file=labels_file, checkpoint_names=model.class_names)
    return OnnxClassifier(model, names, transform_of(model))


def refuse_others(
    model: OnnxModel,
    *,
    model_name: str | None = None,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    size_flag: str = "--img-size",
) -> None:
    """Raise UsageError if a command line asks for another model, number of classes or picture size than the file's."""
    if model_name is not None and model_name != model.name:
        raise UsageError(f"--model is {model_name} but {model.source} holds {model.name}; leave --model away.")
    if num_classes not in (None, len(model.class_names)):
        raise UsageError(
            f"--num_classes is {num_classes} but {model.source} has {len(model.class_names)} classes; leave "
            "--num_classes away."
        )
    asked = (img_size, img_size) if isinstance(img_size, int) else img_size
    if asked not in (None, model.size):
        height, width = model.size
        raise UsageError(
            f"{model.source} is for pictures of {height} x {width} pixels alone; leave {size_flag} away, or export the "
            "model for that size with vim/export_onnx.py --img-size."
        )


def transform_of(model: OnnxModel) -> EvalTransform:
    """Return the transform that the file asks for.

    Raises:
        OnnxError: it asks for another one than this project's.
    """
    asked = model.preprocessing
    ours = {"interpolation": "bicubic", "channels": "RGB"}
    numbers = {"scale": [1 / 255], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    other = [key for key, value in ours.items() if asked.get(key) != value]
    other += [key for key, value in numbers.items() if not _are(asked.get(key), value)]
    if asked["crop_ratio"] < LEAST_CROP_RATIO:
        other.append("crop_ratio")
    if other:
        raise OnnxError(
            f"{model.source} wants its pictures prepared in a way that is not known here: its {other[0]} is "
            f"{asked.get(other[0])!r}; write the file with vim/export_onnx.py."
        )
    return eval_transform(model.size, asked["crop_ratio"])


def _are(found: object, wanted: Sequence[float]) -> bool:
    values = found if isinstance(found, list) else [found]
    return len(values) == len(wanted) and all(
        isinstance(value, int | float) and abs(value) < LARGEST and math.isclose(value, number, rel_tol=1e-6)
        for value, number in zip(values, wanted, strict=True)
    )
