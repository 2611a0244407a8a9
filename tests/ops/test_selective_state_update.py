"""One decoding step against its definition: values, gradients, the state in place, dtypes, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ssm.ops import selective_state_update as module
from mamba_ssm.ops.selective_scan_interface import selective_scan_ref
from mamba_ssm.ops.selective_state_update import selective_state_update, selective_state_update_ref
from mamba_ssm.ops.triton import selective_state_update as upstream_path
from tolerances import RELATIVE, assert_close
from triton_kernels import count_launches

OPTIONS = [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")]
# b, h (0: no heads), g, d, n
SIZES = [(1, 0, 0, 1, 1), (2, 0, 0, 7, 5), (2, 4, 1, 3, 5), (3, 4, 2, 3, 16), (1, 3, 3, 8, 2)]


def arguments(sizes: tuple[int, ...], options: tuple[str, ...], dtype: Any = torch.float64) -> dict[str, Tensor]:
    b, h, g, d, n = sizes
    torch.manual_seed(sum(sizes))
    heads, groups = ((h,), (g,)) if h else ((), ())
    shapes = {
        "state": (b, *heads, d, n),
        "x": (b, *heads, d),
        "dt": (b, *heads, d),
        "A": (*heads, d, n),
        "B": (b, *groups, n),
        "C": (b, *groups, n),
        "D": (*heads, d),
        "z": (b, *heads, d),
        "dt_bias": (*heads, d),
    }
    values = {
        name: torch.randn(shape, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
        if name not in ("D", "z", "dt_bias") or name in options
    }
    values["A"] = -values["A"].abs()
    return values


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dt_softplus", [False, True])
def test_values(sizes: tuple[int, ...], options: tuple[str, ...], dt_softplus: bool, backend: str) -> None:
    values = arguments(sizes, options)
    expected_state = values["state"].clone()
    expected = selective_state_update_ref(**{**values, "state": expected_state}, dt_softplus=dt_softplus)
    before = values["state"].clone()
    found = selective_state_update(**values, dt_softplus=dt_softplus)
    assert_close(found, expected)
    assert_close(values["state"], expected_state)
    assert not torch.equal(values["state"], before)
    single = {name: value.float() for name, value in {**values, "state": before}.items()}
    assert_close(selective_state_update(**single, dt_softplus=dt_softplus), expected)
    assert_close(single["state"], expected_state)


@pytest.mark.parametrize("sizes", SIZES[1:4])
def test_gradients(sizes: tuple[int, ...]) -> None:
    values = arguments(sizes, ("D", "z", "dt_bias"))
    names = list(values)

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = dict(zip(names, tensors, strict=True))
        state = given["state"].clone()
        out = selective_state_update(**{**given, "state": state}, dt_softplus=True)
        return out, state

    assert torch.autograd.gradcheck(run, [value.requires_grad_() for value in values.values()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_equal_the_whole_sequence(dtype: torch.dtype, backend: str) -> None:
    b, d, n, length = 2, 3, 4, 9
    u, delta, z = torch.randn(3, b, d, length, dtype=dtype)
    B, C = torch.randn(2, b, n, length, dtype=dtype)
    A, D, bias = -torch.rand(d, n, dtype=dtype), torch.randn(d, dtype=dtype), torch.randn(d, dtype=dtype)
    exact = [value.double() for value in (u, delta, A, B, C, D, z, bias)]
    expected, last = selective_scan_ref(*exact, True, True)
    state = torch.zeros(b, d, n, dtype=dtype)
    for t in range(length):
        out = selective_state_update(
            state, u[..., t], delta[..., t], A, B[..., t], C[..., t], D, z[..., t], bias, dt_softplus=True
        )
        assert_close(out, expected[..., t])
    assert_close(state, last)


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(state_dtype: torch.dtype, dtype: torch.dtype, backend: str) -> None:
    values = arguments((2, 0, 0, 6, 8), ("D", "z", "dt_bias"), dtype)
    values["state"] = values["state"].to(state_dtype)
    exact = {name: value.to(torch.float64, copy=True) for name, value in values.items()}
    expected = selective_state_update_ref(**exact, dt_softplus=True)
    state = values["state"]
    out = selective_state_update(**values, dt_softplus=True)
    assert (out.dtype, state.dtype) == (dtype, state_dtype)
    # The results are rounded once; before that all is as wide as the widest argument, fp32 at least.
    computed = torch.promote_types(torch.promote_types(dtype, state_dtype), torch.float32)
    for found, wanted in ((out, expected), (state, exact["state"])):
        assert_close(found, wanted, max((found.dtype, computed), key=RELATIVE.__getitem__))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tied_parameters(dtype: torch.dtype, backend: str) -> None:
    values = arguments((2, 4, 2, 3, 5), ("D", "dt_bias"), dtype)
    values["A"] = values["A"][:, :1, :1].expand(4, 3, 5)
    values["dt"] = values["dt"][:, :, :1].expand(2, 4, 3)
    values["dt_bias"] = values["dt_bias"][:, :1].expand(4, 3)
    exact = {name: value.double() for name, value in values.items()}
    exact["state"] = exact["state"].clone()
    expected = selective_state_update_ref(**exact, dt_softplus=True)
    assert_close(selective_state_update(**values, dt_softplus=True), expected)


@pytest.mark.parametrize("sizes", [(2, 0, 0, 7, 5), (2, 4, 2, 3, 5)])
def test_any_strides(sizes: tuple[int, ...], backend: str) -> None:
    values = arguments(sizes, ("D", "z", "dt_bias"), torch.float32)
    exact = {name: value.double() for name, value in values.items()}
    expected = selective_state_update_ref(**exact, dt_softplus=True)
    # The axes in memory in the opposite order, with a gap after each number.
    for name, value in values.items():
        memory = torch.full((*reversed(value.shape), 2), float("nan"))
        values[name] = memory[..., 0].permute(*reversed(range(value.dim()))).copy_(value)
    out = selective_state_update(**values, dt_softplus=True)
    assert out.is_contiguous()
    assert_close(out, expected)
    assert_close(values["state"], exact["state"])


@pytest.mark.parametrize("sizes", [(0, 0, 0, 7, 5), (0, 4, 2, 3, 5), (2, 0, 0, 0, 5), (2, 0, 0, 3, 0)])
def test_nothing_to_do(sizes: tuple[int, ...], backend: str) -> None:
    values = arguments(sizes, ("D", "z"), torch.float32)
    exact = {name: value.double() for name, value in values.items()}
    assert_close(selective_state_update(**values), selective_state_update_ref(**exact))


def test_tiny_steps_keep_their_precision(backend: str) -> None:
    values = arguments((2, 0, 0, 7, 5), (), torch.float32)
    values["dt"] = torch.linspace(-30, 30, 14).view(2, 7)
    values["state"].zero_()
    exact = {name: value.double() for name, value in values.items()}
    selective_state_update_ref(**exact, dt_softplus=True)
    selective_state_update(**values, dt_softplus=True)
    for row, expected in zip(values["state"].view(14, 5), exact["state"].view(14, 5), strict=True):
        assert_close(row, expected)


def test_autograd_knows_of_the_overwriting(backend: str) -> None:
    values = arguments((2, 0, 0, 7, 5), (), torch.float32)
    A = values["A"].requires_grad_()
    kept = (values["state"] * A).sum()
    with torch.no_grad():
        selective_state_update(**values)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()
    with torch.inference_mode():
        state = values["state"].clone()
        selective_state_update(**{**values, "state": state})
    assert not torch.equal(state, values["state"])


def test_triton_runs_what_it_is_chosen_for(backend: str) -> None:
    pytest.importorskip("triton")
    from mamba_ssm.ops import selective_state_update_triton

    values = arguments((2, 4, 2, 3, 5), ("D", "z", "dt_bias"), torch.float16)
    with count_launches(selective_state_update_triton) as launches:
        selective_state_update(**values)
        selective_state_update(**{**values, "state": values["state"].double()})
        values["x"].requires_grad_()
        selective_state_update(**values)
    assert launches == (["_update_kernel"] if backend == "triton" else [])


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("state", (2, 6), "`state` must have shape"),
        ("x", (2, 5), r"`x` must have shape \(2, 4, 6\)"),
        ("dt", (2, 4, 1), "`dt` must have shape"),
        ("A", (6, 8), r"`A` must have shape \(4, 6, 8\)"),
        ("B", (2, 8), "`B` must have shape"),
        ("C", (2, 1, 8), r"`C` must have shape \(2, 2, 8\).*got \(2, 1, 8\)"),
        ("D", (6,), "`D` must have shape"),
        ("z", (2, 6), "`z` must have shape"),
        ("dt_bias", (4,), "`dt_bias` must have shape"),
    ],
)
def test_errors_name_the_argument(name: str, shape: tuple[int, ...], message: str) -> None:
    values = arguments((2, 4, 2, 6, 8), ("D", "z", "dt_bias"))
    values[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=message):
        selective_state_update(**values)


def test_errors_beyond_single_shapes() -> None:
    values = arguments((2, 4, 3, 6, 8), ())
    with pytest.raises(ValueError, match="3 groups, which must divide the 4 heads"):
        selective_state_update(**values)
    values = arguments((2, 0, 0, 6, 8), ())
    with pytest.raises(ValueError, match="`A` must be real"):
        selective_state_update(**{**values, "A": values["A"].to(torch.complex64)})


def test_upstreams_path_holds_the_same_objects() -> None:
    for name in module.__all__:
        assert getattr(upstream_path, name) is getattr(module, name)
