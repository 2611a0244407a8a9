"""Layer and RMS normalisation with the residual addition in front of it, in plain PyTorch.

Glossary: x a branch's output, residual the sum of the branches before, s their sum, n features (last axis).
Everything runs in at least fp32 (fp64 stays fp64), and the unrounded s is what is normalised, also where the
stored residual is rounded to fp16 or bf16. Gradients come from autograd, on every device and when compiled. One
compiled kernel does it all where there is one: on a CPU, in fp32 its gradients too; on a GPU by triton.

Source: Layer normalisation, arXiv 1607.06450; RMS normalisation, arXiv 1910.07467.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from causal_conv1d.backend import differentiates_forward
from mamba_ssm.ops import norm_native
from mamba_ssm.ops.selective_scan import FAMILY

__all__ = [
    "LayerNormFn",
    "LayerNormLinearFn",
    "RMSNorm",
    "config_prune",
    "layer_norm_fn",
    "layer_norm_linear_fn",
    "layer_norm_ref",
    "rms_norm_fn",
    "rms_norm_ref",
]

MAX_THREADS_PER_BLOCK = 1024

LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define(
    "add_norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool rms, ScalarType? stored)"
    " -> (Tensor y, Tensor s)"
)
FAMILY.implement(LIBRARY, "add_norm")


@torch.library.register_fake("mamba_ssm::add_norm", lib=LIBRARY)
def _add_norm_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    stored = arguments[-1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(0) if stored is None else torch.empty_like(y, dtype=stored)


@FAMILY.kernel("torch", "add_norm")
def _add_norm_torch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
    stored: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    total = _add_branches(x, residual, None, None, None, None, 0.0)
    y = (_rms_norm if rms else _layer_norm)(total, weight, bias, eps).to(x.dtype)
    s = x.new_empty(0) if stored is None else total.to(stored)
    return y, s.clone() if s is x or s is residual else s


# The modules of compiled kernels: what their kernels take (`runs`, `trains`), and `AddNorm`, the op with gradients.
KERNELS = {"native": "mamba_ssm.ops.norm_native", "triton": "mamba_ssm.ops.norm_triton"}
FAMILY.compiled_kernel("native", "add_norm", norm_native.add_norm)
FAMILY.triton_kernel(KERNELS["triton"], "add_norm")
FAMILY.compose("add_norm")


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Add the residual, then normalise over the last axis.

        s = rowscale * dropout(x) + dropout(x1) + residual      (what is given of it)
        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias  (var is the biased variance)
        y = s / sqrt(mean(s * s) + eps) * weight + bias         (with `is_rms_norm`)

    Args:
        x: (..., n), any floating dtype; y has its dtype.
        weight, bias: (n,). `bias` may be None.
        residual: x's shape, any floating dtype.
        x1: x's shape, a second branch; excludes `rowscale`.
        weight1, bias1: (n,), a second affine map of the same normalised s, which gives y1.
        eps: added to the variance or mean square.
        dropout_p: probability, 0 <= p < 1, of zeroing an element of x and x1; the others grow by 1 / (1 - p).
        rowscale: x's shape without the last axis, multiplies x's rows.
        prenorm: return s too.
        residual_in_fp32: without a residual, store s in fp32 (or wider) instead of x's dtype.
        is_rms_norm: RMS instead of layer normalisation.
        return_dropout_mask: append the boolean masks of x and x1: True is kept, None where nothing drops.

    Returns:
        y, or a tuple of y, [y1 with `weight1`], [s with `prenorm`], [mask, mask1 with `return_dropout_mask`].
        s has the residual's dtype if one was given; s is `x` itself, not a copy, if nothing was done to it.

    Raises:
        ValueError: a shape above does not hold, `dropout_p` is out of range, `x1` and `rowscale` are
            both given, or `bias1` comes without `weight1`.

    Computes in at least fp32. Definitions: `layer_norm_ref`, `rms_norm_ref`.
    """
    _check_arguments(x, weight, bias, residual, x1, weight1, bias1, dropout_p, rowscale)
    plain = x1 is None and weight1 is None and rowscale is None and dropout_p == 0.0 and not return_dropout_mask
    run = _kernel_for(x, residual, weight, bias) if plain else None
    if run is not None:
        stored = None
        if prenorm and (residual is not None or (residual_in_fp32 and x.dtype != torch.float32)):
            stored = torch.float32 if residual is None else residual.dtype
        y, s = run(x, residual, weight, bias, eps, is_rms_norm, stored)
        return (y, x if stored is None else s) if prenorm else y
    mask = mask1 = None
    if dropout_p > 0.0:
        mask = _draw_mask(x, dropout_p)
        mask1 = None if x1 is None else _draw_mask(x1, dropout_p)
    total = _add_branches(x, residual, x1, rowscale, mask, mask1, dropout_p)

    affine = _rms_norm if is_rms_norm else _layer_norm
    outputs: list[Tensor | None] = [affine(total, weight, bias, eps).to(x.dtype)]
    if weight1 is not None:
        outputs.append(affine(total, weight1, bias1, eps).to(x.dtype))
    if prenorm:
        if residual is not None:
            stored_dtype = residual.dtype
        else:
            stored_dtype = _at_least_fp32(x.dtype) if residual_in_fp32 else x.dtype
        untouched = residual is None and x1 is None and rowscale is None and mask is None
        outputs.append((x if untouched else total).to(stored_dtype))
    if return_dropout_mask:
        outputs += [mask, mask1]
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    return_dropout_mask: bool = False,
) -> Any:
    """Add the residual, then divide by the root mean square; see `layer_norm_fn` with `is_rms_norm`."""
    return layer_norm_fn(
        x,
        weight,
        bias,
        residual=residual,
        x1=x1,
        weight1=weight1,
        bias1=bias1,
        eps=eps,
        dropout_p=dropout_p,
        rowscale=rowscale,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=True,
        return_dropout_mask=return_dropout_mask,
    )


