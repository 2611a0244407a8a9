"""Products with weights in int8 on the compiled CPU kernels of `csrc/cpu`; see `mamba_ssm.ops.int8`."""

from __future__ import annotations

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call
from mamba_ssm.ops.selective_scan_native import LIBRARY


def linear(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, step: Tensor | None) -> Tensor | None:
    """The op `mamba_ssm::int8_linear`: fp32, and narrower numbers computed in it."""
    if x.dtype is torch.float64 or x.shape[-1] == 0:
        return None
    rows = x.to(torch.float32).contiguous()
    out = torch.empty((*x.shape[:-1], weight.shape[0]))
    call = Call(torch.float32)
    call.address(rows).address(out).integers(rows.numel() // x.shape[-1], *weight.shape)
    call.address(call.kept(weight.contiguous())).parameters((bias, scales, step)).run(LIBRARY, "int8_linear")
    return out.to(x.dtype)
