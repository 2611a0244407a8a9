"""The selective scan: every case on every backend against the definition in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import golden
from cases import SCAN, ScanCase
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan import (
    SelectiveScanFn,
    bidirectional_scan,
    selective_scan_fn,
    selective_scan_ref,
)
from tolerances import GOLDEN_OP, RELATIVE, assert_close

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
cases = pytest.mark.parametrize("case", SCAN.values(), ids=SCAN.keys())


def op_arguments(case: ScanCase, t: dict) -> tuple:
    B, C = (v[:, None] if v.dim() == 3 else v for v in (t["B"], t["C"]))
    skip = (t.get("D"), t.get("delta_bias"), t.get("z"))
    return t["u"], t["delta"], t["A"], B, C, *skip, case.softplus, case.reverse, True


def widened(t: dict) -> dict:
    return {
        k: v.detach().to(torch.complex128 if v.is_complex() else torch.float64).requires_grad_() for k, v in t.items()
    }


@cases
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(case: ScanCase, dtype: torch.dtype, backend: str) -> None:
    t = {k: v.requires_grad_() for k, v in case.tensors(dtype).items()}
    out, last, _ = torch.ops.mamba_ssm.selective_scan(*op_arguments(case, t))
    wide = widened(t)
    expected, expected_last = scan_reference(**wide, delta_softplus=case.softplus, reverse=case.reverse)
    assert out.dtype == dtype
    assert out.stride() == torch.empty_like(t["u"]).stride()
    assert_close(out, expected, dtype)
    state = torch.promote_types(dtype, torch.float32)
    assert last.dtype == (state.to_complex() if case.is_complex else state)
    assert_close(last, expected_last, dtype)
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    torch.autograd.backward([out, last], [dout, dlast])
    torch.autograd.backward([expected, expected_last], [dout.double(), dlast.to(expected_last.dtype)])
    for name, value in t.items():
        assert value.grad.dtype == value.dtype
        # A 16-bit gradient may be a small sum of large terms that were rounded one by one.
        slack = 1 if dtype in (torch.float64, torch.float32) else 2
        assert_close(value.grad, wide[name].grad, limit=slack * RELATIVE[dtype])


@cases
def test_without_kept_states(case: ScanCase, backend: str) -> None:
    t = case.tensors(torch.float32)
    *arguments, _ = op_arguments(case, t)
    kept = torch.ops.mamba_ssm.selective_scan(*arguments, True)
    plain = torch.ops.mamba_ssm.selective_scan(*arguments, False)
    torch.testing.assert_close(plain[:2], kept[:2], rtol=0, atol=0)
    assert plain[2].numel() == 0


def golden_tensors(name: str, case: dict) -> dict:
    """The recorded tensors, (re, im) pairs of complex parameters and states joined."""
    t = golden.tensors(name)
    if case["complex"]:
        constant = [k for k in ("B", "C", "dB", "dC") if t[k].shape[-1] == 2]
        for key in ("A", "dA", "last_state", *constant):
            t[key] = torch.view_as_complex(t[key])
    return t


@pytest.mark.parametrize(("name", "case"), golden.cases("selective_scan"))
@pytest.mark.parametrize("function", [selective_scan_fn, selective_scan_ref, SelectiveScanFn.apply])
def test_golden(name: str, case: dict, function, backend: str) -> None:
    t = golden_tensors(name, case)
    inputs = {k: t[k].clone().requires_grad_() for k in NAMES if k in t}
    positional = [inputs.get(k) for k in NAMES]
    out, last = function(*positional, case["delta_softplus"], True)
    out.backward(t["dout"])
    assert_close(out, t["out"], limit=GOLDEN_OP)
    assert_close(last, t["last_state"], limit=GOLDEN_OP)
    for key, value in inputs.items():
        assert_close(value.grad, t["d" + key], limit=GOLDEN_OP)


# opcheck itself reads the gradient of a non-leaf tensor.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@cases
def test_contract(case: ScanCase) -> None:
    t = case.tensors(torch.float32)
    t["u"].requires_grad_()
    t["A"].requires_grad_()
    torch.library.opcheck(torch.ops.mamba_ssm.selective_scan.default, op_arguments(case, t))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(is_complex: bool, reverse: bool) -> None:
    case = ScanCase(2, 4, 5, 2, B="2", C="2", is_complex=is_complex, reverse=reverse)
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float64).items()}

    def outputs(*tensors):
        return torch.ops.mamba_ssm.selective_scan(*op_arguments(case, dict(zip(t, tensors, strict=True))))[:2]

    assert torch.autograd.gradcheck(outputs, tuple(t.values()))


def two_directions(dtype: torch.dtype, form: str = "varying", layout: str = "channel-last") -> tuple[dict, dict]:
    case = ScanCase(3, 10, 37, 4, B=form, C=form, layout=layout)
    first, second = case.tensors(dtype), case.tensors(dtype)
    second["z"] = first["z"]
    return first, second


ORDER = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.mark.parametrize("form", ["varying", "constant", "2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bidirectional_is_the_sum_of_two(form: str, gated: bool, dtype: torch.dtype, backend: str) -> None:
    first, second = ({k: v.requires_grad_() for k, v in d.items()} for d in two_directions(dtype, form))
    z = first["z"] if gated else None
    out = bidirectional_scan([first[k] for k in ORDER], [second[k] for k in ORDER], z, True)
    wide = [widened(first), widened(second)]
    wide[1]["z"] = wide[0]["z"]
    parts = []
    for arguments, reverse in zip(wide, (False, True), strict=True):
        chosen = arguments if gated else {k: v for k, v in arguments.items() if k != "z"}
        parts.append(scan_reference(**chosen, delta_softplus=True, reverse=reverse)[0])
    expected = parts[0] + parts[1]
    assert_close(out, expected, dtype)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    slack = 1 if dtype in (torch.float64, torch.float32) else 2
    for given_tensors, reference in zip((first, second), wide, strict=True):
        for name in ORDER:
            assert_close(given_tensors[name].grad, reference[name].grad, limit=slack * RELATIVE[dtype])
    if gated:
        assert_close(first["z"].grad, wide[0]["z"].grad, limit=slack * RELATIVE[dtype])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_bidirectional_contract() -> None:
    first, second = two_directions(torch.float32, "2")
    first["u"].requires_grad_()
    second["C"].requires_grad_()
    arguments = (*(first[k] for k in ORDER), *(second[k] for k in ORDER), first["z"], True, True)
    torch.library.opcheck(torch.ops.mamba_ssm.bidirectional_scan.default, arguments)


def test_a_large_batch_is_split_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    from mamba_ssm.ops import selective_scan_torch

    case = ScanCase(7, 6, 21, 4, C="constant")
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float64).items()}
    dout = torch.randn(7, 6, 21, dtype=torch.float64)
    results = []
    for size in (1, 2 * 6 * 4, 1 << 20):  # one picture at a time, two, all
        monkeypatch.setattr(selective_scan_torch, "SLICE", size)
        out = selective_scan_fn(**t, delta_softplus=True)
        results.append((out, *torch.autograd.grad(out, list(t.values()), dout)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@given(st.integers(1, 40), st.integers(1, 39), st.booleans())
@settings(deadline=None, max_examples=30)
def test_the_past_decides(length: int, cut: int, reverse: bool) -> None:
    """Tokens after a cut do not change what stands before it, in the direction of the scan."""
    cut = min(cut, length)
    case = ScanCase(1, 3, length, 2, reverse=reverse)
    t = case.tensors(torch.float64)
    changed = t | {"u": t["u"].clone()}
    seen = slice(length - cut, None) if reverse else slice(0, cut)
    hidden = slice(0, length - cut) if reverse else slice(cut, None)
    changed["u"][..., hidden] += 1
    first, second = (torch.ops.mamba_ssm.selective_scan(*op_arguments(case, v))[0] for v in (t, changed))
    torch.testing.assert_close(first[..., seen], second[..., seen], rtol=0, atol=0)


def test_long_sequences_with_large_steps_stay_exact(backend: str) -> None:
    """The sums that break cumulative-product formulations: dt up to 0.3, A down to -16, 1,025 tokens."""
    u = torch.randn(1, 8, 1025)
    delta = torch.rand(1, 8, 1025) * 0.3
    A = -torch.arange(1.0, 17).repeat(8, 1)
    B, C = torch.randn(1, 16, 1025), torch.randn(1, 16, 1025)
    expected, _ = scan_reference(*(v.double() for v in (u, delta, A, B, C)))
    assert_close(selective_scan_fn(u, delta, A, B, C), expected, torch.float32)


def test_compiles_without_a_break() -> None:
    case = SCAN["groups"]
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}

    def block(*tensors):
        return selective_scan_fn(*tensors, delta_softplus=True).sin()

    positional = [t[k] for k in NAMES]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*positional), block(*positional))
    expected = torch.autograd.grad(block(*positional).sum(), positional)
    torch.testing.assert_close(torch.autograd.grad(compiled(*positional).sum(), positional), expected)


def test_exports_as_one_node() -> None:
    class Scan(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return selective_scan_fn(u, delta, A, B, C, delta_softplus=True)

    t = SCAN["no-gate"].tensors(torch.float32)
    arguments = tuple(t[k] for k in ("u", "delta", "A", "B", "C"))
    program = torch.export.export(Scan(), arguments)
    calls = [n for n in program.graph.nodes if n.op == "call_function" and "selective_scan" in str(n.target)]
    assert len(calls) == 1
    torch.testing.assert_close(program.module()(*arguments), Scan()(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 4)}, r"`u` must have shape \(b, d, l\)"),
        ({"u": torch.zeros(2, 4, 0)}, "without empty axes"),
        ({"delta": torch.zeros(2, 4, 5)}, r"`delta` must have shape .* = \(2, 4, 6\), got \(2, 4, 5\)"),
        ({"A": torch.zeros(3, 2)}, r"`A` must have shape \(d, n\) = \(4, 2\), got \(3, 2\)"),
        ({"B": torch.zeros(2, 3, 6)}, r"`B` must have shape"),
        ({"B": torch.zeros(2, 3, 2, 6)}, "3 groups, which do not divide the 4 channels"),
        ({"B": torch.zeros(2, 2, 2, 6), "C": torch.zeros(2, 4, 2, 6)}, "same number of groups, got 2 and 4"),
        ({"C": torch.zeros(4, 2, dtype=torch.complex64)}, "a constant `C` must be complex where A is"),
        ({"D": torch.zeros(3)}, r"`D` must have shape \(d,\) = \(4,\), got \(3,\)"),
        ({"z": torch.zeros(2, 4, 7)}, "`z` must have shape"),
        ({"delta_bias": torch.zeros(1)}, "`delta_bias` must have shape"),
    ],
)
def test_bad_shapes_are_named(change: dict, message: str) -> None:
    good = {
        "u": torch.zeros(2, 4, 6),
        "delta": torch.zeros(2, 4, 6),
        "A": torch.zeros(4, 2),
        "B": torch.zeros(2, 2, 6),
        "C": torch.zeros(2, 1, 2, 6),
    }
    with pytest.raises(ValueError, match=message):
        selective_scan_fn(**(good | change))


def test_the_op_refuses_a_sequence_without_channels(backend: str) -> None:
    u, A, B = torch.zeros(1, 0, 5), torch.zeros(0, 2), torch.zeros(1, 1, 2, 5)
    with pytest.raises(ValueError, match=r"`u` must have .* a channel for each of 1 groups, got \(1, 0, 5\)"):
        torch.ops.mamba_ssm.selective_scan(u, u, A, B, B, None, None, None, True, False, False)
    with pytest.raises(ValueError, match="a channel for each of 0 groups"):
        torch.ops.mamba_ssm.selective_scan(
            torch.zeros(1, 2, 5), torch.zeros(1, 2, 5), torch.zeros(2, 2), B[:, :0], B[:, :0], None, None, None, True,
            False, False,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", ["states", "dlast_state"])
def test_a_backward_called_with_states_of_another_scan(backend: str, wrong: str) -> None:
    u, A, B = torch.randn(2, 6, 40), -torch.rand(6, 3), torch.randn(2, 1, 3, 40)
    inputs = (u, u, A, B, B, None, None)
    out, last, states = torch.ops.mamba_ssm.selective_scan(*inputs, None, True, False, True)
    given = {"states": states, "dlast_state": last}
    given[wrong] = given[wrong][:1, :1]
    with pytest.raises(ValueError, match=rf"`{wrong}` must have shape .*, got \(1, 1, "):
        torch.ops.mamba_ssm.selective_scan_backward(
            torch.ones_like(out), given["dlast_state"], given["states"], *inputs, None, True, False
        )
    out, states = torch.ops.mamba_ssm.bidirectional_scan(*inputs, *inputs, None, True, True)
    with pytest.raises(ValueError, match="`states` must have shape"):
        torch.ops.mamba_ssm.bidirectional_scan_backward(out, states[:, :, :1], *inputs, *inputs, None, True)


@pytest.mark.parametrize("one_is", ["plain", "one group"])
@pytest.mark.parametrize("grouped", ["B", "C"])
def test_one_group_serves_all_groups_of_the_other(backend: str, grouped: str, one_is: str) -> None:
    many, one = torch.randn(2, 3, 5, 7), torch.randn(2, 5, 7) if one_is == "plain" else torch.randn(2, 1, 5, 7)
    B, C = (many, one) if grouped == "B" else (one, many)
    values = [torch.randn(2, 6, 7), torch.randn(2, 6, 7), -torch.rand(6, 5), B, C]

    def run(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in values]
        out = function(*leaves)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    spread = [value.double() if value.dim() == 4 else value.double()[:, None] for value in (B, C)]
    spread = [value.expand(-1, 3, -1, -1) for value in spread]
    expected = selective_scan_ref(*(value.double() for value in values[:3]), *spread)
    found, reference = run(selective_scan_fn, torch.float32), run(selective_scan_ref, torch.float64)
    assert_close(found[0], torch.as_tensor(expected), torch.float32)
    for value, other in zip(found, reference, strict=True):
        assert_close(value, other, limit=1e-5)


def test_a_tensor_of_another_device_is_refused() -> None:
    u, A, B = torch.ones(1, 2, 3), -torch.ones(2, 1, device="meta"), torch.ones(1, 1, 3)
    with pytest.raises(RuntimeError, match="`u` is on cpu while `A` is on meta"):
        selective_scan_fn(u, u, A, B, B)


def test_a_second_derivative_is_refused(backend: str) -> None:
    leaves = [torch.randn(1, 2, 4), torch.randn(1, 2, 4), -torch.rand(2, 3), torch.randn(1, 3, 4), torch.randn(1, 3, 4)]
    leaves = [value.requires_grad_() for value in leaves]
    (slope,) = torch.autograd.grad(torch.as_tensor(selective_scan_fn(*leaves)).sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="selective_scan_fn has no second derivative"):
        slope.square().sum().backward()
