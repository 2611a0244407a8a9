"""Write an ONNX file of vim/export_onnx.py again with int8 weights; needs onnx, and onnxruntime for static scales.

    b batch, h height, w width

What becomes int8, with one scale for each output channel:

    products with a constant matrix        multiplied as int8 with uint8 activations, summed in int32
    convolutions over all channels         static: the same; dynamic: stored as int8, computed in fp32
    weights within a scan's node (x_proj)  stored as int8, computed in fp32

All else stays fp32: the scans with their states, dt_proj (few weights, and what they make is exponentiated), depthwise
convolutions (few weights), norms, embeddings and biases. Subgraphs, which are the bodies of loops, and the functions
that the file defines are left as they are.

Activations have one scale and one zero point per tensor: measured on each batch ("dynamic", so that a picture's logits
depend a little on those beside it), or fixed by the smallest and the largest value on given pictures ("static").
Clipping rare values, at a percentile from 99.5 to 99.999 or where the squared error is smallest, was no better for the
small Vim of examples/digits or a small VMamba: percentiles cut off few but important values.
"""

from __future__ import annotations

import importlib.util
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command_line import UsageError, pip_install
from onnx_file import OnnxError, read_header
from onnx_int8_graph import Rewriting

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from onnx_int8_graph import Ranges

SCHEMES = ("dynamic", "static")
"""Where the scales of activations come from: each batch itself, or pictures that are shown beforehand."""

METADATA_KEY = "quantization"

INPUT, OUTPUT = "input", "logits"
CPU_INFO = Path("/proc/cpuinfo")
_X86 = ("x86_64", "amd64", "i386", "i686", "x86")
_VNNI = ("avx512_vnni", "avx_vnni", "avx512vnni", "avxvnni")
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"}
_WRITE_IT = "write it with vim/export_onnx.py"


def quantize_onnx(
    source: Path, target: Path, *, scheme: str = SCHEMES[0], calibration: Iterable[NDArray[np.float32]] | None = None
) -> None:
    """Write `target`, which says and computes what `source` does, with int8 weights; nothing else changes.

    Args:
        source: a file of vim/export_onnx.py, with its scans as nodes or written out.
        target: the file to write; an older one is replaced once the new one is whole.
        scheme: one of `SCHEMES`.
        calibration: of "static" alone: batches of prepared pictures, (b, 3, h, w) fp32. Some hundred pictures of the
            kind that the model is for are enough. It is consumed once, one batch at a time.
    Raises:
        UsageError: there is no such scheme; there are no pictures or they do not fit; `source` is damaged, already
            quantized or not such a file; onnx or onnxruntime is missing. One sentence says why.
        CheckpointError: `target` cannot be written.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"there is no scheme {scheme!r} of quantization: choose {' or '.join(SCHEMES)}")
    if (calibration is None) == (scheme == "static"):
        raise UsageError(
            "static scales are measured on pictures: give some, or choose the scheme dynamic"
            if calibration is None
            else "the scheme dynamic measures the pictures that it is used on: leave those for calibration away"
        )
    _require("onnx", *(("onnxruntime",) if scheme == "static" else ()))
    from checkpoint import write_whole

    model = _read(source)
    rewriting = Rewriting(model.graph)
    rounded = [node for node in model.graph.node if rewriting.kind(node) in ("product", "convolution")]
    if not rounded:
        raise UsageError(f"{source} has no projection or convolution that could be quantized: {_WRITE_IT}")
    if calibration is not None:
        names = [name for node in rounded for name in (node.input[0], *(node.output if node.op_type == "Conv" else ()))]
        rewriting.ranges = _ranges(source, model, list(dict.fromkeys(names)), calibration)
    rewriting.run()
    model.metadata_props.add(key=METADATA_KEY, value=scheme)
    write_whole(target, lambda file: file.write_bytes(model.SerializeToString()))


def session_settings(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the session configuration entries that onnxruntime needs to compute a file exactly on this processor.

    On x86 without VNNI instructions, onnxruntime adds pairs of products in 16 bits, which overflow for large weights,
    unless it is told to be precise, which is slower. Elsewhere there is nothing to set: on a processor with VNNI that
    setting would only take the speed away.

    Args:
        metadata: what the file says of itself; of files that are not quantized the result is empty.
    """
    if METADATA_KEY not in metadata or platform.machine().lower() not in _X86:
        return {}
    try:
        has_vnni = not set(_VNNI).isdisjoint(CPU_INFO.read_text("utf-8", "replace").split())
    except OSError:  # this system does not say
        has_vnni = False
    return {} if has_vnni else {"session.x64quantprecision": "1"}


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(f"int8 in ONNX needs {' and '.join(missing)}: run {pip_install(' '.join(missing))}")


