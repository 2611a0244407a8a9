"""The compiled CPU kernels where they differ from the others in more than speed: fused ops, threads, extremes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import inner_arguments
from causal_conv1d import backend as backends
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.backend import use_backend
from mamba_ssm.modules import mamba_simple
from mamba_ssm.modules.mamba_simple import Block, Mamba, run_blocks
from mamba_ssm.ops import selective_scan_native as native
from mamba_ssm.ops.mamba_inner import DirectionParameters, bidirectional_inner
from mamba_ssm.ops.norm import RMSNorm, layer_norm_fn
from mamba_ssm.ops.selective_scan import selective_scan_fn, selective_scan_ref
from mamba_ssm.ops.selective_scan_torch import Direction
from native_kernels import count_calls, needs_kernels
from tolerances import RELATIVE, assert_close

pytestmark = needs_kernels


def in_fp64(xz: torch.Tensor, *directions: DirectionParameters, scale: float) -> torch.Tensor:
    wide = [DirectionParameters(*[None if t is None else t.double() for t in d]) for d in directions]
    with use_backend("torch"):
        return bidirectional_inner(xz.double(), *wide, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(
    ("batch", "inner", "length", "states", "rank", "width", "bare"),
    [
        (1, 8, 1, 16, 1, 4, False),
        (2, 24, 33, 16, 2, 4, False),
        (1, 5, 3, 3, 1, 4, True),
        (3, 37, 97, 1, 3, 2, False),
        (1, 64, 200, 16, 4, 7, False),
        (1, 40, 64, 9, 5, 1, True),
    ],
)
def test_inner(
    batch: int, inner: int, length: int, states: int, rank: int, width: int, bare: bool, count: int, dtype, threads
) -> None:
    threads(count)
    xz, first, second = inner_arguments(batch, inner, length, states, rank, width, bare)
    xz = xz.to(dtype)
    with use_backend("native"):
        out = bidirectional_inner(xz, first, second, 0.5)
    assert out.dtype == dtype
    assert_close(out, in_fp64(xz, first, second, scale=0.5), dtype)


@pytest.mark.parametrize("batch", [1, 3])
def test_inner_of_several_spans(batch: int, threads) -> None:
    """Long enough that the directions meet in the middle of a span, and no multiple of anything."""
    threads(2)
    xz, first, second = inner_arguments(batch, 520, 1153, 2, 1, 4, False)
    with use_backend("native"):
        out = bidirectional_inner(xz, first, second, 0.5)
    assert_close(out, in_fp64(xz, first, second, scale=0.5), torch.float32)


def test_inner_takes_channel_first_input() -> None:
    xz, first, second = inner_arguments(2, 12, 21, 4, 2, 4, False)
    with use_backend("native"):
        assert_close(bidirectional_inner(xz.contiguous(), first, second), bidirectional_inner(xz, first, second))


def test_inner_is_one_op_of_its_schema() -> None:
    xz, first, second = inner_arguments(1, 8, 5, 4, 2, 4, False)
    torch.library.opcheck(torch.ops.mamba_ssm.bidirectional_inner, (xz, *first, *second, 1.0))


def test_gradients_go_through_the_inner() -> None:
    xz, first, second = inner_arguments(1, 8, 5, 4, 2, 4, False)
    out = bidirectional_inner(xz.requires_grad_(), first, second)
    out.sum().backward()
    assert xz.grad is not None
    assert xz.grad.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_threads_do_not_change_a_bit(count: int, threads) -> None:
    u, delta = torch.randn(2, 2, 40, 67).unbind(0)
    A, (B, C) = -torch.rand(40, 16), torch.randn(2, 2, 16, 67).unbind(0)
    threads(1)
    expected = selective_scan_fn(u, delta, A, B, C, delta_softplus=True)
    threads(count)
    assert torch.equal(selective_scan_fn(u, delta, A, B, C, delta_softplus=True), expected)


@pytest.mark.parametrize("step", [1e-30, 1e4, float("inf"), float("nan")])
@pytest.mark.parametrize("place", [0, 20, 39])
def test_extreme_steps(step: float, place: int) -> None:
    """Underflow of the exponential forgets the state; infinities and NaN come out where the definition has them."""
    u, delta = torch.randn(1, 16, 40), torch.rand(1, 16, 40)
    delta[:, 3, place] = step
    A, (B, C) = -torch.rand(16, 4) - 0.5, torch.randn(2, 1, 4, 40).unbind(0)
    out = selective_scan_fn(u, delta, A, B, C)
    expected = selective_scan_ref(u, delta, A, B, C)
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_activations_at_the_ends_of_the_range() -> None:
    values = torch.tensor([-3e38, -104.0, -88.5, -87.0, -1e-38, 0.0, 1e-40, 15.0, 88.9, 3e38, float("nan")])
    out = causal_conv1d_fn(values[None, None], torch.ones(1, 1), activation="silu")
    assert torch.allclose(out[0, 0], torch.nn.functional.silu(values), rtol=1e-6, atol=1e-36, equal_nan=True)


def test_growing_states_overflow_like_the_definition() -> None:
    u = torch.ones(1, 8, 200)
    out = selective_scan_fn(u, u, torch.ones(8, 1), u[:, :1], u[:, :1])
    expected = selective_scan_ref(u, u, torch.ones(8, 1), u[:, :1], u[:, :1])
    finite = expected.abs() < 1e38
    assert torch.allclose(out[finite], expected[finite], rtol=1e-4)
    assert out[..., -1].isinf().all()


# --- add and norm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "residual_dtype"),
    [
        ((2, 67, 192), torch.float32, torch.float32),
        ((1, 1, 1), torch.float32, None),
        ((3, 5, 37), torch.float32, torch.float32),
        ((130, 8), torch.bfloat16, torch.float32),
        ((4, 19), torch.bfloat16, torch.bfloat16),
        ((4, 19), torch.bfloat16, None),
    ],
)
def test_add_norm(shape: tuple[int, ...], dtype: torch.dtype, residual_dtype: torch.dtype | None, rms: bool) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1])
    bias = None if rms else torch.randn(shape[-1])
    residual = None if residual_dtype is None else torch.randn(shape).to(residual_dtype)
    options = {"eps": 1e-5, "prenorm": True, "residual_in_fp32": True, "is_rms_norm": rms}
    with torch.no_grad(), use_backend("native"):
        y, total = layer_norm_fn(x, weight, bias, residual, **options)
    wide = [None if t is None else t.double() for t in (x, weight, bias, residual)]
    expected, expected_total = layer_norm_fn(*wide, **options)
    assert y.dtype == dtype
    assert total.dtype == (residual_dtype or torch.float32)
    assert_close(y, expected, dtype)
    assert_close(total, expected_total, total.dtype)


def test_add_norm_is_one_op_of_its_schema() -> None:
    x, residual, weight = torch.randn(3, 2, 5, 8)[0], torch.randn(2, 5, 8), torch.randn(8)
    for arguments in (
        (x, residual, weight, None, 1e-5, True, torch.float32),
        (x, None, weight, weight, 1e-5, False, None),
    ):
        torch.library.opcheck(torch.ops.mamba_ssm.add_norm, arguments)


# --- whole blocks ----------------------------------------------------------------------------------------------------


def make_blocks(count: int, model: int, **options: Any) -> list[Block]:
    norm = options.pop("norm", RMSNorm)
    blocks = [Block(model, partial(Mamba, bimamba_type="v2", **options), norm_cls=norm).eval() for _ in range(count)]
    for block in blocks:
        torch.nn.init.normal_(block.norm.weight)
    return blocks


def one_by_one(blocks: list[Block], x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """The reference: the same blocks in fp64, on the PyTorch kernels."""
    x, residual = x.double(), None if residual is None else residual.double()
    with use_backend("torch"), torch.no_grad():
        for block in blocks:
            x, residual = copy.deepcopy(block).double()(x, residual)
    return x, residual


@pytest.mark.parametrize(
    ("batch", "length", "model", "options"),
    [
        (1, 197, 192, {"if_divide_out": True}),
        (2, 33, 20, {"d_state": 5, "d_conv": 3, "bias": True, "norm": torch.nn.LayerNorm}),
        (3, 1, 7, {"dt_rank": 3, "expand": 3, "conv_bias": False}),
        (2, 700, 260, {"d_state": 2}),
    ],
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_blocks_at_once(batch: int, length: int, model: int, options: dict[str, Any], count: int, threads) -> None:
    threads(count)
    blocks, x = make_blocks(3, model, **options), torch.randn(batch, length, model)
    with torch.no_grad(), count_calls() as calls:
        hidden, residual = run_blocks(blocks, x, None)
    assert calls == ["bidirectional_blocks"]
    expected, expected_residual = one_by_one(blocks, x)
    assert_close(hidden, expected, torch.float32)
    assert_close(residual, expected_residual, torch.float32)


def test_threads_do_not_change_a_bit_of_blocks(threads) -> None:
    """Pictures dealt out whole, pictures shared by all threads, and some of each."""
    blocks, x = make_blocks(2, 40, if_divide_out=True), torch.randn(3, 45, 40)
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        with torch.no_grad():
            results.append(run_blocks(blocks, x, None))
    for hidden, residual in results[1:]:
        assert torch.equal(hidden, results[0][0])
        assert torch.equal(residual, results[0][1])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_one_block_at_once_leaves_its_inputs_alone(count: int, threads) -> None:
    threads(count)
    (block,), (x, residual) = make_blocks(1, 12), torch.randn(2, 3, 9, 12)
    before = x.clone(), residual.clone()
    with torch.no_grad(), count_calls() as calls:
        out, total = block(x, residual)
    assert calls == ["bidirectional_blocks"]
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    expected, expected_total = one_by_one([block], x, residual)
    assert_close(out, expected, torch.float32)
    assert_close(total, expected_total, torch.float32)


@pytest.mark.parametrize("fast", [False, True], ids=["slow-bf16", "fast-bf16"])
@pytest.mark.parametrize("residual_in_fp32", [False, True])
def test_blocks_in_bf16(fast: bool, residual_in_fp32: bool) -> None:
    """Whole blocks, computed in fp32, on a machine without instructions for bf16; else op by op."""
    blocks = [block.bfloat16() for block in make_blocks(3, 24, if_divide_out=True)]
    x = torch.randn(2, 33, 24).bfloat16()
    for block in blocks:
        block.residual_in_fp32 = residual_in_fp32
    with torch.no_grad(), count_calls() as calls, patch.object(mamba_simple, "has_fast_bf16", lambda: fast):
        hidden, residual = run_blocks(blocks, x, None)
    at_once = residual_in_fp32 and not fast
    assert calls == ["bidirectional_blocks"] if at_once else "bidirectional_blocks" not in calls
    assert (hidden.dtype, residual.dtype) == (torch.bfloat16, torch.float32 if residual_in_fp32 else torch.bfloat16)
    expected, expected_residual = one_by_one(blocks, x)
    # Op by op, each of the twelve results of a block that lie in memory is rounded.
    assert_close(hidden, expected, limit=RELATIVE[torch.bfloat16] * (1 if at_once else 4))
    assert_close(residual, expected_residual, limit=RELATIVE[torch.bfloat16] * (1 if at_once else 4))


def test_blocks_of_other_kinds_run_in_between() -> None:
    blocks = make_blocks(2, 16) + make_blocks(1, 16, d_state=4) + make_blocks(1, 16, init_layer_scale=0.1)
    blocks += make_blocks(1, 16, norm=torch.nn.LayerNorm)
    x = torch.randn(1, 11, 16)
    with torch.no_grad(), count_calls() as calls:
        hidden, _ = run_blocks(blocks, x, None)
    assert calls.count("bidirectional_blocks") == 3
    assert_close(hidden, one_by_one(blocks, x)[0], torch.float32)


@pytest.mark.parametrize("name", ["", "mixer", "mixer.in_proj", "mixer.out_proj"])
def test_hooks_are_called(name: str) -> None:
    (block,) = make_blocks(1, 12)
    seen: list[str] = []
    block.get_submodule(name).register_forward_hook(lambda *_: seen.append(name))
    with torch.no_grad():
        run_blocks([block], torch.randn(1, 4, 12), None)
    assert seen == [name]


def test_replaced_modules_are_called() -> None:
    (block,) = make_blocks(1, 12)
    x = torch.randn(1, 4, 12)
    block.mixer.out_proj = torch.nn.Sequential(block.mixer.out_proj, torch.nn.Tanh())
    with torch.no_grad():
        assert run_blocks([block], x, None)[0].abs().max() < 1


def test_blocks_that_are_trained_keep_their_gradients() -> None:
    blocks = make_blocks(2, 12)
    run_blocks(blocks, torch.randn(1, 4, 12), None)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in blocks[0].mixer.parameters())


def test_exported_blocks_take_any_batch() -> None:
    (block,) = make_blocks(1, 12)
    with torch.no_grad():
        dynamic = {"hidden_states": {0: torch.export.Dim("batch", max=10**6)}}
        exported = torch.export.export(block, (torch.randn(2, 9, 12),), dynamic_shapes=dynamic).module()
        x = torch.randn(5, 9, 12)
        assert_close(exported(x)[0], block(x)[0].double(), torch.float32)


@pytest.mark.skipif(not mamba_simple.TRACEABLE, reason="compiled by this torch, the ops run one by one")
def test_compiled_blocks_stay_one_call() -> None:
    blocks, x = make_blocks(3, 12), torch.randn(2, 9, 12)
    compiled = torch.compile(lambda x: run_blocks(blocks, x, None), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(x)
        with count_calls() as calls:
            hidden, residual = compiled(x)
        assert calls == ["bidirectional_blocks"]
        expected, expected_residual = run_blocks(blocks, x, None)
    assert torch.equal(hidden, expected)
    assert torch.equal(residual, expected_residual)


def test_blocks_are_one_op_of_its_schema() -> None:
    (block,) = make_blocks(1, 8)
    parameters = [None if p is None else p.detach() for p in mamba_simple._plain_parameters(block, torch.float32)]
    for dtype in (torch.float32, torch.bfloat16):
        x, residual = torch.randn(1, 5, 8).to(dtype), torch.randn(1, 5, 8)
        torch.library.opcheck(torch.ops.mamba_ssm.bidirectional_blocks, (x, residual, parameters, 1e-5, True, 0.5))


# --- gradients -------------------------------------------------------------------------------------------------------


def scan_arguments(batch: int, channels: int, length: int, states: int, groups: int = 1) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias, z."""
    u, delta, z = torch.randn(3, batch, length, channels).transpose(2, 3).unbind()
    B, C = torch.randn(2, batch, length, groups, states).permute(0, 1, 3, 4, 2).unbind()
    return [u, delta - 3, -torch.rand(channels, states), B, C, torch.randn(channels), torch.randn(channels), z]


