"""Every op as ONNX, run by onnxruntime, against its definition in fp64; whole models against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_vim
from causal_conv1d.reference import conv1d_reference
from mamba_ssm.ops import norm
from mamba_ssm.ops.export import SCHEMES, export_onnx, onnx_translations
from mamba_ssm.ops.mamba_inner_training import DirectionParameters
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan_2d import selective_scan_2d, selective_scan_2d_ref

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no export is tested")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no export is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no export is tested")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves

TOLERANCE = 1e-5  # of the largest value
STRONG = 50.0  # delta * |A| of one step


class Function(nn.Module):
    """A function of one tensor whose other tensors are buffers."""

    def __init__(self, function: Callable[..., Tensor], *others: Any) -> None:
        super().__init__()
        self.function = function
        self.others = [self._keep(index, value) for index, value in enumerate(others)]
        self.eval()

    def _keep(self, index: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return lambda: value
        self.register_buffer(f"other_{index}", value)
        return lambda: getattr(self, f"other_{index}")

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(get() for get in self.others))


def run(program: Any, x: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)
    return torch.from_numpy(session.run(None, {"input": x.numpy()})[0])


def check(function: Callable[..., Tensor], definition: Callable[..., Tensor], x: Tensor, *others: Any, **options: Any):
    """Export with a batch of x, and compare with the definition in fp64 for that batch and for others."""
    program = export_onnx(Function(function, *others), x, **options)
    wide = [value.double() if isinstance(value, Tensor) else value for value in others]
    for batch in (x, x[:1], torch.cat([x, x.flip(0), 0.5 * x])):
        expected = definition(batch.double(), *wide)
        found = run(program, batch)
        assert found.shape == expected.shape
        assert found.isfinite().all()
        error = (found - expected).abs().max().item()
        assert error <= TOLERANCE * max(1.0, expected.abs().max().item()), error
    onnx.checker.check_model(program.model_proto, full_check=True)
    return program


def rates(*shape: int) -> Tensor:
    return -torch.rand(*shape) * 4 - 0.1


# --- one sequence ---------------------------------------------------------------------------------------------------


def packed_scan(columns: Tensor, A: Tensor, D: Any, bias: Any, groups: int, softplus: bool, reverse: bool, z: bool):
    """The op on (b, 3 d + 2 g n, l), which holds u, delta, z, B and C."""
    d, n = A.shape
    u, delta, gate, B, C = columns.split([d, d, d, groups * n, groups * n], 1)
    B, C = (value.unflatten(1, (groups, n)) for value in (B, C))
    arguments = (u, delta, A, B, C, D, bias, gate if z else None, softplus, reverse, False)
    return torch.ops.mamba_ssm.selective_scan(*arguments)[0]


def packed_scan_definition(columns, A, D, bias, groups, softplus, reverse, z):
    d, n = A.shape
    u, delta, gate, B, C = columns.split([d, d, d, groups * n, groups * n], 1)
    B, C = (value.unflatten(1, (groups, n)) for value in (B, C))
    gate = gate if z else None
    return scan_reference(u, delta, A, B, C, D, gate, bias, delta_softplus=softplus, reverse=reverse)[0]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("length", [1, 7, 8, 9, 37, 150, 1025])
@pytest.mark.parametrize("states", [1, 3])
def test_scan_of_any_length(scheme: str, length: int, states: int) -> None:
    x = torch.randn(2, 3 * 6 + 2 * states, length)
    arguments = (rates(6, states), torch.randn(6), torch.randn(6), 1, True, False, True)
    check(packed_scan, packed_scan_definition, x, *arguments, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("plain", [False, True])
def test_scan_with_every_option(scheme: str, groups: int, reverse: bool, plain: bool) -> None:
    x = torch.randn(2, 3 * 6 + 4 * groups, 21)
    if plain:  # steps as they come must not be negative
        x[:, 6:12] = x[:, 6:12].abs() * 0.1
    extras = (None, None) if plain else (torch.randn(6), torch.randn(6))
    arguments = (rates(6, 2), *extras, groups, not plain, reverse, not plain)
    check(packed_scan, packed_scan_definition, x, *arguments, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("states", [1, 4])
def test_scan_keeps_its_state_under_a_decay_of_any_strength(scheme: str, states: int) -> None:
    """Steps of 0.001 to 1 and rates of up to 50: products of a few decays are zero in fp32."""
    x = torch.randn(2, 3 * 5 + 2 * states, 300)
    x[:, 5:10] = torch.rand(2, 5, 300) ** 6
    A = -torch.logspace(-2, 0, 5 * states).view(5, states) * STRONG
    check(packed_scan, packed_scan_definition, x, A, None, None, 1, False, False, False, scheme=scheme)


def constant_scan(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    y = torch.ops.mamba_ssm.selective_scan(u, u, A, B, C, None, None, None, True, False, False)
    return y[0] + y[1].sum(-1, keepdim=True)


def constant_scan_definition(u: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    y, last = scan_reference(u, u, A, B, C, delta_softplus=True)
    return y + last.sum(-1, keepdim=True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_scan_with_constant_projections_and_its_last_state(scheme: str) -> None:
    others = (rates(4, 3), torch.randn(4, 3), torch.randn(4, 3))
    check(constant_scan, constant_scan_definition, torch.randn(2, 4, 19), *others, scheme=scheme)


def last_state(u: Tensor, A: Tensor) -> Tensor:
    rows = u.mean(1, keepdim=True)
    return torch.ops.mamba_ssm.selective_scan(u, u, A, rows, rows, None, None, None, True, False, False)[1]


def last_state_definition(u: Tensor, A: Tensor) -> Tensor:
    rows = u.mean(1, keepdim=True)
    return scan_reference(u, u, A, rows, rows, delta_softplus=True)[1]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_last_state_after_a_sequence_that_was_cut(scheme: str) -> None:
    check(last_state, last_state_definition, torch.randn(2, 4, 143), rates(4, 1), scheme=scheme)


def two_scans(u: Tensor, A: Tensor, A_b: Tensor, D: Tensor) -> Tensor:
    rows = u[:, :3]
    ahead, back = (u, u, A, rows, rows, D, None), (u, u + 1, A_b, rows, rows, None, D)
    return torch.ops.mamba_ssm.bidirectional_scan(*ahead, *back, u, True, False)[0]


def two_scans_definition(u: Tensor, A: Tensor, A_b: Tensor, D: Tensor) -> Tensor:
    rows = u[:, :3]
    ahead = scan_reference(u, u, A, rows, rows, D, u, delta_softplus=True)[0]
    back = scan_reference(u, u + 1, A_b, rows, rows, None, u, D, delta_softplus=True, reverse=True)[0]
    return ahead + back


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bidirectional_scan(scheme: str) -> None:
    others = (rates(5, 3), rates(5, 3), torch.randn(5))
    check(two_scans, two_scans_definition, torch.randn(2, 5, 13), *others, scheme=scheme)


# --- a block, a picture, the small ops ------------------------------------------------------------------------------


def parameters(e: int, n: int, r: int, width: int, plain: bool) -> DirectionParameters:
    extras = [None if plain else torch.randn(e) for _ in range(3)]
    weights = (torch.randn(r + 2 * n, e) * 0.3, torch.randn(e, r), torch.randn(e, n))
    return DirectionParameters(torch.randn(e, 1, width), extras[0], *weights, extras[1], extras[2])


def inner(xz: Tensor, *arguments: Any) -> Tensor:
    return torch.ops.mamba_ssm.bidirectional_inner(xz, *arguments)


def inner_definition(xz: Tensor, *arguments: Any) -> Tensor:
    *flat, scale = arguments
    x, z = xz.chunk(2, 1)
    total = torch.zeros_like(x)
    for own, reverse in ((DirectionParameters(*flat[:7]), False), (DirectionParameters(*flat[7:]), True)):
        u = conv1d_reference(x, own.conv1d_weight.squeeze(1), own.conv1d_bias, silu=True, reverse=reverse)
        rank, states = own.delta_proj_weight.shape[1], own.A_log.shape[1]
        projected = torch.einsum("bdl,pd->bpl", u, own.x_proj_weight)
        r, B, C = projected.split([rank, states, states], 1)
        delta = torch.einsum("brl,dr->bdl", r, own.delta_proj_weight)
        scan = (u, delta, -own.A_log.exp(), B, C, own.D, z, own.delta_bias)
        total = total + scan_reference(*scan, delta_softplus=True, reverse=reverse)[0]
    return total * scale


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("plain", "width", "scale"), [(False, 4, 0.5), (True, 3, 1.0), (False, 1, 1.0)])
def test_bidirectional_inner(scheme: str, plain: bool, width: int, scale: float) -> None:
    both = (*parameters(6, 3, 2, width, plain), *parameters(6, 3, 2, width, plain))
    check(inner, inner_definition, torch.randn(2, 12, 19), *both, scale, scheme=scheme)


def one_sided_bias(xz: Tensor, *arguments: Any) -> Tensor:
    return inner(xz, *arguments)


def test_bidirectional_inner_with_a_bias_in_one_direction_only() -> None:
    both = (*parameters(6, 3, 2, 4, False), *parameters(6, 3, 2, 4, True))
    check(one_sided_bias, inner_definition, torch.randn(2, 12, 19), *both, 1.0)


def four_scans(x: Tensor, weight: Tensor, dt_weight: Tensor, A: Tensor, D: Any, bias: Any, directions: str) -> Tensor:
    projected = (x @ weight).unflatten(-1, (4, -1))
    return selective_scan_2d(x, projected, dt_weight, A, D=D, dt_bias=bias, directions=directions)


def four_scans_definition(x, weight, dt_weight, A, D, bias, directions):
    projected = (x @ weight).unflatten(-1, (4, -1))
    return selective_scan_2d_ref(x, projected, dt_weight, A, D=D, dt_bias=bias, directions=directions)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("directions", ["cross", "rows", "both"])
@pytest.mark.parametrize(
    ("states", "plain", "sides"), [(1, False, (5, 13)), (2, True, (5, 13)), (1, True, (1, 7)), (1, True, (4, 1))]
)
def test_selective_scan_2d(scheme: str, directions: str, states: int, plain: bool, sides: tuple[int, int]) -> None:
    x = torch.randn(2, *sides, 6)
    extras = (None, None) if plain else (torch.randn(4, 6), torch.randn(4, 6))
    others = (torch.randn(6, 4 * (2 + 2 * states)) * 0.3, torch.randn(4, 6, 2), rates(4, 6, states), *extras)
    check(four_scans, four_scans_definition, x, *others, directions, scheme=scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("states", [1, 2])
def test_selective_scan_2d_keeps_its_state_under_a_decay_of_any_strength(scheme: str, states: int) -> None:
    """Rates from 0.1 to 50 with steps of about one: over a line the product of the decays is zero in fp32."""
    x = torch.randn(2, 9, 11, 6)
    A = -torch.logspace(-1, math.log10(50), 4 * 6 * states).view(4, 6, states)
    others = (torch.randn(6, 4 * (2 + 2 * states)) * 0.3, torch.randn(4, 6, 2), A, None, torch.full((4, 6), 0.6))
    check(four_scans, four_scans_definition, x, *others, "cross", scheme=scheme)


def conv(x: Tensor, weight: Tensor, bias: Any, silu: bool, reverse: bool) -> Tensor:
    return torch.ops.causal_conv1d.conv1d(x, weight, bias, None, silu, reverse)


def conv_definition(x: Tensor, weight: Tensor, bias: Any, silu: bool, reverse: bool) -> Tensor:
    return conv1d_reference(x, weight, bias, silu=silu, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("bias", "silu"), [(torch.ones(5), True), (None, False)])
@pytest.mark.parametrize(("width", "length"), [(1, 7), (4, 7), (4, 2)])
def test_conv1d(reverse: bool, bias: Tensor | None, silu: bool, width: int, length: int) -> None:
    check(conv, conv_definition, torch.randn(2, 5, length), torch.randn(5, width), bias, silu, reverse)


def add_norm(x: Tensor, residual: Any, weight: Tensor, bias: Any, rms: bool, stored: Any) -> Tensor:
    residual = x.sin() if residual else None
    y, s = torch.ops.mamba_ssm.add_norm(x, residual, weight, bias, 1e-5, rms, stored)
    return y if stored is None else y + s


def add_norm_definition(x: Tensor, residual: Any, weight: Tensor, bias: Any, rms: bool, stored: Any) -> Tensor:
    define = norm.rms_norm_ref if rms else norm.layer_norm_ref
    y, s = define(x, weight, bias, residual=x.sin() if residual else None, eps=1e-5, prenorm=True)
    return y if stored is None else y + s


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("bias", [None, torch.ones(7)])
@pytest.mark.parametrize(("residual", "stored"), [(False, None), (True, torch.float32)])
def test_add_norm(rms: bool, bias: Tensor | None, residual: bool, stored: torch.dtype | None) -> None:
    check(add_norm, add_norm_definition, torch.randn(2, 3, 7), residual, torch.randn(7), bias, rms, stored)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu(approximate: str) -> None:
    def gelu(x: Tensor, approximate: str) -> Tensor:
        return nn.functional.gelu(x, approximate=approximate)

    check(gelu, gelu, torch.randn(2, 3, 7) * 3, approximate)


# --- whole models ---------------------------------------------------------------------------------------------------


def small_vmamba(**options: Any) -> nn.Module:
    from vmamba import VSSM

    torch.manual_seed(2)
    sizes = {"depths": (1, 1, 2, 1), "dims": 8, "num_classes": 5, "ssm_d_state": 1}
    names = {"norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2"}
    return VSSM(**{**sizes, **names, "forward_type": "v05_noz", **options}).eval()


MODELS = {
    "vim": lambda: small_vim.small_model(),
    "vim without fused ops": lambda: small_vim.small_model(bimamba_type="v1", fused_add_norm=False, rms_norm=False),
    "vim, one direction and rope": lambda: small_vim.small_model(bimamba_type="none", if_rope=True),
    "vmamba": lambda: small_vmamba(),
    "vmamba, the first": lambda: small_vmamba(forward_type="v0", ssm_d_state=2, norm_layer="ln"),
    "vmamba, a cascade": lambda: small_vmamba(forward_type="v32d"),
}


@pytest.mark.parametrize("functions", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MODELS)
def test_whole_model(name: str, scheme: str, functions: bool) -> None:
    model = MODELS[name]()
    program = export_onnx(model, small_vim.pictures(batch=1), scheme=scheme, functions=functions)
    domains = {node.domain for node in program.model.graph}
    assert ("mamba_ssm" in domains) == functions == bool(program.model.functions)
    for batch in (1, 16):
        x = small_vim.pictures(batch=batch)
        with torch.no_grad():
            assert (run(program, x) - model(x)).abs().max().item() <= 1e-4


@pytest.mark.parametrize(
    ("scheme", "functions", "most"), [("steps", False, 85), ("chunks", False, 104), ("steps", True, 12)]
)
def test_a_block_of_vim_adds_few_nodes(scheme: str, functions: bool, most: int) -> None:
    """24 blocks and the rest of Vim-Tiny are to fit 2,500 nodes."""
    counts = []
    for depth in (1, 2):
        model = small_vim.small_model(depth=depth)
        program = export_onnx(model, small_vim.pictures(), scheme=scheme, functions=functions)
        counts.append(sum(1 for _ in program.model.graph.all_nodes()))
        assert len(program.model.functions) == functions, "one definition serves all blocks"
    assert counts[1] - counts[0] <= most


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["vim", "vmamba"])
def test_constants_are_such_as_older_runtimes_read(name: str, scheme: str) -> None:
    """ONNX Runtime up to 1.23 reads a function's constants as tensors alone."""
    program = export_onnx(MODELS[name](), small_vim.pictures(), scheme=scheme)
    nodes = [node for function in program.model.functions.values() for node in function.all_nodes()]
    kinds = {kind for node in nodes if node.op_type == "Constant" for kind in node.attributes}
    assert kinds == {"value"}


