"""The benchmarks measure what they say. Tiny sizes and made-up numbers: no test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from benchmarks.cases import Case, Claim, Comparison
from benchmarks.memory import Memory
from benchmarks.runner import Entry, Outcome, Result, Spread

from benchmarks import cases, cli, machine, memory, paths, report, runner, subjects
from mamba_ssm.ops.selective_scan import FAMILY

ROOT = Path(__file__).resolve().parents[2]
VIM, LOOP, DEIT = Case("vim_tiny", "torch"), Case("vim_tiny", "loop"), Case("deit_tiny")
CLAIMS = (
    Claim("seconds", VIM, LOOP, must=0.2),
    Claim("seconds", VIM, DEIT, must=3.0, aim=2.0),
    Claim("peak_bytes", VIM, None, must=1.5e9),
)
MADE_UP = Outcome(
    "made_up",
    Comparison("made up", (VIM, LOOP, DEIT), DEIT, CLAIMS, threads=1, rounds=5),
    (
        # The whole third round was disturbed, ten times slower.
        Result(VIM, (0.4, 0.4, 4.0, 0.5, 0.3), Memory(imports=300_000_000, loaded=400_000_000, peak=600_000_000)),
        Result(LOOP, (1.0, 1.0, 10.0, 1.0, 1.0)),
        Result(DEIT, (0.1, 0.1, 1.0, 0.1, 0.1)),
    ),
)
TINY = Comparison(
    "tiny",
    (Case("vim_pico", "torch", 32), Case("vim_pico", "loop", 32), Case("deit_tiny", pixels=32)),
    Case("deit_tiny", pixels=32),
    (Claim("seconds", Case("vim_pico", "torch", 32), Case("vim_pico", "loop", 32), must=1e-9),),
    threads=1,
    rounds=2,
)


def test_calls_are_interleaved_and_timed_without_their_context() -> None:
    events: list[str] = []
    ticks = iter(range(100))

    def entry(name: str) -> Entry:
        @contextmanager
        def path() -> Iterator[None]:
            events.append(f"enter {name}")
            yield
            events.append(f"leave {name}")

        return Entry(path, lambda: events.append(name))

    def clock() -> float:
        events.append("clock")
        return next(ticks) ** 2 / 100

    seconds = runner.interleave([entry("a"), entry("b")], 3, clock)
    # 1 - 0, 25 - 16, 81 - 64 hundredths, and 9 - 4, 49 - 36, 121 - 100; before a short call comes an untimed one.
    assert seconds == [pytest.approx((0.01, 0.09, 0.17)), pytest.approx((0.05, 0.13, 0.21))]

    def turn(name: str, short: bool) -> list[str]:
        return [f"enter {name}", *[name] * short, "clock", name, "clock", f"leave {name}"]

    assert events == [
        event
        for short in ((True, True), (True, True), (True, False))
        for name, before in zip("ab", short, strict=True)
        for event in turn(name, before)
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0], Spread(2.0, 2.0, 2.0)),
        ([3.0, 1.0], Spread(2.0, 1.5, 2.5)),
        ([5.0, 1.0, 4.0, 2.0, 3.0], Spread(3.0, 2.0, 4.0)),
    ],
)
def test_spread(values: list[float], expected: Spread) -> None:
    assert Spread.of(values) == expected


def test_ratios_are_taken_round_by_round() -> None:
    vim, loop, deit = MADE_UP.results
    over_loop, over_deit = vim.ratio(loop), MADE_UP.over_base(vim)
    assert [over_loop.low, over_loop.median, over_loop.high] == pytest.approx([0.4, 0.4, 0.4])
    assert [over_deit.low, over_deit.median, over_deit.high] == pytest.approx([4.0, 4.0, 4.0])
    assert MADE_UP.over_base(deit) == Spread(1.0, 1.0, 1.0)
    assert vim.time == Spread(0.4, 0.4, 0.5)


def test_claims_are_judged_by_their_quantity() -> None:
    judged = report.outcome_json(MADE_UP)["claims"]
    assert [claim["holds"] for claim in judged] == [False, False, True]
    assert judged[1]["measured"]["median"] == pytest.approx(4.0)
    assert judged[2]["measured"]["median"] == 600_000_000
    rows = report.claim_rows([MADE_UP])[1:]
    assert [row[-1] for row in rows] == ["NO", "NO", "yes"]
    assert rows[1][:4] == [
        "time of Vim-Tiny, PyTorch path over DeiT-Tiny, 224 px, threads: 1", "3", "2", "4.00 (4.00 to 4.00)",
    ]  # fmt: skip
    assert rows[2][1:4] == ["1,500 MB", "", "600 MB"]


def test_memory_ratio_and_missing_memory() -> None:
    over = Claim("peak_bytes", VIM, DEIT, must=2)
    assert MADE_UP.measured(over) is None
    both = Outcome(
        "two",
        MADE_UP.comparison,
        tuple(Result(case, (1.0,), Memory(1, 2, peak)) for case, peak in ((VIM, 30), (LOOP, 9), (DEIT, 20))),
    )
    assert both.measured(over) == Spread(1.5, 1.5, 1.5)
    assert both.measured(Claim("seconds", VIM, None, must=1)) == Spread(1.0, 1.0, 1.0)


def test_tables() -> None:
    rows = report.measurement_rows([MADE_UP])
    assert rows[1] == [
        "Vim-Tiny, PyTorch path", "224 px", "1", "400.0 ms (400.0 to 500.0)", "4.00 (4.00 to 4.00)", "600 MB",
    ]  # fmt: skip
    assert rows[3][4:] == ["1 (base)", ""]
    lines = report.markdown(rows).splitlines()
    assert len(lines) == 2 + 3
    assert {line.count("|") for line in lines} == {7}
    assert len(report.aligned(rows).splitlines()) == 1 + 3


def test_a_wide_spread_is_told() -> None:
    (warning,) = report.noise_warnings([MADE_UP])
    assert "Vim-Tiny, PyTorch path is 25 % of their median wide" in warning


def test_a_tiny_comparison_runs_whole() -> None:
    threads = torch.get_num_threads()
    said: list[str] = []
    outcome = runner.run_comparison("tiny", TINY, said.append)
    assert [result.case for result in outcome.results] == list(TINY.cases)
    assert all(len(result.seconds) == 2 and min(result.seconds) > 0 for result in outcome.results)
    assert all(result.memory is None for result in outcome.results)
    assert torch.get_num_threads() == threads
    assert said[-1] == "tiny: 2 rounds, threads: 1"


def test_a_wrong_result_is_not_timed() -> None:
    one, other = Case("scan", "torch", 32), Case("scan", "loop", 32)
    good = torch.tensor([1.0, -2.0])
    errors = runner.check_agreement([(one, [good]), (other, [good + 1e-5]), (DEIT, [torch.zeros(3)])])
    assert list(errors) == [other]
    assert errors[other] == pytest.approx(5e-6, rel=0.1)
    for bad in (good + 1e-3, good * float("nan")):
        with pytest.raises(RuntimeError, match=r"scan \(loop\), 32 px, batch 1 and scan \(torch\).*nothing was timed"):
            runner.check_agreement([(one, [good]), (other, [bad])])
        with pytest.raises(RuntimeError, match="their gradient 1 differs"):
            runner.check_agreement([(one, [good, good]), (other, [good, bad + 1e-3])])


def test_results_are_held_to_the_widest_dtype() -> None:
    wide, narrow, plain = Case("scan", "loop", dtype="fp64"), Case("scan", dtype="bf16"), Case("scan")
    good = torch.tensor([1.0, -2.0])
    errors = runner.check_agreement([(narrow, [good.bfloat16() * 1.01]), (plain, [good]), (wide, [good.double()])])
    assert list(errors) == [plain, narrow]
    assert errors[plain] == 0
    assert 0.005 < errors[narrow] < 0.015
    with pytest.raises(RuntimeError, match=r"scan \(auto, bf16\), 224 px, batch 1 and scan \(auto\)"):
        runner.check_agreement([(narrow, [good.bfloat16() * 1.1]), (plain, [good])])


@pytest.mark.parametrize("op", cases.OPS)
def test_all_implementations_of_an_op_agree(op: str) -> None:
    entries = [Case(subject, path, 48, 2, *dtype) for subject, path, *dtype in cases.OPS[op]]  # type: ignore[arg-type]
    results = [(case, runner._warm_up(case, subjects.build(case))) for case in entries]
    assert {subjects.result_key(case)[0] for case in entries} == ({op, "copy"} if op == "conv" else {op})
    assert results[0][1][0].shape[0] == 2
    assert len(runner.check_agreement(results)) == len(entries) - (2 if op == "conv" else 1)


@pytest.mark.parametrize("subject", ["vim_pico", "block", "mixer", "scan", "inner", "conv", "norm"])
def test_a_backward_pass_computes_every_gradient(subject: str) -> None:
    works = []
    for path in ("auto", "torch"):
        case = Case(subject, path, pixels=32, mode="train")
        works.append((case, work := subjects.build(case)))
        with paths.surroundings(case):
            first, again = [value.clone() for value in work.result()], work.result()
        assert len(first) == 1 + len(work.leaves) > 1
        assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))  # gradients do not add up
    results = [(case, runner._warm_up(case, work)) for case, work in works]
    assert list(runner.check_agreement(results)) == [works[1][0]]


def test_a_step_computes_what_a_backward_pass_does_each_time() -> None:
    backward, step = (subjects.build(Case("vim_pico", pixels=32, mode=mode)) for mode in ("train", "step"))
    expected = [value.clone() for value in backward.result()]
    for _ in range(2):
        assert all(torch.equal(*pair) for pair in zip(expected, step.result(), strict=True))


@pytest.mark.parametrize("subject", ["vim_pico", "deit_tiny", "block", "scan"])
def test_weights_and_inputs_are_in_the_dtype_of_the_case(subject: str) -> None:
    wide, narrow = (Case(subject, pixels=32, dtype=dtype) for dtype in ("fp32", "bf16"))
    results = [(case, runner._warm_up(case, subjects.build(case))) for case in (wide, narrow)]
    assert [result[0].dtype for _, result in results] == [torch.float32, torch.bfloat16]
    assert list(runner.check_agreement(results)) == [narrow]


def test_a_compiled_case_is_compiled_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def compiled(function: Callable[..., object], **options: object) -> Callable[..., object]:
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    case = Case("vim_pico", pixels=32, mode="compiled")
    assert subjects.build(Case("vim_pico", pixels=32)).call().shape == (1, 1000)
    assert not asked
    assert runner._warm_up(case, subjects.build(case))[0].shape == (1, 1000)
    assert asked == [{"fullgraph": True}]


def test_the_loop_replaces_the_scans_and_puts_them_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {op: FAMILY.choose(op, "cpu") for op in paths.LOOPS}
    calls: list[bool] = []

    def counted(*arguments: object, reverse: bool = False, **options: object) -> object:
        calls.append(reverse)
        return definition(*arguments, reverse=reverse, **options)

    definition = paths.scan_reference
    monkeypatch.setattr(paths, "scan_reference", counted)
    with torch.inference_mode(), paths.step_by_step():
        subjects.build(Case("vim_pico", pixels=32)).call()
        assert calls == [False, True] * 6  # six blocks, two directions
        subjects.build(Case("scan", pixels=32)).call()
    assert len(calls) == 13
    assert {op: FAMILY.choose(op, "cpu") for op in paths.LOOPS} == kernels
    with pytest.raises(KeyError), paths.step_by_step():
        raise KeyError
    assert {op: FAMILY.choose(op, "cpu") for op in paths.LOOPS} == kernels


def test_networks_take_large_pictures() -> None:
    for name in ("vim_tiny", "deit_tiny"):
        call = subjects.build(Case(name, pixels=64, batch=2)).call
        assert call.args[0].shape == (2, 3, 64, 64)  # type: ignore[attr-defined]
        with torch.inference_mode():
            assert call().shape == (2, 1000)
    assert (subjects.tokens(224), subjects.tokens(1248)) == (197, 6085)


def test_memory_is_that_of_a_fresh_process() -> None:
    ballast = torch.ones(150_000_000)  # 600 MB here must not be counted there
    here = memory._most_so_far()
    found = memory.measure_memory(Case("norm", pixels=32), threads=1)
    if here is None or found is None:
        pytest.skip("this system does not tell the peak memory of a process")
    assert 0 < found.imports <= found.loaded <= found.peak
    assert found.increase == found.peak - found.loaded
    assert found.scratch is None or found.scratch < 5e6
    assert found.peak < here - ballast.nbytes / 2


@pytest.mark.parametrize(
    ("code", "errors", "reason"), [(1, "Traceback\nKeyError: 'x'\n", "KeyError: 'x'"), (-9, "", "exit code -9")]
)
def test_a_failing_memory_process_says_why(
    code: int, errors: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], code, stdout="", stderr=errors)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=rf"memory of norm \(auto\), 224 px, batch 1 failed: {reason}"):
        memory.measure_memory(Case("norm"), threads=1)


def test_machine_versions_and_commit() -> None:
    found = machine.describe_machine()
    assert found["cpu"]
    assert found["cores"] >= 1
    versions = machine.describe_versions()
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__
    assert versions["timm"]
    assert set(machine.describe_commit()) == {"id", "dirty"}


def test_a_machine_without_git_or_load_average(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine.describe_commit() == {"id": None, "dirty": None}
    monkeypatch.delattr(os, "getloadavg", raising=False)
    assert machine.load_average() is None


@pytest.mark.parametrize(("load", "warned"), [(None, False), (0.0, False), (0.3, False), (0.31, True), (6.0, True)])
def test_a_loaded_machine_is_told(load: float | None, warned: bool) -> None:
    assert (machine.load_warning(load) is not None) == warned


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMPARISONS", {"tiny": TINY, "tiny_too": TINY, "other": TINY})
    monkeypatch.setattr(cli, "FRONT_PAGE", {"tiny": TINY, "other": TINY})
    monkeypatch.setattr("benchmarks.machine.load_average", lambda: 5.0)


@pytest.mark.usefixtures("tiny_registry")
def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    assert cli.run(["tiny", "--rounds", "3", "--markdown", "--json", str(target)]) == 0
    printed = capsys.readouterr()
    assert re.search(r"^\| Vim-Pico, PyTorch path \| 32 px \| 1 \| [\d.,]+ ms \(", printed.out, re.MULTILINE)
    assert "| 1e-09 |  |" in printed.out
    assert "| NO |" in printed.out
    assert printed.err.count("WARNING: other programs keep this machine busy (load average 5.00") == 2
    found = json.loads(target.read_text())
    assert list(found) == [
        "format", "date", "command", "machine", "versions", "commit", "backends", "load_average", "comparisons",
    ]  # fmt: skip
    (comparison,) = found["comparisons"]
    assert (comparison["name"], comparison["threads"], comparison["rounds"]) == ("tiny", 1, 3)
    assert comparison["base"] == {
        "subject": "deit_tiny", "path": "auto", "pixels": 32, "batch": 1, "dtype": "fp32", "mode": "inference",
    }  # fmt: skip
    vim, loop, deit = comparison["results"]
    assert [result["label"] for result in (vim, loop)] == ["Vim-Pico, PyTorch path", "Vim-Pico, step-by-step loop"]
    ratios = sorted(mine / base for mine, base in zip(vim["seconds"], deit["seconds"], strict=True))
    assert vim["over_base"]["median"] == pytest.approx(ratios[1])
    assert vim["memory_bytes"] is None
    assert comparison["claims"][0]["holds"] is False
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("tiny_registry")
def test_what_is_selected() -> None:
    def selected(*arguments: str) -> dict[str, Comparison]:
        return cli.select(cli.build_parser().parse_args(arguments))

    assert list(selected()) == ["tiny", "other"]
    assert list(selected("tiny*")) == ["tiny", "tiny_too"]
    quick = selected("--quick", "--threads", "7")
    assert list(quick) == ["tiny"]
    assert (quick["tiny"].rounds, quick["tiny"].threads, quick["tiny"].memory) == (cli.QUICK_ROUNDS, 7, False)


@pytest.mark.usefixtures("tiny_registry")
def test_bad_input_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing" / "found.json"
    for arguments, sentence in (
        (["nothing"], "error: no comparison is called 'nothing'; `scripts/bench --list` prints all names."),
        (["--json", str(missing)], f"error: {missing} cannot be written: there is no folder {missing.parent}."),
        (["tiny", "--json", str(tmp_path)], f"error: {tmp_path} cannot be written: it is a folder."),
    ):
        assert cli.run(arguments) == 2
        assert capsys.readouterr().err.strip() == sentence


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_script_runs_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(ROOT / "scripts" / "bench"), "-h"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: scripts/bench" in done.stdout
