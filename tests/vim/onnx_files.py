"""ONNX files for tests: one that is small enough to be checked by hand, and that of the digits example."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import export_onnx
from pictures import IMAGENET_MEAN, IMAGENET_STD

ROOT = Path(__file__).resolve().parents[2]
DIGITS = ROOT / "examples" / "digits" / "vim_pico_digits.safetensors"
SAMPLES = ROOT / "examples" / "digits" / "samples"
NAMES = ["red", "green", "blue"]
SIZE = (33, 40)
WEIGHT = np.array([[2, -1, 0.5], [0, 3, -0.25], [-1, 0.125, 2]], np.float32)
BIAS = np.array([0.5, 0, -0.5], np.float32)


def logits(batch: np.ndarray) -> np.ndarray:
    """What the small file says of pictures (b, 3, h, w), in fp64: W x (mean of each channel) + b."""
    return batch.astype(np.float64).mean((2, 3)) @ WEIGHT.astype(np.float64).T + BIAS


def preprocessing(**changes: Any) -> dict[str, Any]:
    steps = {"size": list(SIZE), "crop_ratio": 0.875, "interpolation": "bicubic", "channels": "RGB", "scale": 1 / 255}
    return {**steps, "mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD), **changes}


def metadata(**changes: str | None) -> dict[str, str]:
    """What vim/export_onnx.py writes beside the graph; None leaves an entry away."""
    entries = {
        "model_name": "mean_colour",
        "class_names": json.dumps(NAMES),
        "scan": "steps",
        "weights": "colours.pth",
        "preprocessing": json.dumps(preprocessing()),  # the last, so that a file that is cut anywhere lacks something
    }
    return {key: value for key, value in {**entries, **changes}.items() if value is not None}


def small(
    shape: tuple[Any, ...] = ("batch", 3, *SIZE),
    *,
    names: tuple[str, str] = ("input", "logits"),
    kind: int = TensorProto.FLOAT,
    weight: np.ndarray = WEIGHT,
) -> onnx.ModelProto:
    """The small file's graph, or one of another shape, with other names or another dtype; no metadata."""
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [
        helper.make_node("GlobalAveragePool", [names[0]], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["means"]),
        helper.make_node("Gemm", ["means", "weight", "bias"], [names[1]], transB=1),
    ]
    ends = [(names[0], shape), (names[1], (shape[0], len(weight)))]
    first, last = (helper.make_tensor_value_info(name, kind, sizes) for name, sizes in ends)
    held = {"weight": weight, "bias": np.resize(BIAS, len(weight))}
    weights = [numpy_helper.from_array(value.astype(dtype), name) for name, value in held.items()]
    graph = helper.make_graph(nodes, "colours", [first], [last], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def write(path: Path, model: onnx.ModelProto | None = None, **changes: str | None) -> Path:
    """Write a graph (default: the small one) with metadata, changed as said."""
    model = small() if model is None else model
    for key, value in metadata(**changes).items():
        model.metadata_props.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    return path


def with_own_operator(*, defined: bool) -> onnx.ModelProto:
    """The small graph after an operator of the domain "mamba_ssm", which leaves its input as it is if it is defined."""
    model = small()
    model.graph.node.insert(0, helper.make_node("Unchanged", ["input"], ["same"], domain="mamba_ssm"))
    model.graph.node[1].input[0] = "same"
    model.opset_import.append(helper.make_opsetid("mamba_ssm", 1))
    if defined:
        body, opset = [helper.make_node("Identity", ["x"], ["y"])], [helper.make_opsetid("", 18)]
        model.functions.append(helper.make_function("mamba_ssm", "Unchanged", ["x"], ["y"], body, opset))
    return model


def digits(folder: Path) -> Path:
    """The digits example as an ONNX file in `folder`, written at the first call."""
    path = folder / "digits.onnx"
    if not path.exists():
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.onnx and onnxscript warn about themselves
            assert export_onnx.run(["--checkpoint", str(DIGITS), "--output", str(path)]) == 0
    return path
