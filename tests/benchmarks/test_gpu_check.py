"""scripts/gpu_check: what it reads out of the compiler, what it measures (here on the CPU, tiny), what it reports."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from benchmarks.gpu import ceilings, cli, commands, measure, networks, ops, ptxas, report, steps, timing, training
from benchmarks.gpu.findings import Bound, Findings, join
from torch import nn

SCAN = "_ZN4scan7forwardINS_3CutIfLi128ELi4ELi4ELi4ELi3EEEEEvNS_10ParametersINT_5ValueEEE"
BACKWARD = "_ZN4scan8backwardINS_3CutIfLi128ELi4ELi4ELi4ELi3EEEEEvNS_18BackwardParametersINT_5ValueEEE"
WIDE = "_ZN4scan7forwardINS_3CutIfLi128ELi16ELi4ELi3ELi2EEEEEvNS_10ParametersINT_5ValueEEE"
UPDATE = "_ZN6conv1d6updateENS_16UpdateParametersE"
OUTPUT = f"""\
/usr/local/bin/nvcc -O3 -gencode=arch=compute_90,code=sm_90 --threads=1 -c forward.cu -o forward.o
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function '{SCAN}' for 'sm_90'
ptxas info    : Function properties for {SCAN}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 91 registers, used 1 barriers, 12544 bytes smem
ptxas info    : Compile time = 692.609 ms
ptxas info    : Compiling entry function '{WIDE}' for 'sm_90'
ptxas info    : Function properties for {WIDE}
    72 bytes stack frame, 68 bytes spill stores, 40 bytes spill loads
