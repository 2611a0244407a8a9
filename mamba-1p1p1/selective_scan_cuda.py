"""The module by which other code calls the CUDA kernels of the selective scan, under upstream's names.

    b batch, d channels, l length, n state, g groups

Every argument is positional and must be given, None where there is nothing. B and C that vary over time have four axes.
Tensors are on a GPU. Importing it raises ImportError where the kernels cannot run.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mamba_ssm.ops import selective_scan_cuda as kernels
from mamba_ssm.ops.selective_scan import FAMILY, check_scan
from mamba_ssm.ops.selective_scan_torch import CHUNK, Direction

if (_reason := FAMILY.missing("cuda")) is not None:
    raise ImportError(f"the CUDA kernels of mamba_ssm cannot run: {_reason}")

CHECKPOINT = 2048  # tokens between the states that `fwd` returns


def fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    /,
) -> list[Tensor]:
    """Scan; the arguments mean what those of `selective_scan_fn` mean.

    Returns:
        [out, x] or, with z, [out, x, out_z]: the output before the gate, laid out as delta; x (b, d, chunks, 2 n), in
        pairs, after each 2,048 tokens and after the last one: the product of all decays so far, and the state; the
        gated output, laid out as z. So the last state is x[:, :, -1, 1::2].
    """
    y, last, borders = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states=u.shape[-1] > CHECKPOINT)
    out = torch.empty_like(delta).copy_(y)
    checkpoints = torch.stack([_decays(delta, A, delta_bias, delta_softplus), _states(last, borders)], -1).flatten(-2)
    if z is None:
        return [out, checkpoints]
    return [out, checkpoints, torch.empty_like(z).copy_(y * functional.silu(z.float()))]


def bwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    dout: Tensor,
    x: Tensor | None,
    out: Tensor | None,
    dz: Tensor | None,
    delta_softplus: bool,
    recompute_out_z: bool,
    /,
) -> list[Tensor | None]:
    """The gradients of `fwd`, given that of its last result.

    Args:
        x, out: what `fwd` returned; not needed, as the states are computed again.
        dz: (b, d, l) to be filled and returned, or None.

    Returns:
        [du, ddelta, dA, dB, dC, dD, ddelta_bias], None of what was not given, then dz with z, then, if
        `recompute_out_z`, the gated output.
    """
    del x, out
    y, _, borders = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, keep_states=True)
    direction = Direction(u, delta, A, B, C, D, delta_bias, reverse=False)
    found = kernels.scan_backward([direction], z, dout, None, borders, delta_softplus)
    if found is None:
        raise _refusal("bwd", dout)
    rest = iter(found)
    arguments = (u, delta, A, B, C, D, delta_bias)
    gradients: list[Tensor | None] = [None if value is None else next(rest) for value in arguments]
    if z is not None:
        own = next(rest)
        gradients.append(own if dz is None else dz.copy_(own))
        if recompute_out_z:
            gradients.append(torch.empty_like(z).copy_(y * functional.silu(z.float())))
    return gradients


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    softplus: bool,
    *,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output before the gate in fp32, the last state, and the states before each CHUNK tokens."""
    check_scan(u, delta, A, B, C, D, None, delta_bias)
    direction = Direction(u, delta, A, B, C, D, delta_bias, reverse=False)
    found = kernels.scan([direction], None, softplus, keep_states, dtype=torch.float32)
    if found is None:
        raise _refusal("fwd", u)
    return found


def _states(last: Tensor, borders: Tensor) -> Tensor:
    """(b, d, chunks, n) after each CHECKPOINT tokens and after the last one."""
    if not borders.numel():
        return last[:, :, None]
    kept = borders[:, CHECKPOINT // CHUNK :: CHECKPOINT // CHUNK, 0]  # (b, chunks - 1, g, n, d / g)
    return torch.cat([kept.transpose(-1, -2).flatten(2, 3).transpose(1, 2), last[:, :, None]], dim=2)


def _decays(delta: Tensor, A: Tensor, delta_bias: Tensor | None, softplus: bool) -> Tensor:
    """The products of the decays so far, where `_states` has the states."""
    dt = delta.float() if delta_bias is None else delta.float() + delta_bias[:, None]
    if softplus:
        dt = functional.softplus(dt)
    sums = torch.stack([part.sum(-1) for part in dt.split(CHECKPOINT, dim=-1)], dim=-1).cumsum(-1)
    return torch.exp(sums[..., None] * A[:, None])


def _refusal(function: str, value: Tensor) -> RuntimeError:
    return RuntimeError(
        f"selective_scan_cuda.{function} cannot run these arguments, of {value.dtype} and shape {tuple(value.shape)}; "
        "it takes fp32, fp16 and bf16 sequences, fp32 or complex64 A, and B and C of four axes or constant"
    )
