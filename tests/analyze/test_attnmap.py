"""The command that draws attention maps: what it draws, and what it says to what it cannot draw."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from command_calls import THREE, WEIGHTS, Outcome, call_elsewhere, call_here
from PIL import Image

from analyze import attnmap, panels
from analyze.attention import attention_map, rollout
from analyze.recording import mixers_by_stage, record
from classify import load_classifier
from pictures import eval_transform, open_picture

VIM = f"--image {THREE} --checkpoint {WEIGHTS}"
VMAMBA = f"--image {THREE} --model vmamba_tiny_s1l8 --img-size 64 96 --output map.png"
Call = Callable[[str], Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda line: call_here(attnmap.run, line, capfd)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn."""
    pytest.importorskip("matplotlib")
    figures: list[Any] = []
    original = panels.draw_rows

    def keep(*arguments: Any) -> Any:
        figures.append(original(*arguments))
        return figures[-1]

    monkeypatch.setattr(panels, "draw_rows", keep)
    return figures


def shown(figure: Any) -> dict[str, np.ndarray]:
    """The images of a figure, under the titles of their panels, each row's after the one before."""
    found = [(axes.get_title(loc="left"), axes.images[0].get_array()) for axes in figure.axes if axes.images]
    assert len({name for name, _ in found}) == len(found)
    return {name: np.asarray(values) for name, values in found}


def test_the_class_token_of_vim(call: Call, drawn: list[Any]) -> None:
    outcome = call(f"{VIM} --output map.png")
    assert outcome.code == 0
    assert "weights: " in outcome.err
    assert "random" not in outcome.err
    assert outcome.err.endswith("written: map.png\n")
    with Image.open("map.png") as picture:
        assert picture.width > 600
    figure = drawn[0]
    assert figure.get_suptitle() == "vim_pico_patch4_32, block 5, mode CwBdtw"
    images = shown(figure)
    assert list(images) == ["query: class token", "a0: forward", "a1: backward", "all: sum of the directions"]
    assert images["query: class token"].shape == (32, 32, 3)

    model = load_classifier(None, str(WEIGHTS)).model
    picture = eval_transform(32, crop_ratio=1.0)(open_picture(THREE))[None]
    (found,) = record(model, picture, mixers_by_stage(model)[0][-1:])
    for name, ret in (("a0: forward", "a0"), ("a1: backward", "a1"), ("all: sum of the directions", "all")):
        row = attention_map(found, "CwBdtw", ret)[32]
        expected = torch.cat([row[:32], row[33:]]).view(8, 8).numpy()
        np.testing.assert_allclose(images[name], expected, rtol=1e-5, atol=1e-7)
    assert not images["a0: forward"][4:].any()
    assert not images["a1: backward"][:4].any()


def test_panels_lie_on_the_picture_s_pixels(call: Call, drawn: list[Any]) -> None:
    assert call(f"{VMAMBA} --query 50,20 0,63 --ret a1 ao1 --mode ww --stage 1").code == 0
    figure = drawn[0]
    rings = []
    for axes in figure.axes:
        if axes.images:
            assert tuple(axes.images[0].get_extent()) == (0, 96, 64, 0)
            assert axes.get_ylim() == (64, 0), "y must grow downwards"
            rings.append({tuple(line.get_xydata()[0]) for line in axes.lines})
    marks = [{(50.5, 20.5)}, {(50.5, 20.5)}, set(), {(0.5, 63.5)}, {(0.5, 63.5)}, set()]
    assert rings == marks, "what is not in the picture's order has no mark"


