"""Open an ONNX file that vim/export_onnx.py wrote, and run it; needs numpy and onnxruntime alone."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from command_line import pip_install
from onnx_file import Header, OnnxError, is_onnx, read_header
from onnx_int8 import session_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["CUSTOM_OPS", "OnnxError", "OnnxModel", "is_onnx", "open_session", "usable_cores"]

CUSTOM_OPS = "kernels.onnxruntime.so"
"""Name of the library of this project's own operators, in the folder of `mamba_ssm` or in `PROGRAMS`."""

PROGRAMS = Path(__file__).resolve().parent
"""Where these programs are. Never the folder of a model: who sends one could send a library with it, which is run."""

DOMAIN = "mamba_ssm"  # of these operators; the package has the same name
INPUT, OUTPUT = "input", "logits"
_WRITE_IT = "write it with `python vim/export_onnx.py --checkpoint WEIGHTS --output FILE.onnx`"
_log = logging.getLogger(__name__)
LARGEST = 1e6  # of a ratio in the metadata
_LONGEST_REASON = 300  # characters of what onnxruntime says


@dataclass(frozen=True)
class OnnxModel:
    """An open ONNX file with what it says of itself.

    Attributes:
        source: its path, for messages.
        name: of the model, as it is registered.
        class_names: for people to read, by class number.
        size: (height, width) of its pictures, in pixels.
        preprocessing: how a picture becomes an input: size, crop_ratio, interpolation, channels, scale, mean, std.
        metadata: all that the file says, text by key.
        threads: CPU threads of an operator.
        custom_ops: the library of operators that was loaded for it, if any.
        session: onnxruntime's own `InferenceSession`.
    """

    source: str
    name: str
    class_names: list[str]
    size: tuple[int, int]
    preprocessing: Mapping[str, Any]
    metadata: Mapping[str, str]
    threads: int
    custom_ops: Path | None
    session: Any = field(repr=False)

    @property
    def has_random_weights(self) -> bool:
        """Whether the file was written without a checkpoint."""
        return self.metadata.get("weights") == "random"

    @property
    def dtype(self) -> str:
        """Of most of its weights: "float32", or "int8" if vim/onnx_int8.py wrote it."""
        return "int8" if "quantization" in self.metadata else "float32"

    def said(self, key: str) -> Any:
        """Return what the metadata says under `key`, which is JSON; None if it says nothing or nothing readable."""
        return _from_json(self.metadata.get(key, "null"))

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the logits, (b, classes) fp32, of prepared pictures, (b, 3, h, w) fp32.

        Raises:
            ValueError: `batch` has another shape or dtype.
            OnnxError: onnxruntime cannot run the file on it, for want of memory for example.
        """
        wanted = (3, *self.size)
        if batch.ndim != 4 or batch.shape[1:] != wanted or batch.dtype != np.float32:
            raise ValueError(f"`batch` must be fp32 of shape (b, {', '.join(map(str, wanted))}), got {batch.dtype} of "
                             f"{batch.shape}")  # fmt: skip
        try:
            (logits,) = self.session.run([OUTPUT], {INPUT: batch})
        except Exception as error:  # onnxruntime's errors have no class of their own in common
            shape = " x ".join(map(str, batch.shape))
            raise OnnxError(f"{self.source} cannot run on an input of {shape}: {_reason(error)}.") from error
        return logits


def open_session(path: str | Path, *, threads: int | None = None, custom_ops: str = "auto") -> OnnxModel:
    """Open an ONNX file for the CPU.

    Args:
        path: the file.
        threads: of an operator; None: one for each core that this process may use.
        custom_ops: library of this project's own operators: "auto", that of the installed `mamba_ssm` or
            `kernels.onnxruntime.so` beside these programs, if the file has such operators; "none"; or a path.
    Raises:
        OnnxError: it cannot be opened, or is not such a file; one sentence says why.
    """
    source = str(path)
    if "://" in source or source.startswith(("hf-hub:", "hf_hub:")):
        raise OnnxError(f"ONNX files are not fetched: download {source} first, and name the file.")
    path = Path(os.path.expanduser(path))
    header = read_header(path)
    onnxruntime = _onnxruntime()
    threads = threads or usable_cores()
    options = _session_options(onnxruntime, threads, header.metadata)
    library = _load_library(options, custom_ops, path, header)
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        version = onnxruntime.__version__
        raise OnnxError(_why_closed(source, version, header, library, custom_ops, _reason(error))) from error
    classes = _check_ends(session, source)
    names = _class_names(header, source, classes)
    size = tuple(session.get_inputs()[0].shape[2:])
    return OnnxModel(
        source=source,
        name=_text(header, "model_name", source),
        class_names=names,
        size=size,
        preprocessing=_preprocessing(header, source, size),
        metadata=header.metadata,
        threads=threads,
        custom_ops=library,
        session=session,
    )


def usable_cores() -> int:
    """Return the number of cores that this process may use; two hardware threads of a core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cpus = os.sched_getaffinity(0)
    cores = set()
    for cpu in cpus:
        try:
            cores.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:  # this system does not say
            return len(cpus)
    return len(cores)


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        reason = "" if isinstance(error, ModuleNotFoundError) else f" ({_reason(error)})"
        raise OnnxError(f"ONNX files need onnxruntime{reason}: run {pip_install('onnxruntime')}.") from error
    return onnxruntime


