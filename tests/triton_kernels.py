"""What the tests of the triton kernels share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch


class Noted:
    """A kernel that notes its launches."""

    def __init__(self, kernel: Any, name: str, launches: list[str]) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        self.launches.append(self.name)
        launch: Callable[..., Any] = self.kernel[grid]
        return launch


@contextmanager
def count_launches(module: ModuleType) -> Iterator[list[str]]:
    """The names of this module's kernels that are launched inside, in order."""
    launches: list[str] = []
    kernels = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    with patch.multiple(module, **{name: Noted(value, name, launches) for name, value in kernels.items()}):
        yield launches
