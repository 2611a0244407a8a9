"""The picture of times and memory over the resolutions."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cli, plot


def _result(label: str, pixels: int, memory: bool, batch: int = 1) -> dict[str, Any]:
    seconds = pixels / 1000
    return {
        "label": label,
        "case": {"pixels": pixels, "batch": batch},
        "time": {"median": seconds, "low": seconds * 0.9, "high": seconds * 1.1},
        "memory_bytes": {"imports": 7e8, "loaded": 8e8, "peak": 8e8 + 1e5 * pixels} if memory else None,
    }


def _content(memory: bool = True) -> dict[str, Any]:
    names = ("Vim-Tiny", "DeiT-Tiny")
    return {
        "format": cli.FORMAT,
        "machine": {"cpu": "A processor", "torch_instruction_set": "AVX2"},
        "versions": {"torch": "2.15", "timm": "1.0"},
        "comparisons": [
            {"threads": 2, "results": [_result(name, pixels, memory) for name in names]} for pixels in (384, 224)
        ]
        + [{"threads": 2, "results": [_result("alone", 224, memory), _result("Vim-Tiny", 512, memory, batch=8)]}],
    }


def test_what_is_drawn(tmp_path: Path) -> None:
    source = tmp_path / "found.json"
    source.write_text(json.dumps(_content()))
    picture = plot.read(source, cli.FORMAT)
    assert list(picture.lines) == ["Vim-Tiny", "DeiT-Tiny"]
    assert picture.lines["Vim-Tiny"][0] == plot.Point(224, 0.224, 0.224 * 0.9, 0.224 * 1.1, 1e8 + 224e5)
    assert [point.pixels for point in picture.lines["DeiT-Tiny"]] == [224, 384]
    assert picture.imports == 7e8
    assert picture.where == "A processor, AVX2, threads: 2; torch 2.15, timm 1.0"


@pytest.mark.parametrize("memory", [True, False])
@pytest.mark.filterwarnings("default")
def test_the_command_draws(memory: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    source, target = tmp_path / "found.json", tmp_path / "found.png"
    source.write_text(json.dumps(_content(memory)))
    assert cli.run(["--plot", str(source), str(target)]) == 0
    assert capsys.readouterr().out == f"drew {target}\n"
    with Image.open(target) as image:
        assert image.format == "PNG"
        assert image.size == (1200, 500)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 16) or []}
    assert (255, 255, 255) in colours
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours


def test_what_cannot_be_drawn_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "found.json", tmp_path / "found.png"
    old, alone, broken = {**_content(), "format": 1}, _content(), _content()
    alone["comparisons"] = alone["comparisons"][:1]
    del broken["comparisons"][0]["results"][0]["time"]
    for text, sentence in (
        (None, "cannot be read: No such file or directory."),
        ("not JSON", "cannot be read: it is no JSON file ("),
        ("\x00", "cannot be read: it is no JSON file ("),
        ("[]", "cannot be drawn: it is no result of this version of scripts/bench; `scripts/bench"),
        (json.dumps(old), "cannot be drawn: it is no result of this version of scripts/bench; `scripts/bench"),
        (json.dumps(alone), "cannot be drawn: it has nothing in two sizes of pictures or more; `scripts/bench"),
        (json.dumps(broken), "cannot be drawn: something is missing in it ('time'); `scripts/bench"),
        (b"\xff\xfe\xff", "cannot be read: it is no JSON file ("),
    ):
        if text is not None:
            source.write_bytes(text.encode() if isinstance(text, str) else text)
        assert cli.run(["--plot", str(source), str(target)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {source} {sentence}")
    source.write_text(json.dumps(_content()))
    missing = tmp_path / "missing" / "found.png"
    assert cli.run(["--plot", str(source), str(missing)]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_missing_matplotlib_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "found.json"
    source.write_text(json.dumps(_content()))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.run(["--plot", str(source), str(tmp_path / "found.png")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: drawing needs matplotlib (")
    assert line.endswith("); `pip install matplotlib` installs it.")
