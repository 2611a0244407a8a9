"""Effective receptive fields: which pixels the middle of a network's last map depends on. Source: arXiv 1701.04128.

b batch, h and w height and width of the picture, c channels, l tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def last_map(model: Any, pictures: Tensor) -> Tensor:
    """Return the last map before the head of pictures (b, channels, h, w): (b, c, rows, columns).

    Taken from `forward_intermediates` where a model has it (Vim, VMamba, most of timm; the map before the final norm),
    else from `forward_features`, whose result may be (b, c, rows, columns), (b, rows, columns, c) or tokens (b, l, c).
    Class tokens are left out; tokens are put back into their grid.

    Raises:
        ValueError: the model has neither, or gives nothing that can be told for a map.
    """
    if hasattr(model, "forward_intermediates"):
        found = model.forward_intermediates(pictures, indices=1, output_fmt="NCHW", intermediates_only=True)
        return found[-1]
    if not hasattr(model, "forward_features"):
        raise ValueError(f"{type(model).__name__} has neither forward_intermediates nor forward_features")
    return as_map(model.forward_features(pictures), model, pictures.shape[2] / pictures.shape[3])


def as_map(features: Tensor, model: Any, ratio: float) -> Tensor:
    """Return features in any layout as (b, c, rows, columns).

    Args:
        features: (b, c, rows, columns), (b, rows, columns, c) or tokens (b, l, c).
        model: says how many channels (`num_features`) and class tokens (`num_prefix_tokens`) it has, and its grid
            (`patch_embed.grid_size`), where it knows them.
        ratio: height of the picture over its width, from which an unknown grid is told.
    Raises:
        ValueError: they are none of these.
    """
    shape = tuple(features.shape)
    if features.ndim == 4:
        return features.permute(0, 3, 1, 2) if _channels_last(features, model) else features
    if features.ndim != 3:
        raise ValueError(f"features of shape {shape} are no map: they have been pooled, or are no pictures' features")
    tokens = features[:, int(getattr(model, "num_prefix_tokens", 0)) :]
    rows, columns = _grid(tokens.shape[1], model, ratio)
    return tokens.transpose(1, 2).unflatten(2, (rows, columns))


def _channels_last(features: Tensor, model: Any) -> bool:
    layout = getattr(model, "output_fmt", None)
    if layout is not None:
        return str(getattr(layout, "value", layout)).upper() == "NHWC"
    channels = getattr(model, "num_features", features.shape[1])
    return bool(features.shape[1] != channels and features.shape[3] == channels)


def _grid(count: int, model: Any, ratio: float) -> tuple[int, int]:
    """Return the rows and columns of so many patches."""
    known = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    if known is not None and math.prod(known) == count:
        return int(known[0]), int(known[1])
    rows = max(1, round(math.sqrt(count * ratio)))
    if count % rows:
        raise ValueError(f"{count} tokens are no grid of a picture whose height is {ratio:.3g} of its width")
    return rows, count // rows


class EffectiveReceptiveField:
    """The functions of an effective receptive field, under the names of upstream's class."""

    @staticmethod
    def simpnorm(data: Tensor) -> Tensor:
        """Return data ** 0.2 over its maximum: brings out what is small, for display. 0 everywhere stays 0."""
        shown = data.clamp(min=0) ** 0.2
        largest = shown.max()
        return shown / largest if largest > 0 else shown

    @staticmethod
    def get_rectangle(data: Tensor, thresh: float) -> tuple[int, float] | tuple[None, None]:
        """Return the smallest square in the middle that holds more than a share of the total.

        Args:
            data: (h, w), not negative.
            thresh: the share, 0 to 1.
        Returns:
            its side, an odd number of pixels, and its area over that of the picture; (None, None) if no square that
            fits into the picture holds so much.
        Raises:
            ValueError: `data` is no map.
        """
        if data.ndim != 2 or not data.numel():
            raise ValueError(f"`data` must have shape (h, w), got {tuple(data.shape)}")
        height, width = data.shape
        middle = height // 2, width // 2
        down = (torch.arange(height) - middle[0]).abs()
        across = (torch.arange(width) - middle[1]).abs()
        ring = torch.maximum(down[:, None], across)  # the half side of the square that reaches a pixel
        held = torch.bincount(ring.flatten(), weights=data.detach().double().cpu().flatten()).cumsum(0)
        fitting = min(middle[0], middle[1], height - 1 - middle[0], width - 1 - middle[1]) + 1
        enough = (held[:fitting] > thresh * held[-1]).nonzero()
        if not len(enough):
            return None, None
        side = 2 * int(enough[0]) + 1
        return side, side * side / (height * width)

    @staticmethod
    def get_input_grad(model: Any, samples: Tensor, features: Callable[[Any, Tensor], Tensor] = last_map) -> Tensor:
        """Return the score map of pictures (b, channels, h, w): (h, w).

        That is the sum over pictures and channels of relu(d / d picture of the sum over c of
        relu(feature[:, c, rows // 2, columns // 2])). The model's parameters get no gradient.

        Args:
            features: gives the map (b, c, rows, columns) of pictures.
        """
        samples = samples.detach().requires_grad_()
        with torch.enable_grad():
            found = features(model, samples)
            middle = found[:, :, found.shape[2] // 2, found.shape[3] // 2]
            (gradient,) = torch.autograd.grad(middle.relu().sum(), samples)
        return gradient.relu().sum((0, 1))


EffectiveReceiptiveField = EffectiveReceptiveField  # upstream's spelling


def mean_field(
    model: Any, pictures: Iterable[Tensor], features: Callable[[Any, Tensor], Tensor] = last_map
) -> tuple[Tensor | None, int, int]:
    """Average the score maps of single pictures.

    Args:
        pictures: (channels, h, w) each, of one size, on the model's device.
    Returns:
        the mean (h, w) in fp64 on the CPU, None without a picture; how many pictures it is of; how many were left out
        because their map was not finite.
    """
    total, used, skipped = None, 0, 0
    for picture in pictures:
        field = EffectiveReceptiveField.get_input_grad(model, picture[None], features).double().cpu()
        if not bool(field.isfinite().all()):
            skipped += 1
            continue
        total = field if total is None else total + field
        used += 1
    return (None if total is None else total / used), used, skipped