def test_a_map_of_columns_where_height_and_width_differ(call: Call, drawn: list[Any]) -> None:
    """Mode ww is positive and falls with the distance: its order can be read from the picture."""
    outcome = call(f"{VMAMBA} --query 50,20 --ret a1 a2 all --mode ww --stage 1")
    assert outcome.code == 0
    assert "warning: no --checkpoint was given, so the weights of vmamba_tiny_s1l8 are random" in outcome.err
    assert drawn[0].get_suptitle() == "vmamba_tiny_s1l8, stage 1, block 1, mode ww (random weights)"
    images = shown(drawn[0])
    columns, rows = images["a1: columns"], images["a2: rows, reversed"]
    assert columns.shape == (8, 12)
    row, column = 2, 6  # the patch of 8 pixels of (50, 20)
    by_columns = columns.T.flatten()
    assert (np.diff(by_columns[: column * 8 + row + 1]) > 0).all()
    assert not by_columns[column * 8 + row + 1 :].any()
    by_rows = rows.flatten()
    assert (np.diff(by_rows[row * 12 + column :]) < 0).all()
    assert not by_rows[: row * 12 + column].any()
    assert images["all: sum of the directions"].argmax() == row * 12 + column


def test_rollout_and_norms(call: Call, drawn: list[Any]) -> None:
    lines = [
        f"{VIM} --output a.png --rollout --ret all ao1",
        f"{VIM} --output b.png --rollout --norm --ret all --query 9,30",
        f"{VIM} --output c.png --absnorm --ret a0 ao1 --block 2",
        f"{VIM} --output d.png --norm --ret nall --block 0",
    ]
    for line in lines:
        assert call(line).code == 0
    titles = [figure.get_suptitle().removeprefix("vim_pico_patch4_32, ") for figure in drawn]
    assert titles == [
        "rollout through 6 blocks, mode CwBdtw, |x| / max |x|",
        "rollout through 6 blocks, mode CwBdtw, (x - min) / (max - min)",
        "block 2, mode CwBdtw, |x| / max |x|",
        "block 0, mode CwBdtw, (x - min) / (max - min)",
    ]
    model = load_classifier(None, str(WEIGHTS)).model
    mixers = mixers_by_stage(model)[0]
    found = record(model, eval_transform(32, crop_ratio=1.0)(open_picture(THREE))[None], mixers)
    without = [token for token in range(65) if token != 32]

    def grid(row: torch.Tensor) -> np.ndarray:
        return row[without].view(8, 8).numpy()

    whole = rollout(attention_map(each, "CwBdtw", "all", 2) for each in found)
    close = {"rtol": 1e-4, "atol": 1e-7}
    np.testing.assert_allclose(shown(drawn[0])["all: sum of the directions"], grid(whole[32]), **close)
    whole = rollout(attention_map(each, "CwBdtw", "all", 1) for each in found)
    patch = 7 * 8 + 2  # of the pixel (9, 30), after the class token
    np.testing.assert_allclose(shown(drawn[1])["all: sum of the directions"], grid(whole[patch + 1]), **close)
    raw = attention_map(found[2], "CwBdtw", "ao1", 2)[64 - 32]
    np.testing.assert_allclose(shown(drawn[2])["ao1: backward, as it runs"], grid(raw), **close)
    nall = attention_map(found[0], "CwBdtw", "nall", 1)[32]
    np.testing.assert_allclose(shown(drawn[3])["nall: mean of the normalised"], grid(nall), **close)


def test_colour_scales(call: Call, drawn: list[Any]) -> None:
    assert call(f"{VIM} --output map.png --ret a0 --query cls 0,0").code == 0
    assert call(f"{VIM} --output map.png --ret a0 --absnorm").code == 0
    signed, positive = drawn[0].axes[1].images[0], drawn[1].axes[1].images[0]
    low, high = signed.get_clim()
    assert low == -high == -np.abs(signed.get_array()).max()
    assert positive.get_clim() == (0, np.asarray(positive.get_array()).max())
    bars = [axes for axes in drawn[0].axes if axes.get_label() == "<colorbar>"]
    assert len(bars) == 2


