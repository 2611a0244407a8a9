"""What an ONNX file says of itself, read without onnx or onnxruntime; and the error of files that cannot be used.

An ONNX file is one protobuf message, ModelProto (onnx.proto of the ONNX specification): numbered fields one after
another. Only the small ones are read; the graph with its weights is stepped over, so this takes no time and no memory.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

_IR_VERSION, _GRAPH, _OPSET_IMPORT, _METADATA, _FUNCTION = 1, 7, 8, 14, 25  # fields of ModelProto
_LAST_FIELD = 64  # there are 26 today; a larger number is no ModelProto
_SMALL = 2**24  # bytes; what is read here is names and settings
_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # how protobuf writes a value


class OnnxError(ValueError):
    """An ONNX file cannot be had, opened or run; the message is one sentence that names it and the mend."""


@dataclass(frozen=True)
class Header:
    """What the file says beside its graph: `metadata` by key, and the operator sets (`domains`) that it uses.

    `own_domains` are those of the functions that it brings along.
    """

    metadata: dict[str, str] = field(default_factory=dict)
    domains: frozenset[str] = frozenset()
    own_domains: frozenset[str] = frozenset()


class _FormatError(ValueError):
    """The bytes are no ModelProto; `begun`: they began like one."""

    def __init__(self, begun: bool) -> None:
        super().__init__()
        self.begun = begun


def is_onnx(source: str) -> bool:
    """Tell whether `source` ends in .onnx, or is a file that holds ONNX under another name."""
    if source.lower().endswith(".onnx"):
        return True
    path = Path(os.path.expanduser(source))
    try:
        return path.is_file() and bool(read_header(path))
    except (OnnxError, OSError, ValueError):
        return False


def read_header(path: str | Path) -> Header:
    """Return what the file at `path` says of itself.

    Raises:
        OnnxError: there is no such file, or it is not a whole ONNX file; says which.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # a pipe could be waited for without end
            raise OnnxError(f"{path} is no regular file; name the ONNX file itself.")
        with open(path, "rb") as file:
            return _read(file, os.fstat(file.fileno()).st_size)
    except _FormatError as error:
        reason = "is damaged or cut off: it begins as an ONNX file, but does not end as one" if error.begun else (
            "is not an ONNX file: it is damaged, of another format or (after a git clone) only a pointer to the file"
        )  # fmt: skip
        raise OnnxError(f"{path} {reason}; download or write it again.") from error
    except FileNotFoundError as error:
        raise OnnxError(f"There is no file {path}.") from error
    except IsADirectoryError as error:
        raise OnnxError(f"{path} is a folder: name the ONNX file in it.") from error
    except OSError as error:
        raise OnnxError(f"{path} cannot be read: {error.strerror or error}.") from error


def _read(file: BinaryIO, size: int) -> Header:
    metadata: dict[str, str] = {}
    domains: dict[int, set[str]] = {_OPSET_IMPORT: set(), _FUNCTION: set()}
    seen: set[int] = set()
    try:
        for number, kind, length in _fields(file, size):
            if not seen and number != _IR_VERSION:  # every writer begins with it
                raise _FormatError(begun=False)
            seen.add(number)
            if kind != _LENGTH or number not in (_METADATA, *domains) or length > _SMALL:
                file.seek(length, os.SEEK_CUR)
                continue
            texts = _texts(file, file.tell() + length)
            if number == _METADATA:
                metadata[texts.get(1, "")] = texts.get(2, "")
            else:  # the domain is field 1 of an operator set and field 10 of a function
                domains[number].add(texts.get(1 if number == _OPSET_IMPORT else 10, ""))
    except (EOFError, UnicodeDecodeError) as error:
        raise _FormatError(begun=len(seen) > 1) from error
    if _GRAPH not in seen:
        raise _FormatError(begun=len(seen) > 1)
    return Header(metadata, frozenset(domains[_OPSET_IMPORT]), frozenset(domains[_FUNCTION]))


def _fields(file: BinaryIO, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, kind, bytes) of each field up to `end`; whoever asks reads or skips that many bytes."""
    while file.tell() < end:
        tag = _varint(file)
        number, kind = tag >> 3, tag & 7
        if not 1 <= number <= _LAST_FIELD or kind not in (_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES):
            raise EOFError
        length = 0
        if kind == _VARINT:
            _varint(file)
        else:
            length = _varint(file) if kind == _LENGTH else 8 if kind == _EIGHT_BYTES else 4
        if file.tell() + length > end:
            raise EOFError
        yield number, kind, length


def _varint(file: BinaryIO) -> int:
    """Read a number as protobuf writes it: 7 bits a byte, the lowest first, the top bit on all bytes but the last."""
    value = 0
    for place in range(10):
        byte = file.read(1)
        if not byte:
            break
        value |= (byte[0] & 127) << (7 * place)
        if byte[0] < 128:
            return value
    raise EOFError


def _texts(file: BinaryIO, end: int) -> dict[int, str]:
    """Read the texts among the fields of a small message by number; the last of those that are repeated."""
    found: dict[int, str] = {}
    for number, kind, length in _fields(file, end):
        data = file.read(length)
        if kind == _LENGTH and number in (1, 2, 10):
            found[number] = data.decode()
    return found
