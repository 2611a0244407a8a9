"""The shipped digits example: its data, its checkpoint as a user runs it, and its training."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import main
from checkpoint import read_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digits"
CHECKPOINT = EXAMPLE / "vim_pico_digits.safetensors"
sys.path.insert(0, str(EXAMPLE))

import make_dataset  # noqa: E402
import reproduce  # noqa: E402
import save_weights  # noqa: E402
import steps  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "data"
    make_dataset.write_dataset(folder)
    return folder


@pytest.fixture(scope="module")
def held_out_indices():
    _, digits = make_dataset.load_scans()
    return make_dataset.split_indices(digits)["held_out"]


def few_pictures(data, folder, per_class):
    """A data folder with the first pictures of each class."""
    for split in ("train", "val"):
        for name in make_dataset.CLASS_NAMES:
            (folder / split / name).mkdir(parents=True)
            for path in sorted((data / split / name).iterdir())[:per_class]:
                shutil.copy(path, folder / split / name)
    return folder


def test_every_scan_is_in_one_split_and_every_class_is_shared_alike():
    _, digits = make_dataset.load_scans()
    parts = make_dataset.split_indices(digits)
    assert sorted(index for indices in parts.values() for index in indices) == list(range(1797))
    for digit in range(10):
        number = [int((digits[indices] == digit).sum()) for indices in parts.values()]
        assert np.allclose(np.array(number) / sum(number), [0.60, 0.15, 0.25], atol=0.01)


def test_held_out_scans_are_those_of_the_training_run(held_out_indices):
    """Another split would put pictures that the shipped weights were trained on among the held-out ones."""
    digest = hashlib.sha256(",".join(map(str, held_out_indices)).encode()).hexdigest()
    assert digest == "19f0fcbb78e9994acb5406531c5d1c217c23593875dd98da964bed8e88f500e7"


def test_files_are_the_scans(data, held_out_indices):
    scans, digits = make_dataset.load_scans()
    files = sorted((data / "held_out" / "val").glob("*/*.png"), key=lambda path: path.name)
    assert [int(path.stem) for path in files] == held_out_indices
    for path in files[::50]:
        index = int(path.stem)
        assert path.parent.name == make_dataset.CLASS_NAMES[digits[index]]
        ink = 1 - np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX)) / 255
        assert np.corrcoef(ink.ravel(), scans[index].ravel())[0, 1] > 0.95


def test_samples_are_held_out_pictures_one_per_class(data):
    samples = {path.stem: Image.open(path).tobytes() for path in (EXAMPLE / "samples").glob("*.png")}
    assert set(samples) == set(make_dataset.CLASS_NAMES)
    for name, pixels in samples.items():
        held_out = (data / "held_out" / "val" / name).iterdir()
        assert pixels in [Image.open(path).tobytes() for path in held_out]


def test_data_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert make_dataset.run([str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .* is not empty; name a new folder\.\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_checkpoint_says_what_it_is():
    checkpoint = read_checkpoint(str(CHECKPOINT))
    assert (checkpoint.model_name, checkpoint.img_size) == ("vim_pico_patch4_32", 32)
    assert checkpoint.class_names == sorted(make_dataset.CLASS_NAMES)  # the order of the folders
    assert checkpoint.num_classes == 10
    assert CHECKPOINT.stat().st_size < 1_000_000


def test_samples_are_named_rightly_by_the_command_of_the_readme():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, ROOT / "vim" / "infer_rpi.py", "--image", EXAMPLE / "samples"]
    command += ["--checkpoint", CHECKPOINT, "--threads", "1", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    pictures = json.loads(done.stdout)["pictures"]
    assert len(pictures) == 10
    for picture in pictures:
        best = picture["predictions"][0]
        assert best["label"] == Path(picture["image"]).stem


def evaluate(capsys, folder) -> str:
    words = ["--eval", "--resume", CHECKPOINT, "--model", "vim_pico_patch4_32", "--device", "cpu", "--num_workers", "0"]
    assert main.run([*map(str, words), "--data-path", str(folder)]) == 0
    return capsys.readouterr().out


def test_held_out_accuracy(data, capsys):
    printed = evaluate(capsys, data / "held_out")
    assert "on the 450 test images" in printed
    found = re.search(r"Acc@1 ([\d.]+)", printed)
    assert found is not None
    assert float(found[1]) >= 97.5


def test_record_is_that_of_the_shipped_weights(data, capsys):
    """They are the moving average of the best epoch in the log.txt beside them."""
    epochs = [json.loads(line) for line in (EXAMPLE / "log.txt").read_text("utf-8").splitlines()]
    assert len(epochs) == int(reproduce.RECIPE[reproduce.RECIPE.index("--epochs") + 1])
    best = max(epochs, key=lambda epoch: epoch["ema_acc1"])
    assert f"Acc@1 {best['ema_acc1']:.3f} Acc@5 {best['ema_acc5']:.3f} loss {best['ema_loss']:.3f}" in evaluate(
        capsys, data
    )


def test_the_recipe_runs_and_says_how_good_its_weights_are(data, tmp_path):
    """All steps of reproduce.py after the first, on a few pictures for three epochs."""
    few = few_pictures(data, tmp_path / "data", per_class=4)
    shutil.copytree(few / "val", few / "held_out" / "val")
    shutil.copytree(EXAMPLE / "samples", tmp_path / "samples")
    words = ["--epochs", "3", "--batch-size", "8", "--num_workers", "0", "--warmup-epochs", "0"]
    first, *steps = reproduce.commands(tmp_path, words)
    assert first[1:3] == [str(EXAMPLE / "make_dataset.py"), str(tmp_path / "data")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["OMP_NUM_THREADS"] = "1"
    outputs = [subprocess.run(step, env=environment, capture_output=True, text=True, check=True) for step in steps]
    trained, _, evaluated, named = (done.stdout for done in outputs)
    best = re.findall(r"Max accuracy: ([\d.]+)%", trained)[-1]
    assert f"Acc@1 {best}" in evaluated
    assert all(f"{name}.png" in named for name in make_dataset.CLASS_NAMES)
    epochs = [json.loads(line) for line in (tmp_path / "training" / "log.txt").read_text("utf-8").splitlines()]
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]
    assert f"{max(epoch['ema_acc1'] for epoch in epochs):.2f}" == best


@pytest.mark.parametrize("by_average", [True, False])
def test_written_weights_are_those_that_the_run_went_by(tmp_path, capsys, by_average):
    weights, average = {"head.weight": torch.zeros(3, 2)}, {"head.weight": torch.ones(3, 2)}
    contents = {"model": weights, "model_ema": average, "model_name": "vim_x", "img_size": (32, 64)}
    contents["args"] = argparse.Namespace(mend=["lr-lag", "ema-best"] if by_average else [])
    save_checkpoint(tmp_path / "run.pth", {**contents, "class_names": ["a", "b", "c"]})
    assert save_weights.run([str(tmp_path / "run.pth"), str(tmp_path / "out.safetensors")]) == 0
    written = read_checkpoint(str(tmp_path / "out.safetensors"))
    assert torch.equal(written.model["head.weight"], (average if by_average else weights)["head.weight"])
    assert ("moving average" in capsys.readouterr().out) == by_average
    assert (written.model_name, written.img_size, written.class_names) == ("vim_x", (32, 64), ["a", "b", "c"])
    assert save_weights.run([str(tmp_path / "none.pth"), str(tmp_path / "out.safetensors")]) == 2
    assert re.fullmatch(r"error: .*none\.pth.*\n", capsys.readouterr().err)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
def test_ctrl_c_leaves_a_step_the_time_to_save(tmp_path):
    """Ctrl-C reaches both processes; the step may go on for long, and its exit code counts."""
    saved = tmp_path / "saved"
    script = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        f"    pathlib.Path({str(saved)!r}).touch()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGINT, save)\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    assert steps.run_and_say([sys.executable, "-c", script]) == 130
    assert saved.exists()
    assert steps.run_and_say([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137
