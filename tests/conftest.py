"""Shared set-up: reproducible numbers, and the backends that this machine can test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import selected
from causal_conv1d import backend as backends
from causal_conv1d import conv1d_cuda
from mamba_ssm.ops import selective_scan_cuda


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        action="append",
        choices=backends.BACKENDS,
        help="test this backend, and others by giving it again; default: all that CPU tensors run on here. Without a "
        "GPU, triton kernels are interpreted if TRITON_INTERPRET=1 is set",
    )
    parser.addoption("--emulated-cuda", type=Path, help="the folder of the libraries that scripts/emulate_cuda made")


def pytest_configure(config: pytest.Config) -> None:
    selected.BACKENDS += config.getoption("--backend") or []
    folder = config.getoption("--emulated-cuda")
    if folder is not None:
        conv1d_cuda.LIBRARY.load(folder / "causal_conv1d.so")
        selective_scan_cuda.LIBRARY.load(folder / "mamba_ssm.so")


def pytest_report_header() -> list[str]:
    return [f"torch {torch.__version__}, {torch.get_num_threads()} threads", *backends.report().splitlines()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", metafunc.config.getoption("--backend") or _runnable(), indirect=True)


def _runnable() -> list[str]:
    """The backends that every op family has for CPU tensors; the header of the run names the others and says why."""
    known = backends.available_backends().values()
    names = [name for name in backends.BACKENDS if backends.DEVICE_OF.get(name, "cpu") == "cpu"]
    return [name for name in names if all(family[name] is None for family in known)]


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each backend that is tested, in turn.

    The one that tensors get by themselves is not forced, so that calls it has no kernel for (fp64, complex numbers,
    some gradients) take the step down that users' calls take. Those of a GPU get tensors on it; without one, their
    kernels are emulated on CPU tensors.
    """
    name = request.param
    device = backends.DEVICE_OF.get(name, "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        monkeypatch.setattr(backends, "DEVICE_OF", backends.DEVICE_OF | {name: "cpu"})
        device = "cpu"
    automatic = all(family.preferred(device) == name for family in backends.families())
    where = torch.device(device) if device == "cuda" else nullcontext()
    with where, nullcontext() if automatic else backends.use_backend(name):
        yield name


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
