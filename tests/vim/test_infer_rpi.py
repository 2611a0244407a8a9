"""The script as its user sees it: what it prints, writes and returns, for good and for bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import checkpoint
import drawing
import infer_rpi
import models_mamba  # noqa: F401  (registers the models)

MODEL = "vim_pico_patch4_32"
SCRIPT = Path(infer_rpi.__file__).resolve()
NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


@dataclass
class Outcome:
    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Call = Callable[[str], Outcome]


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    return timm.create_model(MODEL, num_classes=10).state_dict()


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, the current one, with a checkpoint w.pth and the pictures a.png and b.jpg in pictures/."""
    checkpoint.save_checkpoint(
        tmp_path / "w.pth",
        {"model": weights, "class_names": NAMES, "args": Namespace(model=MODEL, input_size=32), "epoch": 1},
    )
    (tmp_path / "pictures").mkdir()
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(rng.integers(0, 255, (50, 40, 3), dtype=np.uint8)).save(tmp_path / "pictures" / name)
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


def test_one_picture(call: Call) -> None:
    outcome = call("--image pictures/a.png --checkpoint w.pth")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "Top predictions:"
    assert len(lines) == 6
    for place, line in enumerate(lines[1:], 1):
        label, figure = line.removeprefix(f"{place}. ").split(": ")
        assert label in NAMES
        assert len(figure) == 6
        assert 0 <= float(figure) <= 1
    assert MODEL in outcome.err
    assert "w.pth" in outcome.err
    assert "warning" not in outcome.err


