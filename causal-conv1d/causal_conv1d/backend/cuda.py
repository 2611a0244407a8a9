"""Finds and calls the compiled CUDA kernels of a package.

As those for CPUs (`backend.native`), they are a plain C library: built with nvcc alone, they serve every torch whose
GPU they were compiled for. They run on the current stream of torch and take all memory from it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from contextlib import nullcontext
from functools import cached_property

import torch
from torch import Tensor

from causal_conv1d.backend.native import CompiledLibrary

ABI = 1  # as in csrc/cuda/platform.cuh
WRONG_ARGUMENTS = 1
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as `Element` in platform.cuh


class CudaLibrary(CompiledLibrary):
    """The compiled CUDA kernels of one package; the detail names the toolkit and the GPUs they were compiled for."""

    file = "kernels.cuda.so"
    abi_function = "cuda_abi"
    abi = ABI

    _built = 0  # the version of the toolkit that built it; 0 for the emulated kernels of tests

    def _look_at(self, library: ctypes.CDLL) -> None:
        library.cuda_architectures.restype = ctypes.c_char_p
        library.cuda_error.restype = ctypes.c_char_p
        for function in (library.cuda_runtime_version, library.cuda_driver_version, library.cuda_has_no_code):
            function.restype = ctypes.c_int64
        self._built = library.cuda_runtime_version()
        names = library.cuda_architectures().decode().strip("()")
        self.detail = f"CUDA {_version(self._built)}, for {names}" if self._built else "emulated on the CPU"

    @property
    def missing(self) -> str | None:
        """As `backend.Engine`. Asks for the GPU when it is first read, not at import."""
        return self._without_gpu if self._fault is None and self._built else self._fault

    @cached_property
    def _without_gpu(self) -> str | None:
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        driver = self._library.cuda_driver_version()
        if driver // 1000 < self._built // 1000:
            return (
                f"its kernels were compiled by CUDA {_version(self._built)} and the driver supports {_version(driver)} "
                f"at most; update the driver, or install it again with a CUDA {driver // 1000} toolkit"
            )
        torch.cuda.init()
        if code := self._library.cuda_has_no_code():
            return f"{self._reason(code)} ({self.detail}), which a new installation on this machine mends"
        return None

    def _reason(self, code: int) -> str:
        text: bytes = self._library.cuda_error(ctypes.c_int64(code))
        return text.decode()

    def call(self, kernel: str, device: torch.device, values: Iterable[int]) -> None:
        """Start a kernel on the current stream of this device.

        Raises:
            RuntimeError: it was not started; says why.
        """
        if not self._built:
            code = self._run(kernel, (0, 0, *values))
        elif device.type != "cuda":
            raise RuntimeError(f"the CUDA kernel {kernel} got tensors on {device}; move them to a GPU")
        else:
            stream = torch.cuda.current_stream(device).cuda_stream
            here = device.index == torch.cuda.current_device()
            with nullcontext() if here else torch.cuda.device(device):
                code = self._run(kernel, (device.index, stream, *values))
        if code == WRONG_ARGUMENTS:
            raise RuntimeError(f"the CUDA kernel {kernel} got a wrong list of arguments")
        if code:
            raise RuntimeError(f"the CUDA kernel {kernel} could not be started: {self._reason(code)} ({self.detail})")


def _version(number: int) -> str:
    """CUDA's 13020 as "13.2"."""
    return f"{number // 1000}.{number // 10 % 100}"


class CudaCall:
    """Collects integers for a kernel, and keeps what they point to alive until it was started.

    Memory that is freed then goes to later work on the same stream only, which waits for the kernel.

    Args:
        first: a tensor whose device all others must be on.
    """

    def __init__(self, first: Tensor) -> None:
        self.device = first.device
        self._values: list[int] = []
        self._alive: list[Tensor] = []

    def pointer(self, value: Tensor) -> int:
        """Where the elements are, which this call keeps alive. Raises RuntimeError if that is on another device."""
        if value.device != self.device:
            raise RuntimeError(f"expected all tensors on one device, but found {self.device} and {value.device}")
        value = value.resolve_conj().resolve_neg()
        self._alive.append(value)
        return value.data_ptr()

    def integers(self, *values: int) -> CudaCall:
        self._values += values
        return self

    def address(self, value: Tensor | None) -> CudaCall:
        """Where a tensor's elements are; 0 for none."""
        self._values.append(0 if value is None else self.pointer(value))
        return self

    def sequence(self, value: Tensor | None) -> CudaCall:
        """A tensor (b, d, l), fp32, bf16 or fp16: its address, strides and dtype."""
        if value is None:
            return self.integers(0, 0, 0, 0, 0)
        return self.integers(self.pointer(value), *value.stride(), ELEMENTS[value.dtype])

    def parameter(self, value: Tensor | None) -> CudaCall:
        """A parameter, as the address of contiguous fp32 or, if it is complex, complex64 numbers; 0 for none."""
        if value is None:
            return self.integers(0)
        dtype = torch.complex64 if value.is_complex() else torch.float32
        return self.address(value.detach().to(dtype).contiguous())

    def whole_numbers(self, value: Tensor | None) -> CudaCall:
        """A tensor as the address of contiguous int32 numbers; 0 for none."""
        return self.address(None if value is None else value.to(torch.int32).contiguous())

    def run(self, library: CudaLibrary, kernel: str) -> None:
        """Start it. Raises RuntimeError if it could not be."""
        library.call(kernel, self.device, self._values)
