"""The script that quantizes, as its user sees it, and what the other scripts do with the file that it writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import training_runs

import infer_rpi
import main
import quantize
from checkpoint import CheckpointError, load_weights, read_checkpoint, save_checkpoint
from classify import load_classifier
from int8 import is_quantized
from mamba_ssm.modules.int8 import layers_of
from model_setup import build_model

DIGITS = Path(main.__file__).resolve().parents[1] / "examples" / "digits"
WEIGHTS = DIGITS / "vim_pico_digits.safetensors"
SAMPLES = DIGITS / "samples"
NAMES = ["eight", "five", "four", "nine", "one", "seven", "six", "three", "two", "zero"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """The ten samples as an evaluation set: val/CLASS/CLASS.png."""
    folder = tmp_path_factory.mktemp("digits")
    for name in NAMES:
        target = folder / "val" / name / f"{name}.png"
        target.parent.mkdir(parents=True)
        target.write_bytes((SAMPLES / f"{name}.png").read_bytes())
    return folder


def call(capsys, *words):
    """The exit code, standard output and standard error of a command line."""
    try:
        code = quantize.run([str(word) for word in words])
    except SystemExit as error:  # of argparse
        code = error.code
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize("scheme", ["dynamic", "static"])
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_the_digits_stay_right_in_a_third_of_the_size(scheme, ending, digits, tmp_path, capsys):
    target = tmp_path / f"q.{ending}"
    target.write_bytes(b"an older file")
    calibrate = ("--calibrate", SAMPLES, "--calibration-size", 7) if scheme == "static" else ()
    words = ("--checkpoint", WEIGHTS, "--output", target, "--scheme", scheme, *calibrate, "--data-path", digits)
    code, out, err = call(capsys, *words)
    assert code == 0
    assert "before: * Acc@1 100.000" in out
    assert "after: * Acc@1 100.000" in out
    assert "accuracy: +0.000 points" in out
    assert ("Calibration: 7/7 images" in err) == (scheme == "static")
    ratio = float(re.search(r"size: 0\.8\d MB before, 0\.\d\d MB after, ratio (0\.\d+)", out)[1])
    limit = 0.35 if ending == "safetensors" else 0.37  # torch's format adds 150 bytes to each of 200 tensors
    assert target.stat().st_size < limit * WEIGHTS.stat().st_size
    assert ratio < limit
    apart = float(re.search(r"logits of 10 evaluated pictures: at most (\S+) apart", out)[1])
    assert 0 < apart < 1
    assert re.search(r"one picture: \d+\.\d ms before, \d+\.\d ms after, ratio", out)
    found = read_checkpoint(str(target))
    assert (found.model_name, found.img_size, sorted(found.class_names)) == ("vim_pico_patch4_32", 32, NAMES)
    assert is_quantized(found.model)
    assert any(name.endswith("input_step") for name in found.model) == (scheme == "static")
    assert sorted(tmp_path.iterdir()) == [target]  # no temporary file


@pytest.fixture(scope="module")
def quantized(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("quantized") / "q.safetensors"
    assert quantize.run(["--checkpoint", str(WEIGHTS), "--output", str(path)]) == 0
    return path


def test_without_pictures_random_ones_are_compared(tmp_path, capsys):
    code, out, _ = call(capsys, "--checkpoint", WEIGHTS, "--output", tmp_path / "q.pth")
    assert code == 0
    assert "logits of 2 random pictures" in out
    assert "accuracy: not measured" in out


def test_the_file_names_pictures(quantized, capsys):
    for dtype in ("float32", "bfloat16"):
        words = ["--image", SAMPLES / "three.png", "--checkpoint", quantized, "--topk", "1", "--dtype", dtype]
        assert infer_rpi.run([str(word) for word in words]) == 0
        captured = capsys.readouterr()
        assert "1. three: " in captured.out
        assert "0.22 M parameters" in captured.err


def test_the_file_is_evaluated(quantized, digits, capsys):
    words = ["--eval", "--resume", quantized, "--model", "vim_pico_patch4_32", "--data-path", digits]
    assert main.run([str(word) for word in (*words, "--device", "cpu", "--num_workers", "0")]) == 0
    assert "Acc@1 100.000" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_the_file_is_not_trained(flag, quantized, tmp_path, capsys):
    data = training_runs.write_pictures(tmp_path / "data", train=2, val=1)
    words = [*training_runs.PLAIN, "--epochs", 1, "--data-path", data, flag, quantized]
    assert main.run([str(word) for word in words]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "can be evaluated but not trained" in errors[0]


def test_the_network_of_the_file_is_quantised_and_computes_in_fp32(quantized):
    model = load_classifier(None, str(quantized)).model
    assert len(layers_of(model)) == 2 + 6 * 4
    assert model.layers[0].mixer.A_log.dtype is torch.float32
    assert model.layers[0].mixer.dt_proj.weight.dtype is torch.float32


def test_a_head_of_other_classes_is_named_or_dropped(quantized):
    state = read_checkpoint(str(quantized)).model
    with pytest.raises(CheckpointError, match="10 classes but the model has 3"):
        load_weights(build_model("vim_pico_patch4_32", 3, None), state)
    report = load_weights(build_model("vim_pico_patch4_32", 3, None), state, drop_head=True)
    assert report.dropped[:2] == ["head.weight", "head.bias"]
    assert not report.unexpected


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("head.input_step", torch.ones(2), r"head.input_step must be fp32 of shape \(\)"),
        ("head.input_step", torch.ones(1), r"head.input_step must be fp32 of shape \(\)"),
        ("head.input_step", torch.ones(0), r"head.input_step must be fp32 of shape \(\)"),
        ("head.weight_scales", torch.ones(9), r"head.weight_scales must be fp32 of shape \(10,\)"),
        ("head.weight", torch.ones(10, 9, dtype=torch.int8), r"head.weight is \(10, 9\), the model's is"),
        ("head.weight", torch.ones(10, 64), "head.weight must be int8"),
    ],
)
def test_a_damaged_head_is_named_without_a_word_of_classes(name, value, words, quantized):
    state = {**read_checkpoint(str(quantized)).model, name: value}
    with pytest.raises(CheckpointError, match=words) as caught:
        load_weights(build_model("vim_pico_patch4_32", 10, None), state)
    assert "classes" not in str(caught.value)


def test_without_scales_int8_weights_are_no_plain_ones(quantized):
    state = read_checkpoint(str(quantized)).model
    state = {key: value for key, value in state.items() if not key.endswith("weight_scales")}
    with pytest.raises(CheckpointError, match="beside its weight_scales"):
        load_weights(build_model("vim_pico_patch4_32", 10, None), state)


@pytest.mark.parametrize("folder", ["val", ""])
def test_steps_are_found_on_class_folders(folder, digits, tmp_path, capsys):
    words = ("--scheme", "static", "--calibrate", digits / folder)
    code, _, err = call(capsys, "--checkpoint", WEIGHTS, "--output", tmp_path / "q.pth", *words)
    assert code == 0
    assert "Calibration: 10/10 images" in err


def test_a_picture_that_is_not_there_is_no_fault_of_the_checkpoint(tmp_path, capsys):
    for calibrate in (tmp_path / "none.png", tmp_path):
        words = ("--scheme", "static", "--calibrate", calibrate)
        code, _, err = call(capsys, "--checkpoint", WEIGHTS, "--output", tmp_path / "q.pth", *words)
        assert code == 2
        assert str(calibrate) in err.splitlines()[-1]
        assert "cannot be quantized" not in err


def test_another_model_is_named(quantized):
    state = {**read_checkpoint(str(quantized)).model, "strange.weight_scales": torch.ones(2)}
    with pytest.raises(CheckpointError, match="no layer strange"):
        load_weights(build_model("vim_pico_patch4_32", 10, None), state)


def test_a_vmamba_is_quantized(tmp_path, capsys):
    model = build_model("vmamba_tiny_s1l8", 4, 32)
    source, target = tmp_path / "v.pth", tmp_path / "q.safetensors"
    save_checkpoint(source, {"model": model.state_dict()})
    code, *_ = call(capsys, "--checkpoint", source, "--output", target, "--img-size", 32)
    assert code == 0
    assert target.stat().st_size < 0.27 * source.stat().st_size
    found = read_checkpoint(str(target))
    assert (found.model_name, found.num_classes) == ("vmamba_tiny_s1l8", 4)


BAD = {
    "--output q.onnx": "--output must end in .safetensors or .pth",
    "--output q.bin": "--output must end in .safetensors or .pth",
    "--output nowhere/q.pth": "no folder nowhere",
    "--output {tmp}": "must end in",
    "--output q.pth --scheme static": "name some with --calibrate",
    "--output q.pth --calibrate {samples}": "--calibrate is for --scheme static",
    "--output q.pth --scheme static --calibrate nobody.png": "nobody.png",
    "--output q.pth --data-path nowhere": "nowhere",
    "--output q.pth --model vim_pico_patch4_33": "There is no model called",
    "--output q.pth --num_classes 3": "10 classes",
    "--output q.pth --backend cuda": "--backend cuda cannot run here",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_one_sentence(words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = words.format(tmp=tmp_path, samples=SAMPLES).split()
    code, _, err = call(capsys, "--checkpoint", WEIGHTS, *filled)
    assert code == 2
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [err.splitlines()[-1]]
    assert BAD[words] in err
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_other_sentences(quantized, tmp_path, capsys):
    cases = [
        ((quantized, tmp_path / "q.pth"), "is quantized already"),
        ((tmp_path / "none.pth", tmp_path / "q.pth"), "none.pth"),
        ((tmp_path / "none.onnx", tmp_path / "q.pth"), "--output must end in .onnx"),
        ((tmp_path / "none.onnx", tmp_path / "q.onnx"), "none.onnx"),
        ((quantized, quantized), "is the checkpoint itself"),
        (("", tmp_path / "q.pth"), "--checkpoint is empty"),
        ((tmp_path / "none.onnx", tmp_path / "q.onnx", "--backend", "torch"), "leave --backend torch away"),
    ]
    for (source, target, *others), words in cases:
        code, _, err = call(capsys, "--checkpoint", source, "--output", target, *others)
        assert (code, err.count("error: ")) == (2, 1)
        assert words in err
    code, _, err = call(capsys, "--checkpoint", WEIGHTS, "--output", tmp_path / "q.pth", "--scheme", "statik")
    assert code == 2
    assert "invalid choice: 'statik'" in err


def test_an_onnx_file_is_quantized(digits, tmp_path, capsys):
    for package in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(package, reason=f"{package} is not installed: no ONNX file can be written and run")
    import export_onnx

    source, target = tmp_path / "m.onnx", tmp_path / "q.onnx"
    assert export_onnx.run(["--checkpoint", str(WEIGHTS), "--output", str(source)]) == 0
    words = ("--scheme", "static", "--calibrate", SAMPLES, "--data-path", digits)
    code, out, err = call(capsys, "--checkpoint", source, "--output", target, *words)
    assert code == 0, err
    assert "after: * Acc@1 100.000" in out
    assert re.search("^measured with(out)? this project's operators", out, re.MULTILINE)
    assert target.is_file()
