"""The norms against their definitions: values, every gradient, dtypes, dropout, errors, compile."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mamba_ssm.ops import norm
from mamba_ssm.ops.norm import layer_norm_fn, layer_norm_ref, rms_norm_fn, rms_norm_ref
from mamba_ssm.ops.triton import layer_norm, layernorm
from tolerances import RELATIVE, assert_close
from triton_kernels import count_launches

KINDS = {"layer": (layer_norm_fn, layer_norm_ref), "rms": (rms_norm_fn, rms_norm_ref)}
# What may stand in front of the norm; x1 and rowscale exclude each other.
BRANCHES = [(), ("residual",), ("x1",), ("rowscale",), ("residual", "x1"), ("residual", "rowscale")]
AFFINES = [(), ("bias",), ("bias", "weight1"), ("weight1", "bias1")]
SHAPE = (2, 3, 5)
# Of x, the residual (None: not given) and the parameters.
DTYPES = [
    (torch.float32, None, torch.float32),
    (torch.float32, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float16),
    (torch.bfloat16, None, torch.float32),
    (torch.bfloat16, torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.bfloat16, torch.float32),
]


def assert_all_close(found: Any, reference: Any, dtype: torch.dtype | None = None) -> None:
    """One tensor or a tuple of them."""
    pairs = [(found, reference)] if isinstance(found, Tensor) else list(zip(found, reference, strict=True))
    for value, expected in pairs:
        assert_close(value, expected, dtype)


def arguments(names: tuple[str, ...], shape: tuple[int, ...] = SHAPE, dtype: Any = torch.float64) -> dict[str, Tensor]:
    """Random values for `x`, `weight` and the optional arguments in `names`."""
    torch.manual_seed(len(names))
    shapes = {"x": shape, "residual": shape, "x1": shape, "rowscale": shape[:-1]}
    values = {}
    for name in ("x", "weight", *names):
        size = shapes.get(name, shape[-1:])
        values[name] = torch.randn(size, dtype=torch.float64).to(dtype)
    return {"bias": None, **values}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("branches", "affine"), list(itertools.product(BRANCHES, AFFINES)))
def test_values_and_gradients(kind: str, branches: tuple[str, ...], affine: tuple[str, ...]) -> None:
    function, reference = KINDS[kind]
    values = arguments(branches + affine)
    for prenorm in (False, True):
        assert_all_close(function(**values, eps=1e-3, prenorm=prenorm), reference(**values, eps=1e-3, prenorm=prenorm))
    names = [name for name, value in values.items() if value is not None]
    leaves = [values[name].requires_grad_() for name in names]

    def run(*tensors: Tensor) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return function(**{"bias": None, **given}, eps=1e-3, prenorm=True)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_a_row_of_zeros(kind: str) -> None:
    x = torch.zeros(2, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: KINDS[kind][0](x, w, None, eps=0.1), (x, weight))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [1, 5, 7, 100, 192, 1000, 20_000])
def test_sizes_and_strides(kind: str, features: int, backend: str) -> None:
    values = arguments(("residual", "bias"), (3, 2, features), torch.float32)
    values["x"] = values["x"].transpose(0, 1).contiguous().transpose(0, 1)
    values["weight"] = torch.stack([values["weight"]] * 2, dim=-1)[:, 0]
    function, reference = KINDS[kind]
    assert_close(function(**values), reference(**{name: value.double() for name, value in values.items()}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("features", [1, 5, 100, 1000])
@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
def test_every_gradient(kind: str, dtypes: tuple[Any, Any, Any], features: int, backend: str) -> None:
    function, reference = KINDS[kind]
    names = ("residual", "bias") if dtypes[1] is not None else ("bias",)
    wanted = dict(zip(("x", "residual", "weight", "bias"), (*dtypes, dtypes[2]), strict=True))
    values = {name: value.to(wanted[name]) for name, value in arguments(names, (2, 3, features)).items()}
    for has_bias, prenorm in itertools.product((False, True), repeat=2):
        given = {name: value.requires_grad_() for name, value in values.items() if has_bias or name != "bias"}
        exact = {name: value.detach().double().requires_grad_() for name, value in given.items()}
        options = {"bias": None, "eps": 0.1, "prenorm": prenorm}
        found, expected = function(**options | given, residual_in_fp32=True), reference(**options | exact)
        outputs = found if prenorm else (found,)
        slopes = [torch.randn_like(value) for value in outputs]
        gradients = torch.autograd.grad(outputs, list(given.values()), slopes)
        exact_gradients = torch.autograd.grad(expected, list(exact.values()), [slope.double() for slope in slopes])
        for name, gradient, exact_gradient in zip(given, gradients, exact_gradients, strict=True):
            assert gradient.dtype == wanted[name]
            assert_close(gradient, exact_gradient)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_dtypes_round_only_the_results(
    kind: str, dtype: torch.dtype, residual_dtype: torch.dtype, weight_dtype: torch.dtype, backend: str
) -> None:
    values = arguments(("residual", "bias"), (4, 6, 48), dtype)
    values["residual"] = values["residual"].to(residual_dtype)
    values["weight"], values["bias"] = values["weight"].to(weight_dtype), values["bias"].to(weight_dtype)
    function, reference = KINDS[kind]
    y, total = function(**values, prenorm=True)
    exact_y, exact_total = reference(**{name: value.double() for name, value in values.items()}, prenorm=True)
    assert (y.dtype, total.dtype) == (dtype, residual_dtype)
    assert_close(y, exact_y)
    assert_close(total, exact_total)


@pytest.mark.parametrize("prenorm", [False, True])
def test_the_unrounded_sum_is_normalised(prenorm: bool, backend: str) -> None:
    x = torch.full((1, 4), 256.0, dtype=torch.bfloat16)
    residual = torch.tensor([[0.5, 0.0, 0.5, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    with torch.no_grad():
        found = layer_norm_fn(x, weight, None, residual=residual, prenorm=prenorm, eps=0.0)
    assert (found[0] if prenorm else found).tolist() == [[1.0, -1.0, 1.0, -1.0]]
    assert not prenorm or found[1].tolist() == [[256.0] * 4]
    found = layer_norm_fn(x, weight, None, residual=residual, prenorm=prenorm, eps=0.0)
    slope = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.bfloat16)
    dresidual, dweight = torch.autograd.grad(found[0] if prenorm else found, (residual, weight), slope)
    # The slope less its mean and its part along y, over the standard deviation of 1/4.
    # fp32 rounds sums near 256 by up to 6e-5 of their deviation; rounded to bf16, they would have none.
    assert_close(dresidual, torch.tensor([[-4.0, -4.0, 4.0, 4.0]]), limit=1e-4)
    assert_close(dweight, torch.tensor([1.0, -2.0, 3.0, -4.0]), limit=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch(kind: str, backend: str) -> None:
    leaves = [torch.ones(size).requires_grad_() for size in ((0, 5), (0, 5), (5,), (5,))]
    x, residual, weight, bias = leaves
    y, total = KINDS[kind][0](x, weight, bias, residual, prenorm=True)
    assert (y.shape, total.shape) == ((0, 5), (0, 5))
    for leaf, gradient in zip(leaves, torch.autograd.grad(y.sum() + total.sum(), leaves), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))
    with torch.no_grad():
        assert KINDS[kind][0](x, weight, bias, residual).shape == (0, 5)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_sums_over_many_rows(rows: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        monkeypatch.setattr("mamba_ssm.ops.norm_triton.PARTS", 2)  # several tiles for each of two programs
    values = arguments(("bias",), (rows, 600), torch.float32)
    leaves = [value.requires_grad_() for value in values.values()]
    exact = [value.detach().double().requires_grad_() for value in leaves]
    slope = torch.randn(rows, 600)
    found = torch.autograd.grad(layer_norm_fn(**values), leaves, slope)
    again = torch.autograd.grad(layer_norm_fn(**values), leaves, slope)
    expected = torch.autograd.grad(layer_norm_ref(**dict(zip(values, exact, strict=True))), exact, slope.double())
    for one, two, three in zip(found, again, expected, strict=True):
        assert torch.equal(one, two)
        assert_close(one, three)


def test_only_one_output_has_a_gradient(backend: str) -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16, requires_grad=True)
    residual, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, requires_grad=True)
    _, total = layer_norm_fn(x, weight, None, residual, prenorm=True)
    by_sum = torch.autograd.grad(total.sum(), (x, residual, weight), allow_unused=True, retain_graph=True)
    assert by_sum[2] is None or not by_sum[2].any()
    for term, gradient in zip((x, residual), by_sum[:2], strict=True):
        assert torch.equal(gradient, torch.ones_like(term))
    frozen = torch.autograd.grad(rms_norm_fn(x.detach(), weight, None).sum(), weight)
    assert frozen[0].shape == (6,)


def test_gradients_through_transforms(backend: str) -> None:
    x, weight = torch.randn(3, 6), torch.randn(6)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_fn(x, weight, None).square().sum()

    found = torch.func.grad(loss)(x, weight)
    expected = torch.func.grad(lambda x, w: rms_norm_ref(x, w, None).square().sum())(x.double(), weight.double())
    assert_close(found, expected, limit=4 * RELATIVE[torch.float32])


def test_triton_runs_what_it_is_chosen_for(backend: str) -> None:
    pytest.importorskip("triton")
    from mamba_ssm.ops import norm_triton

    x, weight = torch.randn(2, 3, 8, dtype=torch.float16), torch.ones(8, requires_grad=True)
    with count_launches(norm_triton) as launches:
        rms_norm_fn(x, weight, None, x, prenorm=True)[0].sum().backward()
        with torch.no_grad():
            layer_norm_fn(x, weight, None)
            layer_norm_fn(x.double(), weight, None)
            layer_norm_fn(x, weight, None, x1=x)
    kernels = ["_add_norm_kernel", "_add_norm_backward_kernel", "_add_norm_kernel"]
    assert launches == (kernels if backend == "triton" else [])


@pytest.mark.parametrize(
    ("dtype", "residual_dtype", "residual_in_fp32", "stored"),
    [
        (torch.float16, None, False, torch.float16),
        (torch.float16, None, True, torch.float32),
        (torch.float16, torch.float16, True, torch.float16),
        (torch.float16, torch.float32, False, torch.float32),
        (torch.float32, None, True, torch.float32),
        (torch.float64, None, True, torch.float64),
        (torch.float64, torch.float64, True, torch.float64),
        (torch.float32, torch.float64, True, torch.float64),
    ],
)
def test_residual_dtype(dtype: Any, residual_dtype: Any, residual_in_fp32: bool, stored: Any, backend: str) -> None:
    x = torch.randn(2, 8).to(dtype)
    residual = None if residual_dtype is None else torch.randn(2, 8).to(residual_dtype)
    y, total = rms_norm_fn(x, torch.ones(8), None, residual=residual, prenorm=True, residual_in_fp32=residual_in_fp32)
    assert (y.dtype, total.dtype) == (dtype, stored)


def test_an_untouched_residual_is_x_itself(backend: str) -> None:
    x, weight = torch.randn(2, 8), torch.ones(8)
    assert rms_norm_fn(x, weight, None, prenorm=True)[1] is x
    assert layer_norm_fn(x, weight, None, prenorm=True, residual_in_fp32=True)[1] is x
    half = x.half()
    assert rms_norm_fn(half, weight, None, prenorm=True)[1] is half
    assert rms_norm_fn(x, weight, None, residual=torch.zeros_like(x), prenorm=True)[1] is not x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("branches", [("x1", "weight1"), ("residual", "rowscale"), ()])
def test_dropout(kind: str, branches: tuple[str, ...]) -> None:
    function, reference = KINDS[kind]
    values = arguments(branches, (50, 4, 16))
    torch.manual_seed(3)
    *outputs, mask, mask1 = function(**values, dropout_p=0.25, prenorm=True, return_dropout_mask=True)
    assert len(outputs) == (3 if "weight1" in branches else 2)
    assert mask.dtype == torch.bool
    assert mask.shape == values["x"].shape
    assert (mask1 is None) == ("x1" not in branches)
    # Five standard deviations of 3,200 draws.
    assert abs(mask.double().mean() - 0.75) < 0.04
    expected = reference(**values, dropout_p=0.25, prenorm=True, dropout_mask=mask, dropout_mask1=mask1)
    assert_all_close(tuple(outputs), expected)
    if mask1 is not None:
        assert not torch.equal(mask, mask1)
    if not branches:
        assert_close(outputs[-1], torch.where(mask, values["x"] / 0.75, 0.0))


def test_masks_without_dropout_are_none() -> None:
    y, mask, mask1 = rms_norm_fn(torch.randn(2, 8), torch.ones(8), None, return_dropout_mask=True)
    assert y.shape == (2, 8)
    assert mask is None
    assert mask1 is None


@pytest.mark.parametrize("kind", KINDS)
def test_reference_draws_its_own_mask(kind: str) -> None:
    x = torch.ones(1000, 4, dtype=torch.float64)
    torch.manual_seed(0)
    _, total = KINDS[kind][1](x, torch.ones(4).double(), None, dropout_p=0.5, prenorm=True)
    assert set(total.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("kind", KINDS)
def test_reference_upcast(kind: str) -> None:
    reference = KINDS[kind][1]
    values = arguments(("residual",), (8, 16), torch.bfloat16)
    y, total = reference(**values, prenorm=True, upcast=True)
    wide = {name: None if value is None else value.float() for name, value in values.items()}
    exact_y, exact_total = reference(**wide, prenorm=True)
    assert torch.equal(y, exact_y.bfloat16())
    assert torch.equal(total, exact_total)
    assert reference(**values, prenorm=True)[1].dtype == torch.bfloat16


def test_module() -> None:
    module = norm.RMSNorm(8, dropout_p=0.5, dtype=torch.float64)
    assert list(module.state_dict()) == ["weight"]
    assert module.bias is None
    assert module.eps == 1e-5
    x, residual = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    torch.nn.init.uniform_(module.weight)
    module.eval()
    assert_all_close(
        module(x, residual, prenorm=True),
        rms_norm_ref(x, module.weight, None, residual, eps=1e-5, prenorm=True),
    )
    module.train()
    assert (module(x, prenorm=True)[1] == 0).any()
    module.reset_parameters()
    assert torch.equal(module.weight, torch.ones(8, dtype=torch.float64))
    assert norm.RMSNorm(8).drop is None


def test_linear() -> None:
    values = arguments(("bias", "residual"))
    weight, bias = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    for is_rms_norm, reference in ((False, layer_norm_ref), (True, rms_norm_ref)):
        out, total = norm.LayerNormLinearFn.apply(
            values["x"],
            values["weight"],
            values["bias"],
            weight,
            bias,
            values["residual"],
            1e-3,
            True,
            True,
            is_rms_norm,
        )
        y, expected_total = reference(**values, eps=1e-3, prenorm=True)
        assert_all_close(out, y @ weight.T + bias)
        assert_all_close(total, expected_total)
        assert_all_close(
            norm.layer_norm_linear_fn(
                values["x"], values["weight"], values["bias"], weight, None, values["residual"], 1e-3,
                is_rms_norm=is_rms_norm,
            ),
            y @ weight.T,
        )  # fmt: skip


def test_apply_takes_positional_arguments() -> None:
    values = arguments(("bias", "residual"))
    found = norm.LayerNormFn.apply(
        values["x"], values["weight"], values["bias"], values["residual"], None, None, None,
        1e-3, 0.0, None, True, False, True,
    )  # fmt: skip
    assert_all_close(found, rms_norm_ref(**values, eps=1e-3, prenorm=True))


@pytest.mark.parametrize("kind", KINDS)
def test_compiles_as_one_graph(kind: str) -> None:
    function, _ = KINDS[kind]
    values = arguments(("residual", "bias"))
    values["x"].requires_grad_()
    values["weight"].requires_grad_()

    def loss(**given: Any) -> Tensor:
        y, total = function(**given, prenorm=True, residual_in_fp32=True)
        return (y * y).sum() + total.sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = (values["x"], values["weight"])
    expected, found = loss(**values), compiled(**values)
    assert_all_close(found, expected)
    assert_all_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))
    with torch.no_grad():
        assert_all_close(compiled(**values), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(4)}, r"`weight` must have shape \(5,\)"),
        ({"bias": torch.ones(5, 1)}, r"`bias` must have shape \(5,\)"),
        ({"residual": torch.ones(3, 5)}, r"`residual` must have shape \(2, 3, 5\).*got \(3, 5\)"),
        ({"x1": torch.ones(5)}, r"`x1` must have shape \(2, 3, 5\)"),
        ({"rowscale": torch.ones(3)}, r"`rowscale` must have shape \(2, 3\)"),
        ({"weight1": torch.ones(4)}, "`weight1` must have shape"),
        ({"bias1": torch.ones(5)}, "`bias1` needs `weight1`"),
        ({"x1": torch.ones(SHAPE), "rowscale": torch.ones(2, 3)}, "exclude each other"),
        ({"dropout_p": 1.0}, "`dropout_p` must be at least 0 and below 1, got 1.0"),
        ({"dropout_p": -0.1}, "`dropout_p`"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"x": torch.ones(SHAPE), "weight": torch.ones(5), "bias": None, **changes}
    for function in (layer_norm_fn, rms_norm_fn):
        with pytest.raises(ValueError, match=message):
            function(**values)


def test_upstreams_paths_hold_the_same_objects() -> None:
    for module in (layer_norm, layernorm):
        assert set(module.__all__) == set(norm.__all__)
        assert all(getattr(module, name) is getattr(norm, name) for name in norm.__all__)


def test_config_prune_keeps_what_a_block_holds() -> None:
    configs = [SimpleNamespace(num_warps=count) for count in (1, 2, 4, 8, 16, 32, 64)]
    kept = [config.num_warps for config in norm.config_prune(configs)]
    assert kept in ([1, 2, 4, 8, 16, 32], [1, 2, 4, 8, 16])
