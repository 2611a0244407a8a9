"""Training on the compiled CPU kernels: gradients of mixers and norms, and what must not reach the kernels."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import inner_arguments
from causal_conv1d.backend import use_backend
from mamba_ssm.modules.mamba_simple import Block, Mamba
from mamba_ssm.ops.mamba_inner import DirectionParameters, bidirectional_inner
from mamba_ssm.ops.norm import layer_norm_fn
from native_kernels import count_calls, needs_kernels
from tolerances import RELATIVE, assert_close, relative_error

pytestmark = needs_kernels


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    ("batch", "inner", "length", "states", "rank", "width"),
    [(2, 24, 33, 16, 2, 4), (1, 5, 1, 3, 1, 1), (3, 70, 97, 5, 3, 7)],
)
def test_gradients_of_the_inner(
    batch: int, inner: int, length: int, states: int, rank: int, width: int, bare: bool, count: int, threads
) -> None:
    threads(count)
    arguments = inner_arguments(batch, inner, length, states, rank, width, bare)

    def run(dtype: torch.dtype, backend: str, noise: float = 0.0) -> tuple[Tensor, list[Tensor]]:
        leaves: list[Tensor] = []

        def leaf(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            wide = value.to(dtype) * (1 + noise * torch.randn(value.shape, dtype=dtype))
            leaves.append(wide.detach().requires_grad_())
            return leaves[-1]

        xz, *directions = arguments
        x = leaf(xz)
        assert x is not None
        with use_backend(backend):
            out = bidirectional_inner(x, *(DirectionParameters(*map(leaf, each)) for each in directions), 0.5)
            dout = torch.linspace(-1, 2, out.numel(), dtype=dtype).view(out.shape)
            return out, list(torch.autograd.grad(out, leaves, dout))

    with count_calls() as calls:
        out, found = run(torch.float32, "native")
    assert calls == ["bidirectional_inner", *2 * ["conv1d"], "selective_scan_backward", *2 * ["conv1d_backward"]]
    expected, wide = run(torch.float64, "torch")
    assert_close(out, expected, torch.float32)
    # Through all parts of a block, a gradient may be a small sum of large terms: as near as rounded inputs let it be.
    rounded = run(torch.float64, "torch", noise=torch.finfo(torch.float32).eps)[1]
    for value, reference, other in zip(found, wide, rounded, strict=True):
        assert_close(value, reference, limit=max(2 * RELATIVE[torch.float32], 4 * relative_error(other, reference)))


@pytest.mark.parametrize("features", [1, 7, 8, 33, 192])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("prenorm", [False, True])
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("rms", [False, True])
def test_gradients_of_the_norms(
    rms: bool, has_residual: bool, prenorm: bool, has_bias: bool, features: int, threads
) -> None:
    threads(2)
    tensors = [torch.randn(3, 50, features) + 1, torch.randn(3, 50, features), torch.randn(features)]
    tensors.append(torch.randn(features))

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        x, residual, weight, bias = (value.to(dtype).requires_grad_() for value in tensors)
        leaves = [x, weight, *([residual] if has_residual else []), *([bias] if has_bias else [])]
        with use_backend(backend):
            found = layer_norm_fn(
                x, weight, bias if has_bias else None, residual if has_residual else None,
                eps=1e-5, prenorm=prenorm, is_rms_norm=rms,
            )  # fmt: skip
            outputs = found if prenorm else (found,)
            slopes = [torch.linspace(-1, 2 + i, out.numel(), dtype=dtype).view_as(out) for i, out in enumerate(outputs)]
            return list(torch.autograd.grad(outputs, leaves, slopes))

    with count_calls() as calls:
        found = run(torch.float32, "native")
    assert calls == ["add_norm", "add_norm_backward"]
    for value, reference, other in zip(found, run(torch.float64, "torch"), run(torch.float32, "torch"), strict=True):
        assert_close(value, reference, limit=max(2 * RELATIVE[torch.float32], 4 * relative_error(other, reference)))


def test_gradients_of_the_norms_do_not_depend_on_the_threads(threads) -> None:
    x, weight = torch.randn(300, 40, requires_grad=True), torch.randn(40, requires_grad=True)

    def run(count: int) -> tuple[Tensor, ...]:
        threads(count)
        with use_backend("native"):
            return torch.autograd.grad(layer_norm_fn(x, weight, None, is_rms_norm=True).square().sum(), (x, weight))

    for one, three in zip(run(1), run(3), strict=True):
        assert torch.equal(one, three)


def test_the_stored_sum_alone_has_a_gradient() -> None:
    x, residual, weight = (torch.randn(*shape, requires_grad=True) for shape in ((4, 6), (4, 6), (6,)))
    _, total = layer_norm_fn(x, weight, None, residual, prenorm=True)
    total.sum().backward()
    for term in (x, residual):
        assert term.grad is not None
        assert torch.equal(term.grad, torch.ones(4, 6))
    assert weight.grad is None


@pytest.mark.parametrize("projection_bias", [False, True])
def test_gradients_of_a_whole_mixer(projection_bias: bool, threads) -> None:
    threads(2)
    mixer = Mamba(12, d_state=5, bimamba_type="v2", if_divide_out=True, bias=projection_bias)
    x = torch.randn(3, 37, 12)

    def run(dtype: torch.dtype, backend: str) -> list[Tensor]:
        own = copy.deepcopy(mixer).to(dtype)
        leaf = x.to(dtype).requires_grad_()
        with use_backend(backend):
            out = own(leaf)
            leaves = [leaf, *own.parameters()]
            return [
                out,
                *torch.autograd.grad(out, leaves, torch.linspace(-1, 2, out.numel(), dtype=dtype).view_as(out)),
            ]

    with count_calls() as calls:
        found = run(torch.float32, "native")
    assert calls[0] == "bidirectional_inner"
    for value, reference, other in zip(found, run(torch.float64, "torch"), run(torch.float32, "torch"), strict=True):
        assert_close(value, reference, limit=max(2 * RELATIVE[torch.float32], 4 * relative_error(other, reference)))


REPLACED = [
    ("conv1d.weight", (30, 1, 4)), ("conv1d_b.weight", (32, 1, 2)), ("conv1d.bias", (2,)), ("x_proj.weight", (20, 32)),
    ("x_proj_b.weight", (34, 32)), ("dt_proj.weight", (32, 2)), ("dt_proj.bias", (1,)), ("A_log", (1, 16)),
    ("A_b_log", (32, 8)), ("D", (5,)), ("D_b", (1,)),
]  # fmt: skip


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(("name", "shape"), REPLACED, ids=[name for name, _ in REPLACED])
def test_parameters_of_other_shapes_never_reach_the_kernels(name: str, shape: tuple[int, ...], trains: bool) -> None:
    """What PyTorch makes of them counts: numbers, where each direction may have sizes of its own, or an error."""
    block = Block(16, lambda dim: Mamba(dim, bimamba_type="v2")).eval()
    *path, last = name.split(".")
    owner = block.mixer.get_submodule(".".join(path))
    setattr(owner, last, torch.nn.Parameter(torch.randn(shape)))
    x = torch.randn(2, 33, 16)

    def run() -> Tensor | None:
        try:
            with torch.set_grad_enabled(trains):
                out = block(x)[0]
                if trains:
                    out.square().sum().backward()
                return out
        except (ValueError, RuntimeError, IndexError):
            return None

    found = run()
    with use_backend("torch"):
        expected = run()
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert_close(found, expected, limit=1e-5)


def test_saved_tensors_may_come_back_in_another_layout() -> None:
    mixer, x = Mamba(12, bimamba_type="v2"), torch.randn(2, 21, 12)

    def run(*hooks: Any) -> list[Tensor]:
        with torch.autograd.graph.saved_tensors_hooks(*hooks):
            loss = mixer(x).square().sum()
        return list(torch.autograd.grad(loss, list(mixer.parameters())))

    def turned(value: Tensor) -> Tensor:
        return value.transpose(-1, -2).contiguous() if value.dim() > 1 else value

    found = run(turned, lambda value: value.transpose(-1, -2) if value.dim() > 1 else value)
    for value, reference in zip(found, run(lambda value: value, lambda value: value), strict=True):
        assert_close(value, reference, limit=1e-5)


def test_hooks_on_all_modules_see_the_projections() -> None:
    mixer, seen = Mamba(12, bimamba_type="v2"), []
    handle = torch.nn.modules.module.register_module_full_backward_hook(
        lambda module, *_: seen.append(type(module).__name__)
    )
    try:
        mixer(torch.randn(1, 9, 12, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert seen.count("Linear") == 2


def test_a_changed_projection_is_called(threads) -> None:
    mixer = Mamba(12, bimamba_type="v2")
    x = torch.randn(1, 9, 12, requires_grad=True)
    seen: list[str] = []
    mixer.out_proj.register_forward_hook(lambda *_: seen.append("forward"))
    mixer.in_proj.register_full_backward_hook(lambda *_: seen.append("backward"))
    mixer(x).sum().backward()
    assert seen == ["forward", "backward"]


def test_frozen_parts_and_an_unused_output_have_no_gradient() -> None:
    mixer = Mamba(12, bimamba_type="v2")
    mixer.in_proj.weight.requires_grad_(False)
    mixer(torch.randn(2, 9, 12)).sum().backward()
    assert mixer.in_proj.weight.grad is None
    assert all(value.grad is not None for name, value in mixer.named_parameters() if name != "in_proj.weight")


def test_norms_under_transforms_of_functions() -> None:
    x, weight = torch.randn(5, 6), torch.randn(6, requires_grad=True)

    def loss(own: Tensor) -> Tensor:
        return layer_norm_fn(x, own, None, is_rms_norm=True).square().sum()

    loss(weight).backward()
    assert weight.grad is not None
    assert_close(torch.func.grad(loss)(weight.detach()), weight.grad, torch.float32)
