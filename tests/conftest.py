"""Shared set-up: reproducible numbers, and the backends that this machine can test."""

from __future__ import annotations

from collections.abc import Iterator

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
    """Each backend that can run here, in turn and by force."""
    with backends.use_backend(request.param):
        yield request.param