def _session_options(onnxruntime: Any, threads: int, metadata: Mapping[str, str]) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # a plan of the memory would be held beside the memory of the first run
    options.log_severity_level = 4  # its errors arrive as exceptions
    for name, value in session_settings(metadata).items():
        options.add_session_config_entry(name, value)
    return options


def _load_library(options: Any, asked: str, path: Path, header: Header) -> Path | None:
    """Register a library of operators: the one asked for, or, if the file uses its operators, the one that is there."""
    library = _find_library(asked, path, header)
    if library is None:
        return None
    try:
        _require_whole(library)
        options.register_custom_ops_library(str(library.absolute()))
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        said = f"{library} is no library of operators that this onnxruntime can load ({_reason(error)})"
        if asked != "auto":
            raise OnnxError(f"{said}; name another, or leave --custom-ops away.") from error
        if _needs_library(header):
            raise OnnxError(f"{said}, and {path} needs it: build mamba_ssm again.") from error
        _log.warning("%s, so %s runs without it", said, path)
        return None
    return library


def _require_whole(library: Path) -> None:
    """Raise ValueError for an ELF library that was cut short, which the loader would map, and end the process."""
    with open(library, "rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02" or len(header) < 64:  # not of Linux on 64 bits: what loads it says so
        return
    order = "<" if header[5] == 1 else ">"
    (sections,) = struct.unpack_from(f"{order}Q", header, 40)
    size, count = struct.unpack_from(f"{order}HH", header, 58)
    if library.stat().st_size < sections + size * count:
        raise ValueError("it was cut short: copy it again")


def _find_library(asked: str, path: Path, header: Header) -> Path | None:
    if asked == "none":
        return None
    if asked != "auto":
        library = Path(os.path.expanduser(asked))
        if not library.is_file():
            raise OnnxError(f"There is no library of operators {asked}; leave --custom-ops away to have it found.")
        return library
    if DOMAIN not in header.domains:
        return None
    places = [PROGRAMS / CUSTOM_OPS]
    package = importlib.util.find_spec(DOMAIN)  # finds it without importing it, and with it torch
    if package is not None:
        places[:0] = [Path(folder) / CUSTOM_OPS for folder in package.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def _needs_library(header: Header) -> bool:
    """Whether the file has operators of ours without a definition of them beside it."""
    said = header.metadata.get("needs_custom_ops", "no") == "yes"
    return said or DOMAIN in header.domains - header.own_domains


def _why_closed(source: str, version: str, header: Header, library: Path | None, asked: str, reason: str) -> str:
    """Say why onnxruntime does not open a file, by what it says itself."""
    if _needs_library(header) and DOMAIN in reason:
        if library is not None:
            return f"{source} has an operator that {library} lacks ({reason}); build both from the same version."
        absent = f"none is in an installed mamba_ssm or in {PROGRAMS} as {CUSTOM_OPS}"
        how = "--custom-ops none leaves it away" if asked == "none" else absent
        return (
            f"{source} needs the library of this project's own operators, and {how}; name it with --custom-ops "
            "LIBRARY, or export the model again without them."
        )
    if "external data" in reason.lower():
        return (
            f"{source} keeps its weights in a file beside it, which is missing or another one ({reason}); put it "
            f"there, or {_WRITE_IT}, which makes one file."
        )
    return f"onnxruntime {version} cannot open {source}: {reason}."


def _check_ends(session: Any, source: str) -> int:
    """Return the number of classes, once input and output are those of a Vim."""
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = ", ".join(f"{end.name} {end.type} {end.shape}" for end in [*inputs, *outputs])
    fits = (
        [(end.name, end.type) for end in inputs] == [(INPUT, "tensor(float)")]
        and [(end.name, end.type) for end in outputs] == [(OUTPUT, "tensor(float)")]
        and len(inputs[0].shape) == 4
        and inputs[0].shape[1] == 3
        and all(isinstance(side, int) and side > 0 for side in inputs[0].shape[2:])
        and len(outputs[0].shape) == 2
        and isinstance(outputs[0].shape[1], int)
    )
    if not fits:
        raise OnnxError(
            f"{source} is not a picture classifier of this project, which has an input {INPUT} of (b, 3, height, "
            f"width) and an output {OUTPUT} of (b, classes), both fp32: it has {found}; {_WRITE_IT}."
        )
    if isinstance(inputs[0].shape[0], int):
        raise OnnxError(
            f"{source} takes batches of exactly {inputs[0].shape[0]} pictures; export it for any batch, with "
            "vim/export_onnx.py."
        )
    return int(outputs[0].shape[1])


def _text(header: Header, key: str, source: str) -> str:
    if key not in header.metadata:
        raise OnnxError(
            f"{source} does not say what its model, classes and pictures are (no {key} in its metadata); {_WRITE_IT}."
        )
    return header.metadata[key]


def _class_names(header: Header, source: str, classes: int) -> list[str]:
    names = _from_json(_text(header, "class_names", source))
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise OnnxError(f"The class_names in {source} are no JSON list of texts; {_WRITE_IT}.")
    if classes != len(names):
        raise OnnxError(f"{source} has {len(names)} class names but {classes} classes; {_WRITE_IT}.")
    return names


def _preprocessing(header: Header, source: str, size: Sequence[int]) -> dict[str, Any]:
    said = _from_json(_text(header, "preprocessing", source))
    if not isinstance(said, dict) or said.get("size") != list(size) or not _is_ratio(said.get("crop_ratio")):
        raise OnnxError(
            f"The preprocessing in {source} is not that of a picture of {size[0]} x {size[1]} pixels; {_WRITE_IT}."
        )
    return said


def _is_ratio(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < LARGEST  # compares whole numbers of any size, where math.isfinite overflows


def _from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _reason(error: BaseException) -> str:
    """Return what onnxruntime says in one line, without its own codes: "[ONNXRuntimeError] : 1 : FAIL : ..."."""
    text = " ".join(str(error).split())
    if text.startswith("[ONNXRuntimeError]"):
        text = text.split(" : ", 3)[-1]
    if text.startswith("Load model from "):
        text = text.split(" failed:", 1)[-1]
    text = text or type(error).__name__
    return (text if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]} ...").rstrip(". ")