class RMSNorm(nn.Module):
    """RMS normalisation over the last axis, with an optional residual in front (see `rms_norm_fn`).

    Args:
        hidden_size: n, the number of features.
        eps: added to the mean square.
        dropout_p: dropout on x, while training.
        device, dtype: of `weight`, (n,), which starts at one. There is no bias: the attribute is None.
    """

    bias: None

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        dropout_p: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.drop = nn.Dropout(dropout_p) if dropout_p > 0.0 else None
        self.weight = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set `weight` to one."""
        nn.init.ones_(self.weight)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        prenorm: bool = False,
        residual_in_fp32: bool = False,
    ) -> Any:
        """Return y, or (y, residual_out) with `prenorm`; shapes, dtypes and errors as in `layer_norm_fn`."""
        dropout_p = self.drop.p if self.drop is not None and self.training else 0.0
        options: dict[str, Any] = {"prenorm": prenorm, "residual_in_fp32": residual_in_fp32}
        return rms_norm_fn(x, self.weight, None, residual, eps=self.eps, dropout_p=dropout_p, **options)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def layer_norm_linear_fn(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Any:
    """Normalise (see `layer_norm_fn`), then apply a linear map.

    Args:
        x, residual, eps, prenorm, residual_in_fp32, is_rms_norm: as in `layer_norm_fn`.
        norm_weight, norm_bias: (n,).
        linear_weight, linear_bias: (m, n) and (m,) or None; the product runs in their dtype or autocast's.

    Returns:
        (..., m), or the pair of it and residual_out with `prenorm`.

    Raises:
        ValueError: as `layer_norm_fn`.
    """
    normed = layer_norm_fn(
        x,
        norm_weight,
        norm_bias,
        residual=residual,
        eps=eps,
        prenorm=prenorm,
        residual_in_fp32=residual_in_fp32,
        is_rms_norm=is_rms_norm,
    )
    y, residual_out = normed if prenorm else (normed, None)
    out = functional.linear(y.to(linear_weight.dtype), linear_weight, linear_bias)
    return (out, residual_out) if prenorm else out


class LayerNormFn:
    """Upstream's autograd class by name: `apply` takes the arguments of `layer_norm_fn`."""

    apply = staticmethod(layer_norm_fn)


