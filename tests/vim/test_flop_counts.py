"""FLOPs against figures worked out by hand, and what test_flops.py prints."""

from __future__ import annotations

import json

import pytest
import timm
from torch import nn

import flops
import models_mamba
import test_flops as script
from timing import Timing, time_repeatedly

PICO = "vim_pico_patch4_32"


def small(**options: object) -> models_mamba.VisionMamba:
    """Two layers over a 2 x 3 patch grid and a class token: 7 tokens."""
    return models_mamba.VisionMamba(
        **{  # type: ignore[arg-type]
            "img_size": (8, 12),
            "patch_size": 4,
            "stride": 4,
            "depth": 2,
            "embed_dim": 32,
            "d_state": 8,
            "num_classes": 5,
            **options,
        }
    )


def test_vim_tiny_at_224() -> None:
    """The two published figures, 1.293 G and 0.523 G, to the last digit."""
    count = flops.count_flops(timm.create_model("vim_tiny_patch16_224"))
    tokens, layers, width, inner, state, rank = 197, 24, 192, 384, 16, 12
    per_token = 2 * inner * width + inner * width + 2 * inner * (4 + rank + 2 * state + rank)
    assert count.multiply_adds == 196 * 768 * width + layers * tokens * per_token + 1000 * width
    assert count.scan_flops == 9 * 2 * layers * tokens * inner * state
    assert round(count.multiply_adds / 1e9, 3) == 1.293
    assert round(count.scan_flops / 1e9, 3) == 0.523


@pytest.mark.parametrize(("kind", "scans", "directions"), [("none", 1, 1), ("v1", 2, 1), ("v2", 2, 2)])
def test_mixers(kind: str, scans: int, directions: int) -> None:
    count = flops.count_flops(small(bimamba_type=kind))
    tokens, layers, width, inner, state, rank = 7, 2, 32, 64, 8, 2
    per_token = 3 * inner * width + directions * inner * (4 + rank + 2 * state + rank)
    patches = 6 * (3 * 16) * width
    assert count.multiply_adds == patches + layers * tokens * per_token + 5 * width
    assert count.channel_updates == scans * layers * tokens * inner
    assert count.state_updates == state * count.channel_updates
    assert count.bias_additions == 6 * width + layers * tokens * directions * 2 * inner + 5
    assert count.operations == (
        2 * count.multiply_adds + count.bias_additions + 7 * count.state_updates + 3 * count.channel_updates
    )


def test_other_sizes_and_no_side_effects() -> None:
    model = small(img_size=(16, 8)).train()
    count = flops.count_flops(model)
    assert count.state_updates == 2 * 2 * 9 * 64 * 8
    assert model.training
    assert all(not module._forward_hooks for module in model.modules())


def test_other_models_are_counted_by_their_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, groups=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Flatten(),
        nn.Linear(4 * 64, 7),
    )
    count = flops.count_flops(model, 8)
    assert count.multiply_adds == 64 * 4 * 27 + 64 * 4 * 9 + 256 * 7
    assert count.bias_additions == 64 * 4 + 7
    assert count.scan_flops == 0
    assert round(flops.count_flops(timm.create_model("resnet10t.c3_in1k", num_classes=10), 64).multiply_adds / 1e6) > 10


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run(["--model", PICO, "--num_classes", "10", "--repeat", "2", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    lines = dict(line.split(":", 1) for line in text.splitlines())
    model = timm.create_model(PICO, num_classes=10)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert lines["Parameters"].strip().startswith(f"{parameters:,} ")
    assert "1 x 3 x 32 x 32, cpu, 1 threads" in lines["Input"]
    assert lines["Multiply-adds"].split()[0] == f"{flops.count_flops(model).multiply_adds / 1e9:.3f}"
    assert {"Scans", "Operations", "Latency", "Throughput", "Peak memory"} <= set(lines)


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"--model {PICO} --json --repeat 3 --batch-size 2 --img-size 24 40 --backend torch"
    assert script.run(line.split()) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["input"] == [2, 3, 24, 40]
    assert found["latency"]["runs"] == 3
    assert found["scan_flops"] == 9 * 2 * 6 * (6 * 10 + 1) * 128 * 8
    assert found["pictures_per_second"] == pytest.approx(2000 / found["latency"]["median_ms"], rel=1e-2)
    assert found["peak_memory_bytes"] is None or found["peak_memory_bytes"] > 10**7


@pytest.mark.parametrize(
    "line", ["--model vim_pica_patch4_32", f"--model {PICO} --img-size 3", f"--model {PICO} --backend cuda"]
)
def test_bad_input(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.run([*line.split(), "--repeat", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1


def test_timing() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0))
    assert (timing.median, timing.middle_half) == (3.0, (2.0, 4.0))
    assert Timing((2.0,)).middle_half == (2.0, 2.0)
    assert timing.as_json()["most_ms"] == 100_000
    calls: list[int] = []
    found = time_repeatedly(lambda: calls.append(1), 4, warm_up=3)
    assert len(calls) == 7
    assert len(found.seconds) == 4
    assert list(found.seconds) == sorted(found.seconds)
