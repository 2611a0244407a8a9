"""The inner functions under upstream's names: every option, against the definitions of their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cases import inner_arguments
from causal_conv1d.backend import use_backend
from causal_conv1d.conv1d import FAMILY as CONVOLUTIONS
from mamba_ssm.ops import mamba_inner_torch, selective_scan_torch
from mamba_ssm.ops.mamba_inner import DirectionParameters, bidirectional_inner, compose
from mamba_ssm.ops.selective_scan import FAMILY as SCANS
from mamba_ssm.ops.selective_scan_interface import (
    BiMambaInnerFn,
    MambaInnerFn,
    MambaInnerFnNoOutProj,
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
)
from tolerances import GOLDEN_OP, assert_close

BATCH, INNER, LENGTH, MODEL, STATE, RANK, WIDTH = 2, 6, 19, 5, 4, 3, 4


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def arguments(
    is_complex: bool = False,
    given: str = "",
    skip: bool = True,
    out_bias: bool = True,
    projection_bias: bool = False,
) -> dict[str, torch.Tensor]:
    """The tensor arguments of `mamba_inner_fn`; `given` names which of B and C are passed rather than computed."""
    per_projection = STATE * (2 if is_complex else 1)
    A = -torch.rand(INNER, STATE, dtype=torch.float64) - 0.1
    made = {
        "xz": draw(BATCH, 2 * INNER, LENGTH),
        "conv1d_weight": draw(INNER, 1, WIDTH),
        "conv1d_bias": draw(INNER) if skip else None,
        "x_proj_weight": draw(RANK + per_projection * (2 - len(given)), INNER),
        "delta_proj_weight": draw(INNER, RANK),
        "out_proj_weight": draw(MODEL, INNER),
        "out_proj_bias": draw(MODEL) if out_bias else None,
        "A": (torch.complex(A, torch.randn_like(A)) if is_complex else A).requires_grad_(),
    }
    for name in given:
        columns = LENGTH * (2 if is_complex else 1)
        made[name] = draw(INNER, STATE) if name == "B" and not is_complex else draw(BATCH, 1, STATE, columns)
    if skip:
        made |= {"D": draw(INNER), "delta_bias": draw(INNER)}
    if projection_bias:
        made |= {"B_proj_bias": draw(per_projection), "C_proj_bias": draw(per_projection)}
    return made


OPTIONS = {
    "all": {},
    "bare": {"skip": False, "out_bias": False},
    "projection-bias": {"projection_bias": True},
    "given-B": {"given": "B"},
    "given-C": {"given": "C"},
    "given-both": {"given": "BC"},
    "complex": {"is_complex": True},
    "complex-projection-bias": {"is_complex": True, "projection_bias": True},
    "complex-given-C": {"is_complex": True, "given": "C"},
}


def narrowed(value: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A leaf of the same numbers in another dtype, real or complex."""
    if value is None:
        return None
    return value.detach().to(dtype.to_complex() if value.is_complex() else dtype).requires_grad_()


def compare(function, definition, t: dict, dtype: torch.dtype, **options) -> None:
    """Values and every gradient in `dtype` against the definition in fp64."""
    given = {name: narrowed(value, dtype) for name, value in t.items()}
    out, expected = function(**given, **options), definition(**t, **options)
    dout = torch.randn_like(out)
    found = torch.autograd.grad(out, [value for value in given.values() if value is not None], dout)
    wanted = torch.autograd.grad(expected, [value for value in t.values() if value is not None], dout.double())
    for value, reference in zip((out, *found), (expected, *wanted), strict=True):
        assert_close(value, reference, limit=1e-12 if dtype == torch.float64 else GOLDEN_OP)


dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("softplus", [True, False])
def test_one_direction(options: dict, softplus: bool, dtype: torch.dtype, backend: str) -> None:
    t = arguments(**options)
    if not softplus:  # small steps, which may be negative: large ones let states grow without bound
        t["delta_proj_weight"] = (0.02 * t["delta_proj_weight"].detach()).requires_grad_()
        t["delta_bias"] = None if t.get("delta_bias") is None else (0.02 * t["delta_bias"].detach()).requires_grad_()
    compare(mamba_inner_fn, mamba_inner_ref, t, dtype, delta_softplus=softplus)


