"""The compiled CPU kernels where they differ from the others in more than speed: fused ops, threads, extremes."""

from __future__ import annotations

import pytest
import torch

from causal_conv1d import backend as backends
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.backend import use_backend
from mamba_ssm.ops.mamba_inner import DirectionParameters, bidirectional_inner
from mamba_ssm.ops.selective_scan import selective_scan_fn, selective_scan_ref
from tolerances import assert_close

pytestmark = pytest.mark.skipif(
    any(family.missing("native") is not None for family in backends.families()),
    reason="the native kernels are not built: the header of the run says why",
)


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inner_arguments(
    batch: int, inner: int, length: int, states: int, rank: int, width: int, bare: bool
) -> tuple[torch.Tensor, DirectionParameters, DirectionParameters]:
    def direction() -> DirectionParameters:
        return DirectionParameters(
            torch.randn(inner, 1, width) / width,
            None if bare else torch.randn(inner),
            torch.randn(rank + 2 * states, inner) / inner**0.5,
            torch.randn(inner, rank) / rank**0.5,
            torch.rand(inner, states) * 2,
            None if bare else torch.randn(inner),
            None if bare else torch.randn(inner) - 3,
        )

    xz = torch.randn(batch, length, 2 * inner).transpose(1, 2)
    return xz, direction(), direction()


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
