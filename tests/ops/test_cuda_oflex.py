"""VMamba's names for the CUDA kernels of the scan. On a GPU, or emulated, as in tests/ops/test_cuda.py."""

from __future__ import annotations

import importlib

import pytest
import torch

import selected
from mamba_ssm.ops.reference import scan_reference
from tolerances import assert_close

if "cuda" not in selected.BACKENDS:
    pytest.skip("the CUDA kernels are tested with --backend cuda, as scripts/gpu_check does", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("backend")

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.fixture
def module():
    return importlib.import_module("selective_scan_cuda_oflex")


def arguments(own, dtype, bare, softplus=True):
    """Twelve channels in two groups, of which `own` have a step size."""
    t = {
        "u": torch.randn(2, 12, 37, dtype=dtype),
        "delta": (0.5 * torch.randn(2, own, 37) + (not softplus)).to(dtype),
        "A": -torch.rand(12, 3) * 3 - 0.05,
        "B": torch.randn(2, 2, 3, 37, dtype=dtype),
        "C": torch.randn(2, 2, 3, 37, dtype=dtype),
        "D": None if bare else torch.randn(12),
        "delta_bias": None if bare else torch.rand(own) - 0.5,
    }
    return {name: value if value is None else value.requires_grad_() for name, value in t.items()}


@pytest.mark.parametrize("out_float", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("own", [12, 4, 1])
def test_scan_and_gradients(module, own, bare, softplus, dtype, out_float):
    t = arguments(own, dtype, bare, softplus)
    wide = {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}
    positional = [None if t[k] is None else t[k].detach() for k in NAMES]
    out, x = module.fwd(*positional, softplus, 1, out_float)
    assert out.dtype is (torch.float32 if out_float else dtype)
    shared = {k: None if wide[k] is None else wide[k].repeat_interleave(12 // own, -1 if k == "delta_bias" else 1)
              for k in ("delta", "delta_bias")}  # fmt: skip
    expected, _ = scan_reference(**{**wide, **shared}, delta_softplus=softplus)
    assert_close(out, expected)
    assert x.shape == (2, 12, 1, 6)
    dout = torch.randn_like(out)
    expected.backward(dout.double())
    found = module.bwd(*positional, dout, x, softplus, 1)
    assert len(found) == len(NAMES)
    for name, gradient in zip(NAMES, found, strict=True):
        if t[name] is None:
            assert gradient is None
        else:
            assert gradient.dtype is t[name].dtype
            assert_close(gradient, wide[name].grad, limit=2e-2 if dtype is torch.bfloat16 else 4e-6)


def test_step_sizes_that_do_not_fit_are_refused(module):
    t = arguments(5, torch.float32, False)
    with pytest.raises(ValueError, match="`delta` has 5 channels, which do not divide the 12 channels of `u`"):
        module.fwd(*t.values(), True, 1, True)
