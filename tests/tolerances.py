"""Every number that says how near is near enough.

`RELATIVE` bounds the norm of the difference over the norm of the fp64 reference, per dtype of the inputs; the
computation itself runs in at least fp32, so 16-bit tolerances are those of rounding the inputs and the result once.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
GOLDEN_OP = 1e-5  # a single op or its gradients against upstream's recorded numbers, fp32
GOLDEN_LOGITS = 1e-4  # a whole network's logits


def relative_error(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in the reference's dtype; absolute where the reference is zero."""
    difference = (value.detach().to(reference.dtype) - reference.detach()).abs().norm().item()
    size = reference.detach().abs().norm().item()
    return difference / size if size > 0 else difference


def assert_close(
    value: Tensor, reference: Tensor, dtype: torch.dtype | None = None, limit: float | None = None
) -> None:
    """Shapes agree and the relative error is within `limit`, or the limit of `dtype` (default: the value's)."""
    assert value.shape == reference.shape, f"shape {tuple(value.shape)} is not {tuple(reference.shape)}"
    bound = RELATIVE[dtype or value.dtype] if limit is None else limit
    error = relative_error(value, reference)
    assert error <= bound, f"relative error {error:.2e} exceeds {bound:.0e}"