def test_several_pictures_and_a_bad_one(call: Call, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    outcome = call(f"--image {THREE} bad.png --checkpoint {WEIGHTS} --output maps/ --ret all")
    assert outcome.code == 1
    assert outcome.errors == [line for line in outcome.errors if "'bad.png' is not a picture" in line]
    assert sorted(path.name for path in (tmp_path / "maps").iterdir()) == ["three.png"]
    assert call(f"--image bad.png --checkpoint {WEIGHTS} --output map.png").code == 2


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers(call: Call, value: float) -> None:
    model = timm.create_model("vim_pico_patch4_32", num_classes=10)
    with torch.no_grad():
        model.patch_embed.proj.weight.fill_(value)
    torch.save({"model": model.state_dict(), "model_name": "vim_pico_patch4_32"}, "c.pth")
    outcome = call(f"--image {THREE} --checkpoint c.pth --output map.png --ret all")
    assert outcome.code == 2
    assert len(outcome.errors) == 1
    assert "the maps hold numbers that are not finite: the weights are damaged" in outcome.errors[0]
    assert not Path("map.png").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"{VIM.replace('three', 'eleven')} --output m.png", "No such file: "),
        (f"{VIM} --output m.png --query 32,0", "--query 32,0 lies outside the model's input of 32 x 32 pixels"),
        (f"{VIM} --output m.png --query=-1,0", "--query -1,0 lies outside"),
        (f"{VIM} --output m.png --query 5", "must be X,Y in pixels, such as 16,8, or cls, got '5'"),
        (f"{VIM} --output m.png --stage 1", "--stage 1 is not there: the last one is 0, counted from 0"),
        (f"{VIM} --output m.png --block 6", "--block 6 is not there: the last one is 5"),
        (f"{VIM} --output m.png --ret a2", "`ret` must be one of a0, a1, ao0, ao1, all, nall, got 'a2'"),
        (f"{VIM} --output m.png --mode CC", "invalid choice: 'CC'"),
        (f"{VIM} --output m.png --img-size 3", "cannot be built for 3 pixels"),
        (f"{VIM} --output m.png --img-size 32 32 32", "--img-size takes one number (a square) or two"),
        (f"{VIM} --output no/such/folder/m.png", "Cannot write to --output 'no/such/folder/m.png'"),
        (f"{VIM} --output m.txt", "must end like a picture"),
        (f"{VIM} --output m.png --norm --absnorm", "not allowed with argument"),
        (f"{VIM} --output m.png --model vim_pica_patch4_32", "There is no model called 'vim_pica_patch4_32'"),
        (f"{VIM} --output m.png --device cuda:77", "The device 'cuda:77' cannot be used"),
        (f"{VMAMBA} --query cls", "this model has no class token; give --query as X,Y"),
        (f"{VMAMBA} --stage 4", "--stage 4 is not there: the last one is 3"),
        (f"{VMAMBA} --stage -5", "--stage -5 is not there"),
        (f"--image {THREE} --model resnet18 --output m.png", "resnet18 has no selective scans"),
    ],
)
def test_bad_input(call: Call, line: str, message: str) -> None:
    outcome = call(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]
    assert not Path("m.png").exists()


def test_missing_matplotlib_is_one_sentence(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = call(f"{VIM} --output map.png")
    assert outcome.code == 2
    assert outcome.err.startswith("error: drawing needs matplotlib (")
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize(("text", "expected"), [("3,4", (3, 4)), ("-1,0", (-1, 0)), ("cls", "cls")])
def test_queries(text: str, expected: object) -> None:
    assert attnmap._query(text) == expected


@pytest.mark.parametrize("text", ["", "1", "1,2,3", "1.5,2", "x,y", "CLS"])
def test_bad_queries(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be X,Y"):
        attnmap._query(text)


def test_from_another_folder(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    outcome = call_elsewhere("attnmap.py", f"{VIM} --output here.png --ret all --threads 1", tmp_path)
    assert (outcome.code, outcome.out) == (0, "")
    assert (tmp_path / "here.png").stat().st_size > 5000
