"""Residual addition and normalisation as triton kernels, and their gradients, on a GPU.

n features (the last axis). A program holds whole rows in its registers, as a tile of ROWS rows and BLOCK >= n
columns, and computes in fp32. Nothing is kept for the backward pass but the terms of the sum: it adds them again.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_FEATURES = 16384  # in one row of registers
TILE = 2048  # numbers in a tile of short rows
NUMBERS_PER_WARP = 512
# The most partial sums of the parameters' gradients. It is the same on every GPU, and so are their last digits.
PARTS = 512


@triton.jit
def _load_sum(x, residual, offsets, inside):
    """s = x + residual in fp32; zero outside."""
    s = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        s += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    return s


@triton.jit
def _normalise(s, inside, features, eps, RMS: tl.constexpr):
    """Each row of s, less its mean unless RMS, over its root mean square; and one over that root, (ROWS, 1)."""
    if not RMS:
        s = tl.where(inside, s - tl.sum(s, axis=1, keep_dims=True) / features, 0.0)
    scale = tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / features + eps)
    return s * scale, scale


@triton.jit
def _add_norm_kernel(
    x, residual, weight, bias, y, stored, rows, features, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of one tile. x, residual, y, stored: (rows, features); residual, bias and stored may be None."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < features)
    offsets = row * features + column
    s = _load_sum(x, residual, offsets, inside)
    if stored is not None:
        tl.store(stored + offsets, s, mask=inside)
    out, _ = _normalise(s, inside, features, tl.where(row < rows, eps, 1.0), RMS)  # no row of zeros over zero
    out *= tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)
    if bias is not None:
        out += tl.load(bias + column, mask=column < features, other=0.0).to(tl.float32)
    tl.store(y + offsets, out, mask=inside)


@triton.jit
def _add_norm_backward_kernel(
    dy, ds, x, residual, weight, dx, dresidual, dweight, dbias, rows, features, eps,
    RMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every tile of which the index modulo the number of programs is this program's.

    With v = the normalised s and g = dy * weight,

        dx = dresidual = ds + scale * (g - mean(g) - v * mean(g * v)),  dweight = sum of dy * v,  dbias = sum of dy

    over rows, without mean(g) for the RMS norm. dweight, dbias: (programs, features), a sum of each program.
    ds, residual, dresidual (where it is dx) and dbias may be None.
    """
    column = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + column, mask=column < features, other=0.0).to(tl.float32)
    dweights = tl.zeros((ROWS, BLOCK), tl.float32)
    dbiases = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        inside = (row < rows) & (column < features)
        offsets = row * features + column
        s = _load_sum(x, residual, offsets, inside)
        v, scale = _normalise(s, inside, features, tl.where(row < rows, eps, 1.0), RMS)
        slope = tl.load(dy + offsets, mask=inside, other=0.0).to(tl.float32)
        dweights += slope * v
        if dbias is not None:
            dbiases += slope
        g = slope * w
        total = g - v * (tl.sum(g * v, axis=1, keep_dims=True) / features)
        if not RMS:
            total -= tl.sum(g, axis=1, keep_dims=True) / features
        total *= scale
        if ds is not None:
            total += tl.load(ds + offsets, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + offsets, total, mask=inside)
        if dresidual is not None:
            tl.store(dresidual + offsets, total, mask=inside)
    part = tl.program_id(0) * features + tl.arange(0, BLOCK)
    tl.store(dweight + part, tl.sum(dweights, axis=0), mask=tl.arange(0, BLOCK) < features)
    if dbias is not None:
        tl.store(dbias + part, tl.sum(dbiases, axis=0), mask=tl.arange(0, BLOCK) < features)


