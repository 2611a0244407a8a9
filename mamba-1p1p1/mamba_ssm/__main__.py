"""`python -m mamba_ssm`: which backend runs what, and why."""

import importlib

import mamba_ssm.ops.selective_scan  # noqa: F401  (its family joins the report)
from causal_conv1d.backend.__main__ import main
from mamba_ssm.ops.export import custom_ops_library


def onnx_report() -> str:
    """What exported files run on in ONNX Runtime."""
    library = custom_ops_library()
    if library is not None:
        return f"ONNX files run on the operators of {library}, where it is registered"
    try:
        reasons = importlib.import_module("mamba_ssm._build").REASONS
    except ModuleNotFoundError:
        reasons = {}
    return f"ONNX files run on their own definitions: {reasons.get('onnxruntime', 'the operators were not built')}"


main("python -m mamba_ssm")
print(onnx_report())