ptxas info    : Used 124 registers, used 1 barriers, 72 bytes cumulative stack size, 18688 bytes smem
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    32 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Compiling entry function '{BACKWARD}' for 'sm_90'
ptxas info    : Function properties for {BACKWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 160 registers, used 1 barriers, 35200 bytes smem
ptxas info    : Compiling entry function '{UPDATE}' for 'sm_90'
ptxas info    : Function properties for {UPDATE}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""
TINY = ops.Sizes(batch=2, channels=6, length=9, state=4)
CPU = timing.Device("cpu")


def tiny(name: str, pixels: int, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, img_size=pixels, **options).to(torch.float32)


class Flat(nn.Module):
    """A network so small that only what surrounds it is tested."""

    def __init__(self, pixels: int, materialised: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(3 * pixels * pixels, 1000)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.head(pictures.flatten(1))


# --- the compiler ---------------------------------------------------------------------------------------------------


def test_kernels_are_read_out_of_ptxas() -> None:
    scan, wide, backward, update = ptxas.parse(OUTPUT)
    assert scan == ptxas.Kernel(SCAN, "sm_90", registers=91, shared=12544)
    assert wide == ptxas.Kernel(WIDE, "sm_90", 124, stack=104, spill_stores=72, spill_loads=48, shared=18688)
    assert (backward.registers, update.registers, update.shared) == (160, 40, 0)
    assert [kernel.spills for kernel in (scan, wide, backward, update)] == [False, True, False, False]
    assert ptxas.parse("") == []


@pytest.mark.skipif(not (shutil.which("c++filt") or shutil.which("cu++filt")), reason="no demangler is installed")
def test_names_are_demangled_and_the_common_scans_known() -> None:
    kernels = ptxas.demangled(ptxas.parse(OUTPUT))
    assert [kernel.name for kernel in kernels] == [
        "scan::forward<Cut<float, 128, 4, 4, 4, 3>>",
        "scan::forward<Cut<float, 128, 16, 4, 3, 2>>",
        "scan::backward<Cut<float, 128, 4, 4, 4, 3>>",
        "conv1d::update",
    ]
    assert [ptxas.is_common(kernel) for kernel in kernels] == [True, False, True, False]
    assert ptxas.rows(kernels)[1][:3] == ["sm_90", "`conv1d::update`", "40"]


def test_names_stay_where_nothing_demangles_them() -> None:
    with patch.object(shutil, "which", return_value=None):
        assert ptxas.demangled(ptxas.parse(OUTPUT)) == ptxas.parse(OUTPUT)


def test_only_spills_of_the_common_scans_are_complained_of() -> None:
    fine = [
        ptxas.Kernel(f"scan::{way}<Cut<float, 128, 4, 4, 4, 3>>", "sm_80", registers=90)
        for way in ("forward", "backward")
    ]
    wide = ptxas.Kernel("scan::forward<Cut<float, 128, 16, 4, 3, 2>>", "sm_80", spill_loads=8)
    assert ptxas.complaints([*fine, wide]) == []
    spilling = ptxas.Kernel(fine[0].name, "sm_80", spill_stores=8, spill_loads=12)
    (sentence,) = ptxas.complaints([spilling, fine[1]])
    assert "spills on sm_80: 8 bytes stored, 12 loaded" in sentence
    (sentence,) = ptxas.complaints([wide, fine[0]])
    assert sentence == "No scan of 16 states, forward and backward, was compiled for sm_80."


@pytest.mark.parametrize(
    ("line", "warns"),
    [
        ('scan.cuh(12): warning #177-D: variable "x" was declared but never referenced', True),
        ("ptxas warning : Registers are spilled to local memory in function 'f'", True),
        ("nvcc warning : Support for offline compilation for sm_70 is deprecated", True),
        ("scan.cuh:3:5: warning: unused variable 'x' [-Wunused-variable]", True),
        ("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized", True),
        ("warning: BuildPackage: byte-compiling is disabled, skipping.", False),
        ("ptxas info    : Used 40 registers, used 0 barriers", False),
    ],
)
def test_warnings_of_the_compilers_are_found(line: str, warns: bool) -> None:
    assert ptxas.warnings(f"{OUTPUT}{line}\n") == ([line] if warns else [])


def fake_package(folder: Path, stdout: str, code: int = 0) -> None:
    package = folder / "mamba-1p1p1"
    package.mkdir()
    (package / "setup.py").write_text(
        "import os, sys\nprint(open('told').read(), end='')\n"
        "print(os.environ['TORCH_CUDA_ARCH_LIST'], os.environ['NVCC_APPEND_FLAGS'], os.environ['MAMBA_FORCE_BUILD'])\n"
        f"assert 'MAMBA_SKIP_CUDA_BUILD' not in os.environ\nsys.exit({code})\n"
    )
    (package / "told").write_text(stdout)


@pytest.mark.skipif(not shutil.which("c++filt"), reason="no demangler is installed")
def test_a_build_collects_kernels_and_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    monkeypatch.setenv("MAMBA_SKIP_CUDA_BUILD", "1")
    fake_package(tmp_path, OUTPUT + "ptxas warning : something\n")
    found = commands.build("mamba-1p1p1", tmp_path / "out", "9.0", {})
    assert found.failures == ["A compiler warned: ptxas warning : something"]
    assert len(found.measured["kernels"]) == 4
    assert "4 kernels" in found.notes[0]


def test_a_build_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    fake_package(tmp_path, "scan.cuh(3): error: expected a ;\n", 1)
    (failure,) = commands.build("mamba-1p1p1", tmp_path / "out", "9.0", {}).failures
    assert failure.startswith("Compiling mamba-1p1p1 for 9.0 ended with status 1:")
    assert "expected a ;" in failure
    assert "9.0 -Xptxas -v 1" in failure


def test_a_command_past_its_time_is_stopped_and_one_that_is_missing_named() -> None:
    late = commands.run([sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"], 2)
    assert late.code is None
    assert late.why_not("It") == ["It ran past its time:\non"]
    assert "cannot be started" in commands.run(["/no/such/tool"], 2).stderr


def test_tests_are_counted(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_good(): pass\ndef test_bad(): assert not 'this'\n")
    found = commands.pytest(["test_some.py"], (), 60, {}, tmp_path)
    assert "1 failed, 1 passed in" in found.notes[0]
    assert "assert not 'this'" in found.failures[0]
    assert commands.pytest(["test_some.py"], ("-k", "good"), 60, {}, tmp_path).failures == []


# --- measuring ------------------------------------------------------------------------------------------------------


def test_floors_are_bytes_and_exponentials_over_their_rates() -> None:
    known = ceilings.Ceilings(bytes_per_second=4e12, exps_per_second=2e12, measured_how="told")
    assert known.floors(8, 6) == (2e-12, 3e-12)


def test_bytes_of_a_scan_are_those_of_its_inputs_and_outputs() -> None:
    *tensors, softplus, reverse, keep = ops.OPS["scan"].draw(ops.Sizes(), CPU)
    assert (softplus, reverse, keep) == (True, False, False)
    sequence, states = 64 * 384 * 197 * 2, 64 * 16 * 197 * 2
    assert ops.size_of(*tensors) == 3 * sequence + 2 * states + 4 * (384 * 16 + 2 * 384)
    assert ops.OPS["scan"].exps(ops.Sizes()) == 64 * 384 * 197 * 16


def test_what_a_backward_kept_is_no_byte_that_others_must_read() -> None:
    for name in ("scan backward", "both scans backward"):
        op = ops.OPS[name]
        given = op.prepare(*op.draw(TINY, CPU))
        states = next(value for value in given[1:] if isinstance(value, torch.Tensor))
        assert ops.size_of(given) - ops.size_of(op.own(*given)) == ops.size_of(states)


@pytest.mark.parametrize("name", ops.OPS)
def test_every_op_is_compared_and_timed(name: str) -> None:
    found = ops.measure_op(name, CPU, ceilings.Ceilings(1e9, 1e8, "told"), TINY, rounds=2)
    assert found.failures == []
    (title,) = found.tables
    backends = ops.backends_for(CPU)
    assert [line[:2] for line in found.tables[title][1:]] == [[name, backend] for backend in backends]
    measured = found.measured[f"{name} on torch"]
    assert measured["over_larger_floor"] * max(measured["floors_seconds"]) == pytest.approx(measured["median"])
    asked = [bound.statement for bound in found.bounds]
    assert len(asked) == (len(backends) - 1 if ops.OPS[name].must else 0)


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "backends_for", lambda device: ["native", "torch"])
    monkeypatch.setattr(ops, "use_backend", lambda name: patch.dict(os.environ, RUNS_ON=name))
    wrong = {"native": 1.5, "torch": 1.0}
    op = ops.Op(lambda sizes, device: (torch.ones(3),), lambda x: x * wrong[os.environ["RUNS_ON"]])
    monkeypatch.setitem(ops.OPS, "wrong", op)
    found = ops.measure_op("wrong", CPU, ceilings.Ceilings(1.0, 1.0, "told"), TINY, 1)
    assert found.failures == ["wrong: native is 5.0e-01 away from torch: it was not timed."]
    assert list(found.measured) == ["wrong on torch"]


def test_numbers_that_are_none_are_errors() -> None:
    assert ops.error_of([torch.tensor([float("nan")])], [torch.ones(1)]) == float("inf")
    assert ops.error_of([torch.full((4,), 1.1)], [torch.ones(4)]) == pytest.approx(0.1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_exponentials_are_computed_and_counted() -> None:
    program = (
        "import torch\nfrom benchmarks.gpu import exp_rate\n"
        "out = torch.full((2 * exp_rate.BLOCK,), float('nan'))\n"
        "assert exp_rate.run_exponentials(out, 3) == 6 * exp_rate.BLOCK\n"
        "x = torch.arange(len(out)) * 1e-9\n"
        "for _ in range(3): x = torch.exp2(-x)\n"
        "torch.testing.assert_close(out, x)\n"
    )
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_training_steps_are_compared() -> None:
    found = networks.measure_step(CPU, 2, batch=2, pixels=8, deit=Flat, vim=Flat)
    (title,) = found.tables
    assert [line[0].partition(",")[0] for line in found.tables[title][1:]] == ["DeiT-Tiny", "Vim-Tiny"]
    (bound,) = found.bounds
    assert (bound.must, bound.aim) == (2.0, 1.5)
    assert bound.measured > 0


def test_inference_is_compared_per_batch() -> None:
    found = networks.measure_inference(CPU, 2, (1, 2), 8, Flat, Flat)
    (title,) = found.tables
    assert [line[1] for line in found.tables[title][1:]] == ["1"] * 3 + ["2"] * 3
    assert all("the paper (arXiv 2401.09417) claims 2.8 times" in note for note in found.notes)
    assert len(found.notes) == 4


def test_a_network_that_memory_lacks_for_is_named() -> None:
    def fail() -> None:
        raise torch.cuda.OutOfMemoryError

    lines, measured = networks._compare(CPU, {"large": fail, "small": lambda: None}, 1, 6)
    assert [line[:3] for line in lines if line[0] == "large"] == [["large", "6", "out of memory"]]
    assert measured["large, batch 6"] is None
    assert "small, batch 6" in measured


def test_attention_is_materialised_only_if_asked() -> None:
    for materialised in (False, True):
        model = networks.make_deit(32, materialised)
        kinds = {module.fused_attn for module in model.modules() if hasattr(module, "fused_attn")}
        assert kinds == {not materialised}


def test_mixers_train_kept_and_recomputed() -> None:
    found = networks.measure_mixers(CPU, 1, batch=1, length=5, features=8)
    assert len(next(iter(found.tables.values()))) == 1 + 2 * 5


def test_losses_fall_and_are_the_same_on_the_same_device() -> None:
    make = partial(tiny, "vim_pico_patch4_32")
    found = training.check_training(CPU, steps=8, batch=4, pixels=32, make=make)
    assert found.failures == []
    (measured,) = found.measured.values()
    assert measured["fp32"] == measured["cpu_fp32"]
    assert measured["bf16"][-1] < measured["bf16"][0]


def test_losses_that_stay_or_differ_are_failures() -> None:
    for falling, shared, told in (
        ([2.0, 2.0, 2.0], [2.0], "did not fall"),
        ([2.0, float("nan"), 0.1], [2.0], "did not fall"),
        ([2.0, 0.1, 0.1, 0.1], [2.1], "must be within"),
        ([2.0, 0.1, 0.1, 0.1], [float("nan")], "must be within"),
    ):
        findings = Findings(tables={"Training run": [[]]})
        training._judge(findings, "cuda", falling, shared, [2.0])
        (failure,) = findings.failures
        assert told in failure


def test_a_part_that_breaks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(device: timing.Device, quick: bool) -> Findings:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setitem(measure.PARTS, "step", broken)
    monkeypatch.setattr(sys, "argv", ["measure", "step", str(tmp_path / "told"), "--device", "cpu"])
    assert measure.main() == 1
    told = Findings.from_json(json.loads((tmp_path / "told").read_text()))
    assert told.failures == ["step: RuntimeError: an illegal memory access"]


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "name"),
    [
        ("NVIDIA H200", "gpu_nvidia-h200"),
        ("NVIDIA A100-SXM4-80GB", "gpu_nvidia-a100-sxm4-80gb"),
        ("Tesla V100 (PCIe)", "gpu_tesla-v100-pcie"),
        ("../..", "gpu_unknown"),
    ],
)
def test_cards_name_files(card: str, name: str) -> None:
    assert report.file_name(card) == name


@pytest.mark.parametrize(
    ("measured", "verdict"), [(1.4, "yes, the aim too"), (1.9, "yes"), (2.1, "NO"), (float("nan"), "NO")]
)
def test_bounds_have_verdicts(measured: float, verdict: str) -> None:
    assert Bound("a step", 2.0, measured, 1.5).verdict == verdict


def test_parts_of_a_step_are_joined() -> None:
    one = Findings({"t": [["a"], ["1"]]}, {"list": [1], "x": 1}, notes=["first"])
    two = Findings({"t": [["a"], ["2"]]}, {"list": [2]}, failures=["no"])
    left_out = Findings(skipped="nothing is there")
    whole = join([one, two, left_out])
    assert whole.tables == {"t": [["a"], ["1"], ["2"]]}
    assert whole.measured == {"list": [1, 2], "x": 1}
    assert (whole.status, whole.notes) == ("FAILED", ["first", "SKIPPED: nothing is there."])
    assert one.tables == {"t": [["a"], ["1"]]}
    assert join([left_out]).status == "SKIPPED"
    assert join([one, left_out]).status == "passed"


def content(card: str | None, **found: Findings) -> dict[str, Any]:
    commit = {"id": "0123456789abcdef", "dirty": True}
    return {
        "format": report.FORMAT,
        "machine": {"card": card, "cpu": "some"},
        "not_run": [],
        "steps": {
            name: {**each.as_json(), "seconds": 3.2, "date": "2026-01-01", "commit": commit}
            for name, each in found.items()
        },
    }


def test_a_report_tells_everything_and_keeps_the_other_steps(tmp_path: Path) -> None:
    tables = {"Ops": [["op", "time"], ["scan", "1 ms"]]}
    first = Findings(tables, notes=["a note"], bounds=[Bound("scan over its floor", 1.5, 1.61)])
    report.write(content("NVIDIA H200", ops=first, tests=Findings()), tmp_path, "gpu_nvidia-h200")
    target = report.write(content("NVIDIA H200", tests=Findings(failures=["1 failed"])), tmp_path, "gpu_nvidia-h200")
    text = target.read_text()
    for part in ("# scripts/gpu_check on NVIDIA H200", "- a note", "| scan | 1 ms |", "| 1.61", "| NO", "1 failed"):
        assert part in text
    assert "0123456789ab and changes" in text
    kept = json.loads(target.with_suffix(".json").read_text())["steps"]
    assert {name: step["status"] for name, step in kept.items()} == {"ops": "passed", "tests": "FAILED"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu_nvidia-h200.json", "gpu_nvidia-h200.md"]
    report.write(content("NVIDIA A100", tests=Findings()), tmp_path, "gpu_nvidia-h200")
    assert list(json.loads(target.with_suffix(".json").read_text())["steps"]) == ["tests"]


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def plan_of(monkeypatch: pytest.MonkeyPatch, **jobs: Any) -> None:
    plan = [steps.Step(name, "does it", [job]) for name, job in jobs.items()]
    monkeypatch.setattr(steps, "without_gpu", lambda *arguments: plan)


@pytest.mark.usefixtures("no_gpu")
def test_a_failure_lets_the_other_steps_run(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    def breaks() -> Findings:
        raise OSError("the disk is full")

    plan_of(monkeypatch, build=breaks, tests=lambda: Findings(notes=["3 passed"]))
    assert cli.run(["--output", str(tmp_path / "new")]) == 1
    told = capsys.readouterr().out
    assert "these cannot run: training, ops, step, inference, mixers." in told
    assert "OSError: the disk is full" in told
    assert "3 passed" in told
    assert told.rstrip().endswith("FAILED: build")
    assert (tmp_path / "new" / "gpu_none.md").is_file()


@pytest.mark.usefixtures("no_gpu")
def test_what_is_missing_is_skipped_aloud(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(commands, "find_nvcc", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda *arguments, **options: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert cli.run([]) == 0
    told = capsys.readouterr().out
    for part in ("nvcc was not found", "g++ is not installed", "triton is not installed"):
        assert f"SKIPPED: {part}" in told


@pytest.mark.usefixtures("no_gpu")
def test_every_architecture_of_the_toolkit_is_compiled_unless_one_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_90\\nsm_120\\nsm_75\\n'\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(commands, "find_nvcc", lambda: str(nvcc))
    built = []
    monkeypatch.setattr(
        commands, "build", lambda package, folder, architecture, _: built.append((package, architecture))
    )
    for asked, expected in ((None, ["7.5", "9.0", "12.0"]), ("9.0", ["9.0"])):
        built.clear()
        (step,) = steps.without_gpu(tmp_path, asked, ["build"], False)
        for job in step.jobs:
            job()
        assert built == [(package, name) for name in expected for package in ("causal-conv1d", "mamba-1p1p1")]


def test_with_a_gpu_every_step_is_planned_and_the_build_always(tmp_path: Path) -> None:
    plan = steps.with_gpu(tmp_path / "all", "9.0", steps.NAMES, False)
    assert [step.name for step in plan] == list(steps.NAMES)
    assert (tmp_path / "all" / "tests" / "cases.py").is_file()
    few = steps.with_gpu(tmp_path / "few", "9.0", ("ops",), True)
    assert [step.name for step in few] == ["build", "ops"]


@pytest.mark.parametrize("arguments", [["--steps", "all"], ["--arch", "sm_90"], ["--nothing"]])
def test_bad_arguments_are_refused(arguments: list[str], capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.run(arguments)
    assert "error:" in capsys.readouterr().err