def gradients(op: Any, *arguments: Any) -> list[Tensor]:
    """Those of all tensors among the arguments, for a random gradient of the first result."""
    leaves = [a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    out = op(*leaves)
    out = out if isinstance(out, Tensor) else out[0]
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    return list(torch.autograd.grad(out, tensors, torch.linspace(-1, 2, out.numel()).view(out.shape)))


CASES_OF_GRADIENTS = {
    "scan": lambda: (torch.ops.mamba_ssm.selective_scan, *scan_arguments(2, 150, 70, 5, 2), True, True, True),
    "both scans": lambda: (
        torch.ops.mamba_ssm.bidirectional_scan,
        *scan_arguments(2, 130, 70, 16)[:-1],
        *scan_arguments(2, 130, 70, 16),
        True,
        True,
    ),
    "conv": lambda: (
        torch.ops.causal_conv1d.conv1d,
        torch.randn(2, 70, 5000),
        torch.randn(70, 4),
        torch.randn(70),
        None,
        True,
        True,
    ),
}


@pytest.mark.parametrize("name", CASES_OF_GRADIENTS)
def test_gradients_come_from_the_kernels_whatever_the_threads(name: str, threads) -> None:
    """Several slices of channels, pieces of tokens and pictures: the sums over them must not depend on the threads."""
    op, *arguments = CASES_OF_GRADIENTS[name]()
    threads(1)
    with count_calls() as names:
        alone = gradients(op, *arguments)
    assert any(called.endswith("_backward") for called in names)
    wide = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    with use_backend("torch"):
        expected = gradients(op, *wide)
    for value, reference in zip(alone, expected, strict=True):
        assert_close(value, reference, torch.float32)
    for count in (2, 3):
        threads(count)
        for value, first in zip(gradients(op, *arguments), alone, strict=True):
            assert torch.equal(value, first)


@pytest.mark.parametrize("name", ["CAUSAL_CONV1D", "SELECTIVE_SCAN"])
def test_either_family_can_be_forced_alone(name: str) -> None:
    """With one of the two in pure PyTorch a block with gradients is composed of the ops of its parts."""
    family = next(each for each in backends.families() if each.variable.startswith(name))
    xz, first, second = inner_arguments(1, 6, 9, 3, 2, 4, False)
    xz.requires_grad_()
    with patch.object(family, "_forced", True), count_calls() as calls:
        bidirectional_inner(xz, first, second, 0.5).sum().backward()
    other = "selective_scan" if name == "CAUSAL_CONV1D" else "conv1d"
    assert set(calls) == {other, f"{other}_backward"}


def test_update_runs_on_the_kernel() -> None:
    state = torch.randn(2, 9, 5)
    with count_calls() as names:
        causal_conv1d_update(torch.randn(2, 9), state, torch.randn(9, 4))
    assert names == ["conv1d_update"]


# --- memory ----------------------------------------------------------------------------------------------------------

GUARD = 1234.5


def guarded(*shape: int, channel_last: bool) -> tuple[Tensor, Tensor]:
    """An unset (b, d, l) tensor inside a larger one, and that larger one."""
    batch, channels, length = (size + 2 for size in shape)
    sizes = (batch, length, channels) if channel_last else (batch, channels, length)
    around = torch.full(sizes, GUARD)
    around = around.transpose(1, 2) if channel_last else around
    return around[1:-1, 1:-1, 1:-1], around


@pytest.mark.parametrize("channel_last", [False, True])
@given(batch=st.integers(1, 2), channels=st.integers(1, 37), length=st.integers(1, 90), states=st.integers(1, 18))
@settings(max_examples=25, deadline=None)
def test_nothing_around_the_results_is_written(
    channel_last: bool, batch: int, channels: int, length: int, states: int
) -> None:
    """The output lies inside a larger tensor, as do the inputs, whose surroundings are NaN and must not be read."""

    def inside(*sizes: int) -> Tensor:
        value, around = guarded(*sizes, channel_last=channel_last)
        around.fill_(float("nan"))
        return value.copy_(torch.randn(sizes))

    u, delta, z = (inside(batch, channels, length) for _ in range(3))
    B, C = (inside(batch, states, length)[:, None] for _ in range(2))
    out, around = guarded(batch, channels, length, channel_last=channel_last)
    directions = [
        Direction(u, delta, -torch.rand(channels, states), B, C, None, None, reverse) for reverse in (False, True)
    ]
    with patch.object(native, "_empty_like", lambda *_: out):
        result, last, borders = native.scan(directions, z, softplus=True, keep_states=True)
    assert result is out
    assert not result.isnan().any()
    assert not last.isnan().any()
    assert not borders.isnan().any()
    around[1:-1, 1:-1, 1:-1] = GUARD
    assert (around == GUARD).all()


@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 70),
    length=st.integers(1, 90),
    states=st.integers(1, 6),
    constant=st.booleans(),
    channel_last=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_nothing_around_the_gradients_is_written(
    batch: int, channels: int, length: int, states: int, constant: bool, channel_last: bool
) -> None:
    u, delta, A, B, C, D, bias, z = scan_arguments(batch, channels, length, states)
    if constant:
        B, C = torch.randn(2, channels, states).unbind()
    given = [Direction(u, delta, A, B, C, D, bias, reverse) for reverse in (False, True)]
    _, _, borders = native.scan(given, z, softplus=True, keep_states=True)
    made = []

    def inside(*_: Any) -> Tensor:
        made.append(guarded(batch, channels, length, channel_last=channel_last))
        return made[-1][0]

    with patch.object(native, "_empty_like", inside):
        found = native.scan_backward(given, z, torch.randn_like(u), None, borders, softplus=True)
    assert len(made) == 5  # du and ddelta of each direction, dz
    assert not any(value.isnan().any() for value in found)
    for value, around in made:
        assert (value != GUARD).all()
        value.fill_(GUARD)
        assert (around == GUARD).all()
