"""What the tests of the compiled CPU kernels share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest

from causal_conv1d import backend as backends
from causal_conv1d.backend.native import Library

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
