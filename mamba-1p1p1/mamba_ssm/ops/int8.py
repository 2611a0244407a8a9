"""Products with a weight in int8, of rows that are quantised as they come.

    i inputs, o outputs

    q = round(x / step), within -127 to 127    out = (sum over i of q * weight) * (step * scale) + bias

The sum is one of whole numbers, and exact on every backend; the rest is computed in fp32 in the order above. A row's
step is given, or the largest magnitude in the row divided by 127.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_conv1d.backend import require_one_device
from mamba_ssm.ops import int8_native as native
from mamba_ssm.ops.selective_scan import FAMILY

LEVELS = 127
LEAST_LARGEST = 1e-30  # of a row whose step it says itself: the inverse of less overflows
EXACT = 2**24 // LEVELS**2  # products of whole numbers up to 127 whose sum is exact in fp32, in any order
MOST_INPUTS = 2**31 // (LEVELS * 256)  # of a sum that int32 holds on every backend: one adds 128 to each number


class Int8Weight(NamedTuple):
    """A weight in int8 with what makes numbers of it.

    Attributes:
        values: (o, i), int8, -127 to 127.
        scales: (o,), fp32: what a level of each output's weights stands for.
        step: (), fp32: what a level of the inputs stands for; None to take it from each row.
        observe: called with the inputs before each product, as a calibration does.
    """

    values: Tensor
    scales: Tensor
    step: Tensor | None = None
    observe: Callable[[Tensor], None] | None = None

    @property
    def shape(self) -> torch.Size:
        """(o, i)."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """int8."""
        return self.values.dtype


# --- contract -------------------------------------------------------------------------------------------------------

LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define("int8_linear(Tensor x, Tensor weight, Tensor scales, Tensor? bias, Tensor? step) -> Tensor")
FAMILY.implement(LIBRARY, "int8_linear")
FAMILY.compose("int8_linear")


@torch.library.register_fake("mamba_ssm::int8_linear", lib=LIBRARY)
def _linear_fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# --- kernels --------------------------------------------------------------------------------------------------------


def quantized_rows(x: Tensor, step: Tensor | None) -> tuple[Tensor, Tensor]:
    """The whole numbers of rows (..., i), in the dtype of `x`, and their steps (..., 1): NaN if a row is not finite.

    Args:
        x: fp32 or fp64.
        step: as in `Int8Weight`.
    """
    largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros((*x.shape[:-1], 1))
    finite = largest.isfinite()
    if step is None:
        largest = largest.clamp(min=LEAST_LARGEST)
        # Not LEVELS / largest, which PyTorch rounds twice.
        steps, inverse = largest / LEVELS, torch.full_like(largest, LEVELS) / largest
    else:
        steps = step.to(x.dtype).expand(largest.shape)
        inverse = 1 / steps
    levels = torch.where(finite, x * inverse, 0.0).clamp(-LEVELS, LEVELS).round()
    return levels, torch.where(finite, steps, float("nan"))


def _product(levels: Tensor, weight: Tensor) -> Tensor:
    """The product of whole numbers (rows, i) with a weight (o, i), exact: int32."""
    total = torch.zeros((levels.shape[0], weight.shape[0]), dtype=torch.int32, device=levels.device)
    for first in range(0, levels.shape[1], EXACT):
        part = slice(first, first + EXACT)
        total += (levels[:, part] @ weight[:, part].to(levels.dtype).t()).to(torch.int32)
    return total


@FAMILY.kernel("torch", "int8_linear")
def _linear_torch(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, step: Tensor | None) -> Tensor:
    _check(x, Int8Weight(weight, scales, step), bias)  # for those who call the op itself
    with torch.autocast(x.device.type, enabled=False):
        dtype = torch.promote_types(x.dtype, torch.float32)
        levels, steps = quantized_rows(x.to(dtype).flatten(0, -2) if x.dim() > 1 else x.to(dtype)[None], step)
        out = _product(levels, weight).to(dtype) * (steps * scales.to(dtype))
        if bias is not None:
            out = out + bias.to(dtype)
        return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _linear_native(
    x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, step: Tensor | None
) -> Tensor | None:
    _check(x, Int8Weight(weight, scales, step), bias)  # the kernel reads as many numbers as it expects
    return native.linear(x, weight, scales, bias, step)


FAMILY.compiled_kernel("native", "int8_linear", _linear_native)

# --- public functions -----------------------------------------------------------------------------------------------


def int8_linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with a weight in int8 and inputs that are quantised as they come.

    Args:
        x: (..., i), any strides. fp64, fp32, fp16 or bf16; the result has this dtype.
        weight: of (o, i); i at most 66,052.
        bias: (o,).

    Returns:
        (..., o). No gradient flows through it. A row that holds a NaN or an infinity gives NaN in all outputs; what is
        beyond 127 times a given step counts as that.

    Raises:
        ValueError: a shape or dtype above does not hold; names the argument and what it got.
        RuntimeError: a backend that was asked for cannot run this call, or a gradient is asked for.
    Computes in fp32 but for the sum, which is exact (fp64 stays fp64). Definition: the head of this module.
    """
    _check(x, weight, bias)
    require_one_device(x=x, weight=weight.values, scales=weight.scales, bias=bias, step=weight.step)
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        raise RuntimeError(
            "a quantised layer cannot be trained: rounding has no gradient; call it under torch.no_grad(), or train "
            "the weights that it was made from"
        )
    if weight.observe is not None:
        weight.observe(x)
    out: Tensor = torch.ops.mamba_ssm.int8_linear(x, weight.values, weight.scales, bias, weight.step)
    return out


def linear(x: Tensor, weight: Tensor | Int8Weight, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, or `int8_linear` for a weight in int8."""
    return int8_linear(x, weight, bias) if isinstance(weight, Int8Weight) else F.linear(x, weight, bias)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight (o, i) as whole numbers, int8, and each row's scale, (o,) in fp32: a 127th of its largest magnitude.

    Raises:
        ValueError: it is no such weight, or holds a NaN or an infinity.
    """
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"`weight` must have shape (o, i) and real numbers, got {tuple(weight.shape)} {weight.dtype}")
    levels, steps = quantized_rows(weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), None)
    if not bool(steps.isfinite().all()):
        raise ValueError("`weight` holds numbers that are not finite, which int8 has no place for")
    return levels.to(torch.int8), steps[:, 0].to(torch.float32)


def _check(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> None:
    if weight.values.dtype is not torch.int8 or weight.values.dim() != 2:
        raise ValueError(f"`weight` must be int8 of shape (o, i), got {weight.dtype} of {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if inputs > MOST_INPUTS:
        raise ValueError(f"`weight` must have at most {MOST_INPUTS} inputs, whose sum int32 holds, got {inputs}")
    if not x.is_floating_point() or x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"`x` must have shape (..., {inputs}) and real numbers, got {tuple(x.shape)} of {x.dtype}")
    if weight.scales.shape != (outputs,) or weight.scales.dtype is not torch.float32:
        raise ValueError(
            f"`weight.scales` must be ({outputs},) fp32, got {tuple(weight.scales.shape)} {weight.scales.dtype}"
        )
    if weight.step is not None and (weight.step.dim() or weight.step.dtype is not torch.float32):
        raise ValueError(
            f"`weight.step` must be one number in fp32, of shape (), got {tuple(weight.step.shape)} {weight.step.dtype}"
        )
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"`bias` must have shape ({outputs},), got {tuple(bias.shape)}")
