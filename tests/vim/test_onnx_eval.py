"""`main.py --eval` with an ONNX file: the numbers of the checkpoint that it was made of, and its refusals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx", reason="onnx is not installed: no ONNX file is tested")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no ONNX file is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no ONNX file is tested")

import onnx_files

import main
from labels import imagenet_names, imagenet_wnids
from pictures import eval_transform, open_picture


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """val/ with pictures of some colours in the folders red and blue, and the small file m.onnx."""
    random = np.random.default_rng(0)
    for name in ("red", "blue"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for number in range(5):
            pixels = random.integers(0, 256, (1, 1, 3), np.uint8).repeat(50, 0).repeat(60 - number, 1)
            Image.fromarray(pixels).save(tmp_path / "val" / name / f"{number}.png")
    onnx_files.write(tmp_path / "m.onnx")
    return tmp_path


def evaluate(capsys: pytest.CaptureFixture[str], folder: Path, *words: object) -> tuple[int, str, str]:
    line = ("--eval", "--data-path", folder, "--num_workers", 0, "--batch-size", 3, *words)
    code = main.run([str(word) for word in line])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def result_line(folder: Path, numbers: dict[str, int]) -> str:
    """The line of results of the small file, in fp64."""
    losses, ranks = [], []
    for name, number in numbers.items():
        for path in sorted((folder / "val" / name).iterdir()):
            (scores,) = onnx_files.logits(eval_transform(onnx_files.SIZE).array(open_picture(path))[None])
            losses.append(np.log(np.exp(scores - scores[number]).sum()))
            ranks.append(int((scores > scores[number]).sum()))
    first = 100 * np.mean([rank == 0 for rank in ranks])
    assert 0 < first < 100  # else the test would not notice a confusion
    return f"* Acc@1 {first:.3f} Acc@5 100.000 loss {np.mean(losses):.3f}"


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_the_small_file(folder: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, out, err = evaluate(capsys, folder, flag, folder / "m.onnx", "--device", "cpu")
    assert code == 0, err
    assert result_line(folder, {"red": 0, "blue": 2}) in out.splitlines()
    assert "model: mean_colour, 3 classes, 33 x 40 pixels" in out
    assert f"weights: {folder / 'm.onnx'}, run by onnxruntime" in out
    assert "2 of 3 have a folder, numbered by the checkpoint's class names" in out
    assert "Accuracy of the network on the 10 test images" in out
    assert out.count("* Acc@1") == 1
    again = evaluate(capsys, folder, flag, folder / "m.onnx", "--model", "mean_colour", "--input-size", 33, 40)
    assert result_line(folder, {"red": 0, "blue": 2}) in again[1].splitlines()


def test_broken_pictures_are_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = result_line(folder, {"red": 0, "blue": 2})
    (folder / "val/red/broken.jpg").write_bytes(b"\xff\xd8 no more")
    code, out, err = evaluate(capsys, folder, "--resume", folder / "m.onnx")
    assert code == 0
    assert expected in out.splitlines()
    assert "(1 of 11 could not be read)" in out
    assert "broken.jpg" in err


def test_the_digits_example_has_the_results_of_its_checkpoint(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = onnx_files.digits(tmp_path_factory.getbasetemp())
    data = folder / "digits"
    for sample in sorted(onnx_files.SAMPLES.glob("*.png")):
        (data / "val" / sample.stem).mkdir(parents=True)
        with Image.open(sample) as opened:
            for number in range(3):  # the last are not so easily read
                opened.rotate(25 * number).save(data / "val" / sample.stem / f"{number}.png")
    found, wanted = (
        evaluate(capsys, data, "--resume", weights, "--device", "cpu")[1].splitlines()
        for weights in (model, onnx_files.DIGITS)
    )
    for beginning in ("* Acc@1", "Accuracy of the network", "data: ", "classes: ", "device: "):
        (mine,), (theirs,) = ([line for line in lines if line.startswith(beginning)] for lines in (found, wanted))
        assert mine == theirs
    assert not any(line.startswith("* Acc@1 100.000") for line in found)


def test_folders_have_the_checkpoints_own_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those for people may be others: the words for WordNet ids, or what --labels gave."""
    expected = result_line(folder, {"red": 0, "blue": 2})
    names = {"class_names": '["rot", "grün", "blau"]', "checkpoint_names": json.dumps(onnx_files.NAMES)}
    onnx_files.write(folder / "m.onnx", **names)
    code, out, _ = evaluate(capsys, folder, "--resume", folder / "m.onnx")
    assert code == 0
    assert expected in out.splitlines()
    for damaged in ("[", '["red"]', "[1, 2, 3]"):
        onnx_files.write(folder / "m.onnx", checkpoint_names=damaged)
        code, _, err = evaluate(capsys, folder, "--resume", folder / "m.onnx")
        assert code == 2
        assert "are not 3 names" in err


