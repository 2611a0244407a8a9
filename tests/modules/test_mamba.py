"""The mixer in its three forms, and the block around it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import golden
from mamba_ssm.modules.mamba_simple import Block, Mamba
from mamba_ssm.ops.norm import RMSNorm
from mamba_ssm.ops.reference import scan_reference
from tolerances import GOLDEN_OP, assert_close

TYPES = ("none", "v1", "v2")


@pytest.mark.parametrize(("name", "case"), golden.cases("mamba"))
@pytest.mark.parametrize("fast", [True, False])
def test_golden(name: str, case: dict, fast: bool, backend: str) -> None:
    t = golden.tensors(name)
    mixer = Mamba(**case["config"], use_fast_path=fast)
    golden.fill_parameters(mixer)
    x = t["x"].requires_grad_()
    out = mixer(x)
    out.backward(t["dout"])
    assert_close(out, t["out"], limit=GOLDEN_OP)
    assert_close(x.grad, t["dx"], limit=GOLDEN_OP)
    recorded = {key.removeprefix("grad:") for key in t if key.startswith("grad:")}
    assert recorded == {key for key, _ in mixer.named_parameters()}
    for key, parameter in mixer.named_parameters():
        assert_close(parameter.grad, t[f"grad:{key}"], limit=GOLDEN_OP)


def by_definition(mixer: Mamba, hidden: torch.Tensor) -> torch.Tensor:
    """The v2 block written out with real flips, a direction at a time."""
    xz = mixer.in_proj(hidden).transpose(1, 2)
    total = 0
    for suffix, A_log, D in (("", mixer.A_log, mixer.D), ("_b", mixer.A_b_log, mixer.D_b)):
        conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        x, z = (xz.flip(-1) if suffix else xz).chunk(2, dim=1)
        x = nn.functional.silu(conv(x)[..., : x.shape[-1]])
        dt, B, C = x_proj(x.transpose(1, 2)).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        delta = (dt @ dt_proj.weight.T).transpose(1, 2)
        y, _ = scan_reference(
            x,
            delta,
            -A_log.exp(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z,
            dt_proj.bias,
            delta_softplus=True,
        )
        total = total + (y.flip(-1) if suffix else y)
    return mixer.out_proj((total / 2 if mixer.if_divide_out else total).transpose(1, 2))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"if_divide_out": True},
        {"bias": True, "conv_bias": False},
        {"expand": 1.5, "d_conv": 2, "d_state": 3, "dt_rank": 5},
    ],
    ids=str,
)
def test_v2_equals_its_definition(options: dict, backend: str) -> None:
    mixer = Mamba(10, bimamba_type="v2", **options).double()
    x = torch.randn(2, 19, 10, dtype=torch.float64, requires_grad=True)
    out, expected = mixer(x), by_definition(mixer, x)
    torch.testing.assert_close(out, expected)
    leaves = [x, *mixer.parameters()]
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout))


@pytest.mark.parametrize("bimamba_type", TYPES)
def test_directions(bimamba_type: str) -> None:
    """A change of the last token reaches the first exactly where the mixer is bidirectional."""
    mixer = Mamba(8, bimamba_type=bimamba_type)
    x = torch.randn(1, 9, 8)
    changed = x.clone()
    changed[:, -1] += 1
    assert torch.equal(mixer(x)[:, 0], mixer(changed)[:, 0]) == (bimamba_type == "none")


@pytest.mark.parametrize("bimamba_type", TYPES)
def test_16_bit_weights_stay_near_fp32(bimamba_type: str) -> None:
    mixer = Mamba(16, bimamba_type=bimamba_type)
    x = torch.randn(2, 33, 16)
    half = Mamba(16, bimamba_type=bimamba_type, dtype=torch.bfloat16)
    half.load_state_dict(mixer.state_dict())
    assert half.A_log.dtype == torch.float32
    assert_close(half(x.bfloat16()).float(), mixer(x), limit=0.03)


def test_autocast_keeps_the_state_in_fp32() -> None:
    mixer = Mamba(16, bimamba_type="v2")
    x = torch.randn(2, 33, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = mixer(x)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), mixer(x), limit=0.03)
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in mixer.parameters())


@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("prompt", [0, 1, 2, 7])
def test_steps_equal_the_whole_sequence(scale: float | None, prompt: int, backend: str) -> None:
    mixer = Mamba(12, d_conv=4, expand=1.5, layer_idx=3, init_layer_scale=scale).eval()
    x = torch.randn(2, 11, 12)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with torch.no_grad():
        whole = mixer(x)
        pieces = []
        if prompt:
            pieces.append(mixer(x[:, :prompt], inference_params=params))
            conv_state, ssm_state = params.key_value_memory_dict[3]
        else:
            conv_state, ssm_state = mixer.allocate_inference_cache(2, 11)
            params.key_value_memory_dict[3] = (conv_state, ssm_state)
        for t in range(prompt, 11):
            params.seqlen_offset = t
            if t % 2 and t:  # through forward and through step in turn
                pieces.append(mixer(x[:, t : t + 1], inference_params=params))
            else:
                pieces.append(mixer.step(x[:, t : t + 1], conv_state, ssm_state)[0])
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("bimamba_type", ["v1", "v2"])
def test_a_bidirectional_mixer_refuses_to_step(bimamba_type: str) -> None:
    mixer = Mamba(8, bimamba_type=bimamba_type, layer_idx=0)
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match=f"bimamba_type='none', got '{bimamba_type}'"):
        mixer(torch.zeros(1, 2, 8), inference_params=params)
    with pytest.raises(ValueError, match="bidirectional"):
        mixer.step(torch.zeros(1, 1, 8), *mixer.allocate_inference_cache(1, 1))


def test_bad_calls_are_named() -> None:
    with pytest.raises(ValueError, match="'v3'"):
        Mamba(8, bimamba_type="v3")
    with pytest.raises(NotImplementedError, match="'zeros'"):
        Mamba(8, dt_init="zeros")
    mixer = Mamba(8)
    with pytest.raises(ValueError, match=r"expected \(b, 1, m\), got \(1, 2, 8\)"):
        mixer.step(torch.zeros(1, 2, 8), *mixer.allocate_inference_cache(1, 1))
    params = SimpleNamespace(seqlen_offset=0, key_value_memory_dict={})
    with pytest.raises(ValueError, match="layer_idx"):
        mixer(torch.zeros(1, 2, 8), inference_params=params)
    mixer.layer_idx = 0
    mixer(torch.zeros(1, 2, 8), inference_params=params)
    with pytest.raises(ValueError, match="batch of 1, got 2"):
        mixer(torch.zeros(2, 2, 8), inference_params=params)


def test_initial_steps_lie_in_their_range() -> None:
    mixer = Mamba(32, dt_min=0.01, dt_max=0.02, dt_init="constant", dt_scale=3)
    steps = nn.functional.softplus(mixer.dt_proj.bias)
    assert steps.min() >= 0.0099
    assert steps.max() <= 0.0201
    assert mixer.dt_proj.weight.eq(3 / mixer.dt_rank**0.5).all()
    assert nn.functional.softplus(Mamba(32, dt_max=0.002, dt_init_floor=0.5).dt_proj.bias).min() > 0.49
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(64, 16))
    tagged = {name for name, p in Mamba(8, bimamba_type="v2").named_parameters() if hasattr(p, "_no_weight_decay")}
    assert tagged == {"A_log", "A_b_log", "D", "D_b"}


def make_block(**options) -> Block:
    return Block(8, partial(Mamba, bimamba_type="v2"), partial(RMSNorm, eps=1e-5), **options)


@pytest.mark.parametrize("norm", [nn.LayerNorm, RMSNorm])
def test_fused_and_plain_norms_give_the_same(norm: type) -> None:
    x, residual = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    fused = Block(8, Mamba, norm, fused_add_norm=True, residual_in_fp32=True)
    plain = Block(8, Mamba, norm, residual_in_fp32=True)
    plain.load_state_dict(fused.state_dict())
    for before in (None, residual):
        torch.testing.assert_close(fused(x, before), plain(x, before), rtol=0, atol=0)


def test_any_norm_serves_a_plain_block() -> None:
    block = Block(8, Mamba, lambda dim: nn.Identity(), residual_in_fp32=True)
    x = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    _, residual = block.bfloat16()(x, x)
    torch.testing.assert_close(residual, (x + x).float())
    plain = Block(8, Mamba, lambda dim: nn.LayerNorm(dim, elementwise_affine=False))
    assert plain(x.float(), x.float())[0].isfinite().all()
    with pytest.raises(ValueError, match="LayerNorm or RMSNorm, got Identity"):
        Block(8, Mamba, lambda dim: nn.Identity(), fused_add_norm=True)


@pytest.mark.parametrize("name", ["d_model", "d_conv", "dt_rank", "expand"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_must_be_positive(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be positive, got {value}"):
        Mamba(**{"d_model": 8, name: value})


def test_fp64_is_never_narrowed() -> None:
    block = make_block(fused_add_norm=True, residual_in_fp32=True).double()
    hidden, residual = block(torch.randn(1, 3, 8, dtype=torch.float64))
    assert hidden.dtype == residual.dtype == torch.float64


def test_drop_path_drops_the_branch_before() -> None:
    block = make_block(drop_path=0.9999)
    x, residual = torch.randn(3, 5, 8), torch.randn(3, 5, 8)
    torch.testing.assert_close(block(x, residual)[1], residual)
    torch.testing.assert_close(block.eval()(x, residual)[1], x + residual)
    torch.testing.assert_close(block.train()(x)[1], x)  # the first block has no branch before it


def test_compiles_without_a_break() -> None:
    mixer = Mamba(8, bimamba_type="v2", if_divide_out=True, init_layer_scale=0.1)
    x = torch.randn(2, 9, 8, requires_grad=True)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    leaves = [x, *mixer.parameters()]
    torch.testing.assert_close(compiled(x), mixer(x))
    expected = torch.autograd.grad(mixer(x).square().sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), leaves), expected)