@dtypes
@pytest.mark.parametrize("options", [v for k, v in OPTIONS.items() if "complex" not in k])
def test_two_directions(options: dict, dtype: torch.dtype, backend: str) -> None:
    t = arguments(**options)
    names = list(t)
    at = names.index("A") + 1
    A_b = (-torch.rand(INNER, STATE, dtype=torch.float64)).requires_grad_()
    ordered = {name: t[name] for name in names[:at]} | {"A_b": A_b} | {name: t[name] for name in names[at:]}
    compare(bimamba_inner_fn, bimamba_inner_ref, ordered, dtype)


def test_without_out_proj() -> None:
    t = arguments()
    inner = {k: v for k, v in t.items() if not k.startswith("out_proj")}
    y = mamba_inner_fn_no_out_proj(**inner)
    assert y.shape == (BATCH, INNER, LENGTH)
    projected = torch.nn.functional.linear(y.transpose(1, 2), t["out_proj_weight"], t["out_proj_bias"])
    torch.testing.assert_close(projected, mamba_inner_fn(**t))


@dtypes
@pytest.mark.parametrize("level", [(), (0,), (1,)])
def test_apply_takes_positional_arguments(level: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    t = {name: narrowed(value, dtype) for name, value in arguments().items()}
    order = [*list(t.values())[:8], None, None, t["D"], t["delta_bias"], None, None, True]
    out = MambaInnerFn.apply(*order, *level)
    torch.testing.assert_close(out, mamba_inner_fn(*order))
    leaves = [v for v in order if isinstance(v, torch.Tensor)]
    expected = torch.autograd.grad(mamba_inner_fn(*order).sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), leaves), expected)

    inner = [*order[:5], *order[7:]]
    torch.testing.assert_close(MambaInnerFnNoOutProj.apply(*inner, *level), mamba_inner_fn_no_out_proj(*inner))
    both = [*order[:8], t["A"], *order[8:]]
    torch.testing.assert_close(BiMambaInnerFn.apply(*both, *level), bimamba_inner_fn(*both))


def test_bad_calls_are_named() -> None:
    t = arguments()
    with pytest.raises(ValueError, match="`x_proj_weight` must have 11 rows"):
        mamba_inner_fn(**t | {"x_proj_weight": draw(9, INNER)})
    with pytest.raises(ValueError, match=r"`xz` must have shape \(b, 2 e, l\)"):
        mamba_inner_fn(**t | {"xz": draw(1, 3, 4)})
    with pytest.raises(ValueError, match="`checkpoint_lvl` must be 0 or 1, got 2"):
        MambaInnerFnNoOutProj.apply(*[v for k, v in t.items() if "out" not in k][:6], checkpoint_lvl=2)
    with pytest.raises(ValueError, match="`A_b` must be real"):
        bimamba_inner_fn(**t | {"A_b": t["A"].to(torch.complex128)})


