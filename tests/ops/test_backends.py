"""The choice of a backend: forced by the environment, asked for, reported."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import causal_conv1d
from causal_conv1d import backend as backends
from causal_conv1d.backend import triton

VARIABLES = ("CAUSAL_CONV1D_FORCE_FALLBACK", "SELECTIVE_SCAN_FORCE_FALLBACK")


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> backends.Family:
    """A family of its own with a native kernel, so that choices can be tried where nothing was compiled."""
    monkeypatch.setattr(backends, "_families", {})
    monkeypatch.delenv("TRIAL_FORCE_FALLBACK", raising=False)
    made = backends.Family("trial", "TRIAL_FORCE_FALLBACK", "causal_conv1d", "causal-conv1d")
    made.kernel("torch", "twice")(lambda x: ("torch", 2 * x))
    made.kernel("torch", "thrice")(lambda x: ("torch", 3 * x))
    made.kernel("native", "twice")(lambda x: ("native", 2 * x))
    return made


def test_the_best_that_is_there_runs(family: backends.Family) -> None:
    assert family.choose("twice", "cpu")(1) == ("native", 2)
    assert family.choose("twice", "cuda")(1) == ("torch", 2)
    assert family.choose("twice", "mps")(1) == ("torch", 2)
    assert family.choose("thrice", "cpu")(1) == ("torch", 3)  # no native kernel: one step down


@pytest.mark.parametrize("value", ["TRUE", "true", "1", "Yes", "on", " ON "])
def test_the_environment_forces_torch(family: backends.Family, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRIAL_FORCE_FALLBACK", value)
    assert family.choose("twice", "cpu")(1) == ("torch", 2)
    assert "TRIAL_FORCE_FALLBACK is set" in str(family.missing("native"))
    with pytest.raises(RuntimeError, match="unset TRIAL_FORCE_FALLBACK"), backends.use_backend("native"):
        pass


@pytest.mark.parametrize("value", ["", "0", "FALSE", "no", "off"])
def test_other_values_force_nothing(family: backends.Family, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRIAL_FORCE_FALLBACK", value)
    assert family.choose("twice", "cpu")(1) == ("native", 2)


def test_an_explicit_request_never_steps_down(family: backends.Family) -> None:
    with backends.use_backend("torch"):
        assert family.choose("twice", "cpu")(1) == ("torch", 2)
    with backends.use_backend("native"):
        assert family.choose("twice", "cpu")(1) == ("native", 2)
        with pytest.raises(RuntimeError, match="native backend runs cpu tensors and twice got cuda tensors"):
            family.choose("twice", "cuda")
        with pytest.raises(RuntimeError, match="no kernel for thrice"):
            family.choose("thrice", "cpu")
    assert family.choose("twice", "cpu")(1) == ("native", 2)
    with pytest.raises(RuntimeError, match="cuda backend of trial cannot run"), backends.use_backend("cuda"):
        pass
    with pytest.raises(ValueError, match="'tpu'"), backends.use_backend("tpu"):
        pass


class Engine:
    """Runs kernels, or says why not."""

    def __init__(self, missing: str | None = None) -> None:
        self.missing = missing
        self.detail = "of the test"


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Engine]:
    monkeypatch.setattr(backends, "_families", {})
    return {"cuda": Engine(), "triton": Engine(), "native": Engine()}


def family_of(engines: dict[str, Engine]) -> backends.Family:
    """Each op's kernel answers with its backend's name; `odd` runs on triton and torch only, `whole` is made of ops."""
    made = backends.Family("trial", "TRIAL_FORCE_FALLBACK", "causal_conv1d", "causal-conv1d", **engines)
    for name in backends.BACKENDS:
        made.kernel(name, "plain")(lambda x, name=name: name)
    made.kernel("triton", "odd")(lambda x: "triton")
    for op in ("odd", "whole"):
        made.kernel("torch", op)(lambda x: "torch")
    made.compose("whole")
    return made


def test_cuda_goes_before_triton_and_that_before_torch(engines: dict[str, Engine]) -> None:
    made = family_of(engines)
    assert made.choose("plain", "cuda")(0) == "cuda"
    assert made.choose("plain", "cpu")(0) == "native"
    assert made.choose("odd", "cuda")(0) == "triton"
    engines["cuda"].missing = ""
    assert made.choose("plain", "cuda")(0) == "triton"
    engines["triton"].missing = "triton is not installed"
    assert made.choose("plain", "cuda")(0) == "torch"
    assert made.choose("odd", "cuda")(0) == "torch"
    assert made.missing("triton") == "triton is not installed"
    assert made.missing("cuda")  # its engine does not know why, the notes of the build do
    assert "native available (of the test)" in backends.report()


def test_what_is_made_of_ops_runs_wherever_they_do(engines: dict[str, Engine]) -> None:
    made = family_of(engines)
    assert made.choose("whole", "cuda")(0) == "torch"
    for name, device in (("cuda", "cuda"), ("triton", "cuda"), ("native", "cpu")):
        with backends.use_backend(name):
            assert made.choose("whole", device)(0) == "torch"
            assert made.choose("plain", device)(0) == name
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda backend has no kernel for odd"):
        made.choose("odd", "cuda")


def test_arguments_that_a_compiled_kernel_cannot_take(engines: dict[str, Engine]) -> None:
    made = family_of(engines)
    made.compiled_kernel("cuda", "odd", lambda x: None if x > 3 else "cuda")
    assert made.choose("odd", "cuda")(3) == "cuda"
    assert made.choose("odd", "cuda")(4) == "torch"
    with backends.use_backend("cuda"), pytest.raises(RuntimeError, match="cuda backend cannot run odd with these"):
        made.choose("odd", "cuda")(4)


@pytest.mark.parametrize(
    ("version", "gpu", "interpreted", "reason"),
    [
        ("3.9.0", True, "0", None),
        ("3.9.0", False, "1", None),
        ("3.9.0", False, "0", "torch finds no GPU"),
        ("3.2.0", True, "0", "triton 3.2.0 is older than 3.3"),
        ("", True, "0", "triton is not installed"),
    ],
)
def test_where_triton_runs(
    monkeypatch: pytest.MonkeyPatch, version: str, gpu: bool, interpreted: str, reason: str | None
) -> None:
    engine = triton.Triton()
    engine.__dict__["detail"] = version
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    assert (engine.missing is None) == (reason is None)
    assert str(engine.missing).startswith(str(reason))


def test_the_report_names_every_family_and_reason() -> None:
    known = backends.available_backends()
    assert set(known) == {"causal_conv1d", "selective_scan"}
    text = backends.report()
    for name, found in known.items():
        assert name in text
        assert found["torch"] is None
        assert all(reason in text for reason in found.values() if reason)


def run(*command: str, **environment: str) -> str:
    """Run Python in a new process that finds the packages as this one does."""
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", *command],
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_the_variables_are_read_at_first_use_not_at_import() -> None:
    program = (
        "import os, mamba_ssm, torch\n"
        f"for name in {VARIABLES!r}: os.environ[name] = 'TRUE'\n"
        "from causal_conv1d.backend import available_backends\n"
        "print(sorted({reason for family in available_backends().values() for reason in family.values() if reason}))\n"
        "print(mamba_ssm.Mamba(8, bimamba_type='v2')(torch.randn(1, 3, 8)).shape)\n"
    )
    out = run("-c", program)
    assert all(f"{name} is set" in out for name in VARIABLES)
    assert "torch.Size([1, 3, 8])" in out


@pytest.mark.skipif(
    any(family.missing("native") is not None for family in backends.families()),
    reason="the native kernels are not built: the header of the run says why",
)
@pytest.mark.parametrize("forced", [(), *((name,) for name in VARIABLES)], ids=lambda names: " ".join(names) or "none")
def test_a_forced_half_is_not_done_by_an_op_of_both(forced: tuple[str, ...]) -> None:
    """Ops that convolve and scan at once are compiled ones only where both halves may be."""
    program = (
        "import torch, mamba_ssm\n"
        "from causal_conv1d.backend.native import Library\n"
        "from mamba_ssm.modules.mamba_simple import Block, Mamba, run_blocks\n"
        "names, call = set(), Library.call\n"
        "Library.call = lambda self, name, values: names.add(name) or call(self, name, values)\n"
        "block = Block(8, lambda dim: Mamba(dim, bimamba_type='v2')).eval()\n"
        "x = torch.randn(1, 5, 8)\n"
        "block(x)[0].sum().backward()\n"
        "with torch.no_grad(): run_blocks([block], x, None); block.mixer(x)\n"
        "print(sorted(names))\n"
    )
    used = run("-c", program, **dict.fromkeys(forced, "1"))
    assert ("bidirectional" in used) == (not forced)
    assert ("conv1d" in used) == (VARIABLES[0] not in forced)
    assert ("selective_scan" in used) == (VARIABLES[1] not in forced)


def test_the_commands_print_the_report() -> None:
    for module in ("causal_conv1d.backend", "causal_conv1d"):
        assert "causal_conv1d: CPU tensors run on" in run("-m", module)
    assert "usage: python -m mamba_ssm" in run("-m", "mamba_ssm", "--help")
    out = run("-m", "mamba_ssm", SELECTIVE_SCAN_FORCE_FALLBACK="1")
    assert "selective_scan: CPU tensors run on 'torch'" in out
    assert "SELECTIVE_SCAN_FORCE_FALLBACK is set" in out


def test_imports_need_neither_triton_nor_transformers() -> None:
    program = (
        "import sys\n"
        "for name in ('triton', 'transformers', 'einops', 'causal_conv1d_cuda', 'selective_scan_cuda', 'timm'):\n"
        "    sys.modules[name] = None\n"
        "import causal_conv1d, mamba_ssm\n"
        "import mamba_ssm.ops.triton.layernorm, mamba_ssm.ops.triton.selective_state_update\n"
        "import mamba_ssm.utils.generation, mamba_ssm.utils.hf\n"
        "print(causal_conv1d.__version__, mamba_ssm.__version__)\n"
    )
    assert run("-c", program).split() == ["1.4.0", "1.1.1"]


def test_the_public_names_are_functions_of_this_package() -> None:
    assert causal_conv1d.causal_conv1d_fn(torch.zeros(1, 1, 2), torch.ones(1, 2)).shape == (1, 1, 2)
