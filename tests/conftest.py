"""Shared set-up: reproducible numbers, and the backends that this machine can test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import mamba_ssm.ops.selective_scan  # noqa: F401  (registers its kernels)
from causal_conv1d import backend as backends


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_report_header() -> list[str]:
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", *backends.report().splitlines()]


def _runnable() -> list[str]:
    """The backends that every op family has here; the header of the run names the others and says why."""
    known = backends.available_backends().values()
    return [name for name in backends.BACKENDS if all(family[name] is None for family in known)]


@pytest.fixture(params=_runnable())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here, in turn.

    The one that CPU tensors get by themselves is not forced, so that calls it has no kernel for (fp64, complex
    numbers, some gradients) take the step down that users' calls take.
    """
    automatic = all(family.preferred("cpu") == request.param for family in backends.families())
    with nullcontext() if automatic else backends.use_backend(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