def test_an_operator_has_a_name_for_each_size() -> None:
    """Not overloads, which ONNX Runtime up to 1.24 at least confuses."""
    program = export_onnx(small_vmamba(), small_vim.pictures())
    names = [function.name for function in program.model.functions.values()]
    assert names == ["SelectiveScan2D", "SelectiveScan2D_2", "SelectiveScan2D_3", "SelectiveScan2D_4"]
    assert {function.overload for function in program.model.functions.values()} == {""}


def test_what_the_library_has_no_name_for_is_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mamba_ssm.ops.export_functions.MOST_FORMS", 2)
    model, x = small_vmamba(), small_vim.pictures()
    program = export_onnx(model, x)
    assert len(program.model.functions) == 2
    with torch.no_grad():
        assert (run(program, x) - model(x)).abs().max().item() <= 1e-4


def test_nothing_but_weights_takes_room() -> None:
    model = small_vim.small_model()
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    assert len(export_onnx(model, small_vim.pictures()).model_proto.SerializeToString()) < weights + 60_000


# --- what is refused ------------------------------------------------------------------------------------------------


def test_an_unknown_scheme_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="no scheme 'chunk' to export a scan by; the nearest is 'chunks'"):
        onnx_translations("chunk")


def test_a_training_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\.eval\(\)"):
        export_onnx(small_vim.small_model().train(), small_vim.pictures())


