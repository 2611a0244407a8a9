"""Upstream's recorded numbers (`tests/golden/`) and the recipe that rebuilds the weights they were recorded with.

Every parameter is drawn from its own name, so no weights are stored; see `fill_parameters`.
"""

from __future__ import annotations

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

FOLDER = Path(__file__).parent / "golden"
FILES = {
    "causal_conv1d": "ops.npz",
    "selective_scan": "ops.npz",
    "mamba": "modules.npz",
    "vision_mamba": "vim.npz",
    "released_model": "vim.npz",
}


@cache
def _index() -> dict[str, Any]:
    return json.loads((FOLDER / "golden.json").read_text())


def cases(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """All recorded cases of one kind (a key of `FILES`), as (name, description)."""
    return [(name, case) for name, case in _index()["cases"].items() if case["kind"] == kind]


@cache
def arrays(name: str) -> dict[str, np.ndarray]:
    """The recorded arrays of one case, by their names; complex values end in an axis of (re, im)."""
    with np.load(FOLDER / FILES[_index()["cases"][name]["kind"]]) as stored:
        return {key.split("/", 1)[1]: stored[key] for key in stored.files if key.split("/", 1)[0] == name}


def tensors(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """`arrays` as fresh tensors of a dtype."""
    return {key: torch.tensor(value, dtype=dtype) for key, value in arrays(name).items()}


def normal(key: str, *shape: int) -> Tensor:
    """Standard normal numbers that depend on the salt and `key` alone; fp32."""
    seed = zlib.crc32(f"{_index()['salt']}/{key}".encode())
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def _value(name: str, shape: torch.Size) -> Tensor:
    r = normal(name, *shape)
    last = name.rsplit(".", 1)[-1]
    if last in ("A_log", "A_b_log"):
        return torch.arange(1, shape[-1] + 1).log() + 0.1 * r
    if last in ("D", "D_b") or ("norm" in name and last == "weight"):
        return 1 + 0.1 * r
    if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        return -4.6 + 0.7 * r
    if last == "bias":
        return 0.02 * r
    if last == "gamma":
        return 0.5 + 0.1 * r
    if last == "weight" and len(shape) >= 2:
        return r / math.sqrt(math.prod(shape[1:]))
    return 0.02 * r


@torch.no_grad()
def fill_parameters(module: nn.Module) -> None:
    """Give every parameter the value with which the recording was made."""
    for name, parameter in module.named_parameters():
        parameter.copy_(_value(name, parameter.shape))
