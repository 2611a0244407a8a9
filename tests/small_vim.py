"""A small Vision Mamba and pictures for it, for the tests that need any network rather than a certain one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from golden import fill_parameters
from models_mamba import VisionMamba

SMALL = {"img_size": 32, "patch_size": 8, "stride": 8, "depth": 4, "embed_dim": 16, "d_state": 4, "num_classes": 5}


def small_model(**options: Any) -> VisionMamba:
    """A small network with distinct, reproducible weights everywhere, in evaluation mode."""
    model = VisionMamba(**{**SMALL, **options}).eval()
    fill_parameters(model)
    return model


def pictures(*size: int, batch: int = 2, channels: int = 3) -> Tensor:
    """The same random pictures (batch, channels, height, width) at every call; 32 x 32 pixels if no size is given."""
    return torch.randn(batch, channels, *(size or (32, 32)), generator=torch.Generator().manual_seed(1))


def assert_equal_weights(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names in the same order, with exactly the same values."""
    assert list(given) == list(expected)
    for key, value in expected.items():
        assert torch.equal(given[key], value), key
