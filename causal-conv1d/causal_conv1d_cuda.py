"""The module by which other code calls the CUDA kernels of the causal convolution, under upstream's names.

    b batch, d channels, l length, w conv width

Every argument is positional and must be given, None where there is nothing. Layouts and widths are free, unlike
upstream's; tensors are on a GPU. Importing it raises ImportError where the kernels cannot run.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from causal_conv1d import conv1d_cuda
from causal_conv1d.conv1d import FAMILY, last_columns, prepend

if (_reason := FAMILY.missing("cuda")) is not None:
    raise ImportError(f"the CUDA kernels of causal_conv1d cannot run: {_reason}")


def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    final_states_out: Tensor | None,
    silu_activation: bool,
    /,
) -> Tensor:
    """Convolve x (b, d, l), weight (d, w), and fill `final_states_out` (b, d, w - 1) if it is given.

    The arguments mean what those of `causal_conv1d_fn` mean.
    """
    columns = _columns(x, seq_idx, initial_states)
    out = conv1d_cuda.conv1d(columns, weight, bias, seq_idx, silu_activation, False)
    if out is None:
        raise _refusal("causal_conv1d_fwd", x, weight)
    if final_states_out is not None:
        final_states_out.copy_(last_columns(columns, weight.shape[1] - 1))
    return out[..., columns.shape[-1] - x.shape[-1] :]


def causal_conv1d_bwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    dout: Tensor,
    seq_idx: Tensor | None,
    initial_states: Tensor | None,
    dfinal_states: Tensor | None,
    dx: Tensor | None,
    return_dinitial_states: bool,
    silu_activation: bool,
    /,
) -> list[Tensor | None]:
    """The gradients [dx, dweight, dbias, dinitial_states] of `causal_conv1d_fwd`; None of what there is not.

    dx: (b, d, l) to be filled and returned, or None.
    """
    columns = _columns(x, seq_idx, initial_states)
    before = columns.shape[-1] - x.shape[-1]
    slope = functional.pad(dout, (before, 0)) if before else dout
    found = conv1d_cuda.conv1d_backward(slope, columns, weight, bias, seq_idx, silu_activation, False)
    if found is None:
        raise _refusal("causal_conv1d_bwd", x, weight)
    dcolumns, dweight, dbias = found
    if dfinal_states is not None and weight.shape[1] > 1:
        kept = min(weight.shape[1] - 1, dcolumns.shape[-1])
        dcolumns[..., -kept:] += dfinal_states[..., -kept:]
    own = dcolumns[..., before:]
    initial = dcolumns[..., :before] if return_dinitial_states and initial_states is not None else None
    return [own if dx is None else dx.copy_(own), dweight, None if bias is None else dbias, initial]


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu_activation: bool,
    cache_seqlens: Tensor | None,
    /,
) -> Tensor:
    """`causal_conv1d.causal_conv1d_update` of x (b, d, l)."""
    out = conv1d_cuda.conv1d_update(x, conv_state, weight, bias, cache_seqlens, silu_activation)
    if out is None:
        raise _refusal("causal_conv1d_update", x, weight)
    return out


def _columns(x: Tensor, seq_idx: Tensor | None, initial_states: Tensor | None) -> Tensor:
    if initial_states is None:
        return x
    if seq_idx is not None:
        raise RuntimeError("`seq_idx` cannot be combined with `initial_states`: pass one or the other")
    return prepend(initial_states.to(x.dtype), x)


def _refusal(function: str, x: Tensor, weight: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{function} cannot run x {tuple(x.shape)} of {x.dtype} with weight {tuple(weight.shape)} of {weight.dtype}; "
        f"it takes (b, d, l) and (d, w) with w <= {conv1d_cuda.MAX_WIDTH}, in fp32, fp16 or bf16, and what fits them"
    )