@pytest.fixture
def stacked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes each call of the path that stacks both directions of a v2 block."""
    calls: list[bool] = []
    run_inner = mamba_inner_torch.run_inner

    def noted(*arguments: Any) -> torch.Tensor:
        calls.append(True)
        return run_inner(*arguments)

    monkeypatch.setattr(mamba_inner_torch, "run_inner", noted)
    return calls


def of_dtype(dtype: torch.dtype, xz: torch.Tensor, *directions: DirectionParameters) -> tuple[Any, ...]:
    return xz.to(dtype), *(DirectionParameters(*(None if v is None else v.to(dtype) for v in d)) for d in directions)


@pytest.mark.parametrize("pictures_at_once", [1, 2, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("batch", "inner", "length", "states", "rank", "width", "bare"),
    [
        (1, 8, 1, 16, 1, 4, False),
        (2, 24, 33, 16, 2, 4, False),
        (1, 5, 3, 3, 1, 4, True),
        (3, 37, 97, 1, 3, 2, False),
        (5, 6, 64, 9, 5, 1, True),
        (1, 4, 32, 2, 1, 7, False),
    ],
)
def test_stacked_directions_equal_composed_ones(
    batch, inner, length, states, rank, width, bare, dtype, pictures_at_once, stacked, monkeypatch
) -> None:
    monkeypatch.setattr(selective_scan_torch, "SLICE", 2 * inner * states * pictures_at_once)
    xz, first, second = of_dtype(dtype, *inner_arguments(batch, inner, length, states, rank, width, bare))
    with use_backend("torch"):
        for scale in (1.0, 0.5):
            for layout in (xz, xz.contiguous()):
                given = layout.clone()
                out = bidirectional_inner(layout, first, second, scale)
                assert_close(out, compose(xz, first, second, scale))
                assert out.transpose(1, 2).is_contiguous()
                assert torch.equal(layout, given)
    assert len(stacked) == 4


def test_what_cannot_be_stacked_is_composed(stacked, monkeypatch) -> None:
    xz, first, second = inner_arguments(2, 8, 21, 4, 2, 4, False)
    with use_backend("torch"):
        half = of_dtype(torch.bfloat16, xz, first, second)
        assert_close(bidirectional_inner(*half), compose(*half, 1.0))
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(bidirectional_inner(xz, first, second), compose(xz, first, second, 1.0))
        for empty in (xz[:0], xz[..., :0]):
            with pytest.raises(ValueError, match="without empty axes"):
                bidirectional_inner(empty, first, second)
        narrow = inner_arguments(2, 8, 21, 4, 1, 4, False)[2]
        assert_close(bidirectional_inner(xz, first, narrow), compose(xz, first, narrow, 1.0))
    assert not stacked
    monkeypatch.setattr(CONVOLUTIONS, "_forced", True)
    forced = bidirectional_inner(xz, first, second)
    assert bool(stacked) == (SCANS.preferred("cpu") == "torch")
    assert_close(forced, compose(xz, first, second, 1.0))


@pytest.mark.parametrize("name", ["D", "delta_bias", "conv1d_bias"])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("channels", [2, 8])
def test_one_direction_may_lack_what_the_other_has(name: str, side: int, channels: int, backend: str) -> None:
    xz, *directions = of_dtype(torch.float64, *inner_arguments(2, channels, 21, 4, 2, 4, False))
    lacking, zero = ([*directions], [*directions])
    lacking[side] = directions[side]._replace(**{name: None})
    zero[side] = directions[side]._replace(**{name: torch.zeros(channels, dtype=torch.float64)})
    assert_close(bidirectional_inner(xz, *lacking), bidirectional_inner(xz, *zero))
    leaves = [[xz.clone(), *(v.clone() for d in each for v in d if v is not None)] for each in (lacking, zero)]
    gradients = []
    for each, given in zip((lacking, zero), leaves, strict=True):
        values = iter([value.requires_grad_() for value in given[1:]])
        own = [DirectionParameters(*(None if v is None else next(values) for v in d)) for d in each]
        bidirectional_inner(given[0].requires_grad_(), *own).square().sum().backward()
        gradients.append((given[0].grad, own[1 - side].A_log.grad, own[side].x_proj_weight.grad))
    for without, with_zero in zip(*gradients, strict=True):
        assert_close(without, with_zero)


@pytest.mark.parametrize(
    "wrong",
    [
        {"D": (1,)},
        {"D": (7,)},
        {"delta_bias": (1,)},
        {"A_log": (1, 4)},
        {"A_log": (7, 4)},
        {"delta_proj_weight": (7, 2)},
    ],
    ids=str,
)
def test_shapes_that_fit_each_other_must_fit_the_input(wrong: dict, backend: str) -> None:
    xz, first, second = inner_arguments(2, 8, 21, 4, 2, 4, False)
    values = {name: torch.rand(shape) for name, shape in wrong.items()}
    with pytest.raises(ValueError, match="must have shape"):
        bidirectional_inner(xz, first._replace(**values), second._replace(**values))


def test_forward_mode_is_refused_not_answered_with_zeros(backend: str) -> None:
    xz, first, second = inner_arguments(2, 8, 21, 4, 2, 4, False)
    with pytest.raises(NotImplementedError, match="has no forward-mode derivative; differentiate selective_scan_ref"):
        torch.func.jvp(lambda x: bidirectional_inner(x, first, second), (xz,), (torch.ones_like(xz),))


def test_a_parameter_without_memory_is_named(backend: str) -> None:
    xz, first, second = inner_arguments(2, 8, 21, 4, 2, 4, False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="on cpu and a parameter of the block on meta"):
        bidirectional_inner(xz, first, second._replace(D=second.D.to("meta")))
