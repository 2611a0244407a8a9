"""Networks as ONNX files in ONNX Runtime, and in int8; the scheme of the published export of VMamba among them.

b batch, l length, s streams, n state, d channels
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from benchmarks.cases import Case
from benchmarks.work import Recipe

CHUNK = 24  # tokens
GUARD = 1e-30  # keeps the published scheme from dividing by zero

Int8 = Literal["dynamic", "static"]


def onnx_network(
    name: str, case: Case, *, scheme: str = "chunks", library: bool = False, int8: Int8 | None = None
) -> Recipe:
    """A registered network in ONNX Runtime, on as many threads as torch uses.

    Args:
        scheme: one of `mamba_ssm.ops.export.SCHEMES`, or "chunk24", see `chunk24`.
        library: whether this project's operators compute the scans.
        int8: how it is quantised, if it is; static scales are those of the picture that is timed.
    Raises:
        RuntimeError: the library was not built.
    """
    from mamba_ssm.ops.export import custom_ops_library, export_onnx

    path = custom_ops_library() if library else None
    if library and path is None:
        raise RuntimeError("ONNX Runtime's library of operators was not built; scripts/onnxruntime_ops builds it")
    model, picture = _network(name, case)
    with TemporaryDirectory() as folder:
        file = Path(folder, "model.onnx")
        if scheme == "chunk24":
            program = _exported_in_chunks(model, picture)
        else:
            program = export_onnx(model, picture[:1], scheme=scheme)
        program.save(str(file), external_data=False)
        if int8 is not None:
            file = _quantised(file, int8, picture)
        run = _session(file, path)
    return Recipe(run, (picture,))


def int8_network(name: str, case: Case, *, scheme: Int8) -> Recipe:
    """A registered network in int8 on this project's kernels."""
    from mamba_ssm.modules.int8 import quantize
    from vmamba.int8 import REPLACEMENTS

    model, picture = _network(name, case)
    quantize(model, scheme, [picture] if scheme == "static" else (), replacements=REPLACEMENTS)
    return Recipe(model, (picture,))


def _network(name: str, case: Case) -> tuple[nn.Module, Tensor]:
    """The same weights and picture as in every other case of the network."""
    model = timm.create_model(name, img_size=case.pixels).eval()
    return model, torch.randn(case.batch, 3, case.pixels, case.pixels)


def _session(file: Path, library: Path | None) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # threads wait asleep while others are timed
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda picture: torch.from_numpy(session.run(None, {"input": picture.numpy()})[0])


def _quantised(file: Path, scheme: Int8, picture: Tensor) -> Path:
    from onnx_int8 import quantize_onnx

    target = file.with_name("int8.onnx")
    quantize_onnx(file, target, scheme=scheme, calibration=[picture.numpy()] if scheme == "static" else None)
    return target


def _exported_in_chunks(model: nn.Module, picture: Tensor) -> Any:
    """The network for this batch alone, its scans by `chunk24`."""
    from mamba_ssm.ops import export, export_ops

    class Writer(export_ops.Writer):
        def scan(self, inputs: Any) -> tuple[Any, Any]:
            return chunk24(inputs, picture.shape[0])

    own = export_ops.Writer
    export_ops.Writer = Writer  # type: ignore[misc]
    try:
        return export.export_onnx(model, picture, scheme="steps", dynamic_batch=False)
    finally:
        export_ops.Writer = own  # type: ignore[misc]


def chunk24(inputs: Any, batch: int) -> tuple[Any, Any]:
    """The scan as the published ONNX export of VMamba has it: a chunk of 24 tokens is one cumulative sum.

    With W[t] the product of the decays since the chunk began, h[t] = W[t] h_in + r[t] cumsum(b / r)[t], where r is W
    over its last value; A dt is a grouped convolution, and so is the reading of the states, with the states as its
    weights. Where the decays of a chunk come to zero in fp32, the result is wrong.
    """
    from onnxscript import opset18

    from mamba_ssm.ops.export_graph import ints, number

    op: Any = opset18
    s, n, d = inputs.streams, inputs.states, inputs.channels
    rates = op.Reshape(op.Transpose(inputs.A, perm=[0, 2, 1]), ints(s * d * n, 1, 1))
    zero = op.Squeeze(ints(0))
    h, rows = None, []
    for start in range(0, inputs.length, CHUNK):
        end = min(start + CHUNK, inputs.length)
        t = (end - start) * batch
        shape = ints(end - start, batch, s, d, n)
        dt, drive, B, C = (
            op.Slice(value, ints(start), ints(end), ints(0)) for value in (inputs.dt, inputs.drive, inputs.B, inputs.C)
        )
        total = op.Reshape(op.CumSum(dt, zero), ints(t, s * d, 1))
        W = op.Exp(op.Reshape(op.Conv(total, rates, group=s * d), shape))
        scale = op.Add(op.Slice(W, ints(-1), ints(2**31), ints(0)), number(GUARD))
        r = op.Div(W, scale)
        inflow = op.MatMul(op.Reshape(drive, ints(t * s, d, 1)), op.Reshape(B, ints(t * s, 1, n)))
        added = op.Div(op.Reshape(inflow, shape), op.Add(r, number(GUARD)))
        states = op.Mul(r, op.CumSum(added, zero))
        states = states if h is None else op.Add(states, op.Mul(W, h))
        h = op.Slice(states, ints(-1), ints(2**31), ints(0))
        read = op.Conv(op.Reshape(C, ints(1, t * s * n, 1)), op.Reshape(states, ints(t * s * d, n, 1)), group=t * s)
        rows.append(op.Reshape(read, ints(end - start, batch, s, 1, d)))
    y = op.Concat(*rows, axis=0) if len(rows) > 1 else rows[0]
    return y, op.Transpose(op.Squeeze(h, ints(0)), perm=[0, 1, 3, 2])
