"""Read torch's checkpoint files that hold more than weights, without running anything that is in them.

`torch.load(weights_only=True)` refuses a whole file for one object of a class that it does not know, such as the
configuration (a yacs CfgNode) in VMamba's training checkpoints. `read_without_running` reads the same two formats, the
zip of torch 1.6 and later and the older stream of pickles, with an object that does nothing in the place of every such
object. It imports nothing that the file names and calls nothing but what is written below.
"""

from __future__ import annotations

import io
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

__all__ = ["Inert", "RefusedError", "read_without_running"]

_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older format
_PROTOCOL = 1001
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Parts of Python that pickled data is made of; any other of its modules in a checkpoint is an attempt to run code.
_DATA_MODULES = {
    *("_codecs", "argparse", "array", "collections", "copyreg", "datetime", "decimal", "enum", "fractions"),
    *("functools", "itertools", "logging", "numbers", "operator", "pathlib", "random", "re", "string", "time", "types"),
    *("typing", "uuid", "zoneinfo"),
}
_DATA_BUILTINS = {
    *("abs", "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "len", "list", "max", "min"),
    *("object", "range", "round", "set", "slice", "sorted", "str", "sum", "tuple", "type"),
}
_PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
_DAMAGE = (
    *(pickle.UnpicklingError, EOFError, KeyError, IndexError, AttributeError, TypeError, ValueError, OverflowError),
    *(RuntimeError, MemoryError, RecursionError, NotImplementedError, struct.error, zipfile.BadZipFile),
)


class RefusedError(ValueError):
    """A file names a part of Python that runs code; the message is one sentence that says which."""


class Inert:
    """Stands for an object of a class that is not looked up: takes whatever a pickle does to it, and does nothing."""

    def __new__(cls, *_args: Any, **_options: Any) -> Inert:
        """Make one from any arguments."""
        return super().__new__(cls)

    def __init__(self, *_args: Any, **_options: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...

    def __setitem__(self, _key: Any, _value: Any) -> None: ...

    def append(self, _value: Any) -> None:
        """Take an element of what is a list in the file."""

    def extend(self, _values: Any) -> None:
        """Take elements of what is a list in the file."""

    def add(self, _value: Any) -> None:
        """Take an element of what is a set in the file."""


class _Storage:
    """Bytes of a file, seen as a flat tensor; tensors may be made of it before the bytes are there."""

    def __init__(self, content: bytearray, dtype: torch.dtype) -> None:
        self.bytes = content
        self.flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def read_without_running(path: str | Path, source: str | None = None) -> Any:
    """Return what is in a file of `torch.save`, tensors on the CPU, with an `Inert` for each object of unknown class.

    Args:
        path: a file of either format; the tensors are dense ones of real numbers or booleans.
        source: what messages call the file, `path` if None.
    Raises:
        ValueError: the file is truncated, damaged or of another format.
        RefusedError: it names a part of Python that runs code (`os.system`); nothing of it was looked up.
        OSError: it cannot be opened.
    """
    source = str(path) if source is None else source
    with open(path, "rb") as file:
        try:
            return _read_zip(file, source) if zipfile.is_zipfile(file) else _read_stream(file, source)
        except RefusedError:
            raise
        except _DAMAGE as error:
            raise ValueError(
                f"{source} is not a checkpoint that can be read: it is truncated, damaged or of another format"
            ) from error


def _read_zip(file: BinaryIO, source: str) -> Any:
    """Read the format of torch 1.6 and later: FOLDER/data.pkl, and the numbers in FOLDER/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "byteorder" in entries and _content(file, entries["byteorder"]) != sys.byteorder.encode():
        raise ValueError("the numbers have the other order of bytes")
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, _length: int) -> Tensor:
        if key not in storages:
            storages[key] = _Storage(_content(file, entries[f"data/{key}"]), dtype)
        return storages[key].flat

    return _Unpickler(io.BytesIO(_content(file, entries["data.pkl"])), source, storage).load()


def _content(file: BinaryIO, entry: zipfile.ZipInfo) -> bytearray:
    """Return what an entry of a zip holds; zipfile itself would refuse files that torch wrote without checksums."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > _size(file):
        raise ValueError("torch compresses nothing")
    file.seek(entry.header_offset + 26)
    file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the name and further fields come before it
    content = _filled(bytearray(entry.file_size), file)
    if entry.CRC and zlib.crc32(content) != entry.CRC:
        raise ValueError("the bytes are not those that were written")
    return content


def _read_stream(file: BinaryIO, source: str) -> Any:
    """Read the older format: pickles one after the other, then the numbers of each storage behind their count."""
    file.seek(0)
    storages: dict[str, _Storage] = {}

    def storage(dtype: torch.dtype, key: str, length: int) -> Tensor:
        if key not in storages:
            if not 0 <= length * dtype.itemsize <= _size(file):
                raise ValueError("a storage is longer than the file")
            storages[key] = _Storage(bytearray(length * dtype.itemsize), dtype)
        return storages[key].flat

    def unpickled() -> Any:
        return _Unpickler(file, source, storage).load()

    if unpickled() != _MAGIC or unpickled() != _PROTOCOL:
        raise ValueError("no file of torch.save")
    if unpickled()["little_endian"] != (sys.byteorder == "little"):
        raise ValueError("the numbers have the other order of bytes")
    payload = unpickled()
    for key in unpickled():
        (length,) = struct.unpack("=q", file.read(8))
        if length != len(storages[key].flat):
            raise ValueError("a storage is not as long as the file says")
        _filled(storages[key].bytes, file)
    return payload


def _size(file: BinaryIO) -> int:
    return os.fstat(file.fileno()).st_size


def _filled(content: bytearray, file: Any) -> bytearray:
    """Put the next bytes of `file` into `content` and return it."""
    window, done = memoryview(content), 0
    while done < len(window):
        read = file.readinto(window[done:])
        if not read:
            raise EOFError("the numbers end early")
        done += read
    return content


class _Unpickler(pickle.Unpickler):
    """Makes dictionaries, lists, numbers, texts and tensors; all else becomes `Inert`."""

    def __init__(self, file: Any, source: str, storage: Callable[[torch.dtype, str, int], Tensor]) -> None:
        super().__init__(file, encoding="utf-8")
        self._source = source
        self._storage = storage
        inert = type("Inert", (Inert,), {})  # its own, since a pickle can set attributes of what it names
        self._inert = inert
        self._known = {**_KNOWN, "builtins.getattr": lambda *_of: inert}

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for `module.name`, without importing or looking anything up.

        Raises:
            RefusedError: it is a part of Python that is no data.
        """
        module = _PYTHON_2.get(module, module)
        known = self._known.get(f"{module}.{name}")
        if known is not None:
            return known
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        package = module.partition(".")[0]
        harmless = name in _DATA_BUILTINS if module == "builtins" else package in _DATA_MODULES
        if package in sys.stdlib_module_names and not harmless:
            raise RefusedError(
                f"{self._source} holds a Python object ({module}.{name}) besides tensors and numbers, which could run "
                "code, so it is refused: save the weights alone, or as safetensors"
            )
        return self._inert

    def persistent_load(self, pid: Any) -> Tensor:
        """Return the flat tensor that `pid` means: ("storage", dtype, key, device, length, part of another storage)."""
        kind, dtype, key, _device, length, *part = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("not a storage of numbers")
        flat = self._storage(dtype, key, length)
        if part and part[0] is not None:
            _key, start, length = part[0]
            return flat[start : start + length]
        return flat


def _tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """Return the window of a storage that a tensor is; torch itself refuses one that reaches beyond it."""
    return flat.as_strided(tuple(size), tuple(stride), flat.storage_offset() + offset)


def _data_of(tensor: Tensor, *_rest: Any) -> Tensor:
    return tensor


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _data_of,
    "torch._utils._rebuild_parameter_with_state": _data_of,
    "torch.Size": tuple,
}
