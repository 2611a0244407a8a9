"""Random changes of training pictures: 3-Augment (arXiv 2204.07118), and small moves that lose nothing of a picture."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import timm.data.auto_augment
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from pictures import IMAGENET_MEAN, IMAGENET_STD

BORDER = 4  # pixels that the simple random crop may look beyond the picture, where it is mirrored
LEAST_AREA = 0.08  # of the picture, for a random part of it
TURN, SLANT = 12.0, 12.0  # degrees to either side, at most
SHIFT = 0.1  # of the width and of the height, to either side, at most
SIZES = 0.85, 1.15  # least and most


def posterize_to_nothing(picture: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    """Keep the `bits_to_keep` highest bits of each channel, 0 .. 8; none of them gives a black picture.

    RandAugment's policies draw 0 bits now and then, which Pillow took before version 13 and refuses since.
    """
    del options
    if bits_to_keep >= 8:
        return picture
    return ImageOps.posterize(picture, bits_to_keep) if bits_to_keep > 0 else picture.point(lambda _: 0)


def mend_posterize(steps: Any) -> None:
    """Make the posterizing steps of timm's AutoAugment, RandAugment or AugMix in `steps` take 0 bits, in place."""
    if isinstance(steps, list | tuple):
        for step in steps:
            mend_posterize(step)
    elif getattr(steps, "aug_fn", None) is timm.data.auto_augment.posterize:
        steps.aug_fn = posterize_to_nothing
    else:
        for inner in ("transforms", "ops", "policy"):
            if isinstance(getattr(steps, inner, None), list | tuple):
                mend_posterize(getattr(steps, inner))


class _Sometimes:
    """A change that a PIL picture undergoes with probability `p`, drawn from Python's `random`.

    Raises:
        ValueError: `p` is not in 0 .. 1.
    """

    def __init__(self, p: float) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"`p` must be a probability, 0 .. 1, got {p}")
        self.p = p

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the picture, changed or as it is; one random number decides."""
        return self.change(picture) if random.random() < self.p else picture

    def change(self, picture: Image.Image) -> Image.Image:
        """Return what the picture is changed to."""
        raise NotImplementedError

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"


class GaussianBlur(_Sometimes):
    """Blur with probability `p`; the standard deviation, in pixels, is uniform in radius_min .. radius_max.

    Raises:
        ValueError: `p` is not in 0 .. 1, or not 0 <= radius_min <= radius_max.
    """

    def __init__(self, p: float = 0.1, radius_min: float = 0.1, radius_max: float = 2.0) -> None:
        super().__init__(p)
        if not 0 <= radius_min <= radius_max:
            raise ValueError(f"0 <= `radius_min` <= `radius_max` must hold, got {radius_min} and {radius_max}")
        self.radius_min, self.radius_max = radius_min, radius_max

    def change(self, picture: Image.Image) -> Image.Image:
        """Return the picture blurred by a random radius."""
        radius = random.uniform(self.radius_min, self.radius_max)
        return picture.filter(ImageFilter.GaussianBlur(radius))


class Solarization(_Sometimes):
    """With probability `p`, turn each value v of 128 and more into 255 - v."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__(p)

    def change(self, picture: Image.Image) -> Image.Image:
        """Return the picture solarized."""
        return ImageOps.solarize(picture)


class gray_scale(_Sometimes):  # noqa: N801 (upstream's name)
    """With probability `p`, make all three channels the picture's brightness (ITU-R 601)."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__(p)

    def change(self, picture: Image.Image) -> Image.Image:
        """Return the picture without colour, still as RGB."""
        return ImageOps.grayscale(picture).convert("RGB")


class horizontal_flip(_Sometimes):  # noqa: N801 (upstream's name)
    """Mirror left and right with probability `p`; `activate_pred` is taken for upstream's callers, without effect."""

    def __init__(self, p: float = 0.2, activate_pred: bool = False) -> None:
        super().__init__(p)
        self.activate_pred = activate_pred

    def change(self, picture: Image.Image) -> Image.Image:
        """Return the picture mirrored."""
        return ImageOps.mirror(picture)


