"""One table of cases per op: values, gradients, contracts and compilation all run over the same ones.

Sizes are odd on purpose: length 1, lengths that no lane or chunk divides, channels that 8 does not divide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mamba_ssm.ops.mamba_inner import DirectionParameters

LAYOUTS = ("channel-first", "channel-last", "strided")


def laid_out(value: Tensor, layout: str) -> Tensor:
    """The same numbers (b, d, l) in another memory layout."""
    if layout == "channel-last":
        return value.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "strided":  # one half of a wider tensor, as the block's x and z are
        wide = torch.zeros(value.shape[0], value.shape[2], 2 * value.shape[1], dtype=value.dtype)
        wide[..., : value.shape[1]] = value.transpose(1, 2)
        return wide[..., : value.shape[1]].transpose(1, 2)
    return value.contiguous()


@dataclass(frozen=True)
class ConvCase:
    batch: int
    channels: int
    length: int
    width: int
    bias: bool = True
    seq_idx: bool = False
    silu: bool = True
    reverse: bool = False
    layout: str = "channel-first"

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """x, weight and, where the case has them, bias and seq_idx."""
        made = {
            "x": laid_out(torch.randn(self.batch, self.channels, self.length, dtype=dtype), self.layout),
            "weight": torch.randn(self.channels, self.width, dtype=dtype),
        }
        if self.bias:
            made["bias"] = torch.randn(self.channels, dtype=dtype)
        if self.seq_idx:
            starts = torch.rand(self.batch, self.length) < 0.2
            made["seq_idx"] = starts.cumsum(1).to(torch.int32)
        return made


CONV = {
    "one-token": ConvCase(2, 8, 1, 4),
    "shorter-than-width": ConvCase(1, 3, 2, 4),
    "width-1": ConvCase(2, 5, 9, 1),
    "width-2": ConvCase(1, 16, 37, 2, layout="channel-last"),
    "width-3-linear": ConvCase(3, 5, 65, 3, silu=False),
    "width-7": ConvCase(1, 7, 30, 7, bias=False),
    "no-bias-linear": ConvCase(2, 9, 17, 4, bias=False, silu=False, layout="channel-last"),
    "reverse": ConvCase(2, 12, 33, 4, reverse=True, layout="channel-last"),
    "reverse-strided": ConvCase(2, 11, 19, 4, reverse=True, layout="strided"),
    "strided": ConvCase(2, 24, 50, 4, layout="strided"),
    "documents": ConvCase(2, 8, 40, 4, seq_idx=True, layout="channel-last"),
    "documents-reverse": ConvCase(2, 8, 23, 3, seq_idx=True, reverse=True),
}


@dataclass(frozen=True)
class ScanCase:
    batch: int
    channels: int
    length: int
    state: int
    B: str = "varying"  # varying, constant or a number of groups
    C: str = "varying"
    D: bool = True
    z: bool = True
    bias: bool = True
    softplus: bool = True
    is_complex: bool = False
    reverse: bool = False
    layout: str = "channel-first"

    def _projection(self, form: str, dtype: torch.dtype, parameter: torch.dtype) -> Tensor:
        columns = self.length * (2 if self.is_complex else 1)
        if form == "constant":
            return torch.randn(self.channels, self.state, dtype=parameter)
        if form == "varying":
            return torch.randn(self.batch, self.state, columns, dtype=dtype)
        return torch.randn(self.batch, int(form), self.state, columns, dtype=dtype)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The tensor arguments of `selective_scan_fn`; sequences in `dtype`, parameters in at least fp32."""
        real = torch.promote_types(dtype, torch.float32)
        parameter = real.to_complex() if self.is_complex else real
        sequence = (self.batch, self.channels, self.length)
        A = -torch.rand(self.channels, self.state, dtype=real) * 4 - 0.05
        made = {
            "u": laid_out(torch.randn(sequence, dtype=dtype), self.layout),
            "delta": laid_out(0.5 * torch.randn(sequence, dtype=dtype) + (0 if self.softplus else 1), self.layout),
            "A": torch.complex(A, torch.randn(A.shape, dtype=real)) if self.is_complex else A,
            "B": self._projection(self.B, dtype, parameter),
            "C": self._projection(self.C, dtype, parameter),
        }
        if self.D:
            made["D"] = torch.randn(self.channels, dtype=real)
        if self.z:
            made["z"] = laid_out(torch.randn(sequence, dtype=dtype), self.layout)
        if self.bias:
            made["delta_bias"] = 0.5 * torch.rand(self.channels, dtype=real)
        return made


