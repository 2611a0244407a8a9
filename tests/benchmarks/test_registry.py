"""The comparisons, their claims, and what cannot run or does not apply here."""

from __future__ import annotations

import builtins
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from benchmarks.cases import COMPARISONS, GROUPS, OVER_DEIT, Case, Claim, Comparison
from benchmarks.memory import Memory
from benchmarks.runner import Outcome, Result

from benchmarks import cases, cli, machine, memory, paths, peers, report, runner, subjects

SCAN, LOOP = Case("scan", pixels=32), Case("scan", "loop", 32)


def test_every_registered_comparison_is_well_formed() -> None:
    for name, comparison in COMPARISONS.items():
        assert comparison.base in comparison.cases, name
        assert len(set(comparison.cases)) == len(comparison.cases), name
        for case in comparison.cases:
            assert case.subject in subjects.SUBJECTS
            assert case.path in paths.PATHS
            assert case.path in paths.TITLES
            assert case.mode in report.MODES
            assert not (case.mode == "train" and case.path == "loop")  # which runs forwards only
        for claim in comparison.claims:
            assert claim.of in comparison.cases
            assert claim.over is None or claim.over in comparison.cases
            assert claim.quantity in report.QUANTITIES
            assert claim.needs is None or claim.needs in machine.ABILITIES
            assert comparison.memory or not claim.quantity.endswith("_bytes")
            if claim.quantity == "seconds_per_element":
                assert subjects.SUBJECTS[claim.of.subject].elements(claim.of) > 0


def test_the_comparisons_cover_sizes_batches_threads_paths_dtypes_and_modes() -> None:
    all_cases = [case for comparison in COMPARISONS.values() for case in comparison.cases]
    assert {224, 512, 1248, 2048} <= {case.pixels for case in all_cases}
    assert {case.batch for case in all_cases if case.subject != "copy"} == {1, 8}
    assert {comparison.threads for comparison in COMPARISONS.values()} == {1, 2}
    assert {case.path for case in all_cases} == set(paths.PATHS)
    assert {case.mode for case in all_cases} == {"inference", "train", "step", "compiled"}
    assert {"fp32", "bf16"} <= {case.dtype for case in all_cases}
    assert {case.path for case in COMPARISONS["paths_vim_tiny"].cases} == set(paths.PATHS)


def test_every_claim_belongs_to_one_comparison() -> None:
    found = {
        (name, claim.quantity, claim.must, claim.aim) for name in GROUPS["claims"] for claim in COMPARISONS[name].claims
    }
    assert found == {
        ("vim_tiny_224", "seconds", 1.25, 1.0),
        ("vim_tiny_224", "seconds", 0.2, None),
        ("vim_tiny_224", "seconds", 7, 5.5),
        ("tiny_batch8", "seconds", 1.35, 1.15),
        ("vim_tiny_512", "seconds", 0.85, 0.65),
        ("vim_tiny_1248", "seconds", 0.30, 0.23),
        ("vim_tiny_1248", "increase_bytes", 0.8, 0.5),
        ("vim_tiny_1248", "peak_bytes", 1.5e9, None),
        ("vmamba_tiny_224", "seconds", 1.25, None),
        ("vmamba_tiny_224", "seconds", 1.0, None),
        ("vmamba_tiny_224", "seconds", 3, None),
        ("vmamba_tiny_1024", "peak_bytes", 1.0, None),
        ("small_batch1", "seconds", 1.15, 1.05),
        ("base_batch1", "seconds", 1.15, 1.05),
        ("bf16_224", "seconds", 0.85, 0.7),
        ("bf16_512", "seconds", 0.7, 0.55),
        ("bf16_1248", "seconds", 0.55, 0.40),
        ("train_batch8", "seconds", 1.8, 1.3),
        ("step_batch8", "seconds", 1.8, None),
        ("recomputed_batch8", "allocated_bytes", 0.5, None),
        ("compiled_224", "seconds", 1.05, None),
        ("scan_224_threads1", "seconds_per_element", 0.20e-9, 0.14e-9),
        ("scan_224_threads1", "seconds_per_element", 0.32e-9, 0.24e-9),
        ("conv_1248_threads2", "seconds_per_element", 2.0, 1.3),
        ("inner_1248", "scratch_bytes", 8e6, 2e6),
        ("onnx_vim_tiny", "seconds", 9, 5),
        ("onnx_vim_tiny", "seconds", 1.3, None),
        ("onnx_vmamba_tiny", "seconds", 0.25, None),
        ("int8_vim_tiny", "seconds", 0.8, None),
        ("int8_vmamba_tiny", "seconds", 0.8, None),
    }
    claims = [claim for comparison in COMPARISONS.values() for claim in comparison.claims]
    assert len(set(claims)) == len(claims)
    assert len(claims) - len(found) == 6, "four claims of int8 share a bound in each of two comparisons"
    over_deit = [claim for claim in claims if claim.over and claim.over.subject.startswith("deit")]
    assert {claim.of.path for claim in over_deit if claim.must != 7} == {"auto"}
    assert len(OVER_DEIT) == 6


