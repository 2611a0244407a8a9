"""A plugin of pytest that keeps the tests of the compiled CPU kernels, for runs of a copy that scripts/build_copy made.

    PYTHONPATH=tests/native python -m pytest -p native_only [--instruction-set NAME] [--threads-of LIBRARY] tests/ops

Kept are test_native*.py and, of the other files, what runs on the backend `native` by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

THREADS = 4


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--instruction-set", help="stop unless the kernels run on this one")
    parser.addoption(
        "--threads-of",
        help="a library whose `fork_threads` starts the kernels' threads, four where a test sets no number; each op "
        "runs on one thread too, and must give the same bits. torch itself keeps to one thread.",
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    from causal_conv1d import backend as backends

    wanted = session.config.getoption("--instruction-set")
    for family in backends.families():
        missing = family.missing("native")
        engine = family.engines.get("native")
        if missing is not None or engine is None:
            pytest.exit(f"the native backend of {family.name} cannot run: {missing}", returncode=1)
        if wanted not in (None, engine.detail):
            pytest.exit(f"{family.name} runs on {engine.detail}, not on {wanted}", returncode=1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def kept(item: pytest.Item) -> bool:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        return item.path.name.startswith("test_native") or parameters.get("backend") == "native"

    config.hook.pytest_deselected(items=[item for item in items if not kept(item)])
    items[:] = filter(kept, items)


def pytest_collection_finish(session: pytest.Session) -> None:
    path = session.config.getoption("--threads-of")
    if path is not None:
        _take_threads_of(ctypes.CDLL(path))


def _take_threads_of(library: ctypes.CDLL) -> None:
    """Have the kernels run on another library's threads, and each op on one thread too, for the rest of the process."""
    from causal_conv1d import backend as backends
    from causal_conv1d.backend import native

    torch.set_num_threads(1)
    count = THREADS

    def set_num_threads(wanted: int) -> None:
        nonlocal count
        count = wanted

    torch.set_num_threads, torch.get_num_threads = set_num_threads, lambda: count
    address = ctypes.cast(library.fork_threads, ctypes.c_void_p).value
    native.fork_address = lambda: address
    for family in backends.families():
        kernels = family._kernels["native"]
        kernels.update({op: _on_one_thread_too(op, kernel) for op, kernel in kernels.items()})


def _on_one_thread_too(op: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel; it fails where the number of threads changes a bit of its results or of what it writes in place."""
    from causal_conv1d.backend.native import Library

    call = Library.call  # before a test counts the calls

    def run(*args: Any) -> Any:
        given = _tensors(args)
        before = [value.clone() for value in given]
        with patch.object(torch, "get_num_threads", lambda: 1), patch.object(Library, "call", call):
            alone = [value.clone() for value in (*_tensors(kernel(*args)), *given)]
        for value, old in zip(given, before, strict=True):
            if not _same(value, old):
                value.copy_(old)
        result = kernel(*args)
        together = [*_tensors(result), *given]
        assert all(map(_same, together, alone)), f"{op} depends on the number of threads"
        return result

    return run


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether all bits are the same, those of a NaN too."""
    return torch.equal(
        *(value.new_empty(value.numel()).copy_(value.reshape(-1)).view(torch.uint8) for value in (first, second))
    )
