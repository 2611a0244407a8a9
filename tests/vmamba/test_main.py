"""The command line of VMamba's published code: runs as a person starts them, and what each flag and setting becomes."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import checkpoint
import flags
import main as vim_main
from vmamba import config, models
from vmamba import main as door

DOOR = Path(door.__file__).resolve()
CLASSES = {"blue": (40, 40, 220), "green": (30, 200, 30), "red": (220, 40, 40)}
SMALL = {
    "MODEL": {
        "NAME": "small",
        "DROP_PATH_RATE": 0.0,
        "LABEL_SMOOTHING": 0.0,
        "VSSM": {"EMBED_DIM": 8, "DEPTHS": [1, 1, 1, 1], "SSM_D_STATE": 1, "DOWNSAMPLE": "v3", "NORM_LAYER": "ln2d"},
    },
    "DATA": {"IMG_SIZE": 32, "NUM_WORKERS": 0, "BATCH_SIZE": 8},
    "TRAIN": {"EPOCHS": 1, "WARMUP_EPOCHS": 0},
    "AUG": {"MIXUP": 0.0, "CUTMIX": 0.0},
}


def write_pictures(folder, train, val):
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for name, colour in CLASSES.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = np.clip(np.array(colour) + random.integers(-40, 40, (36, 40, 3)), 0, 255)
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / name / f"{number}.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """small.yaml, pictures in data/, and a copy of them with val/ alone."""
    root = tmp_path_factory.mktemp("door")
    write_pictures(root / "data", 8, 4)
    (root / "only").mkdir()
    (root / "only/val").symlink_to(root / "data/val")
    (root / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return root


def start(*words, cwd, **environment):
    return subprocess.run(
        [sys.executable, str(DOOR), *map(str, words)],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(folder):
    """A run of one epoch, from the folder of the pictures: its output and the folder that it is kept in."""
    words = ("--cfg", "small.yaml", "--data-path", "data", "--output", "runs", "--tag", "first", "--device", "cpu")
    done = start(*words, "--opts", "TRAIN.BASE_LR", "0.03", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done, folder / "runs/small/first"


def accuracies(text):
    return [float(found) for found in re.findall(r"\* Acc@1 ([\d.]+)", text)]


def test_training(trained, folder):
    done, kept = trained
    assert "model: small, " in done.stdout
    assert "24 pictures to train on, 12 to validate on" in done.stdout
    assert {path.name for path in kept.iterdir()} >= {"config.json", "log.txt", "checkpoint.pth", "best_checkpoint.pth"}
    saved = config.load(kept / "config.json")
    assert config.load(folder / "small.yaml", ["TRAIN.BASE_LR", "0.03"]) == config.override(
        saved, ["DATA.DATA_PATH", "''", "OUTPUT", "''", "TAG", "''"]
    )
    assert (saved.OUTPUT, saved.TAG, saved.DATA.DATA_PATH) == ("runs", "first", "data")
    line = json.loads((kept / "log.txt").read_text().splitlines()[0])
    assert line["epoch"] == 0
    assert line["train_lr"] == pytest.approx(0.03 * 8 / 512)


def test_evaluation_gives_what_training_measured(trained, folder):
    done, kept = trained
    checkpoint = kept / "checkpoint.pth"
    words = ("--cfg", folder / "small.yaml", "--pretrained", checkpoint, "--data-path", folder / "only")
    found = start("--eval", *words, "--device", "cpu", "--fused_layernorm", cwd=kept)
    assert found.returncode == 0, found.stderr
    network, average = accuracies(found.stdout)
    assert accuracies(done.stdout) == [network]
    assert "ema network" in found.stdout
    assert "note: FUSED_LAYERNORM has no effect" in found.stdout
    assert "no effect: the warm-up" not in found.stdout
    words = ("--cfg", kept / "config.json", *words[2:])  # and the configuration that the run has kept
    again = start(*words, "--model_ema", "False", "--device", "cpu", cwd=kept)  # --pretrained alone evaluates too
    assert "model: small, " in again.stdout, again.stderr
    assert accuracies(again.stdout) == [network], (again.stderr, average)
    assert "note: --pretrained evaluates; to train from these weights, name them by --finetune" in again.stdout
    assert "Start training" not in again.stdout


def test_going_on_and_starting_from_weights(trained, folder):
    _, kept = trained
    words = ("--cfg", "small.yaml", "--data-path", "data", "--output", "runs", "--device", "cpu")
    resumed = start(*words, "--tag", "second", "--resume", kept / "checkpoint.pth", "--opts", "TRAIN.EPOCHS", "2",
                    cwd=folder)  # fmt: skip
    assert resumed.returncode == 0, resumed.stderr
    assert re.search(r"resumed: .*checkpoint.pth, epoch 1", resumed.stdout)
    assert "Epoch: [1]" in resumed.stdout
    assert "Epoch: [0]" not in resumed.stdout
    again = start(*words, "--tag", "second", "--opts", "TRAIN.EPOCHS", "2", cwd=folder)  # of itself, by its tag
    assert "All 2 epochs were trained before" in again.stdout, again.stderr
    tuned = start(*words, "--tag", "third", "--finetune", kept / "checkpoint.pth", cwd=folder)
    assert tuned.returncode == 0, tuned.stderr
    assert "Epoch: [0]" in tuned.stdout
    assert re.search(r"weights: .*first/checkpoint.pth", tuned.stdout)


def test_throughput(folder):
    done = start("--cfg", "small.yaml", "--throughput", "--batch-size", 2, "--device", "cpu", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "note: --throughput measures random weights on grey pictures; no checkpoint and no picture" in done.stdout
    assert re.search(r"Input: +2 x 3 x 32 x 32, cpu", done.stdout)
    assert re.search(r"Latency: .* 30 runs", done.stdout)
    assert re.search(r"Throughput: +[\d.]+ pictures per second", done.stdout)
    assert not (folder / "output").exists()


def test_the_help_tells_of_every_flag_and_of_what_differs(capsys):
    with pytest.raises(SystemExit) as stop:
        door.run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--cfg", "--opts", "--batch-size", "--data-path", "--zip", "--cache-mode", "--pretrained", "--resume",
                 "--accumulation-steps", "--use-checkpoint", "--disable_amp", "--output", "--tag", "--eval",
                 "--throughput", "--fused_layernorm", "--optim", "--model_ema", "--model_ema_decay",
                 "--model_ema_force_cpu", "--memory_limit_rate", "--finetune", "--device"):  # fmt: skip
        assert re.search(rf"^ +{flag}\b", text, re.MULTILINE), flag
    assert "an unknown flag is an error" in text


# --- refusals ---------------------------------------------------------------------------------------------------------


def run(capsys, *words):
    code = door.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--cfg", "{}/none.yaml"), "there is no configuration"),
        (("--cfg", "vmambav2_tiny"), "the nearest of those that come along is 'vmambav2_tiny_224'"),
        (("--opts", "MODEL.VSSM.SSM_FOWARDTYPE", "v05"), "the nearest is MODEL.VSSM.SSM_FORWARDTYPE"),
        (("--opts", "MODEL.VSSM.SSM_FORWARDTYPE", "v05_nzo"), "the nearest is 'v05_noz'"),
        (("--opts", "SEED"), "KEY VALUE KEY VALUE ..., and 'SEED' is left over"),
        (("--opts", "MODEL.TYPE", "swin"), "MODEL.TYPE must be 'vssm'"),
        (("--batch-size", "many"), "DATA.BATCH_SIZE must be a whole number, got 'many'"),
        (("--cache-mode", "all"), "DATA.CACHE_MODE must be 'no', 'full' or 'part', got 'all'"),
        (("--zip",), "unpack them"),
        (("--accumulation-steps", "4"), "a --batch-size 4 times as large makes the same steps"),
        (("--eval",), "--eval needs weights: name a checkpoint by --pretrained FILE"),
        (("--eval", "--pretrained", "a.pth", "--finetune", "b.pth"), "--finetune is for training"),
        (("--pretrained", "a.pth", "--finetune", "b.pth"), "--finetune is for training"),
        (("--opts", "TRAIN.LAYER_DECAY", "0.9"), "TRAIN.LAYER_DECAY must be 1, got 0.9"),
        (("--opts", "TRAIN.LR_SCHEDULER.NAME", "linear"), "TRAIN.LR_SCHEDULER.NAME linear is not offered"),
        (("--opts", "TRAINCOST_MODE", "true"), "TRAINCOST_MODE is not offered"),
        (("--tag", "../up"), "TAG must be the name of a folder below OUTPUT, got '../up'"),
        (("--tag", "/up"), "TAG must be the name of a folder below OUTPUT, got '/up'"),
        (("--opts", "MODEL.NAME", "a/../../b"), "MODEL.NAME must be the name of a folder below OUTPUT"),
        (("--opts", "MODEL.NAME", '"a\\0"'), "MODEL.NAME must be the name of a folder below OUTPUT"),
        (("--tag", "x" * 300, "--output", "{}/deep"), "config.json cannot be written: File name too long"),
        (("--cfg", "~nobody_of_this_name/x.yaml"), "there is no configuration '~nobody_of_this_name/x.yaml'"),
        (("--cfg", "x" * 300), "there is no configuration"),
        (
            ("--opts", "MODEL.VSSM.PATCH_SIZE", "0"),
            "PATCH_SIZE must be a whole number from 1 to 2147483647, got 0",
        ),
        (("--opts", "MODEL.DROP_PATH_RATE", "1"), "MODEL.DROP_PATH_RATE must be a probability below 1, got 1"),
        (("--opts", "MODEL.VSSM.EMBED_DIM", "200000000"), "network that MODEL.VSSM describes cannot be made"),
        (("--eval", "--pretrained", "{}/none.pth"), "none.pth"),
        (("--output", "{}/small.yaml"), "config.json cannot be written"),
        (("--output", "{}/runs", "--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--output", "{}/runs", "--data-path", "{}/nowhere"), "does not exist"),
        (("--output", "{}/runs", "--opts", "TRAIN.BASE_LR", "-1"), "error: TRAIN.BASE_LR must be"),
        (("--output", "{}/runs", "--opts", "TRAIN.EPOCHS", "0"), "error: TRAIN.EPOCHS must be"),
        (("--output", "{}/runs", "--opts", "AUG.CUTMIX_MINMAX", "[0.5, 0.1]"), "error: AUG.CUTMIX_MINMAX must be two"),
        (("--output", "{}/runs", "--optim", "adamm"), "The optimizer 'adamm' cannot be made"),
        (("--output", "{}/runs", "--model_ema_decay", "2"), "error: --model_ema_decay must be"),
        (("--output", "{}/runs", "--device", "abacus"), "device 'abacus' cannot be used"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_are_one_sentence(folder, capsys, monkeypatch, words, sentence):
    monkeypatch.chdir(folder)
    given = ("--cfg", folder / "small.yaml", "--data-path", folder / "data", "--device", "cpu")
    code, out, err = run(capsys, *given, *(word.format(folder) for word in words))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sentence in err
    assert "Start training" not in out
    assert not (folder / "output").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--data-path", "{}/nowhere"), "does not exist"),
        (("--device", "abacus"), "device 'abacus' cannot be used"),
        (("--opts", "MODEL.VSSM.EMBED_DIM", "16"), "belongs to a model of another size"),
        (("--resume", "{}/none.pth", "--opts", "TRAIN.AUTO_RESUME", "false"), "none.pth"),
    ],
)
def test_a_command_that_fails_changes_nothing(trained, folder, capsys, words, sentence):
    _, kept = trained
    before = {path: path.read_bytes() for path in kept.iterdir()}
    for tag in ("first", "unborn"):
        if tag == "unborn" and "EMBED_DIM" in " ".join(words):
            continue  # a new run may have any network
        given = ("--cfg", folder / "small.yaml", "--data-path", folder / "data", "--device", "cpu")
        code, _, err = run(
            capsys, *given, "--output", folder / "runs", "--tag", tag, *(word.format(folder) for word in words)
        )
        assert code == 2
        assert sentence in err
    assert {path: path.read_bytes() for path in kept.iterdir()} == before
    assert not (folder / "runs/small/unborn").exists()


def test_a_configuration_is_written_whole_or_not_at_all(folder, capsys, monkeypatch):
    path = folder / "whole/small/t/config.json"
    path.parent.mkdir(parents=True)
    path.write_text("of before")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    given = ("--cfg", folder / "small.yaml", "--data-path", folder / "data", "--device", "cpu")
    code, _, err = run(capsys, *given, "--output", folder / "whole", "--tag", "t")
    assert code == 2
    assert "No space left on device" in err
    assert path.read_text() == "of before"
    assert os.listdir(path.parent) == ["config.json"]


def test_a_checkpoint_holds_its_network(trained, folder, tmp_path):
    """A network of one's own is evaluated by another program, in another folder, without its configuration."""
    done, kept = trained
    words = ["--eval", "--resume", str(kept / "checkpoint.pth"), "--data-path", str(folder / "only"), "--num_workers"]
    found = subprocess.run(
        [sys.executable, vim_main.__file__, *words, "0", "--device", "cpu"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr
    assert "model: small, " in found.stdout
    assert accuracies(found.stdout)[0] == accuracies(done.stdout)[0]


def test_a_configuration_as_a_model(folder, tmp_path, monkeypatch, capsys):
    """vim/main.py --model FILE.yaml keeps the network, not the name of the file, in its checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((folder / "small.yaml").read_text().replace("EMBED_DIM: 8", "EMBED_DIM: 12"))
    words = ["--data-path", folder / "data", "--device", "cpu", "--num_workers", 0, "--input-size", 32]
    training = ["--epochs", 1, "--batch-size", 8, "--output_dir", "run", "--mixup", 0, "--cutmix", 0]
    assert vim_main.run([str(word) for word in ("--model", "mine.yaml", *words, *training)]) == 0
    saved = torch.load("run/checkpoint.pth", weights_only=False)
    assert (saved["model_name"], saved["args"].model) == ("mine", "mine")
    assert saved["model_settings"]["MODEL.VSSM.EMBED_DIM"] == 12
    (tmp_path / "mine.yaml").unlink()
    del models._REGISTERED["mine"]  # as in another program, in which somebody else has the name
    capsys.readouterr()
    assert vim_main.run([str(word) for word in ("--eval", "--resume", "run/checkpoint.pth", *words)]) == 0
    assert re.search(r"model: mine_[0-9a-f]{8}, ", capsys.readouterr().out)


def test_safetensors_hold_their_network_too(trained, folder, tmp_path, capsys):
    done, kept = trained
    read = checkpoint.read_checkpoint(str(kept / "checkpoint.pth"))
    settings = torch.load(kept / "checkpoint.pth", weights_only=False)["model_settings"]
    contents = {"model": read.model, "class_names": read.class_names, "model_name": "small", "img_size": read.img_size}
    checkpoint.save_checkpoint(tmp_path / "c.safetensors", contents | {"model_settings": settings})
    words = ["--eval", "--resume", str(tmp_path / "c.safetensors"), "--data-path", str(folder / "data")]
    assert vim_main.run([*words, "--num_workers", "0", "--device", "cpu"]) == 0
    assert accuracies(capsys.readouterr().out) == [accuracies(done.stdout)[0]]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"MODEL.VSSM.DEPTHS": (1, 1, 1, 10**9)}, "settings of another network than its weights are of"),
        ({"MODEL.VSSM.SSM_CONV": 4}, "c.pth cannot be used: MODEL.VSSM.SSM_CONV must be an odd whole number"),
        ({"MODEL.VSSM.SSM_CONVV": 4}, "must be given by their whole names"),
        (None, "settings of another network than its weights are of"),
    ],
)
def test_a_checkpoint_with_damaged_settings(trained, tmp_path, capsys, change, sentence):
    _, kept = trained
    saved = torch.load(kept / "checkpoint.pth", weights_only=False)
    saved["model_settings"] = 3 if change is None else saved["model_settings"] | change
    torch.save(saved, tmp_path / "c.pth")
    assert vim_main.run(["--eval", "--resume", str(tmp_path / "c.pth"), "--data-path", str(tmp_path)]) == 2
    assert sentence in capsys.readouterr().err


def test_a_file_that_a_checkpoint_names_is_not_looked_for(trained, folder, tmp_path, monkeypatch, capsys):
    _, kept = trained
    saved = torch.load(kept / "checkpoint.pth", weights_only=False)
    del saved["model_settings"]
    saved["model_name"] = saved["args"].model = str(folder / "small.yaml")
    torch.save(saved, tmp_path / "c.pth")
    monkeypatch.setattr(config, "load", lambda *_: pytest.fail("the file was read"))
    words = ["--eval", "--resume", str(tmp_path / "c.pth"), "--data-path", str(folder / "data"), "--device", "cpu"]
    assert vim_main.run(words) == 2
    assert "name the model that it was made with" in capsys.readouterr().err


def test_a_configuration_is_needed(capsys):
    code, _, err = run(capsys, "--data-path", "data")
    assert code == 2
    assert "--cfg is missing" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--batchsize", "3"), "there is no flag --batchsize; the nearest is --batch-size"),
        (("--evaluate",), "there is no flag --evaluate; the nearest is --eval"),
        (("--amp-opt-level=O1",), "there is no flag --amp-opt-level=O1; the nearest is"),
        (("--model_ema", "perhaps"), "must be True or False, got 'perhaps'"),
        (("--memory_limit_rate", "all"), "invalid float value"),
    ],
)
def test_flags_that_are_none(capsys, words, sentence):
    with pytest.raises(SystemExit) as stop:
        door.run(["--cfg", "vmambav2_tiny_224", *words])
    assert stop.value.code == 2
    assert sentence in capsys.readouterr().err


def test_unknown_flags_in_a_process_of_their_own(folder):
    done = start("--cfg", "small.yaml", "--data_path", "data", cwd=folder)
    assert done.returncode == 2
    assert "there is no flag --data_path; the nearest is --data-path" in done.stderr
    assert "Traceback" not in done.stderr


# --- what becomes of flags and settings -------------------------------------------------------------------------------


def read(*words, cfg="vmambav2_tiny_224"):
    args = door.parse(["--cfg", cfg, *map(str, words)])
    return door.with_a_folder(door.read_config(args)), args


def settings(*words):
    """What vim/main.py is told, as it reads and checks it."""
    found, args = read("--device", "cpu", *words)
    told = door.words_for(found, args, "vmamba_tiny_s2l5")
    parsed = flags.get_args_parser().parse_args(told)
    flags.check(parsed)
    return parsed


def test_defaults_of_training():
    told = settings("--tag", "t")
    expected = {
        "model": "vmamba_tiny_s2l5", "data_path": "/dataset/ImageNet_ILSVRC2012", "batch_size": 128, "input_size": 224,
        "num_workers": 8, "pin_mem": True, "seed": 0, "eval": False, "resume": "", "finetune": "", "dist_eval": True,
        "output_dir": "output/vssm1_tiny_0230/t", "epochs": 300, "warmup_epochs": 20, "weight_decay": 0.05, "lr": 5e-4,
        "warmup_lr": 5e-7 * 128 / 512, "min_lr": 5e-6 * 128 / 512, "cooldown_epochs": 0, "clip_grad": 5.0,
        "auto_resume": True, "use_checkpoint": False, "sched": "cosine", "decay_epochs": 30.0, "decay_rate": 0.1,
        "opt": "adamw", "opt_eps": 1e-8, "opt_betas": None, "momentum": 0.9, "color_jitter": 0.4,
        "aa": "rand-m9-mstd0.5-inc1", "reprob": 0.25, "remode": "pixel", "recount": 1, "mixup": 0.8, "cutmix": 1.0,
        "cutmix_minmax": None, "mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch", "drop": 0.0,
        "drop_path": 0.2, "smoothing": 0.1, "log_interval": 10, "train_interpolation": "bicubic", "repeated_aug": False,
        "mend": ["lr-lag"], "model_ema": True, "model_ema_decay": 0.9999, "model_ema_force_cpu": False, "if_amp": False,
        "eval_crop_ratio": 0.875, "unscale_lr": False, "hflip": 0.5, "teacher_path": "",
    }  # fmt: skip
    assert {key: getattr(told, key) for key in expected} == expected
    assert not flags.is_given(told, "seed")  # that of a checkpoint counts


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--batch-size", "64"), {"batch_size": 64, "warmup_lr": 5e-7 / 8, "min_lr": 5e-6 / 8}),
        (("--data-path", "it's here"), {"data_path": "it's here"}),
        (("--opts", "DATA.DATA_PATH", "there"), {"data_path": "there"}),
        (("--data-path", "here", "--opts", "DATA.DATA_PATH", "there"), {"data_path": "here"}),
        (("--resume", "a.pth"), {"eval": False, "resume": "a.pth"}),
        (("--resume", "a.pth", "--pretrained", "b.pth"), {"eval": False, "resume": "a.pth"}),
        (("--eval", "--resume", "a.pth"), {"eval": True, "resume": "a.pth"}),
        (("--eval", "--resume", "a.pth", "--pretrained", "b.pth"), {"eval": True, "resume": "a.pth"}),
        (("--eval", "--pretrained", "a.pth"), {"eval": True, "resume": "a.pth"}),
        (("--pretrained", "a.pth"), {"eval": True, "resume": "a.pth"}),
        (("--opts", "MODEL.PRETRAINED", "a.pth", "EVAL_MODE", "true"), {"eval": True, "resume": "a.pth"}),
        (("--finetune", "a.pth"), {"eval": False, "finetune": "a.pth", "resume": ""}),
        (("--use-checkpoint",), {"use_checkpoint": True}),
        (("--output", "runs", "--tag", "2024"), {"output_dir": "runs/vssm1_tiny_0230/2024"}),
        (("--optim", "sgd"), {"opt": "sgd"}),
        (("--model_ema", "False"), {"model_ema": False}),
        (("--model_ema_decay", "0.99", "--model_ema_force_cpu", "true"),
         {"model_ema_decay": 0.99, "model_ema_force_cpu": True}),
        (("--local-rank", "3"), {"local_rank": 3}),
        (("--local_rank=3",), {"local_rank": 3}),
        (("--opts", "DATA.IMG_SIZE", "[64, 96]"), {"input_size": (64, 96)}),
        (("--opts", "DATA.NUM_WORKERS", "0", "DATA.PIN_MEMORY", "no"), {"num_workers": 0, "pin_mem": False}),
        (("--opts", "DATA.INTERPOLATION", "random"), {"train_interpolation": "random"}),
        (("--opts", "SEED", "3"), {"seed": 3}),
        (("--opts", "TEST.CROP", "false"), {"eval_crop_ratio": 1.0}),
        (("--opts", "PRINT_FREQ", "7"), {"log_interval": 7}),
        (("--opts", "MODEL.DROP_RATE", "0.1", "MODEL.DROP_PATH_RATE", "0.4", "MODEL.LABEL_SMOOTHING", "0.2"),
         {"drop": 0.1, "drop_path": 0.4, "smoothing": 0.2}),
        (("--opts", "TRAIN.EPOCHS", "9", "TRAIN.WARMUP_EPOCHS", "2", "TRAIN.WEIGHT_DECAY", "0.2"),
         {"epochs": 9, "warmup_epochs": 2, "weight_decay": 0.2}),
        (("--opts", "TRAIN.BASE_LR", "1e-3", "TRAIN.WARMUP_LR", "4e-6", "TRAIN.MIN_LR", "8e-6"),
         {"lr": 1e-3, "warmup_lr": 1e-6, "min_lr": 2e-6}),
        (("--opts", "TRAIN.CLIP_GRAD", "1"), {"clip_grad": 1.0}),
        (("--opts", "TRAIN.CLIP_GRAD", "0"), {"clip_grad": None}),
        (("--opts", "TRAIN.AUTO_RESUME", "false"), {"auto_resume": False}),
        (("--opts", "TRAIN.LR_SCHEDULER.NAME", "step", "TRAIN.LR_SCHEDULER.DECAY_EPOCHS", "4",
          "TRAIN.LR_SCHEDULER.DECAY_RATE", "0.5"), {"sched": "step", "decay_epochs": 4.0, "decay_rate": 0.5}),
        (("--opts", "TRAIN.OPTIMIZER.EPS", "1e-6", "TRAIN.OPTIMIZER.BETAS", "[0.8, 0.9]", "TRAIN.OPTIMIZER.MOMENTUM",
          "0.5"), {"opt_eps": 1e-6, "opt_betas": [0.8, 0.9], "momentum": 0.5}),
        (("--opts", "AUG.COLOR_JITTER", "0", "AUG.AUTO_AUGMENT", "none", "AUG.REPROB", "0.1", "AUG.REMODE", "rand",
          "AUG.RECOUNT", "2"), {"color_jitter": 0.0, "aa": "none", "reprob": 0.1, "remode": "rand", "recount": 2}),
        (("--opts", "AUG.MIXUP", "0", "AUG.CUTMIX", "0.5", "AUG.CUTMIX_MINMAX", "[0.1, 0.9]", "AUG.MIXUP_PROB", "0.5",
          "AUG.MIXUP_SWITCH_PROB", "0.4", "AUG.MIXUP_MODE", "elem"),
         {"mixup": 0.0, "cutmix": 0.5, "cutmix_minmax": [0.1, 0.9], "mixup_prob": 0.5, "mixup_switch_prob": 0.4,
          "mixup_mode": "elem"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_flags_and_settings(words, told):
    found = settings(*words)
    assert {key: getattr(found, key) for key in told} == told


def test_several_processes_share_a_step(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    found = settings()
    assert (found.lr, found.warmup_lr, found.min_lr) == (5e-4, 5e-7 * 2, 5e-6 * 2)


@pytest.mark.parametrize(
    ("words", "mixed"), [((), True), (("--disable_amp",), False), (("--opts", "ENABLE_AMP", "false"), False)]
)
def test_mixed_precision_is_for_gpus(words, mixed):
    found, args = read(*words, "--device", "cuda:1")
    assert ("--if_amp" in door.words_for(found, args, "m")) == mixed
    assert settings(*words).if_amp is False
    found, args = read(*words)
    assert ("--if_amp" in door.words_for(found, args, "m")) == (mixed and torch.cuda.is_available())


def test_every_flag_of_vims_main_is_one_that_it_has():
    known = {flag for action in flags.get_args_parser()._actions for flag in action.option_strings}
    assert {*door.TRAINING, *door.FURTHER} <= known
    assert door.in_settings("--lr must be 1, not as --lr-noise; see --data-path") == (
        "TRAIN.BASE_LR must be 1, not as --lr-noise; see --data-path"
    )


def test_every_setting_is_used_or_said_to_have_no_effect():
    """So that none is read and forgotten."""
    used = {*door.TRAINING.values(), *door.WITHOUT_EFFECT, *models.ARGUMENTS.values()}
    elsewhere = {  # in words_for, refuse, notes, run
        "DATA.BATCH_SIZE", "DATA.DATA_PATH", "DATA.DATASET", "DATA.IMG_SIZE", "DATA.ZIP_MODE", "DATA.PIN_MEMORY",
        "DATA.NUM_WORKERS", "MODEL.TYPE", "MODEL.NAME", "MODEL.PRETRAINED", "MODEL.RESUME", "TRAIN.WARMUP_LR",
        "TRAIN.MIN_LR", "TRAIN.CLIP_GRAD", "TRAIN.AUTO_RESUME", "TRAIN.ACCUMULATION_STEPS", "TRAIN.USE_CHECKPOINT",
        "TRAIN.LAYER_DECAY", "TRAIN.OPTIMIZER.BETAS",
        "AUG.CUTMIX_MINMAX", "TEST.CROP", "AMP_ENABLE", "OUTPUT", "TAG", "SEED", "EVAL_MODE", "THROUGHPUT_MODE",
        "TRAINCOST_MODE",
    }  # fmt: skip
    assert {key for key, _ in config._flat(config.Config())} == used | elsewhere


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--cache-mode", "no"), "DATA.CACHE_MODE has no effect"),
        (("--fused_layernorm",), "FUSED_LAYERNORM has no effect"),
        (("--memory_limit_rate", "0.5"), "--memory_limit_rate has no effect"),
        (("--opts", "MODEL.NUM_CLASSES", "7"), "MODEL.NUM_CLASSES has no effect: the classes are those of the data"),
        (("--opts", "TRAIN.LR_SCHEDULER.WARMUP_PREFIX", "false"), "WARMUP_PREFIX has no effect"),
        (("--opts", "SAVE_FREQ", "5"), "SAVE_FREQ has no effect"),
        (("--opts", "TEST.CROP", "false"), "TEST.CROP False keeps the middle square"),
        (("--opts", "DATA.INTERPOLATION", "bilinear"), "DATA.INTERPOLATION is for training"),
    ],
)
def test_what_has_no_effect_is_said(words, sentence):
    said = door.notes(*read(*words))
    assert len(said) == 1
    assert sentence in said[0]


def test_notes_are_about_what_is_done():
    assert door.notes(*read()) == []
    words = ("--opts", "TRAIN.LR_SCHEDULER.WARMUP_PREFIX", "false", "SAVE_FREQ", "5")
    assert door.notes(*read("--eval", "--pretrained", "a.pth", *words)) == []


def test_runs_are_called_after_the_time():
    found, args = read()
    assert re.fullmatch(r"\d{14}", found.TAG)
    assert found.OUTPUT == "output"
    assert door.words_for(found, args, "m")[-1] == "--auto-resume"


def test_a_run_goes_on_where_the_newest_stopped(tmp_path):
    words = ("--output", tmp_path, "--auto-resume")
    args = door.parse(["--cfg", "vmambav2_tiny_224", *map(str, words)])
    config = door.read_config(args)
    assert re.fullmatch(r"\d{14}", door.with_a_folder(config, args.auto_resume).TAG)
    for age, name in enumerate(("newest", "older", "no-checkpoint")):
        folder = tmp_path / config.MODEL.NAME / name
        folder.mkdir(parents=True)
        if name != "no-checkpoint":
            (folder / "checkpoint.pth").touch()
            os.utime(folder / "checkpoint.pth", (1e9 - age, 1e9 - age))
    assert door.with_a_folder(config, args.auto_resume).TAG == "newest"
    assert door.with_a_folder(config).TAG != "newest"
    tagged = door.read_config(door.parse(["--cfg", "vmambav2_tiny_224", "--tag", "own", *map(str, words)]))
    assert door.with_a_folder(tagged, True).TAG == "own"


def test_vims_main_is_called_with_the_published_name(monkeypatch, tmp_path, capsys):
    told = []

    def run_at_once(words, starting, _):
        told.append(words)
        starting()
        return 7

    monkeypatch.setattr(vim_main, "run", run_at_once)
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, "--cfg", "vmambav0_small_224", "--data-path", "d", "--tag", "t", "--cache-mode", "no")
    assert code == 7  # the code of vim/main.py
    assert told[0][:2] == ["--model", "vanilla_vmamba_small"]
    assert out.count("note: ") == 1
    kept = tmp_path / "output/vssm_small/t/config.json"
    assert config.load(kept).MODEL.VSSM.SSM_FORWARDTYPE == "v0"
    monkeypatch.setenv("RANK", "1")  # neither writes nor talks
    code, out, _ = run(capsys, "--cfg", "vmambav0_small_224", "--data-path", "d", "--tag", "u", "--cache-mode", "no")
    assert (code, out) == (7, "")
    assert not (tmp_path / "output/vssm_small/u").exists()
    assert len(told) == 2


def test_numbers_survive_the_way_through_words():
    found, args = read("--opts", "TRAIN.BASE_LR", "1e-7", "TRAIN.MIN_LR", "1.23456789012345e-9", "--device", "cpu")
    parsed = flags.get_args_parser().parse_args(door.words_for(found, args, "m"))
    assert parsed.lr == 1e-7
    assert math.isclose(parsed.min_lr, 1.23456789012345e-9 / 4, rel_tol=1e-15)