def test_a_model_in_int8_is_refused() -> None:
    from mamba_ssm.modules.int8 import quantize

    with pytest.raises(ValueError, match="export the plain one"):
        export_onnx(quantize(small_vim.small_model()), small_vim.pictures())


def test_an_old_opset_is_refused() -> None:
    with pytest.raises(ValueError, match="from 18 to"):
        export_onnx(small_vim.small_model(), small_vim.pictures(), opset=17)


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_newer_opset(scheme: str, opset: int) -> None:
    model, x = small_vim.small_model(), small_vim.pictures()
    program = export_onnx(model, x, scheme=scheme, opset=opset)
    assert program.model_proto.opset_import[0].version == opset
    onnx.checker.check_model(program.model_proto, full_check=True)
    with torch.no_grad():
        assert (run(program, x) - model(x)).abs().max().item() <= 1e-4


def test_a_fixed_batch() -> None:
    model, x = small_vim.small_model(), small_vim.pictures(batch=3)
    program = export_onnx(model, x, dynamic_batch=False)
    assert [side.dim_value for side in program.model_proto.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 32, 32]
    with torch.no_grad():
        assert (run(program, x) - model(x)).abs().max().item() <= 1e-4


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"only scans of fp32 can be exported, got DOUBLE; call \.float\(\)"):
        export_onnx(small_vim.small_model().double(), small_vim.pictures().double())


def test_complex_rates_are_refused() -> None:
    A = torch.complex(rates(4, 2), rates(4, 2))
    x = torch.randn(2, 4, 6)

    def scan(u: Tensor, A: Tensor) -> Tensor:
        rows = torch.cat([u, u], 2)[:, :2]
        return torch.ops.mamba_ssm.selective_scan(u, u, A, rows, rows, None, None, None, True, False, False)[0]

    with pytest.raises((ValueError, RuntimeError), match=r"COMPLEX|complex"):
        export_onnx(Function(scan, A), x)
