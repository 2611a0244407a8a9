"""What each option of `VSSM` may be: one table, which is looked at before anything is built."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from vmamba.forward_types import parse_forward_type
from vmamba.layers import ACTIVATIONS, DOWNSAMPLES, NORMS, PATCH_EMBEDS, choose
from vmamba.ss2d import INITIALIZERS

_MOST = 1000  # channels inside a branch over those outside; what is far beyond is a slip


_LARGEST = 2**31 - 1  # whole number; with torch's numbers of 64 bits, products of two still are one


def is_whole(value: Any, least: int) -> bool:
    """Whether `value` is a whole number from `least` on that torch can count to; true and false are none."""
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) <= _LARGEST


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _is_size(value: Any) -> bool:
    sides = value if _is_list(value) else [value, value]
    return len(sides) == 2 and all(is_whole(side, 1) for side in sides)


def _from(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number from {least} to {_LARGEST}", lambda value: is_whole(value, least)


_SWITCH = "true or false", lambda value: isinstance(value, bool)
_RATE = "a probability below 1", lambda value: _is_number(value) and 0 <= value < 1
_RATIO = f"a number up to {_MOST}, 0 for no such branch", lambda value: _is_number(value) and value <= _MOST
_PIXELS = "one or two whole numbers of pixels from 1 on"
_TABLE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "patch_size": _from(1),
    "in_chans": _from(1),
    "num_classes": _from(0),
    "ssm_d_state": _from(1),
    "ssm_ratio": _RATIO,
    "ssm_dt_rank": (
        "a whole number from 1 on, or 'auto'",
        lambda value: value == "auto" if isinstance(value, str) else is_whole(value, 1),
    ),
    "ssm_conv": (
        "an odd whole number, or less than 2 for no convolution",
        lambda value: is_whole(value, -1) and (value < 2 or value % 2 == 1),
    ),
    "ssm_conv_bias": _SWITCH,
    "ssm_drop_rate": _RATE,
    "mlp_ratio": _RATIO,
    "mlp_drop_rate": _RATE,
    "gmlp": _SWITCH,
    "drop_path_rate": _RATE,
    "patch_norm": _SWITCH,
    "use_checkpoint": _SWITCH,
    "posembed": _SWITCH,
    "imgsize": (_PIXELS, _is_size),
    "img_size": (_PIXELS, lambda value: value is None or _is_size(value)),
    "drop_rate": _RATE,
}
_CHOICES: dict[str, Mapping[str, Any]] = {
    "ssm_act_layer": ACTIVATIONS,
    "ssm_init": INITIALIZERS,
    "mlp_act_layer": ACTIVATIONS,
    "norm_layer": NORMS,
    "downsample_version": DOWNSAMPLES,
    "patchembed_version": PATCH_EMBEDS,
}


def check_options(options: Mapping[str, Any]) -> list[int]:
    """Return the channels of each stage, if the arguments of `VSSM` describe a network.

    Args:
        options: all of its arguments by name; others beside them are not looked at.
    Raises:
        ValueError: one is of another type, out of its range or at odds with another; names it and what it got.
    """
    for name, (words, fits) in _TABLE.items():
        if not fits(options[name]):
            raise ValueError(f"`{name}` must be {words}, got {options[name]!r}")
    for name, table in _CHOICES.items():
        choose(name, options[name], table)
    parse_forward_type(options["forward_type"])
    dims = _channels(options["depths"], options["dims"])
    for name in ("ssm_ratio", "mlp_ratio"):
        if options[name] > 0 and int(options[name] * min(dims)) < 1:
            raise ValueError(
                f"`{name}` must be 0 or leave a channel of {min(dims)}, those of the narrowest stage, got "
                f"{options[name]}"
            )
    _check_patches(options, dims[0])
    return dims


def _channels(depths: Any, dims: Any) -> list[int]:
    """The channels of each stage; one number for `dims` doubles from stage to stage."""
    stages = list(depths) if _is_list(depths) else []
    if is_whole(dims, 1):
        channels = [int(dims) * 2**stage for stage in range(len(stages))]
    else:
        channels = list(dims) if _is_list(dims) else []
    if not stages or len(channels) != len(stages) or not all(is_whole(value, 1) for value in [*stages, *channels]):
        raise ValueError(f"`depths` and `dims` must be positive and one for each stage, got {depths} and {dims}")
    return channels


def _check_patches(options: Mapping[str, Any], channels: int) -> None:
    patch = options["patch_size"]
    if str(options["patchembed_version"]).lower() == "v2":
        if patch < 2:
            raise ValueError(f"`patch_size` must be at least 2 with `patchembed_version` 'v2', got {patch}: use 'v1'")
        if channels < 2:
            raise ValueError(f"`dims` must begin with 2 or more with `patchembed_version` 'v2', got {channels}")
    name = "imgsize" if options["img_size"] is None else "img_size"
    size = options[name]
    if options["posembed"] and min(size if _is_list(size) else [size]) < patch:
        raise ValueError(f"`{name}` must be at least the `patch_size` {patch} with `posembed`, got {size}")
