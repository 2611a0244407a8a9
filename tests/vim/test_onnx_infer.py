"""`infer_rpi.py` with ONNX files: what it prints, what it refuses, and that it needs nothing of torch's."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason="onnx is not installed: no ONNX file is tested")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no ONNX file is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no ONNX file is tested")

import onnx_files

import infer_rpi
import onnx_session
from pictures import eval_transform, open_picture

SCRIPT = Path(infer_rpi.__file__).resolve()
NOT_NEEDED = "torch torchvision timm safetensors causal_conv1d mamba_ssm huggingface_hub tqdm onnx"

# Run by Python before anything else: the packages of $WITHOUT are found, but cannot be imported.
SITE = """
import importlib.abc, importlib.machinery, os, sys

class Refusal(importlib.abc.Loader):
    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r}")

    def exec_module(self, module):
        pass

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["WITHOUT"].split():
            return importlib.machinery.ModuleSpec(name, Refusal())

sys.meta_path.insert(0, Finder())
"""


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Call = Callable[[str], Outcome]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with the small file m.onnx and the pictures a.png and b.jpg in pictures/."""
    onnx_files.write(tmp_path / "m.onnx")
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (50, 45, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def call(folder: Path, capfd: pytest.CaptureFixture[str]) -> Call:
    """Call the script in this process with a command line; checks what holds of every outcome."""

    def run(line: str) -> Outcome:
        try:
            code = infer_rpi.run(shlex.split(line))
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def start(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Outcome]:
    """Run the script as a program that cannot import certain packages."""
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)

    def run(line: str, without: str = NOT_NEEDED) -> Outcome:
        environment = {**os.environ, "PYTHONPATH": str(site), "WITHOUT": without}
        command = [sys.executable, "-W", "error", str(SCRIPT), *shlex.split(line)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
        assert "Traceback" not in done.stderr
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def expected(path: str) -> np.ndarray:
    """The probabilities of a picture by the small file, in fp64."""
    (scores,) = onnx_files.logits(eval_transform(onnx_files.SIZE).array(open_picture(path))[None])
    powers = np.exp(scores - scores.max())
    return powers / powers.sum()


def test_the_numbers_are_those_of_the_file(call: Call) -> None:
    outcome = call("--image pictures/a.png pictures/b.jpg --checkpoint m.onnx --json")
    assert outcome.code == 0
    found = json.loads(outcome.out)
    assert found["model"] == "mean_colour"
    assert found["checkpoint"] == "m.onnx"
    assert found["num_classes"] == 3
    assert found["img_size"] == list(onnx_files.SIZE)
    assert (found["device"], found["dtype"], found["backend"]) == ("cpu", "float32", "onnxruntime")
    assert found["threads"] == onnx_session.usable_cores()
    assert found["custom_ops"] is None
    for entry in found["pictures"]:
        probabilities = expected(entry["image"])
        order = [prediction["index"] for prediction in entry["predictions"]]
        assert order == np.argsort(-probabilities).tolist()
        for prediction in entry["predictions"]:
            assert prediction["label"] == onnx_files.NAMES[prediction["index"]]
            assert prediction["probability"] == pytest.approx(probabilities[prediction["index"]], abs=1e-6)
    assert "mean_colour, 3 classes, 33 x 40 pixels" in outcome.err
    assert "weights: m.onnx" in outcome.err
    assert "warning" not in outcome.err


def test_text_and_runtimes(call: Call) -> None:
    outcome = call("--image pictures/a.png --checkpoint m.onnx --topk 2 --threads 1")
    assert outcome.out.splitlines()[0] == "Top predictions:"
    best = np.argsort(-expected("pictures/a.png"))[:2]
    names = [onnx_files.NAMES[index] for index in best]
    assert [line.split(": ")[0] for line in outcome.out.splitlines()[1:]] == [f"1. {names[0]}", f"2. {names[1]}"]
    assert "1 threads" in outcome.err
    same = "--runtime onnxruntime --device cpu --dtype float32 --backend auto --model mean_colour --num-classes 3"
    for words in (f"{same} --img-size 33 40", "--custom-ops none"):
        again = call(f"--image pictures/a.png --checkpoint m.onnx --topk 2 --threads 1 {words}")
        assert again.out == outcome.out, again.err


def test_the_ending_need_not_be_onnx(call: Call, folder: Path) -> None:
    (folder / "m.onnx").rename(folder / "weights")
    assert call("--image pictures/a.png --checkpoint weights").code == 0


def test_benchmark_and_batches(call: Call) -> None:
    single = json.loads(call("--image pictures gone.png --checkpoint m.onnx --json").out)
    outcome = call("--image pictures gone.png --checkpoint m.onnx --json --benchmark 2 --batch-size 3")
    found = json.loads(outcome.out)
    assert outcome.code == 1
    assert found["benchmark"]["runs"] == 2
    assert found["benchmark"]["batch_size"] == 3
    assert "No such file" in found["pictures"][2]["error"]
    for one, other in zip(single["pictures"][:2], found["pictures"][:2], strict=True):
        probabilities = ([p["probability"] for p in entry["predictions"]] for entry in (one, other))
        assert next(probabilities) == pytest.approx(next(probabilities), abs=1e-6)


def test_random_weights_are_said_aloud(call: Call, folder: Path) -> None:
    onnx_files.write(folder / "m.onnx", weights="random")
    assert "its weights are random and the predictions mean nothing" in call("--image pictures --checkpoint m.onnx").err


def test_labels_of_a_file(call: Call, folder: Path) -> None:
    (folder / "labels.txt").write_text("数字 0\n数字 1\n数字 2\n", encoding="utf-8")
    assert "1. 数字 " in call("--image pictures/a.png --checkpoint m.onnx --labels labels.txt").out
    (folder / "short.txt").write_text("one\ntwo\n")
    outcome = call("--image pictures/a.png --checkpoint m.onnx --labels short.txt")
    assert outcome.code == 2
    assert "has 2 names but the model has 3 classes" in outcome.errors[0]


def test_unprintable_names_are_made_harmless(call: Call, folder: Path) -> None:
    onnx_files.write(folder / "m.onnx", class_names=json.dumps(["a\x1b[31m", "b\nc", "d"]))
    found = json.loads(call("--image pictures/a.png --checkpoint m.onnx --json").out)
    assert {entry["label"] for entry in found["pictures"][0]["predictions"]} == {"a [31m", "b c", "d"}


def test_output(call: Call, folder: Path) -> None:
    assert call("--image pictures --checkpoint m.onnx --output drawn").code == 0
    with Image.open(folder / "drawn/a.png") as drawn:
        assert drawn.height > 500
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["a.png", "b.png"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scores_that_are_no_numbers(call: Call, folder: Path, value: float) -> None:
    weight = onnx_files.WEIGHT.copy()
    weight[1, 1] = value
    onnx_files.write(folder / "m.onnx", onnx_files.small(weight=weight))
    outcome = call("--image pictures/a.png --checkpoint m.onnx")
    assert outcome.code == 2
    assert outcome.out == ""
    assert "not finite numbers; the weights may be damaged" in outcome.errors[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--checkpoint gone.onnx", "There is no file gone.onnx"),
        ("--checkpoint cut.onnx", "cut.onnx is damaged or cut off"),
        ("--checkpoint text.onnx", "text.onnx is not an ONNX file"),
        ("--checkpoint other.onnx", "it has pixels tensor(float)"),
        ("--checkpoint bare.onnx", "no class_names in its metadata"),
        (
            "--checkpoint grey.onnx",
            "wants its pictures prepared in a way that is not known here: its channels is 'BGR'",
        ),
        ("--checkpoint mean.onnx", "its mean is [0.5, 0.5, 0.5]"),
        ("--checkpoint nearest.onnx", "its interpolation is 'nearest'"),
        ("--checkpoint scale.onnx", "its scale is 1"),
        ("--checkpoint std.onnx", "its std is None"),
        ("--checkpoint ratio.onnx", "its crop_ratio is 0.001"),
        ("--checkpoint https://example.org/m.onnx", "download https://example.org/m.onnx first"),
        ("--checkpoint m.onnx --custom-ops gone.so", "There is no library of operators gone.so"),
        ("--checkpoint m.onnx --custom-ops text.onnx", "text.onnx is no library of operators"),
        ("--checkpoint m.onnx --img-size 224", "m.onnx is for pictures of 33 x 40 pixels alone; leave --img-size away"),
        ("--checkpoint m.onnx --model vim_pico_patch4_32", "m.onnx holds mean_colour; leave --model away"),
        ("--checkpoint m.onnx --num_classes 4", "m.onnx has 3 classes; leave --num_classes away"),
        ("--checkpoint m.onnx --device cuda", "leave --device cuda away"),
        ("--checkpoint m.onnx --dtype bfloat16", "leave --dtype bfloat16 away"),
        ("--checkpoint m.onnx --backend native", "leave --backend native away"),
        ("--checkpoint m.onnx --runtime torch", "--runtime torch cannot run m.onnx, which is ONNX"),
        ("--runtime onnxruntime", "needs --checkpoint FILE.onnx"),
        (
            "--runtime onnxruntime --checkpoint w.pth",
            "w.pth is not one; make one of a checkpoint with `python vim/export_onnx.py --checkpoint w.pth --output w.",
        ),
        ("--runtime onnxruntime --checkpoint gone.pth", "there is no gone.pth"),
        ("--custom-ops none", "--custom-ops is for ONNX files alone"),
        ("--checkpoint w.pth --custom-ops lib.so", "--custom-ops is for ONNX files alone"),
    ],
)
def test_bad_input(call: Call, folder: Path, words: str, expected: str) -> None:
    whole = (folder / "m.onnx").read_bytes()
    (folder / "cut.onnx").write_bytes(whole[:-9])
    (folder / "text.onnx").write_bytes(b"no model")
    (folder / "w.pth").write_bytes(b"PK\x03\x04")
    onnx_files.write(folder / "other.onnx", onnx_files.small(names=("pixels", "scores")))
    onnx_files.write(folder / "bare.onnx", class_names=None, preprocessing=None)
    for name, change in {
        "grey": {"channels": "BGR"},
        "mean": {"mean": [0.5, 0.5, 0.5]},
        "nearest": {"interpolation": "nearest"},
        "scale": {"scale": 1},
        "std": {"std": None},
        "ratio": {"crop_ratio": 0.001},
    }.items():
        onnx_files.write(folder / f"{name}.onnx", preprocessing=json.dumps(onnx_files.preprocessing(**change)))
    outcome = call(f"--image pictures/a.png {words}")
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert expected in outcome.errors[0]
    assert outcome.errors[0].endswith(".")


# ---------------------------------------------------------------- without torch


def various_pictures(folder: Path) -> None:
    """Pictures of every kind that Pillow reads differently, and one that is damaged."""
    folder.mkdir()
    for sample in onnx_files.SAMPLES.glob("*.png"):
        shutil.copy(sample, folder)
    with Image.open(onnx_files.SAMPLES / "three.png") as opened:
        digit = opened.convert("RGB").resize((90, 70))
    exif = Image.Exif()
    exif[0x0112] = 6
    digit.save(folder / "turned.jpg", exif=exif)
    digit.convert("L").save(folder / "grey.png")
    digit.convert("1").save(folder / "bits.png")
    digit.convert("CMYK").save(folder / "print.jpg")
    digit.convert("P", palette=Image.Palette.ADAPTIVE, colors=7).save(folder / "palette.png", transparency=0)
    see_through = digit.convert("RGBA")
    see_through.putalpha(digit.convert("L"))
    see_through.save(folder / "see_through.png")
    see_through.convert("LA").save(folder / "see_through_grey.png")
    Image.fromarray(np.asarray(digit.convert("L")).astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(np.asarray(digit.convert("L")).astype(np.float32) / 255).save(folder / "float.tif")
    digit.save(folder / "moving.gif", save_all=True, append_images=[digit.transpose(Image.Transpose.ROTATE_90)])
    digit.resize((1, 1)).save(folder / "dot.png")
    digit.resize((3000, 2)).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:300])


