"""The command that measures throughput: what runs how often, and what it does without enough memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_calls import DIGITS, WEIGHTS, Outcome, call_elsewhere, call_here
from PIL import Image
from torch import Tensor

from analyze import tp

PICO = "--model vim_pico_patch4_32 --batch-size 4 --warmup 2 --runs 3 --threads 1"
LINE = re.compile(r"(.*): batch_size (\d+) throughput ([0-9.]+) images/s, peak memory (.*)")
Call = Callable[[str], Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], threads: object) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda line: call_here(tp.run, line, capfd)


def measured(outcome: Outcome) -> dict[str, tuple[int, float]]:
    """Batch size and throughput of every pass."""
    found = (LINE.fullmatch(line) for line in outcome.out.splitlines())
    return {match[1]: (int(match[2]), float(match[3])) for match in found if match}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool, tuple[int, ...], bool]]:
    """What the network is called with: training, gradients, shape, autocast."""
    seen: list[tuple[bool, bool, tuple[int, ...], bool]] = []
    original = tp.load_network

    def load(*arguments: Any, **options: Any) -> Any:
        network = original(*arguments, **options)
        network.model.register_forward_pre_hook(
            lambda model, given: seen.append(
                (model.training, torch.is_grad_enabled(), tuple(given[0].shape), torch.is_autocast_enabled("cpu"))
            )
        )
        return network

    monkeypatch.setattr(tp, "load_network", load)
    return seen


def test_forward_and_backward(call: Call, steps: list) -> None:
    outcome = call(f"{PICO} --amp --size 24 40")
    assert outcome.code == 0
    assert outcome.out.startswith("vim_pico_patch4_32, ")
    assert "GFLOPs per picture\n3 x 24 x 40 pixels, cpu, backend " in outcome.out
    found = measured(outcome)
    assert list(found) == ["forward", "forward+backward", "forward+backward, amp"]
    assert all(size == 4 and rate > 0 for size, rate in found.values())
    assert outcome.out.count("3 runs") == 3
    batch = (4, 3, 24, 40)
    passes = [(False, False, batch, False), (True, True, batch, False), (True, True, batch, True)]
    assert [step for step in steps if step[2][0] == 4] == [step for step in passes for _ in range(5)]
    assert "forward: 20/20 images" in outcome.err
    assert "random" not in outcome.err


def test_forward_only(call: Call) -> None:
    assert list(measured(call(f"{PICO} --forward-only"))) == ["forward"]


def test_the_throughput_is_of_the_timed_passes(call: Call) -> None:
    outcome = call(f"{PICO} --forward-only --runs 1")
    _, rate = measured(outcome)["forward"]
    median = float(re.search(r"median ([0-9.]+) ms", outcome.out)[1])
    assert rate == pytest.approx(4000 / median, abs=4000 / median * 0.06 / median + 0.01)


def test_pictures_of_a_folder(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, colour in (("val/a/red.png", (255, 0, 0)), ("val/b/blue.png", (0, 0, 255)), ("other.png", (0, 0, 0))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), colour).save(tmp_path / name)
    batches: list[Tensor] = []
    monkeypatch.setattr(tp, "_forward", lambda model: batches.append)
    assert call(f"{PICO} --forward-only --data-path {tmp_path}").code == 0
    batch = batches[0]
    assert batch.shape == (4, 3, 32, 32)
    assert torch.equal(batch[:2], batch[2:]), "two pictures, each used twice"
    first, second = (picture.mean((1, 2)).argmax().item() for picture in batch[:2])
    assert {first, second} == {0, 2}


class Greedy:
    """A step that needs more memory than there is for more than so many pictures."""

    def __init__(self, most: int, error: Exception) -> None:
        self.most, self.error = most, error

    def __call__(self, batch: Tensor) -> None:
        if len(batch) > self.most:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        MemoryError(),
    ],
)
def test_the_batch_is_halved_until_it_fits(call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(tp, "_forward", lambda model: Greedy(3, error))
    outcome = call(f"{PICO} --forward-only --batch-size 13")
    assert outcome.code == 0
    assert measured(outcome)["forward"][0] == 3
    assert re.findall(r"forward of (\d+) pictures does not fit into the memory; trying (\d+)", outcome.err) == [
        ("13", "6"), ("6", "3"),
    ]  # fmt: skip


def test_not_even_one_picture_fits(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "_forward", lambda model: Greedy(0, MemoryError()))
    outcome = call(f"{PICO} --forward-only")
    assert outcome.code == 2
    assert outcome.errors == ["error: The model cannot run on an input of 1 x 3 x 32 x 32: out of memory."]


def test_other_failures_are_not_taken_for_a_want_of_memory(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tp, "_forward", lambda model: Greedy(0, RuntimeError("no kernel for this")))
    outcome = call(f"{PICO} --forward-only")
    assert outcome.code == 2
    assert outcome.errors == ["error: The model cannot run on an input of 4 x 3 x 32 x 32: no kernel for this."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model vim_pica_patch4_32", "There is no model called 'vim_pica_patch4_32'"),
        ("--model vim_pico_patch4_32 --size 3", "cannot be built for 3 pixels"),
        ("--model vim_pico_patch4_32 --data-path nowhere", "There are no pictures in 'nowhere'"),
        ("--model vim_pico_patch4_32 --device cuda:77", "The device 'cuda:77' cannot be used"),
        ("--model vim_pico_patch4_32 --runs 0", "must be a whole number from 1"),
    ],
)
def test_bad_input(call: Call, line: str, message: str) -> None:
    outcome = call(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]


def test_from_another_folder(tmp_path: Path) -> None:
    line = f"--checkpoint {WEIGHTS} --data-path {DIGITS / 'samples'} --batch-size 2 --warmup 1 --runs 1 --threads 1"
    outcome = call_elsewhere("tp.py", line, tmp_path)
    assert outcome.code == 0
    assert list(measured(outcome)) == ["forward", "forward+backward"]
