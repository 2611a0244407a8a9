"""The causal convolution: every case on every backend against the definition in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import golden
from cases import CONV, ConvCase
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import CausalConv1dFn, causal_conv1d_ref, causal_conv1d_update_ref
from causal_conv1d.reference import conv1d_reference
from tolerances import GOLDEN_OP, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
cases = pytest.mark.parametrize("case", CONV.values(), ids=CONV.keys())


def run(case: ConvCase, t: dict) -> torch.Tensor:
    return torch.ops.causal_conv1d.conv1d(t["x"], t["weight"], t.get("bias"), t.get("seq_idx"), case.silu, case.reverse)


def in_fp64(case: ConvCase, t: dict) -> tuple[torch.Tensor, dict]:
    """The definition's result, and the fp64 copies of the inputs it can be differentiated in."""
    wide = {k: v if k == "seq_idx" else v.detach().double().requires_grad_() for k, v in t.items()}
    out = conv1d_reference(
        wide["x"], wide["weight"], wide.get("bias"), wide.get("seq_idx"), silu=case.silu, reverse=case.reverse
    )
    return out, wide


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case: ConvCase, dtype: torch.dtype, backend: str) -> None:
    t = case.tensors(dtype)
    for name, value in t.items():
        if name != "seq_idx":
            value.requires_grad_()
    out = run(case, t)
    expected, wide = in_fp64(case, t)
    assert out.dtype == dtype
    assert out.stride() == torch.empty_like(t["x"]).stride()
    assert_close(out, expected, dtype)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for name in wide:
        if name != "seq_idx":
            assert_close(t[name].grad, wide[name].grad, dtype)


@pytest.mark.parametrize(("name", "case"), golden.cases("causal_conv1d"))
@pytest.mark.parametrize("function", [causal_conv1d_fn, causal_conv1d_ref, CausalConv1dFn.apply])
def test_golden(name: str, case: dict, function, backend: str) -> None:
    t = golden.tensors(name)
    inputs = {k: t[k].requires_grad_() for k in ("x", "weight", "bias") if k in t}
    extra = {
        "initial_states": t.get("initial_states"),
        "return_final_states": True,
        "activation": case["activation"],
    }
    out, final = function(*inputs.values(), **extra) if "bias" in t else function(*inputs.values(), None, **extra)
    out.backward(t["dout"])
    assert_close(out, t["out"], limit=GOLDEN_OP)
    assert_close(final, t["final_states"], limit=GOLDEN_OP)
    for key, value in inputs.items():
        assert_close(value.grad, t["d" + key], limit=GOLDEN_OP)


# opcheck itself reads the gradient of a non-leaf tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@cases
def test_contract(case: ConvCase) -> None:
    t = case.tensors(torch.float32)
    t["x"].requires_grad_()
    t["weight"].requires_grad_()
    arguments = (t["x"], t["weight"], t.get("bias"), t.get("seq_idx"), case.silu, case.reverse)
    torch.library.opcheck(torch.ops.causal_conv1d.conv1d.default, arguments)


def test_gradcheck() -> None:
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 7), (3, 4), (3,)))
    history = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def both(x, weight, bias, history):
        return causal_conv1d_fn(x, weight, bias, None, history, True, None, "silu")

    assert torch.autograd.gradcheck(both, (x, weight, bias, history))


