"""Finds and calls the compiled CPU kernels of a package.

The binding is a plain C interface called through ctypes, not PyTorch's C++ one: a library then depends on neither the
torch nor the Python it was built beside, compiles in seconds, also under pip's build isolation, and no upgrade of torch
can break it. The kernels have no threads of their own: they run on the pool of the OpenMP runtime that torch loaded,
whose fork function is looked up in this process and handed in with each call.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
from array import array
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from causal_conv1d.backend.memory import keep_freed_memory

ABI = 5  # as in csrc/cpu/platform.h
FAILURES = {1: "got a wrong list of arguments", 2: "found no memory left"}


class CompiledLibrary:
    """The kernels of one package that were compiled for one kind of device.

    Args:
        package: its import name; the library lies in its folder.

    Attributes:
        detail: as `backend.Engine`.
    """

    file: str
    abi_function: str
    abi: int

    def __init__(self, package: str) -> None:
        self.detail = ""
        self._fault: str | None = ""
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / self.file if spec is not None and spec.origin else Path(self.file)
        if path.is_file():
            self.load(path)

    def load(self, path: Path) -> None:
        """Take the kernels from this file; `missing` says if that fails."""
        self._fault = self._open(path)

    @property
    def missing(self) -> str | None:
        """As `backend.Engine`."""
        return self._fault

    def _open(self, path: Path) -> str | None:
        """Load the library; why it cannot be used, None if it can."""
        if _is_cut_short(path):
            return f"{path.name} is cut short, which a new installation mends"
        try:
            self._library = ctypes.CDLL(str(path))
            abi = getattr(self._library, self.abi_function)
            abi.restype = ctypes.c_int64
            if abi() != self.abi:
                return f"{path.name} belongs to another version of this package, which a new installation mends"
            self._look_at(self._library)
            return None
        except (OSError, AttributeError) as error:
            return f"{path.name} cannot be loaded ({error}), which a new installation mends"

    def _look_at(self, library: ctypes.CDLL) -> None:
        """Set `detail`."""
        raise NotImplementedError

    def _run(self, kernel: str, values: Iterable[int]) -> int:
        arguments = array("q", values)
        address, count = arguments.buffer_info()
        code: int = getattr(self._library, kernel)(ctypes.c_void_p(address), ctypes.c_int64(count))
        return code


class Library(CompiledLibrary):
    """The compiled CPU kernels of one package; the detail is "avx512", "avx2", "neon" or "generic"."""

    file = "kernels.cpu.so"
    abi_function = "native_abi"
    abi = ABI

    def _look_at(self, library: ctypes.CDLL) -> None:
        name = library.native_instruction_set
        name.restype = ctypes.c_char_p
        self.detail = name().decode()

    def call(self, kernel: str, values: list[int]) -> None:
        """Run a kernel on torch's threads, `torch.get_num_threads()` of them.

        Raises:
            RuntimeError, MemoryError: the kernel did not run; nothing was written.
        """
        keep_freed_memory()
        code = self._run(kernel, (fork_address(), torch.get_num_threads(), *values))
        if code:
            error = MemoryError if code == 2 else RuntimeError
            raise error(f"the native kernel {kernel} {FAILURES.get(code, f'failed with code {code}')}")


def _is_cut_short(path: Path) -> bool:
    """Whether an ELF file ends before its table of sections, which is the last thing in it: loading it would crash."""
    with open(path, "rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":  # of 64 bits
        return False
    if len(header) < 64:
        return True
    order = "<" if header[5] == 1 else ">"
    (start,) = struct.unpack_from(f"{order}Q", header, 40)
    size, count = struct.unpack_from(f"{order}HH", header, 58)
    return path.stat().st_size < start + size * count


@cache
def fork_address() -> int:
    """Where the fork function of torch's OpenMP runtime is; 0, and so one thread, if torch has none.

    A name that torch's own libraries resolve is the one of the runtime that they use.
    """
    for library in _libraries_of_torch():
        try:
            return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
        except AttributeError:
            continue
    return 0


def _libraries_of_torch() -> list[ctypes.CDLL]:
    """torch's library, whose symbols include those of what it is linked to, then the whole process."""
    folder = Path(torch.__file__).parent / "lib"
    found = [path for path in (folder / "libtorch_cpu.so", folder / "libtorch_cpu.dylib") if path.is_file()]
    return [ctypes.CDLL(str(path)) for path in found] + ([ctypes.CDLL(None)] if found else [])
