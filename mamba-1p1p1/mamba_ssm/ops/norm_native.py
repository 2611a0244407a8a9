"""Residual addition and normalisation on the compiled CPU kernels of `csrc/cpu`, and their gradients.

n features (the last axis).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def trains(*tensors: Tensor | None) -> bool:
    """Whether `AddNorm` takes these: all in fp32, and nothing transforms them (`torch.func`)."""
    plain = all(value is None or value.dtype is torch.float32 for value in tensors)
    return plain and not torch._C._are_functorch_transforms_active()


class AddNorm(torch.autograd.Function):
    """`add_norm` in fp32, with gradients: y, and the sum s if it is to be `stored` (else None)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        eps: float,
        rms: bool,
        stored: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None]:
        """x, residual: (..., n). weight, bias: (n,)."""
        found = add_norm(x, residual, weight, bias, eps, rms, None if residual is None else torch.float32)
        assert found is not None
        y, s = found
        ctx.save_for_backward(x.contiguous() if residual is None else s, weight)
        ctx.eps, ctx.rms, ctx.has_residual, ctx.has_bias = eps, rms, residual is not None, bias is not None
        ctx.set_materialize_grads(False)
        return y, None if stored is None else s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x, residual (the same tensor), weight and bias."""
        if dy is None:
            return ds, ds, None, None, None, None, None
        s, weight = ctx.saved_tensors
        features = s.shape[-1]
        dy, ds = dy.contiguous(), None if ds is None else ds.contiguous()
        total, parameters = torch.empty_like(s), s.new_zeros(2, features)
        if s.numel():
            call = Call(torch.float32)
            call.address(dy).address(s).address(ds).parameter(weight).address(total).address(parameters)
            call.integers(s.numel() // features, features).number(ctx.eps).integers(ctx.rms)
            call.run(LIBRARY, "add_norm_backward")
        dweight, dbias = parameters.unbind()
        return total, total if ctx.has_residual else None, dweight, dbias if ctx.has_bias else None, None, None, None
