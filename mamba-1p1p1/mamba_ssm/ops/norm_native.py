"""Residual addition and normalisation on the compiled CPU kernels of `csrc/cpu`. n features (the last axis)."""

from __future__ import annotations

import torch
from torch import Tensor

from causal_conv1d.backend.call import ELEMENTS, Call
from mamba_ssm.ops.selective_scan_native import LIBRARY


def runs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernel takes these dtypes: fp32 or bf16 x, and a residual in its dtype or in fp32."""
    if residual is not None and residual.dtype not in (x.dtype, torch.float32):
        return False
    parameters = weight.dtype is not torch.float64 and (bias is None or bias.dtype is not torch.float64)
    return x.dtype in ELEMENTS and parameters


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    stored: torch.dtype | None,
) -> tuple[Tensor, Tensor] | None:
    """The op `mamba_ssm::add_norm`, or None for the dtypes that the kernel does not take."""
    sum_dtype = residual.dtype if residual is not None else stored or torch.float32
    if not runs(x, residual, weight, bias) or stored not in (None, sum_dtype):
        return None
    x = x.contiguous()
    features = x.shape[-1]
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    s = x.new_empty(x.shape if stored else 0, dtype=sum_dtype)
    if x.numel() == 0:
        return y, s
    call = Call(x.dtype).integers(ELEMENTS[sum_dtype])
    call.address(x).address(residual).address(y).address(s if stored else None).parameter(weight).parameter(bias)
    call.integers(x.numel() // features, features).number(eps).integers(rms)
    call.run(LIBRARY, "add_norm")
    return y, s
