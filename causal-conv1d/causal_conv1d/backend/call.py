"""The arguments of one call of a compiled kernel, in the order in which the kernel reads them."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import torch
from torch import Tensor

from causal_conv1d.backend.native import Library

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}  # as `Element` in platform.h


def pointer(value: Tensor) -> int:
    """Where the elements are. Raises RuntimeError if that is not this machine's memory."""
    if not value.is_cpu:
        raise RuntimeError(f"expected all tensors on one device, but found one on cpu and one on {value.device}")
    return value.data_ptr()


class Call:
    """Collects integers for a kernel, and keeps what they point to alive until it ran.

    Args:
        dtype: fp32 or bf16, of the activations that the kernel reads and writes.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._values = [ELEMENTS[dtype]]
        self._alive: list[Tensor] = []

    def converted(self, value: Tensor) -> Tensor:
        """The value in the dtype of the activations."""
        return value if value.dtype is self.dtype else self.kept(value.to(self.dtype))

    def kept(self, value: Tensor) -> Tensor:
        """The value, alive as long as this call."""
        self._alive.append(value)
        return value

    def integers(self, *values: int) -> Call:
        self._values += values
        return self

    def number(self, value: float) -> Call:
        self._values += struct.unpack("<q", struct.pack("<d", value))
        return self

    def address(self, value: Tensor | None) -> Call:
        """Where a tensor's elements are; 0 for none. The caller keeps it alive."""
        self._values.append(0 if value is None else pointer(value))
        return self

    def sequence(self, value: Tensor | None) -> Call:
        """A tensor (b, d, l) in the dtype of the activations, as its address and its three strides."""
        if value is None:
            return self.integers(0, 0, 0, 0)
        converted = self.converted(value)
        self._values += (pointer(converted), *converted.stride())
        return self

    def parameter(self, value: Tensor | None) -> Call:
        """A parameter, as the address of contiguous fp32 numbers; 0 for none."""
        return self.parameters((value,))

    def parameters(self, values: Iterable[Tensor | None]) -> Call:
        """Several of them. A model has 500, so that each attribute counts."""
        for value in values:
            if value is None:
                self._values.append(0)
            elif value.dtype is torch.float32 and value.is_contiguous():
                self._values.append(value.data_ptr() if value.is_cpu else pointer(value))
            else:
                self.address(self.kept(value.detach().to(torch.float32).contiguous()))
        return self

    def run(self, library: Library, kernel: str) -> None:
        """Run it. Raises RuntimeError or MemoryError if the kernel refuses."""
        library.call(kernel, self._values)
