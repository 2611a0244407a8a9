"""The triton kernels of the convolution and the scan, in what the case tables do not reach."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cases import ScanCase
from causal_conv1d import backend as backends
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan import bidirectional_scan, selective_scan_fn
from tolerances import assert_close
from triton_kernels import count_launches

pytest.importorskip("triton", reason="triton is not installed")

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update, conv1d_triton
from causal_conv1d.reference import conv1d_reference
from mamba_ssm.ops import selective_scan_triton

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available(),
        reason="triton kernels need a GPU, or TRITON_INTERPRET=1 to emulate one",
    ),
    pytest.mark.usefixtures("_on_triton"),
]


@pytest.fixture
def _on_triton(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Forces the backend; without a GPU its kernels are emulated on CPU tensors."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    monkeypatch.setattr(backends, "DEVICE_OF", backends.DEVICE_OF | {"triton": device})
    with torch.device(device), backends.use_backend("triton"):
        yield


def leaves(case: ScanCase) -> dict[str, Tensor]:
    return {name: value.requires_grad_() for name, value in case.tensors(torch.float32).items()}


def check_scan(case: ScanCase) -> None:
    """Values and all gradients against the definition in fp64."""
    t = leaves(case)
    wide = {name: value.detach().double().requires_grad_() for name, value in t.items()}
    out = torch.as_tensor(selective_scan_fn(**t, delta_softplus=case.softplus))
    expected, _ = scan_reference(**wide, delta_softplus=case.softplus)
    assert_close(out, expected)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, list(t.values()), dout)
    for value, other in zip(found, torch.autograd.grad(expected, list(wide.values()), dout.double()), strict=True):
        assert_close(value, other)


def test_a_scan_and_its_gradient_are_a_launch_each() -> None:
    t = leaves(ScanCase(1, 3, 5, 2))
    with count_launches(selective_scan_triton) as launches:
        torch.as_tensor(selective_scan_fn(**t)).sum().backward()
    assert launches == ["scan_kernel", "scan_backward_kernel"]


def test_two_directions_are_two_launches() -> None:
    t = leaves(ScanCase(1, 3, 5, 2))
    direction = [t[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    with count_launches(selective_scan_triton) as launches:
        bidirectional_scan(direction, direction, t["z"], True).sum().backward()
    assert launches == ["scan_kernel"] * 2 + ["scan_backward_kernel"] * 2


def test_a_convolution_its_gradient_and_a_step_are_a_launch_each() -> None:
    x, weight = torch.randn(1, 3, 5, requires_grad=True), torch.randn(3, 4)
    with count_launches(conv1d_triton) as launches:
        torch.as_tensor(causal_conv1d_fn(x, weight, activation="silu")).sum().backward()
        causal_conv1d_update(torch.randn(1, 3), torch.zeros(1, 3, 4), weight)
    assert launches == ["conv1d_kernel", "conv1d_backward_kernel", "conv1d_update_kernel"]


@pytest.mark.parametrize("states", [1, 3, 32, 130], ids="n={}".format)
def test_any_number_of_states(states: int) -> None:
    """More than one block of channels where there is one state, more than one warp where there are many."""
    check_scan(ScanCase(1, 34 if states == 1 else 9, 11, states, layout="channel-last"))


def test_groups_of_more_channels_than_a_block_has() -> None:
    check_scan(ScanCase(1, 34, 9, 4, B="2", C="2"))


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels of tensors that 32 bits cannot address, which are too large to be made here."""
    asked = []

    def reach(value: Tensor) -> int:
        asked.append(value)
        return 2**31

    monkeypatch.setattr(selective_scan_triton, "_reach", reach)
    check_scan(ScanCase(2, 5, 37, 4))
    assert asked


def test_gradients_do_not_change_from_call_to_call() -> None:
    t = leaves(ScanCase(3, 20, 34, 4, B="constant"))
    first, second = (
        torch.autograd.grad(torch.as_tensor(selective_scan_fn(**t)).sum(), list(t.values())) for _ in range(2)
    )
    for value, other in zip(first, second, strict=True):
        assert torch.equal(value, other)


@pytest.mark.parametrize("width", [8, 9, 11])
@pytest.mark.parametrize("reverse", [False, True])
def test_many_taps(width: int, reverse: bool) -> None:
    """Both ways to the gradient of x, over more than one block of tokens."""
    x, weight, bias = torch.randn(2, 40, 3).mT, torch.randn(3, width), torch.randn(3)
    index = (torch.rand(2, 40) < 0.1).cumsum(1)
    wide = [value.double().requires_grad_() for value in (x, weight, bias)]
    for value in (x, weight, bias):
        value.requires_grad_()
    expected = conv1d_reference(*wide, index, silu=True, reverse=reverse)
    out = torch.ops.causal_conv1d.conv1d(x, weight, bias, index, True, reverse)
    assert_close(out, expected)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, (x, weight, bias), dout)
    for value, other in zip(found, torch.autograd.grad(expected, wide, dout.double()), strict=True):
        assert_close(value, other)