def test_memory_and_time_per_element_are_quantities() -> None:
    seconds = Claim("seconds_per_element", SCAN, None, must=1e-9)
    increase = Claim("increase_bytes", SCAN, LOOP, must=0.5)
    scratch = Claim("scratch_bytes", SCAN, None, must=2e6)
    comparison = Comparison("made up", (SCAN, LOOP), LOOP, (seconds, increase, scratch))
    elements = 384 * 5 * 16  # channels, tokens of 32 pixels, states
    results = (
        Result(SCAN, (2e-9 * elements, 3e-9 * elements), Memory(1, 10, 15, scratch=7), error=1e-7),
        Result(LOOP, (1.0, 1.0), Memory(1, 10, 30)),
    )
    outcome = Outcome("made_up", comparison, results)
    measured = [outcome.measured(claim) for claim in comparison.claims]
    assert [value and pytest.approx(value.median) for value in measured] == [2.5e-9, 0.25, 7]
    rows = report.claim_rows([outcome])[1:]
    assert [row[-1] for row in rows] == ["NO", "yes", "yes"]
    assert rows[0][1] == "1 ns"
    assert rows[0][3] == "2.500 ns (2.250 to 2.750)"
    assert "error" not in report.measurement_rows([outcome])[0]
    unknown = Claim("scratch_bytes", LOOP, None, must=1)  # a system that does not tell
    assert outcome.measured(unknown) is None
    assert report._verdict(unknown, None) == ""


def test_an_aim_that_is_reached_is_told() -> None:
    claim = Claim("seconds", SCAN, None, must=2, aim=1)
    verdicts = [report._verdict(claim, runner.Spread.of([seconds])) for seconds in (0.5, 1.5, 2.5)]
    assert verdicts == ["yes, the aim too", "yes", "NO"]


@pytest.mark.parametrize(
    ("used", "needs", "reason"),
    [
        ("avx512", "AVX-512 kernels", None),
        ("avx2", "AVX-512 kernels", "the compiled kernels use avx2 here"),
        ("neon", "AVX2 kernels", "the compiled kernels use neon here"),
        ("", "AVX2 kernels", "there are no compiled kernels here"),
    ],
)
def test_a_claim_that_does_not_apply_is_told(
    used: str, needs: str, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_kernels", lambda: used)
    claim = Claim("seconds", SCAN, None, must=1, needs=needs)
    outcome = Outcome("made_up", Comparison("made up", (SCAN,), SCAN, (claim,)), (Result(SCAN, (2.0,)),))
    (told,) = report.outcome_json(outcome)["claims"]
    assert (told["does_not_apply"], told["holds"]) == (reason, False if reason is None else None)
    (row,) = report.claim_rows([outcome])[1:]
    assert row[-1] == ("NO" if reason is None else f"does not apply: {reason}")


@pytest.mark.parametrize(
    ("found", "applies"), [(["avx2"], False), (["avx512f", "avx512_bf16"], True), (["amx_bf16"], True)]
)
def test_bf16_is_claimed_only_where_the_processor_multiplies_it(
    found: list[str], applies: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "instruction_sets", lambda: found)
    assert (machine.ABILITIES["bf16 products"]() is None) == applies


def test_memory_beyond_the_result_counts_what_a_call_frees_again() -> None:
    def call() -> torch.Tensor:
        return torch.ones(5_000_000)[:1].expand(1_000_000).contiguous()  # 20 MB, then a result of 4 MB

    call()  # what it frees must be counted again
    found = memory._scratch(call)
    if found is None:
        pytest.skip("this system does not tell")
    assert 19e6 < found < 22e6


def test_allocated_memory_is_what_a_call_holds_at_once() -> None:
    def call() -> torch.Tensor:
        for _ in range(3):
            torch.ones(5_000_000).sum()  # 20 MB, freed each time
        return torch.ones(1_000_000) + torch.ones(1_000_000)  # three times 4 MB

    earlier = torch.ones(30_000_000)
    call()
    assert 20e6 <= memory._allocated(call) < 21e6
    assert earlier.nbytes == 120e6


# --- other packages -------------------------------------------------------------------------------------------------


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subjects, "find_spec", lambda name: None)