# --- the file -------------------------------------------------------------------------------------------------------


def _read(source: Path) -> Any:
    """Return the file as a ModelProto, once it is one of this project's in fp32."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        header = read_header(source)
        if METADATA_KEY in header.metadata:
            said = header.metadata[METADATA_KEY]
            raise UsageError(f"{source} is quantized already ({said}): quantize the file in fp32 that it was made from")
        model = onnx.load_model(str(source), load_external_data=False)
        if any(onnx.external_data_helper.uses_external_data(tensor) for tensor in model.graph.initializer):
            raise UsageError(f"{source} keeps its weights in a file beside it: {_WRITE_IT}, which makes one file")
        onnx.checker.check_model(model)
    except UsageError:
        raise
    except OnnxError as error:
        raise UsageError(str(error)) from error
    except (DecodeError, onnx.checker.ValidationError, ValueError) as error:
        raise UsageError(f"{source} is damaged, or not one that this onnx knows: download or write it again") from error
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror or error}") from error
    ends = [[value.name for value in values] for values in (model.graph.input, model.graph.output)]
    if ends != [[INPUT], [OUTPUT]]:
        raise UsageError(f"{source} is not a model of this project, which has one input {INPUT!r} and one output "
                         f"{OUTPUT!r}: {_WRITE_IT}")  # fmt: skip
    if any(node.op_type in _QUANTIZED for node in model.graph.node):
        raise UsageError(f"{source} is quantized already, by another program: quantize the file in fp32 instead")
    return model


# --- calibration ----------------------------------------------------------------------------------------------------


def _ranges(source: Path, model: Any, names: Sequence[str], batches: Iterable[NDArray[np.float32]]) -> Ranges:
    """Return the smallest and the largest value of each activation, and of zero, on all pictures, run one by one."""
    session = _session(source, model, names)
    shape = session.get_inputs()[0].shape[1:]
    found: Ranges = {}
    for batch in batches:
        if batch.dtype != np.float32 or batch.ndim != 4 or list(batch.shape[1:]) != shape:
            raise UsageError(
                f"pictures for calibration must be fp32 of shape (b, {', '.join(map(str, shape))}), got {batch.dtype} "
                f"of {batch.shape}"
            )
        for picture in batch:  # of many at once, the activations would take too much memory
            for name, value in zip(names, _run(session, names, picture, source), strict=True):
                low, high = found.get(name, (0.0, 0.0))
                found[name] = (np.minimum(low, value.min()).item(), np.maximum(high, value.max()).item())
    if not found:
        raise UsageError("there are no pictures for calibration: static scales need some")
    wrong = next((name for name, ends in found.items() if not np.isfinite(ends).all()), None)
    if wrong is not None:
        raise UsageError(f"{source} makes values of {wrong} that are not finite of the pictures for calibration")
    return found


def _run(session: Any, names: Sequence[str], picture: NDArray[np.float32], source: Path) -> Any:
    try:
        return session.run(names, {INPUT: picture[None]})
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        raise UsageError(f"{source} cannot run on one picture: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())


def _session(source: Path, model: Any, names: Sequence[str]) -> Any:
    """Open the model so that it also returns the values `names`."""
    import onnx
    import onnxruntime

    from mamba_ssm.ops.export import custom_ops_library

    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    of_graph = {value.name for value in probe.graph.output}
    extra = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    probe.graph.output.extend(value for value in extra if value.name not in of_graph)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its errors arrive as exceptions
    library = custom_ops_library()
    try:
        if library is not None:
            options.register_custom_ops_library(str(library))
        return onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        raise UsageError(f"onnxruntime {onnxruntime.__version__} cannot open {source}: {_reason(error)}") from error
