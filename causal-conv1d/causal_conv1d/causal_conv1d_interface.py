"""Upstream's import path: names only. The ops stand in `conv1d.py`, their definition in `reference.py`."""

from causal_conv1d.conv1d import (
    CausalConv1dFn,
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)

__all__ = [
    "CausalConv1dFn",
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
]
