"""Plain "v2" blocks with projections in int8, several of them in one call: `bidirectional_blocks` with such weights.

    b batch, l length, m model channels, e inner channels

The projections of the steps (dt_proj, of few inputs) stay in fp32, as do the convolutions over time, the norms, the
scans and their states: a tenth of the weights, and none of the products that take the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from causal_conv1d.backend.call import Call
from causal_conv1d.conv1d import FAMILY as CONVOLUTIONS
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops.int8 import Int8Weight, int8_linear
from mamba_ssm.ops.mamba_inner import compose
from mamba_ssm.ops.mamba_inner_training import of_both_directions
from mamba_ssm.ops.norm import layer_norm_fn
from mamba_ssm.ops.selective_scan import FAMILY

# Where the weights in int8 stand among the parameters of a block: in_proj, out_proj, x_proj, x_proj_b.
PLACES = (2, 4, 8, 8 + native.PER_DIRECTION)
PER_BLOCK = 2 * len(PLACES)  # a scale and a step of each

LIBRARY = torch.library.Library("mamba_ssm", "FRAGMENT")
LIBRARY.define(
    "int8_blocks(Tensor x, Tensor? residual, Tensor?[] parameters, Tensor?[] scales, float eps, bool rms, float scale)"
    " -> (Tensor out, Tensor residual)"
)
FAMILY.implement(LIBRARY, "int8_blocks")
FAMILY.join(CONVOLUTIONS, "int8_blocks")
FAMILY.compose("int8_blocks")


@torch.library.register_fake("mamba_ssm::int8_blocks", lib=LIBRARY)
def _blocks_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, torch.empty_like(out, dtype=torch.promote_types(x.dtype, torch.float32))


def run_int8_blocks(
    x: Tensor, residual: Tensor | None, parameters: Sequence[Tensor | None], eps: float, rms: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Run plain "v2" blocks: as `mamba_ssm::bidirectional_blocks`.

    Args:
        parameters: of each block, those of the plain op, weights in int8 at `PLACES`, and then a scale and a step (or
            None) of each of these four.
    """
    count = native.PER_BLOCK + PER_BLOCK
    blocks = [parameters[first : first + count] for first in range(0, len(parameters), count)]
    own = [value for block in blocks for value in block[: native.PER_BLOCK]]
    scales = [value for block in blocks for value in block[native.PER_BLOCK :]]
    out, total = torch.ops.mamba_ssm.int8_blocks(x, residual, own, scales, eps, rms, scale)
    return out, total


def _blocks_of(parameters: Sequence[Any], scales: Sequence[Any]) -> list[tuple[list[Any], list[Any]]]:
    """The parameters and the scales of each block."""
    count = len(parameters) // native.PER_BLOCK
    return [
        (
            list(parameters[i * native.PER_BLOCK : (i + 1) * native.PER_BLOCK]),
            list(scales[i * PER_BLOCK : (i + 1) * PER_BLOCK]),
        )
        for i in range(count)
    ]


@FAMILY.kernel("torch", "int8_blocks")
def _blocks_torch(
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor | None],
    scales: list[Tensor | None],
    eps: float,
    rms: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    for own, numbers in _blocks_of(parameters, scales):
        for index, place in enumerate(PLACES):
            own[place] = Int8Weight(own[place], *numbers[2 * index : 2 * index + 2])
        normed, total = layer_norm_fn(
            x, own[0], own[1], residual, eps=eps, prenorm=True, residual_in_fp32=True, is_rms_norm=rms
        )
        forward, backward = of_both_directions(tuple(own[6:]))
        y = compose(int8_linear(normed, own[2], own[3]).transpose(1, 2), forward, backward, scale)
        x, residual = int8_linear(y.transpose(1, 2), own[4], own[5]), total.clone() if total is x else total
    assert residual is not None
    return x, residual


def _blocks_native(
    x: Tensor,
    residual: Tensor | None,
    parameters: list[Tensor | None],
    scales: list[Tensor | None],
    eps: float,
    rms: bool,
    scale: float,
) -> tuple[Tensor, Tensor] | None:
    if x.dtype is not torch.float32 or (residual is not None and residual.dtype is not torch.float32):
        return None
    blocks = _blocks_of(parameters, scales)
    if not all(_fits(x.shape[2], blocks[0][0], *block) for block in blocks):
        return None
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    first = blocks[0][0]
    call = Call(torch.float32)
    (batch, length, features), channels, states = x.shape, first[4].shape[1], first[10].shape[1]
    call.integers(batch, channels, length, states, 1, 2)
    call.address(x).address(residual).address(out).address(total).integers(features).number(eps).integers(rms)
    call.number(scale).integers(first[6].shape[-1], first[9].shape[1], len(blocks))
    for own, numbers in blocks:
        call.parameters(own[:2])
        _linear(call, own[2], own[3:4], numbers[0:2])
        _linear(call, own[4], own[5:6], numbers[2:4])
        for index in range(2):
            direction = own[6 + index * native.PER_DIRECTION :][: native.PER_DIRECTION]
            call.parameters(direction[:2])
            _linear(call, direction[2], (), numbers[4 + 2 * index : 6 + 2 * index])
            call.parameters(direction[3:]).integers(index)
    call.run(native.LIBRARY, "int8_blocks")
    return out, total


def _linear(call: Call, weight: Tensor, bias: Sequence[Tensor | None], numbers: Sequence[Tensor | None]) -> None:
    call.address(weight if weight.is_contiguous() else call.kept(weight.contiguous())).parameters((*bias, *numbers))


def _fits(features: int, first: list[Any], own: list[Any], numbers: list[Any]) -> bool:
    """Whether a block's parameters have the dtypes, and the shapes of the first block's, that the kernel relies on."""
    weights = [own[place] for place in PLACES]
    if any(weight.dtype is not torch.int8 for weight in weights):
        return False
    if any(value is not None and value.dtype is not torch.float32 for value in numbers):
        return False
    if any(step is not None and step.dim() for step in numbers[1::2]):
        return False
    if any(
        scales is None or scales.shape != weight.shape[:1] for scales, weight in zip(numbers[::2], weights, strict=True)
    ):
        return False
    others = [value for place, value in enumerate(own) if place not in PLACES and value is not None]
    if any(value.dtype is torch.float64 for value in others):
        return False
    alike = all(
        value is None or value.shape == other.shape
        for value, other in zip(own[6:], first[6:], strict=True)
        if other is not None
    )
    return alike and native.block_fits(features, first[4].shape[1], own)


FAMILY.compiled_kernel("native", "int8_blocks", _blocks_native)