class LayerNormLinearFn:
    """Upstream's autograd class by name: `apply` takes the arguments of `layer_norm_linear_fn`."""

    apply = staticmethod(layer_norm_linear_fn)


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """Define `layer_norm_fn` by its formulas, in the dtypes that are given.

    Differs from it where the dtype is narrow: the sum is rounded to x's dtype before it is normalised and
    returned, unless `upcast` (then all is done in at least fp32 and only y is rounded to x's dtype).
    `dropout_mask`, `dropout_mask1`: x's shape, True is kept; drawn here if `dropout_p` > 0 and they are None.
    """

    def normalise(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        s = s.to(torch.promote_types(s.dtype, weight.dtype))
        centred = s - s.mean(-1, keepdim=True)
        y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    return _apply_definition(
        normalise,
        [x, weight, bias, residual, x1, weight1, bias1, rowscale],
        (dropout_mask, dropout_mask1),
        dropout_p,
        prenorm,
        upcast,
    )


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    x1: Tensor | None = None,
    weight1: Tensor | None = None,
    bias1: Tensor | None = None,
    eps: float = 1e-6,
    dropout_p: float = 0.0,
    rowscale: Tensor | None = None,
    prenorm: bool = False,
    dropout_mask: Tensor | None = None,
    dropout_mask1: Tensor | None = None,
    upcast: bool = False,
) -> Any:
    """Define `rms_norm_fn` by its formulas, in the dtypes that are given; see `layer_norm_ref`."""

    def normalise(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = s / torch.sqrt(s.square().mean(-1, keepdim=True) + eps) * weight
        return y if bias is None else y + bias

    return _apply_definition(
        normalise,
        [x, weight, bias, residual, x1, weight1, bias1, rowscale],
        (dropout_mask, dropout_mask1),
        dropout_p,
        prenorm,
        upcast,
    )


def config_prune(configs: Iterable[Any]) -> list[Any]:
    """Keep the launch configurations whose `num_warps` fit one thread block of this machine's GPU.

    A warp has 32 threads, 64 on some AMD GPUs; a block has 1024 threads at most.
    """
    warp_size = 32
    if torch.cuda.is_available():
        warp_size = getattr(torch.cuda.get_device_properties(0), "warp_size", warp_size)
    return [config for config in configs if config.num_warps * warp_size <= MAX_THREADS_PER_BLOCK]


def _kernel_for(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None) -> Callable[..., Any] | None:
    """What runs this call on a compiled kernel: the op, or `AddNorm` where gradients are wanted. None: PyTorch does.

    A compiler fuses the plain operations by itself, and only they have forward-mode derivatives.
    """
    if differentiates_forward() or torch.compiler.is_compiling():
        return None
    module = KERNELS.get(FAMILY.backend_for("add_norm", x.device.type))
    if module is None:
        return None
    kernels = importlib.import_module(module)
    tensors = (x, residual, weight, bias)
    if not kernels.runs(*tensors):
        return None
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)):
        return torch.ops.mamba_ssm.add_norm
    return kernels.AddNorm.apply if kernels.trains(*tensors) else None