def runs(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the kernels take these: any of fp32, fp16 and bf16, and rows that fit in the registers."""
    known = all(value is None or value.dtype in DTYPES for value in (x, residual, weight, bias))
    return known and x.shape[-1] <= MAX_FEATURES


def trains(*tensors: Tensor | None) -> bool:
    """Whether `AddNorm` takes these: all that `runs`, unless something transforms them (`torch.func`)."""
    return not torch._C._are_functorch_transforms_active()


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    stored: torch.dtype | None,
) -> tuple[Tensor, Tensor] | None:
    """The op `mamba_ssm::add_norm`, or None for the dtypes and sizes that the kernel does not take."""
    if not runs(x, residual, weight, bias) or stored not in (None, *DTYPES):
        return None
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y = torch.empty_like(x)
    s = x.new_empty(0) if stored is None else torch.empty_like(x, dtype=stored)
    if x.numel() == 0:
        return y, s
    sizes, tile = _sizes(x), _tile(x)
    grid = (triton.cdiv(sizes[0], tile["ROWS"]),)
    with torch.cuda.device_of(x):
        _add_norm_kernel[grid](
            x, residual, weight.contiguous(), None if bias is None else bias.contiguous(), y,
            None if stored is None else s, *sizes, eps, rms, **tile,
        )  # fmt: skip
    return y, s


class AddNorm(torch.autograd.Function):
    """`add_norm` with gradients: y, and the sum s in the dtype `stored` (None: not stored)."""

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
        found = add_norm(x, residual, weight, bias, eps, rms, stored)
        assert found is not None
        y, s = found
        # The unrounded sum was normalised: a narrow stored one would give the gradients of other numbers.
        exact = residual is not None and stored is torch.float32
        ctx.save_for_backward(*((s, None) if exact else (x, residual)), weight)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.eps, ctx.rms = eps, rms
        ctx.set_materialize_grads(False)
        return y, None if stored is None else s

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x, residual, weight and bias; those of x and residual are one tensor if of one dtype."""
        dtypes = (ctx.x_dtype, ctx.residual_dtype)
        if dy is None:
            assert ds is not None
            return *(None if dtype is None else ds.to(dtype) for dtype in dtypes), None, None, None, None, None
        x, residual, weight = ctx.saved_tensors
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        dy, ds = dy.contiguous(), None if ds is None else ds.contiguous()
        dx = torch.empty_like(x, dtype=ctx.x_dtype)
        shared = ctx.residual_dtype in (None, ctx.x_dtype)
        dresidual = None if shared else torch.empty_like(x, dtype=ctx.residual_dtype)
        sizes, tile = _sizes(x), _tile(x)
        programs = min(triton.cdiv(sizes[0], tile["ROWS"]), PARTS)
        dweights = weight.new_empty(programs, sizes[1], dtype=torch.float32)
        dbiases = None if ctx.bias_dtype is None else torch.empty_like(dweights)
        if programs:
            with torch.cuda.device_of(x):
                _add_norm_backward_kernel[(programs,)](
                    dy, ds, x, residual, weight.contiguous(), dx, dresidual, dweights, dbiases,
                    *sizes, ctx.eps, ctx.rms, **tile,
                )  # fmt: skip
        dweight = dweights.sum(0).to(weight.dtype)
        dbias = None if dbiases is None else dbiases.sum(0).to(ctx.bias_dtype)
        of_residual = dx if shared and ctx.residual_dtype is not None else dresidual
        return dx, of_residual, dweight, dbias, None, None, None


def variants() -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Typical kernels, their signatures and constants, for compiling them ahead of time."""
    found: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    # dtypes of x, residual, the parameters, bias and the stored sum; whether RMS; n
    for x, residual, weight, bias, stored, rms, features in (
        ("fp32", None, "fp32", "fp32", None, False, 5),
        ("bf16", "fp32", "fp32", None, "fp32", True, 192),
        ("fp16", "fp16", "fp16", "fp16", "fp16", False, 1000),
    ):
        sizes = {"rows": "i32", "features": "i32", "eps": "fp32"}
        constants = {"RMS": rms, **_shape_of_tile(features)}
        terms = {"x": x, "residual": residual, "weight": weight, "bias": bias}
        forward = {**terms, "y": x, "stored": stored}
        dresidual = None if residual == x else residual
        slopes = {"dx": x, "dresidual": dresidual, "dweight": "fp32", "dbias": bias and "fp32"}
        backward = {"dy": x, "ds": stored, **terms, **slopes}
        del backward["bias"]
        for kernel, pointers in ((_add_norm_kernel, forward), (_add_norm_backward_kernel, backward)):
            given = {name: "constexpr" if dtype is None else f"*{dtype}" for name, dtype in pointers.items()}
            absent = {name: None for name, dtype in pointers.items() if dtype is None}
            signature = {**given, **sizes, **dict.fromkeys(constants, "constexpr")}
            found.append((kernel, signature, {**absent, **constants}))
    return found


def _sizes(x: Tensor) -> tuple[int, int]:
    """Rows and features."""
    features = x.shape[-1]
    return x.numel() // features if features else 0, features


def _tile(x: Tensor) -> dict[str, Any]:
    """The constants and the options of a launch for x's rows."""
    shape = _shape_of_tile(x.shape[-1])
    warps = min(max(shape["ROWS"] * shape["BLOCK"] // NUMBERS_PER_WARP, 1), 32)
    return {**shape, "num_warps": warps, "enable_fp_fusion": True}


def _shape_of_tile(features: int) -> dict[str, int]:
    block = triton.next_power_of_2(max(features, 1))
    return {"ROWS": max(TILE // block, 1), "BLOCK": block}
