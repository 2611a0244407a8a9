"""Export to ONNX: what `torch.onnx.export` must be told of this project's ops. Needs onnx and onnxscript, when used."""

from __future__ import annotations

import difflib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SCHEMES = ("chunks", "steps")
"""How a scan is written, both exact for any decay.

"steps" is the smallest graph: one ONNX `Scan` for all directions, a turn for each token. "chunks" is faster: a turn
takes four tokens, or, of a picture with one state, a token of every row or column at once.
"""

LEAST_OPSET = 18
_PACKAGES = ("onnx", "onnxscript")
_UNLIMITED = 2**62  # bytes of a constant that is computed while exporting: all that depends on weights alone


def onnx_translations(scheme: str = SCHEMES[0]) -> dict[Any, Callable[..., Any]]:
    """Return the `custom_translation_table` for `torch.onnx.export(..., dynamo=True)`, called under `torch.no_grad()`.

    With it a model that calls the ops of `mamba_ssm` and `causal_conv1d`, in evaluation mode and in fp32, becomes a
    graph of ONNX's own operators (opset 18) that any runtime can run. The batch may be dynamic; every other size is
    that of the example input. `export_onnx` does all of it.

    Args:
        scheme: one of `SCHEMES`.
    Raises:
        ValueError: there is no such scheme.
        ImportError: onnx or onnxscript is not installed; one sentence says how to install them.
    Not exported, with ValueError while exporting: complex A, packed sequences (`seq_idx`), gradients, other dtypes.
    """
    _require(scheme)
    from mamba_ssm.ops import export_ops

    return export_ops.table(scheme)


def _require(scheme: str) -> None:
    """Raise for a scheme that is not there, and for packages that are not."""
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.0)[0]
        raise ValueError(f"there is no scheme {scheme!r} to export a scan by; the nearest is {near!r}")
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"the ONNX export needs {' and '.join(missing)}; install with `pip install onnx onnxscript`")


def export_onnx(
    model: nn.Module,
    example: Tensor,
    *,
    scheme: str = SCHEMES[0],
    opset: int = LEAST_OPSET,
    dynamic_batch: bool = True,
    functions: bool = True,
) -> Any:
    """Export a model of one input and one output, such as `VisionMamba` or `VSSM`.

    Args:
        model: in evaluation mode and fp32, on the CPU.
        example: an input, (b, ...); all of its sizes but the batch are fixed in the graph.
        scheme: see `onnx_translations`.
        opset: 18 or later.
        dynamic_batch: the graph takes any batch, not only that of the example.
        functions: an op of this project is one node of the domain "mamba_ssm", which the file defines in ONNX's own
            operators and `custom_ops_library` computes fast. Without it, its definition stands in its place, for
            runtimes that know no functions.

    Returns:
        torch's `ONNXProgram`, with an input "input" and an output "logits"; `.model_proto` is the graph, `.save` writes
        it.
    Raises:
        ValueError: the model is training, `opset` or `scheme` is impossible, or the model has what is not exported.
        ImportError: see `onnx_translations`.
        RuntimeError: torch cannot export the model; its text says which part.
    """
    _require(scheme)
    newest = _newest_opset()
    if not LEAST_OPSET <= opset <= newest:
        raise ValueError(f"`opset` must be from {LEAST_OPSET} to {newest}, got {opset}")
    if model.training:
        raise ValueError("a model is exported as it predicts: call .eval() on it first")
    from mamba_ssm.modules.int8 import layers_of
    from mamba_ssm.ops import export_functions, export_ops

    if layers_of(model):
        raise ValueError("a model in int8 cannot be exported: export the plain one, and quantise the file")
    known = export_functions.Functions() if functions else None
    with torch.no_grad(), warnings.catch_warnings(), _without_notes("onnxscript"):
        warnings.simplefilter("ignore")  # of torch and onnxscript about themselves
        program = _exported(model, example, export_ops.table(scheme, known), opset, dynamic_batch)
        if known is not None:
            known.attach(program.model)
    return program


def _exported(
    model: nn.Module, example: Tensor, translations: dict[Any, Any], opset: int, dynamic_batch: bool
) -> torch.onnx.ONNXProgram:
    import onnxscript.optimizer

    # A batch of one in the example would be taken for a size that is always one.
    given = torch.cat([example, example]) if dynamic_batch and example.shape[0] == 1 else example
    batch = ({0: torch.export.Dim("batch", min=1, max=2**16)},)
    try:
        program = torch.onnx.export(
            model,
            (given,),
            dynamo=True,
            custom_translation_table=translations,
            dynamic_shapes=batch if dynamic_batch else None,
            input_names=["input"],
            output_names=["logits"],
            opset_version=opset,
            external_data=False,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise _first_cause(error) from error
    assert program is not None
    onnxscript.optimizer.optimize(program.model, input_size_limit=_UNLIMITED, output_size_limit=_UNLIMITED)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in torch's program each node comes from: as large as the nodes
    return program


def custom_ops_library() -> Path | None:
    """The library with which ONNX Runtime computes this project's operators fast, if it was built.

    Where it is not None, register it with `SessionOptions.register_custom_ops_library(str(path))`. It is the file
    kernels.onnxruntime.so in the folder of `mamba_ssm`, for programs that do not import that.
    """
    path = Path(__file__).resolve().parent.parent / "kernels.onnxruntime.so"
    return path if path.is_file() else None


def _first_cause(error: BaseException) -> Exception:
    """What a translation refused, as it said it; of anything else, a line of what torch ran into."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, ValueError):
        return ValueError(str(cause))
    line = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
    return RuntimeError(f"torch cannot export the model: {line}")


@contextmanager
def _without_notes(name: str) -> Iterator[None]:
    """Keep a logger from telling what it could not simplify."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _newest_opset() -> int:
    import onnx

    return int(onnx.defs.onnx_opset_version())
