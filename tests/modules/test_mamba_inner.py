"""The inner functions under upstream's names: every option, against the definitions of their parts."""

from __future__ import annotations

import pytest
import torch

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


def compare(function, definition, t: dict, **options) -> None:
    out, expected = function(**t, **options), definition(**t, **options)
    torch.testing.assert_close(out, expected)
    leaves = [value for value in t.values() if value is not None]
    dout = torch.randn_like(out)
    torch.testing.assert_close(torch.autograd.grad(out, leaves, dout), torch.autograd.grad(expected, leaves, dout))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("softplus", [True, False])
def test_one_direction(options: dict, softplus: bool, backend: str) -> None:
    compare(mamba_inner_fn, mamba_inner_ref, arguments(**options), delta_softplus=softplus)


@pytest.mark.parametrize("options", [v for k, v in OPTIONS.items() if "complex" not in k])
def test_two_directions(options: dict, backend: str) -> None:
    t = arguments(**options)
    names = list(t)
    at = names.index("A") + 1
    A_b = (-torch.rand(INNER, STATE, dtype=torch.float64)).requires_grad_()
    ordered = {name: t[name] for name in names[:at]} | {"A_b": A_b} | {name: t[name] for name in names[at:]}
    compare(bimamba_inner_fn, bimamba_inner_ref, ordered)


def test_without_out_proj() -> None:
    t = arguments()
    inner = {k: v for k, v in t.items() if not k.startswith("out_proj")}
    y = mamba_inner_fn_no_out_proj(**inner)
    assert y.shape == (BATCH, INNER, LENGTH)
    projected = torch.nn.functional.linear(y.transpose(1, 2), t["out_proj_weight"], t["out_proj_bias"])
    torch.testing.assert_close(projected, mamba_inner_fn(**t))


@pytest.mark.parametrize("level", [(), (0,), (1,)])
def test_apply_takes_positional_arguments(level: tuple[int, ...]) -> None:
    t = arguments()
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