def test_without_torch_it_says_what_torch_says(
    call: Call, start: Callable[..., Outcome], folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = onnx_files.digits(tmp_path_factory.getbasetemp())
    various_pictures(folder / "digits")
    line = "--image digits --topk 10 --json --batch-size 4 --threads 1"
    torch = call(f"{line} --checkpoint {onnx_files.DIGITS} --output by_torch")
    bare = start(f"{line} --checkpoint {model} --output by_onnx")
    here = call(f"{line} --checkpoint {model}")  # with the operators of an installed mamba_ssm, if it has them
    with_torch = json.loads(torch.out)
    assert len(with_torch["pictures"]) == 23
    assert len(torch.errors) == 1
    assert "broken.jpg" in torch.errors[0]
    for outcome in (bare, here):
        assert outcome.code == torch.code == 1
        assert outcome.errors == torch.errors
        assert_same_report(with_torch, json.loads(outcome.out))
    assert json.loads(bare.out)["custom_ops"] is None
    drawn = {path.name for path in (folder / "by_onnx").iterdir()}
    assert drawn == {path.name for path in (folder / "by_torch").iterdir()}
    assert len(drawn) == 22


def assert_same_report(with_torch: dict[str, Any], without: dict[str, Any]) -> None:
    """The same model and pictures, the same labels in the same order, and probabilities to 1e-5."""
    for key in ("model", "num_classes", "img_size", "device", "dtype", "threads"):
        assert with_torch[key] == without[key]
    for one, other in zip(with_torch["pictures"], without["pictures"], strict=True):
        assert one["image"] == other["image"]
        assert one.get("error") == other.get("error")
        pairs = zip(one.get("predictions", []), other.get("predictions", []), strict=True)
        for first, second in pairs:
            assert (first["index"], first["label"]) == (second["index"], second["label"])
            assert first["probability"] == pytest.approx(second["probability"], abs=1e-5)


def test_the_text_is_the_same_too(
    call: Call, start: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = onnx_files.digits(tmp_path_factory.getbasetemp())
    line = f"--image {onnx_files.SAMPLES / 'three.png'} {onnx_files.SAMPLES / 'eight.png'} --topk 1"
    torch, bare = call(f"{line} --checkpoint {onnx_files.DIGITS}"), start(f"{line} --checkpoint {model}")
    assert torch.code == bare.code == 0
    assert bare.out == torch.out


def test_what_is_missing_is_named(start: Callable[..., Outcome], folder: Path) -> None:
    outcome = start("--image pictures/a.png --checkpoint w.pth")
    assert outcome.code == 2
    assert "No module named 'torch'" in outcome.errors[0]
    assert "setup_cpu_env.py" in outcome.errors[0]
    assert "(.onnx) needs no torch" in outcome.errors[0]
    outcome = start("--image pictures/a.png --checkpoint m.onnx", without=f"{NOT_NEEDED} onnxruntime")
    assert outcome.code == 2
    assert "ONNX files need onnxruntime: run `" in outcome.errors[0]
    for package in ("numpy", "PIL"):
        outcome = start("--image pictures/a.png --checkpoint m.onnx", without=f"{NOT_NEEDED} {package}")
        assert outcome.code == 2
        assert f"No module named '{package}'" in outcome.errors[0]
        assert "-m pip install numpy pillow onnxruntime`" in outcome.errors[0]


def test_wordnet_ids_need_timm(start: Callable[..., Outcome], folder: Path) -> None:
    (folder / "labels.txt").write_text("n01440764\nn01443537\nn01484850\n")
    outcome = start("--image pictures/a.png --checkpoint m.onnx --labels labels.txt")
    assert outcome.code == 2
    assert "words for WordNet ids such as n01440764 are timm's" in outcome.errors[0]


def test_torch_is_not_imported_where_it_is_installed(start: Callable[..., Outcome]) -> None:
    outcome = start("--image pictures/a.png --checkpoint m.onnx --benchmark 1 --output drawn.png", without="torch")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Forward pass, batch 1: median ")