@given(st.integers(1, 9), st.integers(1, 6), st.integers(1, 9), st.booleans())
@settings(deadline=None, max_examples=40)
def test_two_halves_with_states_equal_the_whole(first: int, width: int, second: int, last: bool) -> None:
    x = torch.randn(2, 3, first + second, dtype=torch.float64)
    weight, bias = torch.randn(3, width, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    whole, end = causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    head, state = causal_conv1d_fn(x[..., :first], weight, bias, return_final_states=True, activation="silu")
    buffer = torch.full((2, 3, width - 1), float("nan"), dtype=torch.float64)
    tail, state = causal_conv1d_fn(x[..., first:], weight, bias, None, state, True, buffer, "silu")
    torch.testing.assert_close(torch.cat([head, tail], -1), whole)
    torch.testing.assert_close(state, end)
    assert state.data_ptr() == buffer.data_ptr() or width == 1


def test_documents_do_not_see_each_other() -> None:
    parts = [torch.randn(1, 4, n, dtype=torch.float64) for n in (3, 1, 5)]
    index = torch.cat([torch.full((1, p.shape[-1]), i, dtype=torch.int32) for i, p in enumerate(parts)], dim=1)
    weight = torch.randn(4, 4, dtype=torch.float64)
    packed = causal_conv1d_fn(torch.cat(parts, -1), weight, seq_idx=index, activation="swish")
    torch.testing.assert_close(packed, torch.cat([causal_conv1d_fn(p, weight, activation="silu") for p in parts], -1))


@pytest.mark.parametrize("function", [causal_conv1d_update, causal_conv1d_update_ref])
@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("new", [1, 2, 5, 9])
@pytest.mark.parametrize("size", [3, 4, 6])
def test_stepping_equals_the_whole(function, circular: bool, new: int, size: int, backend: str) -> None:
    x, weight, bias = torch.randn(2, 5, 18), torch.randn(5, 4), torch.randn(5)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    state, pieces = torch.zeros(2, 5, size), []
    for start in range(0, 18, new):
        seen = torch.full((2,), start, dtype=torch.int32) if circular else None
        pieces.append(function(x[..., start : start + new], state, weight, bias, "silu", seen))
    torch.testing.assert_close(torch.cat(pieces, -1), whole)
    recent = x[..., -size:]
    torch.testing.assert_close(state, recent.roll(18 % size, -1) if circular else recent)


def test_step_of_a_single_column_keeps_its_shape() -> None:
    state = torch.zeros(2, 5, 3)
    assert causal_conv1d_update(torch.randn(2, 5), state, torch.randn(5, 4)).shape == (2, 5)


def test_compiles_without_a_break() -> None:
    def block(x, weight, bias):
        return causal_conv1d_fn(x, weight, bias, activation="silu").sin()

    arguments = [torch.randn(s, requires_grad=True) for s in ((2, 6, 11), (6, 4), (6,))]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), block(*arguments))
    expected = torch.autograd.grad(block(*arguments).sum(), arguments)
    torch.testing.assert_close(torch.autograd.grad(compiled(*arguments).sum(), arguments), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"`x` must have shape \(b, d, l\)"),
        ({"weight": torch.zeros(4, 4)}, r"`weight` must have shape \(d, w\) = \(3, 4\), got \(4, 4\)"),
        ({"bias": torch.zeros(2)}, r"`bias` must have shape \(d,\) = \(3,\), got \(2,\)"),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.int32)}, r"`seq_idx` must have shape \(b, l\) = \(2, 5\)"),
        ({"initial_states": torch.zeros(2, 3, 4)}, r"`initial_states` must have shape .* = \(2, 3, 3\)"),
        (
            {"seq_idx": torch.zeros(2, 5, dtype=torch.int32), "return_final_states": True},
            "cannot be combined",
        ),
    ],
)
def test_bad_shapes_are_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 3, 5), "weight": torch.zeros(3, 4)} | change
    with pytest.raises(ValueError, match=message):
        causal_conv1d_fn(**arguments)


def test_the_old_position_of_the_activation_is_named() -> None:
    with pytest.raises(TypeError, match="pass the activation as activation='silu'"):
        causal_conv1d_fn(torch.zeros(1, 1, 1), torch.zeros(1, 1), None, "silu")


def test_bad_activation_is_named() -> None:
    with pytest.raises(NotImplementedError, match="'gelu'"):
        causal_conv1d_fn(torch.zeros(1, 1, 1), torch.zeros(1, 1), activation="gelu")


def test_state_too_small_is_named() -> None:
    with pytest.raises(ValueError, match="at least w - 1 = 3 columns, got 2"):
        causal_conv1d_update(torch.zeros(1, 1), torch.zeros(1, 1, 2), torch.zeros(1, 4))


def test_an_empty_batch_has_gradients_of_zero(backend: str) -> None:
    x, weight, bias = torch.randn(0, 5, 7), torch.randn(5, 3, requires_grad=True), torch.randn(5, requires_grad=True)
    torch.as_tensor(causal_conv1d_fn(x.requires_grad_(), weight, bias, activation="silu")).sum().backward()
    for value in (weight, bias):
        assert value.grad is not None
        assert not value.grad.any()


def test_a_complex_sequence_stays_complex() -> None:
    x, weight = torch.ones(1, 1, 3) * 1j, torch.ones(1, 2)
    assert torch.equal(torch.as_tensor(causal_conv1d_fn(x, weight)), torch.tensor([[[1j, 2j, 2j]]]))


def test_a_tensor_of_another_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match="`x` is on cpu while `weight` is on meta"):
        causal_conv1d_fn(torch.ones(1, 1, 3), torch.ones(1, 2, device="meta"))


def test_a_second_derivative_is_refused(backend: str) -> None:
    x, weight = torch.randn(1, 2, 5, requires_grad=True), torch.randn(2, 3)
    (slope,) = torch.autograd.grad(
        torch.as_tensor(causal_conv1d_fn(x, weight, activation="silu")).sum(), x, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="causal_conv1d_fn has no second derivative"):
        slope.square().sum().backward()