def test_names_that_were_made_up_are_not_looked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx_files.write(folder / "m.onnx", class_names='["Class 0", "Class 1", "Class 2"]', weights="random")
    code, out, _ = evaluate(capsys, folder, "--resume", folder / "m.onnx")
    assert code == 0
    assert "sorted order of the folders (a guess" in out
    assert "(random ones, so the results mean nothing)" in out
    assert result_line(folder, {"blue": 0, "red": 1}) in out.splitlines()


def test_a_part_of_imagenet(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = np.zeros((1000, 3), np.float32)
    weight[7, 0] = weight[999, 2] = 100
    model = onnx_files.small(weight=weight)
    onnx_files.write(folder / "m.onnx", model, class_names=json.dumps(imagenet_names()))
    for name, number in (("red", 7), ("blue", 999)):
        (folder / "val" / name).rename(folder / "val" / imagenet_wnids()[number])
    code, out, _ = evaluate(capsys, folder, "--resume", folder / "m.onnx")
    assert code == 0
    assert "2 of 1000 have a folder, numbered by ImageNet's WordNet ids" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--eval", "--resume", "{}/gone.onnx"), "There is no file"),
        (
            ("--eval", "--resume", "{}/m.onnx", "--model", "vim_pico_patch4_32"),
            "m.onnx holds mean_colour; leave --model",
        ),
        (("--eval", "--resume", "{}/m.onnx", "--input-size", "48"), "33 x 40 pixels alone; leave --input-size away"),
        (("--eval", "--resume", "{}/m.onnx", "--if_amp"), "leave --if_amp away"),
        (("--eval", "--resume", "{}/other.onnx"), "its channels is 'BGR'"),
        (("--eval", "--resume", "{}/m.onnx", "--data-path", "{}/strangers"), "none of the checkpoint's class names"),
        (("--eval", "--resume", "{}/m.onnx", "--data-path", "{}/gone"), "does not exist"),
        (("--resume", "{}/m.onnx"), "is an ONNX file, which can be evaluated (--eval) but not trained"),
        (("--finetune", "{}/m.onnx"), "is an ONNX file, which can be evaluated (--eval) but not trained"),
        (("--finetune", "{}/weights"), "is an ONNX file, which can be evaluated (--eval) but not trained"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], sentence: str
) -> None:
    (folder / "strangers/val/unicorn").mkdir(parents=True)
    onnx_files.write(folder / "weights")
    onnx_files.write(folder / "other.onnx", preprocessing=json.dumps(onnx_files.preprocessing(channels="BGR")))
    line = ["--num_workers", "0", "--data-path", str(folder), *(word.format(folder) for word in words)]
    code = main.run(line)
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "Acc@1" not in out


def test_another_device_is_not_taken_in_silence(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "pick_device", lambda name: main.torch.device(name))
    code, _, err = evaluate(capsys, folder, "--resume", folder / "m.onnx", "--device", "cuda")
    assert code == 2
    assert "an ONNX file is evaluated on the CPU here: leave --device cuda away" in err


def test_without_onnxruntime(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, _, err = evaluate(capsys, folder, "--resume", folder / "m.onnx")
    assert code == 2
    assert "ONNX files need onnxruntime" in err
