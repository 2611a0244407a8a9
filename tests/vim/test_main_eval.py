"""`main.py --eval` as a person runs it, its numbers against a computation of its own, and its refusals."""

import argparse
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

import main
import utils
from checkpoint import save_checkpoint
from labels import imagenet_wnids

VIM = Path(main.__file__).resolve().parent
MODEL = "vim_pico_patch4_32"
NAMES = ["ant", "bee", "cow", "doe", "emu", "fox", "gnu"]
FOLDERS = ["bee", "cow", "gnu"]  # a part of the classes
PER_FOLDER = 4


def make_weights(seed, classes=7):
    torch.manual_seed(seed)
    model = timm.create_model(MODEL, num_classes=classes)
    with torch.no_grad():
        model.head.weight *= 100  # else all pictures look alike to untrained weights
    return model.state_dict()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """data/val with a part of the classes, and checkpoints: with everything, bare, without names."""
    root = tmp_path_factory.mktemp("eval")
    random = np.random.default_rng(0)
    for name in FOLDERS:
        (root / "data/val" / name).mkdir(parents=True)
        for number in range(PER_FOLDER):
            pixels = random.integers(0, 255, (4, 4, 3), np.uint8).repeat(12, 0).repeat(10 + number, 1)
            Image.fromarray(pixels).save(root / "data/val" / name / f"{number}.png")
    weights, average = make_weights(1), make_weights(2)
    settings = argparse.Namespace(model=MODEL, input_size=32)
    whole = {"model": weights, "model_ema": average, "epoch": 7, "args": settings, "class_names": NAMES}
    save_checkpoint(root / "whole.pth", whole)
    save_checkpoint(root / "bare.pth", weights)
    save_checkpoint(root / "names.pth", {"model": weights, "class_names": NAMES})
    save_checkpoint(root / "headless.pth", {key: value for key, value in weights.items() if "head" not in key})
    return root


def run(capsys, *words) -> tuple[int, str, str]:
    code = main.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def evaluate(capsys, folder, checkpoint, *words) -> tuple[int, str, str]:
    place = ("--data-path", folder / "data", "--resume", folder / checkpoint, "--device", "cpu")
    return run(capsys, "--eval", "--model", MODEL, "--batch-size", 5, "--num_workers", 0, *place, *words)


