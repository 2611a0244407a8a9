"""Upstream's import path: names only. The ops stand in `selective_scan.py` and `mamba_inner.py`."""

from mamba_ssm.ops.mamba_inner import (
    BiMambaInnerFn,
    MambaInnerFn,
    MambaInnerFnNoOutProj,
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    mamba_inner_ref,
)
from mamba_ssm.ops.selective_scan import SelectiveScanFn, selective_scan_fn, selective_scan_ref

__all__ = [
    "BiMambaInnerFn",
    "MambaInnerFn",
    "MambaInnerFnNoOutProj",
    "SelectiveScanFn",
    "bimamba_inner_fn",
    "bimamba_inner_ref",
    "mamba_inner_fn",
    "mamba_inner_fn_no_out_proj",
    "mamba_inner_ref",
    "selective_scan_fn",
    "selective_scan_ref",
]
