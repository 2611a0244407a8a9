"""The compiled kernels for weights in int8: PyTorch's bits, and blocks in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from causal_conv1d.backend import use_backend
from int8_cases import SIZES, STEPS, case
from mamba_ssm.modules.int8 import quantize
from mamba_ssm.modules.mamba_simple import Block, Mamba, run_blocks
from mamba_ssm.ops.int8 import int8_linear
from mamba_ssm.ops.norm import RMSNorm
from native_kernels import count_calls, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize("threads_used", [1, 3])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("size", SIZES)
def test_the_kernel_gives_the_bits_of_pytorch(size, step, threads_used, threads):
    x, weight, bias = case(*size, step, bias=size[1] % 2 == 1)
    threads(threads_used)
    with use_backend("native"), count_calls() as calls:
        found = int8_linear(x, weight, bias)
    assert calls == ["int8_linear"]
    with use_backend("torch"):
        assert torch.equal(found, int8_linear(x, weight, bias))


# --- blocks ---------------------------------------------------------------------------------------------------------


def blocks_of(count: int = 2, width: int = 24, states: int = 5, scheme: str = "dynamic", bias: bool = False):
    made = [
        Block(
            width,
            lambda m: Mamba(m, d_state=states, bimamba_type="v2", if_divide_out=True, bias=bias),
            RMSNorm,
            fused_add_norm=True,
            residual_in_fp32=True,
        )
        for _ in range(count)
    ]
    network = nn.Sequential(*made).eval()
    x = torch.randn(2, 7, width)
    if scheme == "static":
        for block in network:
            quantize(block, scheme, [x])
    else:
        quantize(network)
    return network, x


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("batch", "length", "width", "states"),
    [(1, 1, 8, 3), (1, 33, 24, 5), (3, 17, 40, 16), (2, 600, 16, 4), (2, 1, 3, 1)],
)
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_blocks_in_one_call_are_blocks_of_parts(batch, length, width, states, scheme, bias, threads):
    """The outputs agree but where a last bit of fp32 moves an input to the next level."""
    network, _ = blocks_of(1, width, states, scheme, bias)
    x, residual = torch.randn(batch, length, width), torch.randn(batch, length, width)
    with use_backend("torch"):
        want, want_total = run_blocks(network, x, residual)
    for count in (1, 2):
        threads(count)
        with count_calls() as calls:
            found, total = run_blocks(network, x, residual)
        assert calls == ["int8_blocks"]
        assert torch.equal(total, want_total)
        apart = (found - want).abs()
        assert apart.max() <= 0.02 * want.abs().max()
        assert (apart > 1e-5 * want.abs().max()).any(-1).sum() <= 2 + batch * length // 20


@torch.no_grad()
def test_several_blocks_are_one_call_and_plain_ones_another():
    network, x = blocks_of(3)
    plain = Block(24, lambda m: Mamba(m, d_state=5, bimamba_type="v2", if_divide_out=True), RMSNorm).eval()
    with count_calls() as calls:
        hidden, residual = run_blocks([*network, plain], x, None)
    assert calls == ["int8_blocks", "bidirectional_blocks"]
    want, total = x, None
    for block in [*network, plain]:
        want, total = block(want, total)
    assert torch.equal(hidden, want)
    assert torch.equal(residual, total)


@pytest.mark.parametrize("name", ["in_proj", "out_proj", "x_proj", "x_proj_b"])
@pytest.mark.parametrize("steps", [torch.ones(1), torch.ones(2), torch.ones(0)])
@torch.no_grad()
def test_a_step_of_another_shape_is_not_read(name, steps):
    network, x = blocks_of(2, scheme="static")
    getattr(network[1].mixer, name).input_step = steps
    with pytest.raises(ValueError, match="must be one number"):
        run_blocks(network, x, None)


@torch.no_grad()
def test_a_residual_that_is_not_there_and_few_and_many_rows():
    network, _ = blocks_of(2)
    for length in (5, 700):
        x = torch.randn(2, length, 24)
        alone = torch.cat([run_blocks(network, one[None], None)[0] for one in x])
        assert (run_blocks(network, x, None)[0] - alone).abs().max() <= 0.02 * alone.abs().max()
