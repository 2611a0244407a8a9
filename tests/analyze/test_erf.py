"""The command that draws effective receptive fields."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_calls import DIGITS, WEIGHTS, Outcome, call_elsewhere, call_here
from PIL import Image

from analyze import erf, receptive_field
from analyze.commands import pictures_under
from analyze.receptive_field import EffectiveReceptiveField
from classify import load_classifier
from flags import UsageError
from pictures import eval_transform, open_picture

SAMPLES = f"--images {DIGITS / 'samples'}"
VIM = f"{SAMPLES} --checkpoint {WEIGHTS} --output erf.png"
Call = Callable[[str], Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda line: call_here(erf.run, line, capfd)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[erf.Field], Any]]:
    """The fields that are drawn, and the figures."""
    pytest.importorskip("matplotlib")
    found: list[tuple[list[erf.Field], Any]] = []
    original = erf.draw

    def keep(fields: list[erf.Field]) -> Any:
        found.append((fields, original(fields)))
        return found[-1][1]

    monkeypatch.setattr(erf, "draw", keep)
    return found


def test_before_and_after_training(call: Call, drawn: list) -> None:
    line = f"{SAMPLES} --model vim_pico_patch4_32 vim_pico_patch4_32 --checkpoint - {WEIGHTS} --output erf.png"
    outcome = call(line)
    assert outcome.code == 0
    assert "note: there are 10 pictures, fewer than --count 50" in outcome.err
    assert "weights of vim_pico_patch4_32 are random" in outcome.err
    assert "vim_pico_patch4_32: 10/10 images" in outcome.err
    fields, figure = drawn[0]
    assert [field.title.split("\n")[1] for field in fields] == ["random weights", "vim_pico_digits.safetensors"]

    model = load_classifier(None, str(WEIGHTS)).model
    transform = eval_transform(32, crop_ratio=1.0)
    total = torch.zeros(32, 32, dtype=torch.float64)
    for source in (DIGITS / "samples").iterdir():
        total += EffectiveReceptiveField.get_input_grad(model, transform(open_picture(source))[None])
    torch.testing.assert_close(fields[1].values, total / 10, rtol=1e-4, atol=1e-9)

    panels = [axes for axes in figure.axes if axes.images]
    for axes, field in zip(panels, fields, strict=True):
        (image,) = axes.images
        assert image.get_clim() == (0, 1), "one scale for all"
        expected = EffectiveReceptiveField.simpnorm(field.values).numpy()
        np.testing.assert_array_equal(np.asarray(image.get_array()), expected)
        assert axes.get_title(loc="left") == field.title
        assert axes.get_xlabel() == "mean of 10 pictures"
    assert len([axes for axes in figure.axes if axes.get_label() == "<colorbar>"]) == 1
    with Image.open("erf.png") as picture:
        assert picture.width > 600


def test_the_table(call: Call, drawn: list) -> None:
    outcome = call(f"{VIM} --count 2 --thresholds 0.3 0.999999")
    heading, names, first, second = outcome.out.splitlines()
    assert heading == "vim_pico_patch4_32, vim_pico_digits.safetensors, 32 x 32 pixels"
    assert names.split() == ["share", "side", "area"]
    side, area = EffectiveReceptiveField.get_rectangle(drawn[0][0][0].values, 0.3)
    assert first.split() == ["30%", str(side), f"{area:.2%}"]
    assert second.split() == ["100%", "-", "-"]


def test_the_draw_of_pictures_follows_the_seed(call: Call, monkeypatch: pytest.MonkeyPatch, drawn: list) -> None:
    seen: list[list[str]] = []
    original = erf._opened

    def keep(network: Any, sources: list[str], *rest: Any) -> Any:
        seen.append(sources)
        return original(network, sources, *rest)

    monkeypatch.setattr(erf, "_opened", keep)
    for seed in (0, 0, 1):
        assert call(f"{VIM} --count 3 --seed {seed}").code == 0
    assert [len(sources) for sources in seen] == [3, 3, 3]
    assert seen[0] == seen[1] != seen[2]


def test_networks_side_by_side_without_checkpoints(call: Call, drawn: list) -> None:
    models = "vmamba_tiny_s1l8 resnet10t vim_pico_patch4_32 vim_pico_patch4_32 convnext_atto"
    outcome = call(f"{SAMPLES} --count 1 --img-size 32 64 --model {models} --output wide/")
    assert outcome.code == 0
    assert Path("wide/erf.png").exists()
    fields, figure = drawn[0]
    assert [field.values.shape for field in fields] == [(32, 64)] * 5
    assert sum(bool(axes.images) and axes.get_visible() for axes in figure.axes) == 5


def test_pictures_that_fail(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn: list) -> None:
    folder = tmp_path / "some" / "deep"
    folder.mkdir(parents=True)
    (folder / "bad.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40), (200, 10, 90)).save(folder / "good.png")
    outcome = call(f"--images some --checkpoint {WEIGHTS} --output erf.png")
    assert outcome.code == 1
    assert len(outcome.errors) == 1
    assert "bad.png' is not a picture" in outcome.errors[0]
    assert drawn[0][0][0].used == 1

    (folder / "good.png").unlink()
    outcome = call(f"--images some --checkpoint {WEIGHTS} --output erf.png")
    assert outcome.code == 2
    assert "has no receptive field on these 1 pictures: none could be read" in outcome.errors[-1]


def test_pictures_without_finite_gradients(call: Call, monkeypatch: pytest.MonkeyPatch, drawn: list) -> None:
    original = EffectiveReceptiveField.get_input_grad
    calls: list[int] = []

    def sometimes(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        return original(*arguments) * (torch.nan if len(calls) % 2 else 1)

    monkeypatch.setattr(receptive_field.EffectiveReceptiveField, "get_input_grad", staticmethod(sometimes))
    outcome = call(f"{VIM} --count 4")
    assert outcome.code == 0
    assert "note: 2 of 4 pictures were left out, for gradients that are not finite numbers" in outcome.err
    assert (drawn[0][0][0].used, drawn[0][0][0].skipped) == (2, 2)
    outcome = call(f"{VIM} --count 1")
    assert outcome.code == 2
    assert outcome.errors[0].endswith("on these 1 pictures: its gradients are not finite numbers.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--images nowhere --output e.png", "There are no pictures in 'nowhere'"),
        (f"{SAMPLES} --output e.png --model resnet10t resnet10t --checkpoint -", "--checkpoint names 1 and --model 2"),
        (f"{SAMPLES} --output e.png --model resnet10tt", "There is no model called 'resnet10tt'"),
        (f"{SAMPLES} --output e.png --model vim_pico_patch4_32 --img-size 3", "cannot be built for 3 pixels"),
        (f"{SAMPLES} --output e.png --model vmamba_tiny_s1l8 --img-size 1", "cannot be built for 1 pixels"),
        (f"{SAMPLES} --output no/e.png", "Cannot write to --output 'no/e.png'"),
        (f"{SAMPLES} --output e.png --thresholds 1.5", "must be a number between 0 and 1, got '1.5'"),
        (f"{SAMPLES} --output e.png --count 0", "must be a whole number from 1"),
        (f"{SAMPLES} --output e.png --checkpoint nowhere.pth", "nowhere.pth"),
    ],
)
def test_bad_input(call: Call, line: str, message: str) -> None:
    outcome = call(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]
    assert not Path("e.png").exists()


def test_missing_matplotlib_is_one_sentence(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = call(VIM)
    assert outcome.code == 2
    assert outcome.err.startswith("error: drawing needs matplotlib (")
    assert outcome.err.count("\n") == 1


def test_pictures_of_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("val/cat/a.JPEG", "val/dog/b.png", "val/dog/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = [str(tmp_path / "val/cat/a.JPEG"), str(tmp_path / "val/dog/b.png")]
    assert pictures_under(str(tmp_path)) == expected
    assert pictures_under(str(tmp_path / "val/*/*.*"))[:2] == expected
    assert pictures_under(str(tmp_path / "val/dog")) == expected[1:]
    for nothing in (tmp_path / "val/*/*.gif", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="There are no pictures in"):
            pictures_under(str(nothing))


def test_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = call_elsewhere("erf.py", f"{VIM} --count 2 --threads 1", tmp_path)
    assert outcome.code == 0
    assert outcome.out.startswith("vim_pico_patch4_32, vim_pico_digits.safetensors, 32 x 32 pixels\n")
    assert (tmp_path / "erf.png").stat().st_size > 5000
