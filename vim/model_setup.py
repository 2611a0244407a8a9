"""Choose a device and build a model by name, with errors that say what to type instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from torch import Tensor, nn

import models_mamba  # noqa: F401  (its models are registered with timm by importing it)
import other_family
from causal_conv1d.backend import use_backend
from checkpoint import Checkpoint, read_checkpoint
from checkpoint_sources import first_line
from flags import UsageError
from mamba_ssm.ops.selective_scan import FAMILY as SCANS
from registry import VARIANTS


def pick_device(name: str) -> torch.device:
    """Return the device called `name`, after trying it.

    Raises:
        UsageError: there is no such device, or torch cannot use it.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # "meta" has no numbers in it
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = first_line(error)
        if name.startswith("cuda") and not torch.cuda.is_available():
            reason = "this torch finds no CUDA device; leave --device away or say --device cpu"
        raise UsageError(f"The device {name!r} cannot be used: {reason}.") from error
    return device


def place(model: nn.Module, device: torch.device, dtype: str) -> nn.Module:
    """Move a model to a device and give it a dtype ("float32" or "bfloat16"), and return it.

    What decides how long a state lasts (A_log, D) stays in fp32, as in a model that is built narrow.
    """
    wide = {parameter: parameter.data for parameter in model.parameters() if hasattr(parameter, "_no_weight_decay")}
    model.to(device, getattr(torch, dtype))
    for parameter, value in wide.items():
        parameter.data = value.to(device)
    return model


def read_checkpoint_for(model_name: str | None, source: str) -> Checkpoint:
    """Read a checkpoint; from a repository that holds several, the one that `model_name` (None: any) is for."""
    variant = VARIANTS.get(model_name or "")
    return read_checkpoint(source, finetuned=variant is not None and variant.finetuned)


def build_model(
    name: str, num_classes: int, img_size: int | tuple[int, int] | None, *, seed: int = 0, **options: Any
) -> nn.Module:
    """Return the registered model `name` in evaluation mode, with random weights (the same ones for a seed).

    Args:
        name: a name that timm knows, the ones of `models_mamba` and of `vmamba` included; or the file of a VMamba's
            configuration.
        num_classes: rows of the classifier.
        img_size: pixels, one number or (height, width); None: the model's own.
        options: further arguments of the model; global_pool is left out for models without it.
    Raises:
        UsageError: there is no such model, or not for that size or number of classes.
    """
    name = other_family.registered(name)
    if not is_registered(name):
        hint = f"the nearest is {nearest!r}" if (nearest := _nearest(name)) else "timm.list_models() gives the names"
        raise UsageError(
            f"There is no model called {name!r}; {hint}, and a VMamba of your own is named by its configuration, "
            "--model FILE.yaml."
        )
    torch.manual_seed(seed)
    if img_size is not None:
        options["img_size"] = img_size
    try:
        while True:
            try:
                model = timm.create_model(name, num_classes=num_classes, **options).eval()
                _refuse_small_pictures(model, img_size)
                return model
            except TypeError as error:  # convolutions take any size, Vim has no global_pool
                unknown = [
                    option for option in ("img_size", "global_pool") if option in str(error) and option in options
                ]
                if not unknown:
                    raise
                del options[unknown[0]]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        at_size = f"{img_size} pixels and " if img_size else ""
        raise UsageError(f"{name} cannot be built for {at_size}{num_classes} classes: {first_line(error)}.") from error


def is_registered(name: str) -> bool:
    """Whether timm knows a model called `name`, VMamba's included, which are registered by asking for one."""
    if not timm.is_model(name):
        other_family.package()
    return timm.is_model(name)


def published_weights(name: str) -> str:
    """Return where weights for ImageNet's classes are: those published for the VMamba `name`, else Vim-Tiny's."""
    if name not in VARIANTS and name in other_family.package().weights.PUBLISHED:
        return other_family.package().weights.published_url(name)
    return "hustvl/Vim-tiny-midclstok"


def _nearest(name: str) -> str | None:
    ours = [*VARIANTS, *other_family.package().factories.VARIANTS]
    near = [
        *difflib.get_close_matches(name, ours, n=1, cutoff=0.6),
        *_models_that_begin_like(name),
        *difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0.4),
    ]
    return near[0] if near else None


def _refuse_small_pictures(model: Any, img_size: int | tuple[int, int] | None) -> None:
    """Raise ValueError for pictures that a network for any size, VMamba, can make no map of."""
    least = getattr(model, "least_size", 1)
    if min(input_shape(model, img_size)[1:]) < least:
        raise ValueError(f"its pictures must have at least {least} x {least} pixels")


def _models_that_begin_like(name: str) -> list[str]:
    """Our own models whose first two words are (nearly) those of `name`; the published names are long."""
    words = {"_".join(known.split("_")[:2]): known for known in reversed(VARIANTS)}
    return [words[near] for near in difflib.get_close_matches("_".join(name.split("_")[:2]), words, n=1, cutoff=0.75)]


def input_shape(model: nn.Module, img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """Return (channels, height, width) of the pictures for a model that was built for `img_size`."""
    config = getattr(model, "default_cfg", None) or {}
    channels, height, width = config.get("input_size") or (3, 224, 224)
    if img_size is not None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    return channels, height, width


def patch_grid(model: Any, img_size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """Return the patch grid of a checkpoint made for rectangles; squares need no such hint (None)."""
    projection = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(img_size, tuple) or not isinstance(projection, nn.Conv2d):
        return None
    sides = zip(img_size, projection.kernel_size, projection.stride, strict=True)
    rows, columns = ((side - patch) // stride + 1 for side, patch, stride in sides)
    return rows, columns


@contextmanager
def chosen_backend(name: str) -> Iterator[None]:
    """Run the ops inside on the backend `name`; "auto" leaves the choice to them.

    Raises:
        UsageError: that backend is not there; says why and what to do.
    """
    with ExitStack() as stack:
        if name != "auto":
            try:
                stack.enter_context(use_backend(name))
            except RuntimeError as error:
                raise UsageError(f"--backend {name} cannot run here: {error}") from error
        yield


def backend_that_runs(name: str, device: torch.device) -> str:
    """The backend of the scan on `device` if the command line says `name`: what "auto" comes to, else `name`."""
    return SCANS.preferred(device.type) if name == "auto" else name


@contextmanager
def refuse_failures(batch: Tensor) -> Iterator[None]:
    """Turn a failure to run a model on `batch` (no memory, no kernel) into a UsageError of one sentence."""
    try:
        yield
    except RuntimeError as error:
        raise UsageError(f"The model cannot run on an input of {_by(batch.shape)}: {first_line(error)}.") from error


def blank_batch(batch_size: int, shape: tuple[int, int, int], device: torch.device, dtype: str = "float32") -> Tensor:
    """Return grey pictures, (batch, channels, height, width), to time a model with.

    Raises:
        UsageError: there is not enough memory for them.
    """
    try:
        return torch.zeros(batch_size, *shape, device=device, dtype=getattr(torch, dtype))
    except RuntimeError as error:
        raise UsageError(f"There is not enough memory for an input of {_by((batch_size, *shape))}.") from error


def _by(shape: Sequence[int]) -> str:
    return " x ".join(str(side) for side in shape)
