"""The scan of a picture in four directions: every case on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cases import SCAN_2D, Scan2dCase
from mamba_ssm.ops import selective_scan_2d_native as native
from mamba_ssm.ops.reference import ROUTES, scan_2d_reference, take_route, undo_route
from mamba_ssm.ops.selective_scan import selective_scan_fn
from mamba_ssm.ops.selective_scan_2d import selective_scan_2d, selective_scan_2d_ref
from native_kernels import count_calls, needs_kernels
from tolerances import RELATIVE, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ORDER = ("x", "projected", "dt_weight", "A", "D", "dt_bias")
cases = pytest.mark.parametrize("case", SCAN_2D.values(), ids=SCAN_2D.keys())


def op_arguments(case: Scan2dCase, t: dict) -> tuple:
    return (*(t.get(name) for name in ORDER), case.directions, True)


def run(case: Scan2dCase, t: dict) -> Tensor:
    x, projected, dt_weight, A, D, dt_bias = (t.get(name) for name in ORDER)
    return selective_scan_2d(x, projected, dt_weight, A, D=D, dt_bias=dt_bias, directions=case.directions)


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case: Scan2dCase, dtype: torch.dtype, backend: str) -> None:
    t = {k: v.requires_grad_() for k, v in case.tensors(dtype).items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    out, expected = run(case, t), scan_2d_reference(*op_arguments(case, wide)[:-1])
    state = torch.promote_types(dtype, torch.float32)
    assert out.dtype == state
    assert out.is_contiguous()
    assert_close(out, expected, state)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for name, value in t.items():
        assert value.grad.dtype == value.dtype
        assert_close(value.grad, wide[name].grad, dtype)


@cases
def test_without_kept_states(case: Scan2dCase, backend: str) -> None:
    t = case.tensors(torch.float32)
    *arguments, _ = op_arguments(case, t)
    kept = torch.ops.mamba_ssm.selective_scan_2d(*arguments, True)
    plain = torch.ops.mamba_ssm.selective_scan_2d(*arguments, False)
    torch.testing.assert_close(plain[0], kept[0], rtol=0, atol=0)
    assert plain[1].numel() == 0


# opcheck itself reads the gradient of a non-leaf tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@cases
def test_contract(case: Scan2dCase, backend: str) -> None:
    t = case.tensors(torch.float32)
    t["x"].requires_grad_()
    t["A"].requires_grad_()
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan_2d.default, op_arguments(case, t))


def test_gradcheck() -> None:
    case = Scan2dCase(2, 3, 2, 4, 2, 2)
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float64).items()}
    assert torch.autograd.gradcheck(lambda *values: run(case, dict(zip(t, values, strict=True))), tuple(t.values()))


def test_compiles_whole(backend: str) -> None:
    case = Scan2dCase(1, 5, 3, 8, 2, 1)
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}
    compiled = torch.compile(lambda given: run(case, given) * 2, fullgraph=True, backend="aot_eager")
    found, expected = compiled(t), run(case, t) * 2
    assert_close(found, expected)
    slope, leaves = torch.randn_like(found), list(t.values())
    for value, other in zip(
        torch.autograd.grad(found, leaves, slope), torch.autograd.grad(expected, leaves, slope), strict=True
    ):
        assert_close(value, other)


@pytest.mark.parametrize("directions", ROUTES)
@given(height=st.integers(1, 6), width=st.integers(1, 6), data=st.data())
@settings(deadline=None, max_examples=25)
def test_routes_visit_each_pixel_once(directions: str, height: int, width: int, data: st.DataObject) -> None:
    picture = torch.arange(height * width).view(1, height, width, 1)
    for route in ROUTES[directions]:
        visited = take_route(picture, *route)
        assert visited.flatten().sort().values.tolist() == list(range(height * width))
        assert torch.equal(undo_route(visited, *route, height), picture)
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    at, last = row * width + column, height * width - 1
    places = [(take_route(picture, *route).flatten() == at).nonzero().item() for route in ROUTES["cross"]]
    assert places == [at, column * height + row, last - at, last - (column * height + row)]


def test_autocast_narrows_nothing_inside(backend: str) -> None:
    case = SCAN_2D["odd"]
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = run(case, t)
            results.append([out, *torch.autograd.grad(out.sum(), list(t.values()))])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_is_a_scan_with_four_groups(backend: str) -> None:
    """One row: two directions are the others', and each is a selective scan of its own."""
    case = Scan2dCase(2, 1, 37, 8, 3, 2)
    t = case.tensors(torch.float32)
    r, B, C = t["projected"].squeeze(1).transpose(1, 2).split([3, 2, 2], -1)
    total = torch.zeros(2, 8, 37)
    for k, (_, reverse) in enumerate(ROUTES["cross"]):
        delta = (r[:, k] @ t["dt_weight"][k].t()).transpose(1, 2)
        parts = t["x"].squeeze(1).transpose(1, 2), delta, B[:, k].transpose(1, 2), C[:, k].transpose(1, 2)
        u, delta, b, c = (part.flip(-1) if reverse else part for part in parts)
        y = selective_scan_fn(u, delta, t["A"][k], b, c, t["D"][k], None, t["dt_bias"][k], True)
        total += y.flip(-1) if reverse else y
    assert_close(run(case, t).squeeze(1).transpose(1, 2), total)


