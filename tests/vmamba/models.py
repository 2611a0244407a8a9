"""Reproducible weights and pictures for the tests of VMamba, and a small network."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vmamba import VSSM

SMALL: dict[str, Any] = {
    "depths": (1, 2, 1, 1),
    "dims": 8,
    "num_classes": 5,
    "ssm_d_state": 2,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}


def fill(module: nn.Module) -> nn.Module:
    """Give every floating-point value of the state dict the number that the golden vectors were made with."""
    state = module.state_dict()
    names = sorted(state)
    made = {name: _wave(j, name, state[name]) for j, name in enumerate(names) if state[name].is_floating_point()}
    module.load_state_dict({**state, **made})
    return module


def _wave(j: int, name: str, like: Tensor) -> Tensor:
    i = torch.arange(like.numel(), dtype=torch.int64)
    v = torch.sin(2 * math.pi * ((i * i + 3 * i) % 10007).double() / 10007 + 1.3 * j).view(like.shape)
    if name.endswith("A_logs"):
        v = 0.5 * v
    elif name.endswith(".Ds"):
        v = 0.2 * v
    elif name.endswith("dt_projs_bias"):
        v = -1.5 + 0.5 * v
    elif name.endswith(("x_proj_weight", "dt_projs_weight")):
        v = 2 * v / math.sqrt(like.shape[-1])
    elif like.ndim == 1:
        v = 1 + 0.1 * v if name.endswith((".weight", ".running_var")) else 0.05 * v
    else:
        v = 1.5 * v / math.sqrt(like.numel() / like.shape[0])
    return v.to(like.dtype)


def picture(channels: int, height: int, width: int) -> Tensor:
    """The picture that the golden vectors were made with, (1, channels, height, width)."""
    i = torch.arange(channels * height * width, dtype=torch.int64)
    return torch.sin(2 * math.pi * ((5 * i * i + i) % 4099).double() / 4099).float().view(1, channels, height, width)


def pictures(height: int = 32, width: int = 32, batch: int = 2, channels: int = 3) -> Tensor:
    """The same random pictures (batch, channels, height, width) at every call."""
    generator = torch.Generator("cpu").manual_seed(1)
    random = torch.randn(batch, channels, height, width, generator=generator, device="cpu")
    return random.to(torch.get_default_device())


def small_model(**options: Any) -> VSSM:
    """A small network with distinct, reproducible weights everywhere, in evaluation mode."""
    model = VSSM(**{**SMALL, **options}).eval()
    fill(model)
    return model
