"""The CUDA kernels: what the cases of all backends leave out, and upstream's names for them.

On a GPU, or emulated: `scripts/emulate_cuda FOLDER`, then `--backend cuda --emulated-cuda FOLDER`.
"""

from __future__ import annotations

import importlib
import itertools
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import selected
from cases import SCAN, ConvCase, ScanCase, laid_out
from causal_conv1d import backend as backends
from causal_conv1d import causal_conv1d_fn
from causal_conv1d.backend.cuda import CudaLibrary
from causal_conv1d.reference import conv1d_reference, conv1d_update_reference
from mamba_ssm.ops import selective_scan_cuda
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan import bidirectional_scan, selective_scan_fn
from tolerances import RELATIVE, assert_close

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


if "cuda" not in selected.BACKENDS:
    pytest.skip("the CUDA kernels are tested with --backend cuda, as scripts/gpu_check does", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def calls():
    """The kernels that are started, in order."""
    names: list[str] = []
    call = CudaLibrary.call

    def noted(self, kernel, *arguments):
        names.append(kernel)
        call(self, kernel, *arguments)

    with patch.object(CudaLibrary, "call", noted):
        yield names


@pytest.fixture
def module(request: pytest.FixtureRequest) -> ModuleType:
    """One of the two modules of upstream's names."""
    return importlib.import_module(request.param)


scans = pytest.mark.parametrize("module", ["selective_scan_cuda"], indirect=True)
convolutions = pytest.mark.parametrize("module", ["causal_conv1d_cuda"], indirect=True)


def run(case: ScanCase, t: dict) -> tuple[Tensor, Tensor]:
    return selective_scan_fn(**t, delta_softplus=case.softplus, return_last_state=True)


@pytest.mark.parametrize("case", [case for case in SCAN.values() if not case.reverse], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_kernels_do_every_case(case: ScanCase, dtype: torch.dtype, calls: list[str]) -> None:
    t = {k: v.requires_grad_() for k, v in case.tensors(dtype).items()}
    out, last = run(case, t)
    torch.autograd.backward([out, last], [torch.ones_like(out), torch.ones_like(last)])
    assert calls
    assert set(calls) == {"scan_forward", "scan_backward"}


@pytest.mark.parametrize("states", [2, 16, 17, 64, 65, 129, 256, 300])
@pytest.mark.parametrize("is_complex", [False, True])
def test_any_number_of_states(states: int, is_complex: bool, calls: list[str]) -> None:
    """In one launch or several, whose results are summed up."""
    case = ScanCase(1, 5, 37, states, is_complex=is_complex)
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}
    wide = {k: v.detach().to(torch.promote_types(v.dtype, torch.float64)).requires_grad_() for k, v in t.items()}
    out, last = run(case, t)
    expected, expected_last = scan_reference(**wide, delta_softplus=True)
    assert_close(out, expected)
    assert_close(last, expected_last, torch.float32)
    dout, dlast = torch.randn_like(out), torch.randn_like(last)
    torch.autograd.backward([out, last], [dout, dlast])
    torch.autograd.backward([expected, expected_last], [dout.double(), dlast.to(expected_last.dtype)])
    for name, value in t.items():
        assert_close(value.grad, wide[name].grad, torch.float32)
    assert set(calls) == {"scan_forward", "scan_backward"}


@pytest.mark.parametrize("states", [4, 70])
def test_two_directions_of_several_launches(states: int) -> None:
    case = ScanCase(2, 6, 35, states, layout="channel-last")
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    parts = [{k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()} for _ in range(2)]
    z = parts[0]["z"]
    out = bidirectional_scan(*([part[k] for k in order] for part in parts), z, True)
    wide = [{k: v.detach().double().requires_grad_() for k, v in part.items()} for part in parts]
    wide[1]["z"] = wide[0]["z"]
    pairs = zip(wide, (False, True), strict=True)
    expected = sum(scan_reference(**w, delta_softplus=True, reverse=reverse)[0] for w, reverse in pairs)
    assert_close(out, expected)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for part, reference in zip(parts, wide, strict=True):
        for name in order:
            assert_close(part[name].grad, reference[name].grad, limit=2 * RELATIVE[torch.float32])
    assert_close(z.grad, wide[0]["z"].grad, torch.float32)


def test_sequences_of_mixed_dtypes() -> None:
    case = ScanCase(2, 5, 40, 3)
    dtypes = {"u": torch.bfloat16, "delta": torch.float32, "B": torch.float16, "z": torch.float16}
    t = {k: v.to(dtypes.get(k, torch.float32)).requires_grad_() for k, v in case.tensors(torch.float32).items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    out, _ = run(case, t)
    expected, _ = scan_reference(**wide, delta_softplus=True)
    assert_close(out, expected, torch.bfloat16)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for name, value in t.items():
        assert value.grad.dtype == value.dtype
        assert_close(value.grad, wide[name].grad, value.dtype)


@pytest.mark.parametrize("layouts", list(itertools.product(("channel-first", "channel-last"), repeat=2)), ids=str)
@pytest.mark.parametrize("states", [4, 70])
def test_each_sequence_has_a_layout_of_its_own(layouts: tuple[str, str], states: int) -> None:
    """So different threads of a block read, add and write the same places of its shared memory."""
    case = ScanCase(1, 34, 37, states)
    own = dict(zip(("u", "z"), layouts, strict=True)) | {"delta": "channel-last"}
    parts = [case.tensors(torch.float32) for _ in range(2)]
    parts = [{k: laid_out(v, own[k]) if k in own else v for k, v in part.items()} for part in parts]
    parts = [{k: v.requires_grad_() for k, v in part.items()} for part in parts]
    order = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    out = bidirectional_scan(*([part[k] for k in order] for part in parts), parts[0]["z"], True)
    wide = [{k: v.detach().double().requires_grad_() for k, v in part.items()} for part in parts]
    wide[1]["z"] = wide[0]["z"]
    pairs = zip(wide, (False, True), strict=True)
    expected = sum(scan_reference(**w, delta_softplus=True, reverse=reverse)[0] for w, reverse in pairs)
    assert_close(out, expected)
    dout = laid_out(torch.randn(out.shape), "channel-first")
    out.backward(dout)
    expected.backward(dout.double())
    for part, reference in zip(parts, wide, strict=True):
        for name in order:
            assert_close(part[name].grad, reference[name].grad, limit=2 * RELATIVE[torch.float32])
    assert_close(parts[0]["z"].grad, wide[0]["z"].grad, torch.float32)


def test_gradients_have_the_same_bits_each_time() -> None:
    case = ScanCase(3, 40, 70, 16, B="2", C="2")
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}
        out, _ = run(case, t)
        found.append(torch.autograd.grad(out.square().sum(), list(t.values())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_fp64_steps_down(calls: list[str]) -> None:
    case = SCAN["odd"]
    run(case, case.tensors(torch.float64))
    causal_conv1d_fn(torch.randn(1, 2, 3).double(), torch.randn(2, 2).double())
    assert not calls


@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("width", [1, 4, 5, 32])
def test_a_convolution_over_several_blocks(length: int, width: int, calls: list[str]) -> None:
    case = ConvCase(2, 33, length, width, layout="channel-last")
    t = {k: v.requires_grad_() for k, v in case.tensors(torch.float32).items()}
    out = causal_conv1d_fn(**t, activation="silu")
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    expected = conv1d_reference(**wide, silu=True)
    assert_close(out, expected)
    dout = torch.randn_like(out)
    out.backward(dout)
    expected.backward(dout.double())
    for name, value in t.items():
        assert_close(value.grad, wide[name].grad, torch.float32)
    assert calls == ["conv1d_forward", "conv1d_backward"]


def test_a_convolution_that_is_too_wide_steps_down(calls: list[str]) -> None:
    x, weight = torch.randn(1, 2, 50), torch.randn(2, 33)
    assert_close(causal_conv1d_fn(x, weight), conv1d_reference(x.double(), weight.double()))
    assert not calls
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda backend cannot run conv1d with these"):
        causal_conv1d_fn(x, weight)


@scans
@pytest.mark.parametrize("case", ["groups", "odd", "bare", "constant", "complex", "no-gate", "complex-mixed"])
def test_scan_by_upstreams_names(case: str, module: ModuleType) -> None:
    chosen = SCAN[case]
    t = {k: v.requires_grad_() for k, v in chosen.tensors(torch.float32).items()}
    expected, last = run(chosen, t)
    dout = torch.randn_like(expected)
    order = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    positional = [t[k].detach() if k in t else None for k in order]
    positional[3:5] = [value[:, None] if value.dim() == 3 else value for value in positional[3:5]]
    found = module.fwd(*positional, chosen.softplus)
    assert_close(found[2] if "z" in t else found[0], expected)
    assert_close(found[1][:, :, -1, 1::2], last, torch.float32)
    expected.backward(dout)
    dz = torch.empty_like(t["z"]) if "z" in t else None
    gradients = module.bwd(*positional, dout, found[1], found[0], dz, chosen.softplus, "z" in t)
    if "z" in t:
        assert_close(gradients.pop(), expected)
        assert gradients[-1] is dz
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias", "z")
    for name, value in zip(names, gradients, strict="z" in t):
        assert (value is None) == (name not in t)
        if value is not None:
            assert_close(value.reshape(t[name].shape), t[name].grad, torch.float32)


@scans
def test_checkpoints_of_long_sequences(module: ModuleType) -> None:
    case = ScanCase(1, 2, 4100, 3, z=False)
    t = case.tensors(torch.float32)
    B, C = t["B"][:, None], t["C"][:, None]
    _, x = module.fwd(t["u"], 0.1 * t["delta"], t["A"], B, C, t["D"], None, t["delta_bias"], True)
    assert x.shape == (1, 2, 3, 6)
    for chunk, end in enumerate((2048, 4096, 4100)):
        part = {k: v[..., :end] for k, v in t.items() if k in ("u", "B", "C")}
        delta = 0.1 * t["delta"][..., :end]
        _, last = scan_reference(
            part["u"].double(), delta.double(), t["A"].double(), part["B"].double(), part["C"].double(),
            delta_bias=t["delta_bias"].double(), delta_softplus=True,
        )  # fmt: skip
        assert_close(x[:, :, chunk, 1::2], last, limit=1e-5)
        steps = torch.nn.functional.softplus(delta + t["delta_bias"][:, None]).sum(-1)
        assert_close(x[:, :, chunk, 0::2], torch.exp(steps[..., None] * t["A"]), limit=1e-3)


@convolutions
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("length", [2, 9])
def test_convolution_by_upstreams_names(with_states: bool, length: int, module: ModuleType) -> None:
    x, weight, bias = torch.randn(2, 8, length), torch.randn(8, 4), torch.randn(8)
    states = torch.randn(2, 8, 3) if with_states else None
    leaves = [value.clone().requires_grad_() for value in (x, weight, bias, *([states] if with_states else []))]
    expected, final = causal_conv1d_fn(*leaves[:3], None, leaves[3] if with_states else None, True, None, "silu")
    room = torch.empty(2, 8, 3)
    assert_close(module.causal_conv1d_fwd(x, weight, bias, None, states, room, True), expected)
    assert_close(room, final)
    dout, dfinal = torch.randn_like(expected), torch.randn_like(final)
    torch.autograd.backward([expected, final], [dout, dfinal])
    dx = torch.empty_like(x)
    found = module.causal_conv1d_bwd(x, weight, bias, dout, None, states, dfinal, dx, with_states, True)
    assert found[0] is dx
    assert (found[3] is None) == (not with_states)
    for value, leaf in zip(found, leaves, strict=False):
        assert_close(value, leaf.grad)


@convolutions
def test_convolution_step_by_upstreams_names(module: ModuleType) -> None:
    x, state, weight = torch.randn(2, 5, 3), torch.randn(2, 5, 4), torch.randn(5, 3)
    seen = torch.tensor([1, 6], dtype=torch.int32)
    expected_state = state.clone()
    expected = conv1d_update_reference(x, expected_state, weight, None, seen, silu=True)
    assert_close(module.causal_conv1d_update(x, state, weight, None, True, seen), expected)
    assert torch.equal(state, expected_state)


@convolutions
def test_wrong_arguments_are_refused_in_a_sentence(module: ModuleType) -> None:
    with pytest.raises(RuntimeError, match="causal_conv1d_fwd cannot run x"):
        module.causal_conv1d_fwd(torch.randn(1, 2, 3), torch.randn(3, 2), None, None, None, None, False)


@convolutions
def test_what_does_not_fit_is_refused_before_memory_is_touched(module: ModuleType) -> None:
    x, weight, states = torch.randn(2, 8, 9), torch.randn(8, 4), torch.randn(2, 8, 3)
    seq_idx = torch.zeros(2, 9, dtype=torch.int32)
    for state in (torch.zeros(1, 8, 4), torch.zeros(2, 7, 4), torch.zeros(2, 8, 2)):
        with pytest.raises(RuntimeError, match="causal_conv1d_update cannot run"):
            module.causal_conv1d_update(x, state, weight, None, True, None)
    with pytest.raises(RuntimeError, match="causal_conv1d_update cannot run"):
        module.causal_conv1d_update(x, torch.zeros(2, 8, 4), weight, None, True, seq_idx[0, :1])
    with pytest.raises(RuntimeError, match="causal_conv1d_fwd cannot run"):
        module.causal_conv1d_fwd(x, weight, None, seq_idx[:1, :3], None, None, True)
    with pytest.raises(RuntimeError, match="causal_conv1d_bwd cannot run"):
        module.causal_conv1d_bwd(x, weight, None, x, seq_idx[:, :3], None, None, None, False, True)
    with pytest.raises(RuntimeError, match="`seq_idx` cannot be combined"):
        module.causal_conv1d_fwd(x, weight, None, seq_idx, states, None, True)


@scans
def test_a_lazily_conjugated_tensor(module: ModuleType) -> None:
    t = SCAN["complex"].tensors(torch.float32)
    B, C = t["B"][:, None], t["C"][:, None]
    found, expected = (
        module.fwd(t["u"], t["delta"], A, B, C, None, None, None, True)[0]
        for A in (t["A"].conj(), t["A"].conj().resolve_conj())
    )
    assert torch.equal(found, expected)


def test_a_rate_of_minus_infinity_forgets_at_once() -> None:
    case = ScanCase(1, 3, 37, 4)
    t = case.tensors(torch.float32)
    t["A"][0, 0] = -torch.inf
    out, last = run(case, t)
    expected, expected_last = scan_reference(**{k: v.double() for k, v in t.items()}, delta_softplus=True)
    assert_close(out, expected)
    assert_close(last, expected_last, torch.float32)


def test_small_and_large_steps_keep_their_digits() -> None:
    """softplus of what is far below zero, about zero and above 20, in the last digits."""
    delta = torch.linspace(-60, 60, 481).view(1, 1, -1)
    u, A, B = torch.ones_like(delta), torch.full((1, 1), -1e30), torch.ones(1, 1, 481)
    out = selective_scan_fn(u, delta, A, B, B, delta_softplus=True)
    expected = torch.nn.functional.softplus(delta.double())
    assert ((out.double() - expected) / expected).abs().max() < 1e-6


def test_the_cuts_are_those_of_the_library(calls: list[str]) -> None:
    """The room for sums of blocks, which Python makes, follows how the library cuts launches."""
    for states in (1, 2, 16, 17, 64, 65):
        for is_complex in (False, True):
            own = selective_scan_cuda.cut_for(states, is_complex)
            launches = -(-states // own.states)
            case = ScanCase(1, 2, 3, states, is_complex=is_complex)
            calls.clear()
            run(case, case.tensors(torch.float32))
            assert calls == ["scan_forward"] * launches