@needs_kernels
def test_one_call_of_the_kernels() -> None:
    case = SCAN_2D["odd"]
    with count_calls() as calls:
        run(case, {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}).sum().backward()
    assert calls == ["selective_scan_2d", "selective_scan_2d_backward"]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda v: v[0], r"`x` must have shape \(b, h, w, d\)"),
        ("x", lambda v: v[:0], "without empty axes"),
        ("projected", lambda v: v[..., :-1], r"`projected` must have shape \(b, h, w, 4, r \+ 2 n\)"),
        ("dt_weight", lambda v: v[:, :, 0], r"`dt_weight` must have shape \(4, d, r\)"),
        ("dt_weight", lambda v: v[:3], r"`dt_weight` must have shape \(4, d, r\)"),
        ("dt_weight", lambda v: v[:, :, :0], r"\(4, d, r\) with r from 1 on, got \(4, 19, 0\)"),
        ("x", lambda v: v.to(torch.complex64), "`x` must be of real floating-point numbers, got torch.complex64"),
        ("x", lambda v: v.int(), "`x` must be of real floating-point numbers, got torch.int32"),
        ("projected", lambda v: v.long(), "`projected` must be of real floating-point numbers"),
        ("dt_weight", lambda v: v.to(torch.complex64), "`dt_weight` must be of real floating-point numbers"),
        ("A", lambda v: v.int(), "`A` must be of real floating-point numbers"),
        ("D", lambda v: v > 0, "`D` must be of real floating-point numbers, got torch.bool"),
        ("dt_bias", lambda v: v.int(), "`dt_bias` must be of real floating-point numbers"),
        ("A", lambda v: v.flatten(0, 1), r"`A` must be real and have shape \(4, d, n\)"),
        ("A", lambda v: v.to(torch.complex64), "`A` must be real"),
        ("D", lambda v: v.flatten(), r"`D` must have shape \(4, d\)"),
        ("dt_bias", lambda v: v[:, 1:], r"`dt_bias` must have shape \(4, d\)"),
    ],
)
def test_wrong_shapes(name: str, change, message: str) -> None:
    t = SCAN_2D["odd"].tensors(torch.float32)
    t[name] = change(t[name])
    with pytest.raises(ValueError, match=message):
        run(SCAN_2D["odd"], t)


@pytest.mark.parametrize("wrong", ["states", "dout", "projected"])
def test_a_backward_called_with_wrong_shapes_reads_nothing_else(wrong: str) -> None:
    case = SCAN_2D["odd"]
    *inputs, _ = op_arguments(case, case.tensors(torch.float32))
    out, states = torch.ops.mamba_ssm.selective_scan_2d(*inputs, True)
    given = {"dout": torch.ones_like(out), "states": states, "projected": inputs[1]}
    given[wrong] = given[wrong][:1, :1]
    inputs[1] = given["projected"]
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.mamba_ssm.selective_scan_2d_backward(given["dout"], given["states"], *inputs)


@pytest.mark.parametrize("empty", ["channels", "rank"])
def test_the_op_called_without_channels_or_rank(backend: str, empty: str) -> None:
    case = Scan2dCase(1, 3, 4, 0 if empty == "channels" else 8, 2, 2)
    t = case.tensors(torch.float32)
    if empty == "channels":
        with pytest.raises(ValueError, match="a channel for each of 4 groups, got"):
            torch.ops.mamba_ssm.selective_scan_2d(*op_arguments(case, t))
        return
    t["projected"], t["dt_weight"] = t["projected"][..., 2:], t["dt_weight"][..., :0]
    *inputs, _ = op_arguments(case, t)
    out, states = torch.ops.mamba_ssm.selective_scan_2d(*inputs, True)
    found = torch.ops.mamba_ssm.selective_scan_2d_backward(torch.ones_like(out), states, *inputs)
    wide = {k: v.double().requires_grad_() for k, v in t.items()}
    expected = scan_2d_reference(*op_arguments(case, wide)[:-1])
    expected.sum().backward()
    assert_close(out, expected)
    for value, name in zip(found, ORDER, strict=True):
        assert_close(value, wide[name].grad)


@needs_kernels
def test_the_kernel_refuses_a_rank_of_none() -> None:
    t = Scan2dCase(1, 3, 4, 8, 1, 2).tensors(torch.float32)
    call = native._call(t["x"], t["projected"], t["dt_weight"][..., :0], *(t[name] for name in ORDER[3:]), "cross")
    out = torch.full_like(t["x"], 7.0)
    with pytest.raises(RuntimeError):
        call.address(out).address(None).run(native.LIBRARY, "selective_scan_2d")
    assert (out == 7).all()


def test_unknown_directions() -> None:
    t = SCAN_2D["odd"].tensors(torch.float32)
    with pytest.raises(ValueError, match="one of 'cross', 'rows', 'both', got 'diagonal'"):
        selective_scan_2d(*(t[name] for name in ORDER[:4]), directions="diagonal")


def test_second_derivatives_are_refused() -> None:
    case = Scan2dCase(1, 2, 2, 3, 1, 1)
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float64).items()}
    (slope,) = torch.autograd.grad(run(case, t).sum(), t["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="selective_scan_2d_ref twice"):
        slope.sum().backward()
    x, projected, dt_weight, A, D, dt_bias = t.values()
    once = selective_scan_2d_ref(x, projected, dt_weight, A, D=D, dt_bias=dt_bias)
    (slope,) = torch.autograd.grad(once.sum(), projected, create_graph=True)
    slope.sum().backward()
    assert RELATIVE[torch.float64] < projected.grad.abs().max().item()