class RandomMove:
    """Turn, move, size and slant a PIL picture a little, each amount uniform in -TURN .. TURN and so on.

    What comes in from beyond the border has the border's colour. The size in pixels stays. Random numbers come from
    torch, and from Python's `random` for the interpolation "random".

    Args:
        interpolation: bilinear or bicubic; random: either, equally likely for each picture.
    """

    def __init__(self, interpolation: str = "bicubic") -> None:
        self.interpolations = ("bilinear", "bicubic") if interpolation == "random" else (interpolation,)

    def __call__(self, picture: Image.Image) -> Image.Image:
        """Return the picture moved."""
        angle, shift, size, slant = transforms.RandomAffine.get_params(
            [-TURN, TURN], [SHIFT, SHIFT], [*SIZES], [-SLANT, SLANT], [picture.width, picture.height]
        )
        interpolation = InterpolationMode(random.choice(self.interpolations))
        colour = list(border_colour(picture))
        return functional.affine(picture, angle, [*shift], size, [*slant], interpolation, fill=colour)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(interpolation={' or '.join(self.interpolations)})"


def border_colour(picture: Image.Image) -> tuple[int, ...]:
    """Return the median of the outermost pixels of an RGB picture, 0 .. 255 per channel."""
    values = np.asarray(picture)
    border = np.concatenate([values[0], values[-1], values[:, 0], values[:, -1]])
    return tuple(int(value) for value in np.median(border, axis=0))


class Cover:
    """Resize to the least size that covers (height, width), the proportions kept; bicubic.

    For a square it is torchvision's Resize of the shorter side.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, picture: Image.Image) -> Image.Image:
        height, width = self.size
        if height * picture.width <= width * picture.height:  # the width decides
            height = max(height, width * picture.height // picture.width)
        else:
            width = max(width, height * picture.width // picture.height)
        return picture.resize((width, height), Image.Resampling.BICUBIC)

    def __repr__(self) -> str:
        return f"Cover(size={self.size})"


def new_data_aug_generator(args: argparse.Namespace) -> Callable[[Image.Image], Tensor]:
    """Return 3-Augment: an RGB picture to the (3, height, width) fp32 input of the model, at random.

    A crop and a flip; one of grey, solarized and blurred, equally likely; colour jitter; ImageNet's mean and
    standard deviation. Random numbers come from Python's `random` and from torch.

    Args:
        args: input_size (pixels, or a (height, width) pair); src: the crop is of a picture resized to just
            cover the size, mirrored for 4 pixels beyond its edges, else of a random part of 8 % to all of
            its area; color_jitter: strength in brightness, contrast and saturation, 0 or None for none; hflip:
            probability of the flip, 0.5 where it is missing.
    Raises:
        ValueError: `input_size` is less than 1 pixel.
    Source: arXiv 2204.07118, section 3.
    """
    size = args.input_size
    size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    if min(size) < 1:
        raise ValueError(f"`input_size` must be at least 1 pixel on each side, got {args.input_size}")
    one_of_three = [gray_scale(p=1.0), Solarization(p=1.0), GaussianBlur(p=1.0)]
    flip = transforms.RandomHorizontalFlip(getattr(args, "hflip", 0.5))
    steps = [*_crop(size, args.src), flip, transforms.RandomChoice(one_of_three)]
    if args.color_jitter:
        steps.append(transforms.ColorJitter(*[args.color_jitter] * 3))
    steps += [transforms.ToTensor(), transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    return transforms.Compose(steps)


def _crop(size: tuple[int, int], simple: bool) -> list[Callable[[Image.Image], Image.Image]]:
    """Return the steps that cut (height, width) pixels out of a picture."""
    if simple:
        return [Cover(size), transforms.RandomCrop(size, padding=BORDER, padding_mode="reflect")]
    from timm.data.transforms import RandomResizedCropAndInterpolation

    return [RandomResizedCropAndInterpolation(size, scale=(LEAST_AREA, 1.0), interpolation="bicubic")]