SCAN = {
    "one-token": ScanCase(2, 8, 1, 4),
    "state-1": ScanCase(2, 6, 35, 1),
    "chunk": ScanCase(1, 5, 32, 16, layout="channel-last"),
    "chunk-and-one": ScanCase(2, 7, 33, 16, layout="channel-last"),
    "odd": ScanCase(3, 13, 95, 5, layout="strided"),
    "long": ScanCase(1, 3, 1000, 2),
    "state-large": ScanCase(1, 4, 21, 70),
    "bare": ScanCase(2, 8, 20, 4, D=False, z=False, bias=False, softplus=False),
    "no-skip": ScanCase(2, 8, 20, 4, D=False),
    "no-gate": ScanCase(2, 8, 20, 4, z=False),
    "no-bias": ScanCase(2, 8, 20, 4, bias=False),
    "no-softplus": ScanCase(2, 8, 20, 4, softplus=False),
    "constant-B": ScanCase(2, 8, 33, 4, B="constant"),
    "constant-C": ScanCase(2, 8, 33, 4, C="constant", reverse=True),
    "constant": ScanCase(2, 8, 33, 4, B="constant", C="constant"),
    "groups": ScanCase(2, 12, 33, 4, B="3", C="3"),
    "groups-one-constant": ScanCase(2, 12, 18, 4, B="constant", C="2"),
    "reverse": ScanCase(2, 10, 37, 8, reverse=True, layout="channel-last"),
    "reverse-groups": ScanCase(1, 10, 20, 8, B="5", C="5", reverse=True),
    "complex": ScanCase(2, 6, 33, 4, is_complex=True),
    "complex-groups": ScanCase(2, 6, 18, 3, B="2", C="2", is_complex=True, reverse=True),
    "complex-constant": ScanCase(2, 6, 20, 4, B="constant", C="constant", is_complex=True),
    "complex-mixed": ScanCase(1, 6, 20, 4, B="constant", is_complex=True, z=False),
}


def inner_arguments(
    batch: int, inner: int, length: int, states: int, rank: int, width: int, bare: bool
) -> tuple[Tensor, DirectionParameters, DirectionParameters]:
    """xz (b, 2 e, l), channels contiguous, and the parameters of both directions; `bare` leaves out what it can."""

    def direction() -> DirectionParameters:
        return DirectionParameters(
            torch.randn(inner, 1, width) / width,
            None if bare else torch.randn(inner),
            torch.randn(rank + 2 * states, inner) / inner**0.5,
            torch.randn(inner, rank) / rank**0.5,
            torch.rand(inner, states) * 2,
            None if bare else torch.randn(inner),
            None if bare else torch.randn(inner) - 3,
        )

    xz = torch.randn(batch, length, 2 * inner).transpose(1, 2)
    return xz, direction(), direction()


@dataclass(frozen=True)
class Scan2dCase:
    batch: int
    height: int
    width: int
    channels: int
    rank: int
    states: int
    directions: str = "cross"
    bias: bool = True
    skip: bool = True
    strided: bool = False
    decay: float = 1.0

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The inputs of `selective_scan_2d`, by name; parameters are at least fp32."""
        pixels, wide = (self.batch, self.height, self.width), torch.promote_types(dtype, torch.float32)
        x = torch.randn(*pixels, self.channels, dtype=dtype)
        if self.strided:  # channels first, and rows with a gap between them
            x = torch.randn(self.batch, self.channels, self.height, self.width + 1, dtype=dtype)
            x = x[..., :-1].permute(0, 2, 3, 1).detach()
        made = {
            "x": x,
            "projected": torch.randn(*pixels, 4, self.rank + 2 * self.states, dtype=dtype),
            "dt_weight": torch.randn(4, self.channels, self.rank, dtype=wide) / self.rank**0.5,
            "A": -self.decay * torch.exp(torch.randn(4, self.channels, self.states, dtype=wide)),
        }
        if self.skip:
            made["D"] = torch.randn(4, self.channels, dtype=wide)
        if self.bias:
            made["dt_bias"] = torch.randn(4, self.channels, dtype=wide) - 1
        return made


SCAN_2D = {
    "one-pixel": Scan2dCase(2, 1, 1, 8, 1, 1),
    "one-row": Scan2dCase(1, 1, 35, 5, 2, 1),
    "one-column": Scan2dCase(1, 35, 1, 5, 2, 3),
    "odd": Scan2dCase(2, 5, 7, 19, 3, 1),
    "wide": Scan2dCase(1, 6, 21, 32, 6, 1, strided=True),
    "tall-many-states": Scan2dCase(1, 40, 3, 17, 2, 16),
    "no-bias": Scan2dCase(1, 9, 9, 16, 4, 4, bias=False),
    "no-skip": Scan2dCase(2, 4, 9, 8, 1, 2, skip=False),
    "rows": Scan2dCase(1, 7, 6, 9, 2, 1, directions="rows"),
    "both": Scan2dCase(2, 6, 7, 12, 2, 5, directions="both"),
    "strong-decay": Scan2dCase(1, 12, 12, 8, 2, 1, decay=40.0),
}