@pytest.mark.usefixtures("no_peers")
def test_a_missing_package_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    peer = Comparison("peer", (SCAN, Case("mambapy_scan", pixels=32)), SCAN)
    monkeypatch.setattr(cli, "COMPARISONS", {"own": Comparison("own", (SCAN,), SCAN), "other": peer})
    sentence = "mambapy is not installed; `pip install -r requirements/peers.txt` installs it"
    assert cli.run(["other"]) == 2
    assert capsys.readouterr().err == f"error: other cannot run: {sentence}.\n"
    assert cli.run(["oth*"]) == 2
    assert f"left out: other: {sentence}\n" in capsys.readouterr().err
    assert cli.run(["o*", "--rounds", "1"]) == 0
    printed = capsys.readouterr()
    assert f"left out: other: {sentence}\n" in printed.err
    assert "scan" in printed.out
    assert "mambapy" not in printed.out


def test_missing_compiled_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(subjects.FAMILY), "missing", lambda *_: "no compiler was found")
    assert subjects.missing(Case("scan", "native")) == "the compiled kernels cannot run here: no compiler was found"
    assert subjects.missing(Case("scan")) is None


def test_a_package_that_cannot_be_imported_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> ModuleType:
        if name.startswith("mambapy"):
            raise ImportError("it wants another torch")
        return original(name, *arguments, **options)

    ours = [sys.modules[name] for name in peers.OURS]
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(RuntimeError, match=r"mambapy cannot be used \(it wants another torch\); `pip install -r req"):
        subjects.build(Case("mambapy_scan", pixels=32))
    assert [sys.modules[name] for name in peers.OURS] == ours


PEERS = [name for name, subject in subjects.SUBJECTS.items() if subject.package and subject.requirements == "peers.txt"]


@pytest.mark.parametrize("subject", PEERS)
@pytest.mark.filterwarnings("default")
def test_other_packages_compute_the_same_by_themselves(subject: str, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Case(subject, pixels=32)
    if subjects.missing(peer) is not None:
        pytest.skip(str(subjects.missing(peer)))
    own = Case(subjects.SUBJECTS[subject].computes, pixels=32)
    result = runner._warm_up(own, subjects.build(own))
    with monkeypatch.context() as patch:
        patch.setattr(type(subjects.FAMILY), "choose", lambda *_: pytest.fail("ran a kernel of this repository"))
        theirs = runner._warm_up(peer, subjects.build(peer))
    assert list(runner.check_agreement([(own, result), (peer, theirs)])) == [peer]


@pytest.mark.parametrize("way", ["chunks", "chunk24", "operators"])
@pytest.mark.filterwarnings("ignore")
def test_onnx_files_compute_the_same(way: str) -> None:
    pytest.importorskip("onnxscript")
    case, own = (Case(name, pixels=32) for name in (f"vmamba_tiny_onnx_{way}", "vmamba_tiny"))
    if subjects.missing(case) is not None:
        pytest.skip(str(subjects.missing(case)))
    try:
        work = subjects.build(case)
    except RuntimeError as error:
        pytest.skip(str(error))  # the library was not built
    results = [(each, runner._warm_up(each, built)) for each, built in ((own, subjects.build(own)), (case, work))]
    assert list(runner.check_agreement(results)) == [case]


# --- the command ----------------------------------------------------------------------------------------------------


def test_groups_are_selected_and_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(cli.select(cli.build_parser().parse_args(["claims"]))) == GROUPS["claims"]
    assert cli.run(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [*cases.COMPARISONS, *GROUPS]


def test_a_long_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\n  no C++ compiler was found\nand 300 lines of what it wanted")

    monkeypatch.setattr(cli, "COMPARISONS", {"own": Comparison("own", (SCAN,), SCAN)})
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(runner, "build", fail)
    assert cli.run(["own"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: no C++ compiler was found."
