"""What the tests of the compiled CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from causal_conv1d import backend as backends
from causal_conv1d.backend.native import Library
from mamba_ssm.ops.mamba_inner import DirectionParameters

needs_kernels = pytest.mark.skipif(
    any(family.missing("native") is not None for family in backends.families()),
    reason="the native kernels are not built: the header of the run says why",
)


@contextmanager
def count_calls() -> Iterator[list[str]]:
    """The names of the kernels that are called inside, in order."""
    names: list[str] = []
    call = Library.call

    def noted(self: Library, kernel: str, values: list[int]) -> None:
        names.append(kernel)
        call(self, kernel, values)

    with patch.object(Library, "call", noted):
        yield names


def inner_arguments(
    batch: int, inner: int, length: int, states: int, rank: int, width: int, bare: bool
) -> tuple[torch.Tensor, DirectionParameters, DirectionParameters]:
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