def test_the_numbers_are_those_of_the_model(call: Call, weights: dict[str, torch.Tensor]) -> None:
    """By hand: bicubic to 32 pixels, ImageNet's mean and deviation, the network, softmax."""
    model = timm.create_model(MODEL, num_classes=10).eval()
    model.load_state_dict(weights)
    picture = opened("pictures/a.png").resize((32, 40), Image.Resampling.BICUBIC).crop((0, 4, 32, 36))
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
    values = (values - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.inference_mode():
        expected = model(values[None]).softmax(-1)[0]
    found = json.loads(call("--image pictures/a.png --checkpoint w.pth --json --topk 10").out)
    predictions = found["pictures"][0]["predictions"]
    assert [p["label"] for p in predictions] == [NAMES[p["index"]] for p in predictions]
    assert [p["index"] for p in predictions] == expected.argsort(descending=True).tolist()
    for prediction in predictions:
        assert prediction["probability"] == pytest.approx(expected[prediction["index"]].item(), abs=1e-5)


def test_several_pictures_whatever_the_batch(call: Call) -> None:
    one = call("--image pictures/a.png pictures/b.jpg pictures/a.png --checkpoint w.pth")
    assert one.code == 0
    assert one.out.count("Top predictions:") == 2
    assert "Picture: pictures/a.png" in one.out
    for image in ("pictures", "pictures/", "'pictures/*'", "pictures/a.png 'pictures/b.*'"):
        again = call(f"--image {image} --checkpoint w.pth --batch-size 2 --topk 3 --json")
        found = json.loads(again.out)["pictures"]
        assert [os.path.basename(entry["image"]) for entry in found] == ["a.png", "b.jpg"]
        for entry in found:
            assert f"1. {entry['predictions'][0]['label']}: {entry['predictions'][0]['probability']:.4f}" in one.out


def test_standard_input(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = call("--image pictures/a.png --checkpoint w.pth")
    data = io.TextIOWrapper(io.BytesIO((folder / "pictures/a.png").read_bytes()))
    monkeypatch.setattr(sys, "stdin", data)
    assert call("--image - --checkpoint w.pth").out == direct.out


def test_an_empty_terminal_is_not_waited_for(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    outcome = call("--image - --checkpoint w.pth")
    assert outcome.code == 2
    assert "standard input" in outcome.errors[0]


def test_json_alone_is_on_standard_output(call: Call) -> None:
    outcome = call("--image pictures gone.png --checkpoint w.pth --json --benchmark 2 --threads 1")
    assert outcome.code == 1
    found = json.loads(outcome.out)
    assert found["model"] == MODEL
    assert found["checkpoint"] == "w.pth"
    assert found["num_classes"] == 10
    assert found["img_size"] == [32, 32]
    assert found["threads"] == 1
    assert found["benchmark"]["runs"] == 2
    assert 0 < found["benchmark"]["least_ms"] <= found["benchmark"]["median_ms"] <= found["benchmark"]["most_ms"]
    assert "No such file" in found["pictures"][2]["error"]
    assert len(outcome.errors) == 1


def test_benchmark(call: Call) -> None:
    outcome = call("--image pictures/a.png --checkpoint w.pth --benchmark 3 --batch-size 2")
    first, *rest = outcome.out.splitlines()
    assert first.startswith("Forward pass, batch 2: median ")
    assert first.endswith("3 runs")
    assert rest[0] == "Top predictions:"


def test_topk_is_clamped(call: Call) -> None:
    assert len(call("--image pictures/a.png --checkpoint w.pth --topk 99").out.splitlines()) == 11
    assert len(call("--image pictures/a.png --checkpoint w.pth --topk 1").out.splitlines()) == 2


def test_without_a_checkpoint_it_says_so(call: Call) -> None:
    outcome = call(f"--image pictures/a.png --model {MODEL} --num_classes 3")
    assert outcome.code == 0
    assert "random" in outcome.err
    assert "mean nothing" in outcome.err
    assert sorted(line.split(". ")[1].split(":")[0] for line in outcome.out.splitlines()[1:]) == [
        "Class 0",
        "Class 1",
        "Class 2",
    ]
    assert call(f"--image pictures/a.png --model {MODEL} --num-classes 3").out == outcome.out


def test_a_thousand_classes_have_imagenet_names(call: Call) -> None:
    import labels

    outcome = call(f"--image pictures/a.png --model {MODEL} --topk 1 --json")
    found = json.loads(outcome.out)["pictures"][0]["predictions"][0]
    assert found["label"] == labels.imagenet_names()[found["index"]]


def test_labels_of_a_file(call: Call, folder: Path) -> None:
    (folder / "labels.txt").write_text("".join(f"数字 {index}\n" for index in range(10)), encoding="utf-8")
    assert "1. 数字 " in call("--image pictures/a.png --checkpoint w.pth --labels labels.txt").out
    (folder / "short.txt").write_text("one\ntwo\n")
    outcome = call("--image pictures/a.png --checkpoint w.pth --labels short.txt")
    assert outcome.code == 2
    assert outcome.out == ""
    assert "has 2 names but the model has 10 classes" in outcome.errors[0]


def test_other_sizes_resize_the_position_embedding(call: Call) -> None:
    outcome = call("--image pictures/a.png --checkpoint w.pth --img-size 48")
    assert outcome.code == 0
    assert "from 65 to 145 tokens" in outcome.err
    outcome = call("--image pictures/a.png --checkpoint w.pth --img-size 24 40 --json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["img_size"] == [24, 40]


def test_backends(call: Call) -> None:
    plain = call("--image pictures/a.png --checkpoint w.pth --backend torch")
    assert plain.code == 0
    outcome = call("--image pictures/a.png --checkpoint w.pth --backend cuda")
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1


@pytest.mark.parametrize("fast", [False, True], ids=["slow-bf16", "fast-bf16"])
def test_bfloat16(call: Call, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("causal_conv1d.backend.machine.has_fast_bf16", lambda: fast)
    wide, narrow = (
        json.loads(call(f"--image pictures/a.png --checkpoint w.pth --topk 10 --json --dtype {dtype}").out)
        for dtype in ("float32", "bfloat16")
    )
    assert (wide["dtype"], narrow["dtype"]) == ("float32", "bfloat16")
    probabilities = (
        {p["index"]: p["probability"] for p in found["pictures"][0]["predictions"]} for found in (wide, narrow)
    )
    before, after = probabilities
    assert before != after
    assert all(abs(before[index] - after[index]) < 0.01 for index in before)
    outcome = call("--image pictures/a.png --checkpoint w.pth --dtype bfloat16")
    assert ("slower" in outcome.err) is not fast


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu(call: Call) -> None:
    outcome = call("--image pictures/a.png --checkpoint w.pth --device cuda")
    assert outcome.code == 2
    assert "no CUDA device" in outcome.errors[0]


# ---------------------------------------------------------------- the drawn picture


def opened(path: str) -> Image.Image:
    with Image.open(path) as picture:
        return picture.convert("RGB")


def test_output_file(call: Call, folder: Path) -> None:
    outcome = call("--image pictures/a.png --checkpoint w.pth --output drawn.png")
    assert outcome.code == 0
    drawn = opened("drawn.png")
    # 40 x 50 is enlarged 11 times; the panel with the labels is under it.
    top = opened("pictures/a.png").resize((440, 550), Image.Resampling.NEAREST)
    left = (drawn.width - 440) // 2
    assert np.array_equal(np.asarray(drawn.crop((left, 0, left + 440, 550))), np.asarray(top))
    assert drawn.height > 550 + 5 * 20
    assert np.asarray(drawn.crop((0, 550, *drawn.size))).std() > 10
    assert sorted(path.name for path in folder.iterdir()) == ["drawn.png", "pictures", "w.pth"]


@pytest.mark.parametrize("name", ["drawn.jpg", "drawn.webp", "drawn.bmp", "drawn.tiff", "drawn.GIF"])
def test_output_formats(call: Call, name: str) -> None:
    assert call(f"--image pictures/a.png --checkpoint w.pth --output {name}").code == 0
    assert opened(name).height > 550


def test_output_folder(call: Call, folder: Path) -> None:
    (folder / "pictures/a.jpg").write_bytes((folder / "pictures/b.jpg").read_bytes())
    outcome = call("--image pictures gone.png --checkpoint w.pth --output new/drawn --json")
    assert outcome.code == 1
    assert sorted(path.name for path in (folder / "new/drawn").iterdir()) == ["a-2.png", "a.png", "b.png"]
    assert [entry.get("output") for entry in json.loads(outcome.out)["pictures"]] == [
        os.path.join("new", "drawn", name) for name in ("a.png", "a-2.png", "b.png")
    ] + [None]


@pytest.mark.parametrize(
    ("output", "images", "expected"),
    [
        ("missing/drawn.png", "pictures/a.png", "No such file"),
        ("drawn.txt", "pictures/a.png", "must end like a picture"),
        ("pictures/a.png", "pictures/a.png", "overwrite"),
        ("pictures", "pictures", "overwrite"),
        ("w.pth", "pictures", "several pictures need a folder"),
        ("w.pth/drawn.png", "pictures/a.png", "Cannot write"),
        ("'a\0b.png'", "pictures/a.png", "Cannot write"),
    ],
)
def test_unwritable_output_stops_before_the_work(
    call: Call, folder: Path, output: str, images: str, expected: str
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    outcome = call(f"--image {images} --checkpoint w.pth --output {output}")
    assert outcome.code == 2
    assert outcome.out == ""
    assert expected in outcome.errors[0]
    assert "model:" not in outcome.err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_a_failed_write_leaves_the_old_file(call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "drawn.png").write_bytes(b"old")

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    outcome = call("--image pictures/a.png --checkpoint w.pth --output drawn.png")
    assert outcome.code == 2
    assert "No space left" in outcome.errors[0]
    assert "Top predictions:" in outcome.out
    assert (folder / "drawn.png").read_bytes() == b"old"
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (640, 480), (3000, 2000), (20_000, 3), (3, 20_000)])
def test_any_size_can_be_drawn(size: tuple[int, int]) -> None:
    drawn = drawing.draw_predictions(Image.new("RGB", size, "red"), [("tabby, tabby cat", 0.9), ("猫" * 99, 0.1)])
    assert drawing.LEAST_WIDTH <= drawn.width <= drawing.LONGEST_SIDE
    assert drawn.height <= 2 * drawing.LONGEST_SIDE
    assert (np.asarray(drawn)[0] == (255, 0, 0)).all(-1).any()


def test_the_bar_is_as_long_as_the_probability() -> None:
    for probability in (0.0, 0.25, 1.0):
        drawn = np.asarray(drawing.draw_predictions(Image.new("RGB", (1000, 100)), [("", probability)]))
        length = max((row == drawing._BEST).all(-1).sum() for row in drawn)
        assert length == pytest.approx(probability * (1000 - 2 * 29), abs=2)


def test_fonts_are_looked_for_by_character() -> None:
    assert drawing.has_font_for("tabby, tabby cat")
    assert not drawing.has_font_for("\U0010fffd")


# ---------------------------------------------------------------- bad input


class Bomb:
    """Would leave a trace if it were unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("made by evil.pth",)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--image gone.png --checkpoint w.pth", "No such file"),
        ("--image w.pth --checkpoint w.pth", "is not a picture"),
        ("--image empty --checkpoint w.pth", "is a folder"),
        ("--image '*.webp' --checkpoint w.pth", "No such file"),
        ("--image pictures/a.png --checkpoint w.pth --device meta", "cannot be used"),
        ("--image http://127.0.0.1:1/x.png --checkpoint w.pth", "Cannot download"),
        ("--image pictures/a.png --checkpoint gone.pth", "gone.pth"),
        ("--image pictures/a.png --checkpoint pictures/a.png", "a.png"),
        ("--image pictures/a.png --checkpoint cut.pth", "cut.pth"),
        ("--image pictures/a.png --checkpoint evil.pth", "run code"),
        ("--image pictures/a.png --checkpoint headless.pth", "holds no classifier"),
        ("--image pictures/a.png --checkpoint nan.pth", "not finite"),
        ("--image pictures/a.png --checkpoint w.pth --num_classes 9", "leave --num_classes away"),
        (f"--image pictures/a.png --checkpoint w.pth --model {TINY}", "another model"),
        ("--image pictures/a.png --model vim_pica_patch4_32", "the nearest is 'vim_pico_patch4_32'"),
        (f"--image pictures/a.png --model {MODEL} --img-size 2", "cannot be built for 2 pixels"),
        ("--image pictures/a.png --checkpoint w.pth --labels gone.txt", "Cannot read"),
        ("--image pictures/a.png --checkpoint w.pth --device gpu", "cannot be used"),
    ],
)
def test_bad_input(call: Call, folder: Path, weights: dict[str, torch.Tensor], line: str, expected: str) -> None:
    (folder / "empty").mkdir()
    whole = (folder / "w.pth").read_bytes()
    (folder / "cut.pth").write_bytes(whole[: len(whole) // 2])
    torch.save({"model": weights, "boom": Bomb()}, folder / "evil.pth")
    checkpoint.save_checkpoint(
        folder / "headless.pth", {"model": {k: v for k, v in weights.items() if "head" not in k}, "model_name": MODEL}
    )
    broken = {**weights, "norm_f.weight": torch.full_like(weights["norm_f.weight"], float("nan"))}
    checkpoint.save_checkpoint(folder / "nan.pth", {"model": broken, "model_name": MODEL})
    outcome = call(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert expected in outcome.errors[0]
    assert not (folder / "made by evil.pth").exists()
    assert outcome.errors[0].endswith(".")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--image",
        "--image x --topk 0",
        "--image x --topk many",
        "--image x --batch-size -1",
        "--image x --threads 0",
        "--image x --threads 100000",
        "--image x --batch-size 9999999999999999999999",
        "--image x --benchmark 0",
        "--image x --img-size 1 2 3",
        "--image x --backend best",
        "--image x --nonsense",
    ],
)
def test_bad_command_lines(call: Call, line: str) -> None:
    outcome = call(line)
    assert outcome.code == 2
    assert "error:" in outcome.err
    assert outcome.out == ""


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_other_pictures_of_a_batch_are_still_done(call: Call, folder: Path, batch_size: int) -> None:
    (folder / "pictures/aa.png").write_bytes(b"no picture")
    (folder / "pictures/c.jpg").mkdir()
    outcome = call(f"--image pictures --checkpoint w.pth --batch-size {batch_size}")
    assert outcome.code == 1
    assert outcome.out.count("Top predictions:") == 2
    assert ["aa.png" in line for line in outcome.errors] == [True, False]
    assert "c.jpg" in outcome.errors[1]


def test_interruption(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import pictures

    def interrupt(sources: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pictures, "find_pictures", interrupt)
    outcome = call("--image pictures/a.png --checkpoint w.pth")
    assert outcome.code == 130
    assert outcome.errors == ["error: stopped before the end."]


# ---------------------------------------------------------------- as a program of its own


def start(*arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, env=environment, timeout=300, **options)  # type: ignore[call-overload]


def test_the_command_of_the_guides_from_another_folder(folder: Path) -> None:
    """Unchanged it must work, and import nothing of training or plotting."""
    weights = timm.create_model(TINY).state_dict()
    checkpoint.save_checkpoint(folder / "vim_tiny.pth", {"model": weights})
    (folder / "cat.jpg").write_bytes((folder / "pictures/b.jpg").read_bytes())
    line = f"--image cat.jpg --checkpoint vim_tiny.pth --model {TINY} --num_classes 1000 --topk 5 --device cpu"
    done = start("-X", "importtime", str(SCRIPT), *line.split(), cwd=folder)
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[-6] == "Top predictions:"
    assert [line.split(". ")[0] for line in lines[-5:]] == ["1", "2", "3", "4", "5"]
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr.decode(), re.MULTILINE))
    assert {"models_mamba", "classify", "torch"} <= imported
    assert not imported & {"engine", "datasets", "main", "matplotlib", "sklearn", "mlflow", "transformers"}


def test_inside_vim_and_a_pipe_that_closes_early(folder: Path) -> None:
    code = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, 'infer_rpi.py', *sys.argv[1:]], stdout=subprocess.PIPE, "
        "stderr=subprocess.PIPE); p.stdout.close(); e = p.stderr.read().decode(); p.wait(); p.stderr.close(); "
        "print(p.returncode, 'Traceback' in e, 'Exception ignored' in e)"
    )
    done = start(
        "-c", code, "--image", str(folder / "pictures"), "--checkpoint", str(folder / "w.pth"), cwd=SCRIPT.parent
    )
    assert done.stdout.decode().split() == ["1", "False", "False"], done.stderr.decode()


def test_help_is_quick_and_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, str(SCRIPT), "-h"], capture_output=True, env=environment, timeout=60)
    assert done.returncode == 0
    assert b"--checkpoint" in done.stdout


def test_a_missing_package_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm/__init__.py").write_text("raise ImportError('No module named mamba_ssm')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--image", "pictures"],
        capture_output=True,
        env=environment,
        cwd=folder,
        timeout=300,
    )
    assert done.returncode == 2
    assert b"setup_cpu_env.py" in done.stderr
    assert b"Traceback" not in done.stderr


def test_the_shortest_demonstration_says_what_it_did_not_name(tmp_path: Path) -> None:
    """Without weights and without a network it shows that Vim-Tiny runs, reads a shipped digit, and says so."""
    root = SCRIPT.parents[1]
    picture = root / "examples/digits/samples/three.png"
    done = subprocess.run(
        [sys.executable, root / "infer_vim_tiny.py", picture, "--threads", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 2
    assert "Forward pass: " in done.stdout
    assert "eight.png" in done.stdout
    assert done.stderr.splitlines()[-1] == f"Not named, for want of weights: {picture}."
