"""Read torch's checkpoint files, every byte compared with its checksum, without running anything that is in them.

`torch.load(weights_only=True)` refuses a whole file for one object of a class that it does not know, such as the
configuration (a yacs CfgNode) in VMamba's training checkpoints. `read_without_running` reads the same two formats, the
zip of torch 1.6 and later and the older stream of pickles, with an object that does nothing in the place of every such
object. It imports nothing that the file names, calls nothing but what is written below, and takes no more memory than
the file has bytes, but for what the objects of Python need. `read_torch_file` asks torch first.
"""

from __future__ import annotations

import argparse
import contextlib
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
from typing import Any, BinaryIO, ClassVar

import torch
from torch import Tensor

__all__ = ["DamagedError", "Inert", "RefusedError", "in_words", "read_torch_file", "read_without_running"]

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


class RefusedError(ValueError):
    """A file names a part of Python that runs code; the message is one sentence that says which."""


class DamagedError(ValueError):
    """A file is no whole checkpoint; `fault` says what is wrong with it, the message also what to do."""

    def __init__(self, fault: str) -> None:
        super().__init__(f"{fault}; download it again")
        self.fault = fault


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


def in_words(value: Any) -> str:
    """What a value of a checkpoint is, for use inside a sentence."""
    kind = type(value).__name__
    if isinstance(value, Inert):
        return "an object of an unknown class"
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


class _Storage:
    """Bytes of a file, seen as a flat tensor; tensors may be made of it before the bytes are there."""

    def __init__(self, content: bytearray, dtype: torch.dtype) -> None:
        self.bytes = content
        self.flat = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


def read_torch_file(path: str | Path, source: str | None = None) -> Any:
    """Return what is in a file of `torch.save`, tensors on the CPU: as torch reads it, else as `read_without_running`.

    Args:
        path: a file of either format.
        source: what messages call the file, `path` if None.
    Raises:
        DamagedError: the file is truncated, damaged or of another format.
        RefusedError: it names a part of Python that runs code.
        OSError: it cannot be opened.
    """
    source = str(path) if source is None else source
    with open(path, "rb") as file:
        _refuse_changed_bytes(file, source)
    try:
        with _namespaces_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # of a damaged file torch raises nearly anything
        return read_without_running(path, source)


def _namespaces_allowed() -> contextlib.AbstractContextManager[Any]:
    """Let torch.load read argparse.Namespace (plain attributes) besides tensors and numbers."""
    if hasattr(torch.serialization, "safe_globals"):
        return torch.serialization.safe_globals([argparse.Namespace])
    torch.serialization.add_safe_globals([argparse.Namespace])  # torch 2.4 has no context manager for it
    return contextlib.nullcontext()


def _refuse_changed_bytes(file: BinaryIO, source: str) -> None:
    """Compare each part of torch's zip with its checksum, which torch itself does not do for tensors."""
    try:
        with zipfile.ZipFile(file) as archive:
            if not any(entry.CRC for entry in archive.infolist()):
                return  # written with torch.serialization.set_crc32_options(False), or empty
            changed = archive.testzip()
    except Exception:  # an older format, or a zip that cannot be read, which is said where it is read
        return
    if changed:
        raise DamagedError(f"{source} is damaged: the bytes of {changed} are not those that were written")


def read_without_running(path: str | Path, source: str | None = None) -> Any:
    """Return what is in a file of `torch.save`, tensors on the CPU, with an `Inert` for each object of unknown class.

    Args:
        path: a file of either format; the tensors are dense ones of real numbers or booleans.
        source: what messages call the file, `path` if None.
    Raises:
        DamagedError: the file is truncated, damaged or of another format.
        RefusedError: it names a part of Python that runs code (`os.system`); nothing of it was looked up.
        OSError: it cannot be opened.
    """
    source = str(path) if source is None else source
    with open(path, "rb") as file:
        try:
            return _read_zip(file, source) if zipfile.is_zipfile(file) else _read_stream(file, source)
        except RefusedError:
            raise
        except Exception as error:  # the bytes of a damaged file can mean anything
            raise DamagedError(
                f"{source} is not a checkpoint that can be read: it is truncated, damaged, of another format or (after "
                "a git clone) only a pointer to the file"
            ) from error


def _read_zip(file: BinaryIO, source: str) -> Any:
    """Read the format of torch 1.6 and later: FOLDER/data.pkl, and the numbers in FOLDER/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
    if "byteorder" in entries and _content(file, entries["byteorder"]) != sys.byteorder.encode():
        raise ValueError("the numbers have the other order of bytes")
    storages: dict[str, _Storage] = {}
    room = _Room(file)

    def storage(dtype: torch.dtype, key: str, _length: int) -> Tensor:
        if key not in storages:
            entry = entries[f"data/{key}"]
            room.take(entry.file_size)
            storages[key] = _Storage(_content(file, entry), dtype)
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
    room = _Room(file)

    def storage(dtype: torch.dtype, key: str, length: int) -> Tensor:
        if key not in storages:
            room.take(length * dtype.itemsize)
            storages[key] = _Storage(bytearray(length * dtype.itemsize), dtype)
        return storages[key].flat

    def unpickled() -> Any:
        return _Unpickler(file, source, storage).load()

    if any(
        type(found) is not int or found != expected
        for found, expected in ((unpickled(), _MAGIC), (unpickled(), _PROTOCOL))
    ):
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


class _Room:
    """How many bytes of numbers a file may still ask for: together they are no more than it has."""

    def __init__(self, file: BinaryIO) -> None:
        self.left = _size(file)

    def take(self, count: int) -> None:
        if not 0 <= count <= self.left:
            raise ValueError("the storages are longer than the file")
        self.left -= count


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


class _Unpickler(pickle._Unpickler):  # the one in Python: that in C makes room for as many objects as a file names
    """Makes dictionaries, lists, numbers, texts and tensors; all else becomes `Inert`."""

    # torch writes no bytearray, which would be made before its bytes are known to be there.
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }

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

    def _load_build(self) -> None:
        """Leave out the state of an object: of those that are made here, none has any that is of use."""
        self.stack.pop()  # type: ignore[attr-defined]  # made by load()

    dispatch[pickle.BUILD[0]] = _load_build


def _sequence(value: Any) -> Any:
    """`value`, a list or a tuple: a tensor would be one of as many tensors as it says it has rows."""
    if not isinstance(value, list | tuple):
        raise TypeError("not a list")
    return value


def _size_of(sides: Any = ()) -> tuple[Any, ...]:
    return tuple(_sequence(sides))


def _ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict(map(_sequence, _sequence(items)))


def _tensor(flat: Tensor, offset: int, size: Any, stride: Any, *_rest: Any) -> Tensor:
    """Return the window of a storage that a tensor is; torch itself refuses one that reaches beyond it."""
    return flat.as_strided(_size_of(size), _size_of(stride), flat.storage_offset() + offset)


def _data_of(tensor: Tensor, *_rest: Any) -> Tensor:
    return tensor


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _data_of,
    "torch._utils._rebuild_parameter_with_state": _data_of,
    "torch.Size": _size_of,
}