def _rms_norm(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    # One pass for the norms, one for the scale and one for the weight, in place where autograd does not look:
    # on a CPU two thirds of the time of torch.nn.functional.rms_norm.
    norm = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
    mean_square = torch.addcmul(norm.new_full((1,), eps), norm, norm, value=1.0 / s.shape[-1])
    y = s * torch.rsqrt(mean_square)
    weight = weight.to(s.dtype)
    y = y * weight if torch.is_grad_enabled() else y.mul_(weight)
    return y if bias is None else y + bias.to(s.dtype)


def _layer_norm(s: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    bias = None if bias is None else bias.to(s.dtype)
    return functional.layer_norm(s, s.shape[-1:], weight.to(s.dtype), bias, eps)


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _add_branches(
    x: Tensor,
    residual: Tensor | None,
    x1: Tensor | None,
    rowscale: Tensor | None,
    mask: Tensor | None,
    mask1: Tensor | None,
    dropout_p: float,
) -> Tensor:
    """Return s of `layer_norm_fn` in the widest dtype of its terms, fp32 at least."""
    wide = _at_least_fp32(x.dtype)
    for term in (residual, x1):
        if term is not None:
            wide = torch.promote_types(wide, term.dtype)
    total = x
    if rowscale is not None:
        total = total.to(wide) * rowscale.to(wide).unsqueeze(-1)
    if mask is not None:
        total = _drop(total.to(wide), mask, dropout_p)
    if x1 is not None:
        total = _add(total, x1 if mask1 is None else _drop(x1.to(wide), mask1, dropout_p), wide)
    if residual is not None:
        total = _add(total, residual, wide)
    return total.to(wide)


def _add(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    # One wide operand makes torch convert the other one on the fly, without a copy.
    return a + b if wide in (a.dtype, b.dtype) else a.to(wide) + b


def _draw_mask(x: Tensor, dropout_p: float) -> Tensor:
    return torch.rand(x.shape, device=x.device) >= dropout_p


def _drop(x: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    return x.masked_fill(~mask, 0.0) / (1.0 - dropout_p)


def _apply_definition(
    normalise: Any,
    tensors: list[Any],
    masks: tuple[Tensor | None, Tensor | None],
    dropout_p: float,
    prenorm: bool,
    upcast: bool,
) -> Any:
    """Carry out what both definitions share: all but `normalise(s, weight, bias)`."""
    dtype = tensors[0].dtype
    if upcast:
        tensors = [None if t is None else t.to(_at_least_fp32(t.dtype)) for t in tensors]
    x, weight, bias, residual, x1, weight1, bias1, rowscale = tensors
    if rowscale is not None:
        x = x * rowscale.unsqueeze(-1)
    if dropout_p > 0.0:
        mask, mask1 = masks
        x = functional.dropout(x, dropout_p) if mask is None else _drop(x, mask, dropout_p)
        if x1 is not None:
            x1 = functional.dropout(x1, dropout_p) if mask1 is None else _drop(x1, mask1, dropout_p)
    s = x
    for term in (x1, residual):
        if term is not None:
            s = (s + term).to(x.dtype)
    outputs = [normalise(s, weight, bias).to(dtype)]
    if weight1 is not None:
        outputs.append(normalise(s, weight1, bias1).to(dtype))
    if prenorm:
        outputs.append(s)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _check_arguments(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    x1: Tensor | None,
    weight1: Tensor | None,
    bias1: Tensor | None,
    dropout_p: float,
    rowscale: Tensor | None,
) -> None:
    """Raise the ValueErrors of `layer_norm_fn`."""
    features = x.shape[-1:]
    wanted = [("weight", weight, features), ("bias", bias, features), ("residual", residual, x.shape)]
    if x1 is not None or weight1 is not None or bias1 is not None or rowscale is not None:
        wanted += [("x1", x1, x.shape), ("rowscale", rowscale, x.shape[:-1])]
        wanted += [("weight1", weight1, features), ("bias1", bias1, features)]
    for name, tensor, shape in wanted:
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"`{name}` must have shape {tuple(shape)} because `x` has shape {tuple(x.shape)}, "
                f"got {tuple(tensor.shape)}."
            )
    if x1 is not None and rowscale is not None:
        raise ValueError("`x1` and `rowscale` exclude each other; scale the rows of `x` beforehand.")
    if bias1 is not None and weight1 is None:
        raise ValueError("`bias1` needs `weight1`: both belong to the second affine map.")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"`dropout_p` must be at least 0 and below 1, got {dropout_p}.")