def result_line(weights, folder, numbers, size=32) -> str:
    """The line of results, computed picture by picture in fp64 from the definition."""
    side = size if size <= 32 else int(size / 0.875)
    prepare = transforms.Compose(
        [
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    model = timm.create_model(MODEL, num_classes=len(weights["head.bias"]), img_size=size).eval()
    model.load_state_dict(weights)
    losses, ranks = [], []
    for name, target in numbers.items():
        for path in sorted((folder / "data/val" / name).glob("*.png")):
            with torch.no_grad(), Image.open(path) as picture:
                scores = model(prepare(picture)[None])[0].double()
            losses.append(-torch.log_softmax(scores, 0)[target].item())
            ranks.append(int((scores > scores[target]).sum()))
    acc1, acc5 = (100 * np.mean([rank < k for rank in ranks]) for k in (1, 5))
    assert acc1 != acc5  # else the test would not notice a confusion
    return f"* Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} loss {np.mean(losses):.3f}"


BY_NAME = {name: NAMES.index(name) for name in FOLDERS}


def start(*command, cwd) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_the_command_of_the_readme_from_another_folder(folder):
    broken = folder / "data/val/cow/broken.jpg"
    broken.write_bytes(b"\xff\xd8 no more")
    try:
        done = start(
            *(VIM / "main.py", "--eval", "--resume", "whole.pth", "--model", MODEL, "--device", "cpu"),
            *("--batch-size", 1, "--num_workers", 1, "--data-path", "data"),
            cwd=folder,
        )
    finally:
        broken.unlink()
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("*")]
    expected = [result_line(make_weights(seed), folder, BY_NAME) for seed in (1, 2)]
    assert lines == expected
    assert re.search(r"Accuracy of the network on the 12 test images: \d+\.\d% \(1 of 13", done.stdout)
    assert "Accuracy of the ema network on the 12 test images" in done.stdout
    assert "3 of 7 have a folder, numbered by the checkpoint's class names" in done.stdout
    assert done.stderr.count("broken.jpg") == 1
    assert re.search(r"13/13 images, [\d.]+ images/s, .* left", done.stderr)
    assert done.stderr.count("images/s") <= 4  # two evaluations, not a line per batch


def test_two_processes_count_every_picture_once(folder):
    done = start(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", VIM / "main.py", "--eval"),
        *("--dist-eval", "--no-model-ema", "--resume", folder / "whole.pth", "--model", MODEL),
        *("--device", "cpu", "--num_workers", 0, "--batch-size", 5, "--data-path", folder / "data"),
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("*")]
    assert lines == [result_line(make_weights(1), folder, BY_NAME)]
    assert "on the 12 test images" in done.stdout


def test_weights_alone_are_evaluated_once_and_guessing_is_said(folder, capsys):
    code, out, _ = evaluate(capsys, folder, "bare.pth")
    assert code == 0
    assert out.count("* Acc@1") == 1
    assert result_line(make_weights(1), folder, {name: i for i, name in enumerate(FOLDERS)}) in out
    assert "sorted order of the folders (a guess" in out


def test_a_part_of_imagenet_has_imagenets_numbers(capsys, tmp_path):
    weights = make_weights(3, 1000)
    numbers = {imagenet_wnids()[number]: number for number in (7, 999)}
    random = np.random.default_rng(1)
    pixels = [random.integers(0, 255, (40, 40, 3), np.uint8) for _ in range(6)]
    with torch.no_grad():  # class 999 is always the first answer, class 7 the second
        weights["head.bias"][999] += 2000
        weights["head.bias"][7] += 1000
    for name, start in zip(numbers, (0, 3), strict=True):
        (tmp_path / "data/val" / name).mkdir(parents=True)
        for number in range(start, start + 3):
            Image.fromarray(pixels[number]).save(tmp_path / "data/val" / name / f"{number}.png")
    save_checkpoint(tmp_path / "imagenet.safetensors", {"model": weights})
    code, out, _ = evaluate(capsys, tmp_path, "imagenet.safetensors")
    assert code == 0
    assert result_line(weights, tmp_path, numbers) in out
    assert "* Acc@1 50.000 Acc@5 100.000" in out
    assert "2 of 1000 have a folder, numbered by ImageNet's WordNet ids" in out


def test_moving_average_can_be_left_out(folder, capsys):
    code, out, _ = evaluate(capsys, folder, "whole.pth", "--no-model-ema")
    assert code == 0
    assert "ema" not in out.lower()


def test_finetune_names_weights_too_and_typed_size_wins(folder, capsys):
    words = ("--eval", "--model", MODEL, "--data-path", folder / "data", "--finetune", folder / "whole.pth")
    words += ("--device", "cpu", "--num_workers", 0, "--val-batch-size", 3, "--input-size", 48)
    lines = {}
    for mode in ("middle", "upstream"):
        code, out, _ = run(capsys, *words, "--pos-embed-resize", mode)
        assert code == 0
        assert "resized from 65 to 145 rows" in out
        assert "48 x 48 pixels" in out
        lines[mode] = [line for line in out.splitlines() if line.startswith("*")]
    assert lines["middle"] != lines["upstream"]


def test_a_checkpoint_says_which_model_it_is(folder, capsys):
    words = ("--data-path", folder / "data", "--resume", folder / "whole.pth", "--device", "cpu")
    code, out, _ = run(capsys, "--eval", *words, "--num_workers", 0, "--if_amp")
    assert code == 0
    assert f"model: {MODEL}" in out
    assert "32 x 32" in out


def test_random_weights_are_said_aloud(folder, capsys):
    words = ("--data-path", folder / "data", "--model", "resnet10t", "--device", "cpu", "--num_workers", 0)
    code, out, _ = run(capsys, "--eval", *words)
    assert code == 0
    assert "weights: random" in out
    assert "resnet10t" in out
    assert "Acc@5 100.000" in out  # of three classes


def test_more_workers_than_cpus_are_not_started(folder, capsys, monkeypatch):
    monkeypatch.setattr(utils, "usable_cpus", lambda: 0)
    code, out, _ = evaluate(capsys, folder, "names.pth", "--num_workers", 10)
    assert code == 0
    assert "0 of the 10 processes" in out
    assert "* Acc@1" in out


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--resume", "{}/none.pth"), "none.pth"),
        (("--resume", "{}/data/val/bee/0.png"), "0.png"),
        (("--resume", "{}/headless.pth"), "no head.weight"),
        (("--model", "resnet10t"), "no fc.weight"),
        (("--model", "vim_pico_patch_32"), f"the nearest is '{MODEL}'"),
        (("--model", "vim_tiny_patch16_224"), "the checkpoint belongs to"),
        (("--data-path", "{}/nowhere"), "does not exist"),
        (("--data-path", "{}"), "has no folder 'val'"),
        (("--data-set", "CIFAR"), "CIFAR-100"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--val-batch-size", "-1"), "--val-batch-size must be at least 1"),
        (("--num_workers", "-1"), "--num_workers must be at least 0"),
        (("--input-size", "0"), "--input-size must be at least 1"),
        (("--input-size", "2"), "cannot be built for 2 pixels"),
        (("--eval-crop-ratio", "0"), "--eval-crop-ratio must be above 0"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_one_sentence(folder, capsys, words, sentence):
    code, out, err = evaluate(capsys, folder, "names.pth", *(word.format(folder) for word in words))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "Acc@1" not in out


def test_folders_of_other_classes_are_refused(folder, capsys, tmp_path):
    for name in ("bee", "unicorn"):
        (tmp_path / "val" / name).mkdir(parents=True)
    code, _, err = evaluate(capsys, folder, "names.pth", "--data-path", tmp_path)
    assert code == 2
    assert "1 of 2 class folders are none of the checkpoint's class names: 'unicorn'" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_not_replaced_in_silence(folder, capsys):
    code, _, err = evaluate(capsys, folder, "names.pth", "--device", "cuda")
    assert code == 2
    assert "this torch finds no CUDA device" in err


def test_a_word_that_is_no_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        main.run(["--evaluate-me"])
    assert stop.value.code == 2
    assert "unrecognized arguments: --evaluate-me" in capsys.readouterr().err


@pytest.mark.parametrize("place", [VIM, VIM.parent])
def test_torch_hub_finds_every_registered_model(place):
    model = torch.hub.load(str(place), MODEL, source="local", num_classes=3, img_size=16)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 3)
    assert set(timm.list_models(module="models_mamba")) <= set(runpy.run_path(str(place / "hubconf.py")))
