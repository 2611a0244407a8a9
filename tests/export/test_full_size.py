"""Vim-Tiny and VMamba-Tiny as ONNX, at their real size and with the weights that upstream's numbers were made with."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from torch import nn

import models_mamba  # noqa: F401  (registers Vim with timm)
import vmamba  # noqa: F401  (registers VMamba with timm)
from command_line import DEFAULT_MODEL
from golden import fill_parameters
from mamba_ssm.ops.export import SCHEMES, custom_ops_library, export_onnx

pytest.importorskip("onnx", reason="onnx is not installed: no export is tested")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no export is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no export is tested")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves

TOLERANCE = 1e-4  # of a logit
MOST_NODES = 2500
STRONGEST = 50.0  # step size times |A|, of the channel where it is largest: two steps of it are zero in fp32


def _models_of_vmamba() -> ModuleType:
    path = Path(__file__).parents[1] / "vmamba" / "models.py"
    spec = importlib.util.spec_from_file_location("golden_vmamba", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def golden_model(name: str) -> nn.Module:
    model = timm.create_model(name).eval()
    if name == DEFAULT_MODEL:
        fill_parameters(model)
    else:
        _models_of_vmamba().fill(model)
    return model


@torch.no_grad()
def strengthen_decay(model: nn.Module) -> None:
    """Steps of about one and rates up to STRONGEST: sums over a chunk of 24 tokens that no quotient survives."""
    for name, parameter in model.named_parameters():
        if name.rsplit(".", 1)[-1] in ("A_log", "A_b_log", "A_logs"):
            rates = torch.linspace(-2, math.log(STRONGEST), parameter.numel())
            parameter.copy_(rates.view(parameter.shape))
        if name.endswith(("dt_proj.bias", "dt_proj_b.bias", "dt_projs_bias")):
            parameter.fill_(math.log(math.expm1(1.0)))


def sessions(file: str) -> dict[str, onnxruntime.InferenceSession]:
    found = {"plain": onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])}
    library = custom_ops_library()
    if library is not None:
        options = onnxruntime.SessionOptions()
        options.register_custom_ops_library(str(library))
        found["library"] = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return found


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", [DEFAULT_MODEL, "vmamba_tiny_s2l5"])
def test_the_logits_are_those_of_pytorch(name: str, scheme: str, strong: bool, tmp_path: Path) -> None:
    model, x = golden_model(name), torch.randn(16, 3, 224, 224)
    if strong:
        strengthen_decay(model)
    program = export_onnx(model, x[:1], scheme=scheme)
    nodes = sum(1 for _ in program.model.graph.all_nodes())
    nodes += sum(1 for function in program.model.functions.values() for _ in function.all_nodes())
    assert nodes <= MOST_NODES
    file = str(tmp_path / "model.onnx")
    program.save(file, external_data=False)
    batches = (1,) if strong else (1, 16)
    for way, session in sessions(file).items():
        for batch in batches:
            with torch.inference_mode():
                expected = model(x[:batch])
            found = torch.from_numpy(session.run(None, {"input": x[:batch].numpy()})[0])
            assert expected.abs().max() > 0.1
            assert (found - expected).abs().max().item() <= TOLERANCE, way
