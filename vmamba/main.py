#!/usr/bin/env python3
"""Train and evaluate VMamba by the command line of its published code.

python vmamba/main.py --cfg vmambav2_tiny_224 --eval --pretrained CHECKPOINT --data-path DIR    (DIR/val/CLASS/*.jpg)
python vmamba/main.py --cfg vmambav2_tiny_224 --data-path DIR --batch-size 128 --output RUNS  (DIR/train/CLASS/*.jpg)
python vmamba/main.py --cfg vmambav2_tiny_224 --throughput --batch-size 64

`vim/main.py` does the work; the flags and the configuration are put into its words. What differs from the published
code: an unknown flag is an error. Evaluation never trains: --pretrained means it, with or without --eval; training
starts from weights by --finetune. A CPU computes in full precision. The learning rate changes by epochs, not by steps,
and the warm-up takes its first epochs instead of coming before them. A run is kept in OUTPUT/NAME/TAG, as config.json
(yaml text), log.txt, checkpoint.pth and best_checkpoint.pth; nothing is written before training can begin.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "vim"))  # before this folder, whose main.py has the name of that one's
    sys.path.append(str(ROOT))

try:
    import torch

    from vmamba.config import Config, ConfigError, as_yaml, changed, find, load, override
    from vmamba.forward_types import nearest
    from vmamba.models import register, value_of
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; run `python3 setup_cpu_env.py` once, then this with its Python.", file=sys.stderr)
    sys.exit(2)

DATA = "/dataset/ImageNet_ILSVRC2012"
REFERENCE_BATCH = 512  # pictures in a step that the learning rates are for
TIMED_RUNS = 30
KEPT = "config.json"  # upstream's name for yaml text

# --- command line -----------------------------------------------------------------------------------------------------


def _truth(text: str) -> bool:
    known = {"true": True, "yes": True, "1": True, "on": True, "false": False, "no": False, "0": False, "off": False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"must be True or False, got {text!r}")
    return known[text.lower()]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; what a flag says goes into the configuration under its `dest`, where that has dots."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _add_upstreams_flags(parser.add_argument_group("upstream's flags"))
    add = parser.add_argument_group("further flags").add_argument
    add("--finetune", default="", metavar="FILE", help="checkpoint whose weights training starts from")
    add("--auto-resume", action="store_true", help="without --tag: go on with the newest run of that name, if any")
    add("--device", default="", help="cpu, cuda, cuda:1 ...; CUDA where there is one, else the CPU")
    add("--local-rank", "--local_rank", default=None, help=argparse.SUPPRESS)  # given by torch's launcher
    return parser


def _add_upstreams_flags(group: Any) -> None:
    def setting(flag: str, key: str, meaning: str, **options: Any) -> None:
        group.add_argument(flag, dest=key, default=None, help=f"{meaning} ({key})", **options)

    def switch(flag: str, key: str, meaning: str, value: str = "true") -> None:
        setting(flag, key, meaning, action="store_const", const=value)

    add = group.add_argument
    add("--cfg", default="", metavar="FILE", help="yaml file, or the name of one in vmamba/configs")
    add("--opts", nargs="+", default=[], metavar="KEY VALUE", help="settings that win over the file's")
    setting("--batch-size", "DATA.BATCH_SIZE", "pictures per step and process", metavar="N")
    setting("--data-path", "DATA.DATA_PATH", "folder with train/ and val/", metavar="DIR")
    switch("--zip", "DATA.ZIP_MODE", "pictures in zip files: refused, as folders are read")
    setting("--cache-mode", "DATA.CACHE_MODE", "no, full or part: without effect", metavar="MODE")
    setting("--pretrained", "MODEL.PRETRAINED", "checkpoint to evaluate", metavar="FILE")
    setting("--resume", "MODEL.RESUME", "checkpoint to go on from, or with --eval to evaluate", metavar="FILE")
    setting("--accumulation-steps", "TRAIN.ACCUMULATION_STEPS", "must be 1", metavar="N")
    switch("--use-checkpoint", "TRAIN.USE_CHECKPOINT", "compute activations again in the backward pass")
    switch("--disable_amp", "AMP_ENABLE", "no mixed precision", "false")
    setting("--output", "OUTPUT", "folder of the runs, by default `output`", metavar="DIR")
    setting("--tag", "TAG", "name of the run, by default the time", metavar="NAME")
    switch("--eval", "EVAL_MODE", "evaluate only")
    switch("--throughput", "THROUGHPUT_MODE", "print FLOPs, latency and pictures per second")
    switch("--fused_layernorm", "FUSED_LAYERNORM", "without effect")
    setting("--optim", "TRAIN.OPTIMIZER.NAME", "a timm optimizer", metavar="NAME")
    add("--model_ema", type=_truth, default=True, metavar="BOOL", help="keep a moving average of the weights")
    add("--model_ema_decay", default="0.9999", metavar="X", help="its decay per step")
    add("--model_ema_force_cpu", type=_truth, default=False, metavar="BOOL", help="keep it in CPU memory")
    add("--memory_limit_rate", type=float, default=-1.0, metavar="X", help="without effect")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read a command line; an unknown flag ends the process with an error that names the nearest."""
    parser = build_parser()
    args, rest = parser.parse_known_args(words)
    if rest:
        near = nearest(rest[0].partition("=")[0], (flag for own in parser._actions for flag in own.option_strings))
        parser.error(f"there is no flag {rest[0]}; the nearest is {near}")
    return args


def read_config(args: argparse.Namespace) -> Config:
    """Return the configuration of a command line: the file, then --opts, then the flags.

    Raises:
        ConfigError: it cannot be read; one sentence.
    """
    if not args.cfg:
        raise ConfigError("--cfg is missing: name a yaml file or one of vmamba/configs, such as vmambav2_tiny_224")
    flags = [word for key, text in _settings(args) for word in (key, text)]
    return override(load(args.cfg, args.opts), flags)


def _settings(args: argparse.Namespace) -> list[tuple[str, str]]:
    """The flags that are settings, as KEY and VALUE in yaml."""
    given = ((key, value) for key, value in vars(args).items() if key.isupper() and value is not None)
    as_text = ("DATA.DATA_PATH", "MODEL.PRETRAINED", "MODEL.RESUME", "OUTPUT", "TAG", "TRAIN.OPTIMIZER.NAME")
    return [(key, _quoted(value) if key in as_text else value) for key, value in given]


def _quoted(text: str) -> str:
    """A text as a yaml scalar, whatever is in it."""
    return "'" + text.replace("'", "''") + "'"


# --- vim/main.py's words ----------------------------------------------------------------------------------------------

TRAINING = {
    "--train-interpolation": "DATA.INTERPOLATION",
    "--drop": "MODEL.DROP_RATE",
    "--drop-path": "MODEL.DROP_PATH_RATE",
    "--smoothing": "MODEL.LABEL_SMOOTHING",
    "--epochs": "TRAIN.EPOCHS",
    "--warmup-epochs": "TRAIN.WARMUP_EPOCHS",
    "--weight-decay": "TRAIN.WEIGHT_DECAY",
    "--lr": "TRAIN.BASE_LR",
    "--sched": "TRAIN.LR_SCHEDULER.NAME",
    "--decay-epochs": "TRAIN.LR_SCHEDULER.DECAY_EPOCHS",
    "--decay-rate": "TRAIN.LR_SCHEDULER.DECAY_RATE",
    "--opt": "TRAIN.OPTIMIZER.NAME",
    "--opt-eps": "TRAIN.OPTIMIZER.EPS",
    "--momentum": "TRAIN.OPTIMIZER.MOMENTUM",
    "--color-jitter": "AUG.COLOR_JITTER",
    "--aa": "AUG.AUTO_AUGMENT",
    "--reprob": "AUG.REPROB",
    "--remode": "AUG.REMODE",
    "--recount": "AUG.RECOUNT",
    "--mixup": "AUG.MIXUP",
    "--cutmix": "AUG.CUTMIX",
    "--mixup-prob": "AUG.MIXUP_PROB",
    "--mixup-switch-prob": "AUG.MIXUP_SWITCH_PROB",
    "--mixup-mode": "AUG.MIXUP_MODE",
    "--log-interval": "PRINT_FREQ",
}
# The same for flags whose values are not a setting's own.
FURTHER = {
    "--input-size": "DATA.IMG_SIZE",
    "--num_workers": "DATA.NUM_WORKERS",
    "--seed": "SEED",
    "--warmup-lr": "TRAIN.WARMUP_LR",
    "--min-lr": "TRAIN.MIN_LR",
    "--clip-grad": "TRAIN.CLIP_GRAD",
    "--opt-betas": "TRAIN.OPTIMIZER.BETAS",
    "--cutmix-minmax": "AUG.CUTMIX_MINMAX",
    "--model-ema-decay": "--model_ema_decay",
    "--output_dir": "--output",
}
WITHOUT_EFFECT = {
    "DATA.CACHE_MODE": "each picture is read when it is needed",
    "DATA.MASK_PATCH_SIZE": "no picture is masked",
    "DATA.MASK_RATIO": "no picture is masked",
    "MODEL.NUM_CLASSES": "the classes are those of the data, or of the checkpoint",
    "MODEL.MMCKPT": "the names in a detector's checkpoint are known without it",
    "MODEL.VSSM.SSM_RANK_RATIO": "no network uses it",
    "TRAIN.MOE.SAVE_MASTER": "there is no mixture of experts",
    "TRAIN.LR_SCHEDULER.GAMMA": "it is for multistep, which is not offered",
    "TRAIN.LR_SCHEDULER.MULTISTEPS": "they are for multistep, which is not offered",
    "TRAIN.LR_SCHEDULER.WARMUP_PREFIX": "the warm-up takes the first epochs of the schedule",
    "TEST.SEQUENTIAL": "the result does not depend on it",
    "TEST.SHUFFLE": "the result does not depend on it",
    "SAVE_FREQ": "every epoch is saved in the place of the last one",
    "FUSED_LAYERNORM": "the norms are as fast without it",
}


def evaluates(config: Config) -> bool:
    """Whether a configuration is one for evaluation."""
    return config.EVAL_MODE or bool(config.MODEL.PRETRAINED and not config.MODEL.RESUME)


def refuse(config: Config, args: argparse.Namespace) -> None:
    """Raise ConfigError if what is asked for cannot be done, with what to do instead."""
    if config.DATA.ZIP_MODE:
        raise ConfigError("pictures in zip files (--zip) are not read: unpack them, and name the folder by --data-path")
    if config.TRAINCOST_MODE:
        raise ConfigError("TRAINCOST_MODE is not offered: a run prints the seconds of its steps; set it to False")
    if config.EVAL_MODE and not (config.MODEL.RESUME or config.MODEL.PRETRAINED):
        raise ConfigError("--eval needs weights: name a checkpoint by --pretrained FILE")
    if evaluates(config) and args.finetune:
        raise ConfigError("--finetune is for training: leave --eval and --pretrained away, or --finetune")
    if evaluates(config):
        return
    train = config.TRAIN
    steps, decay, schedule = train.ACCUMULATION_STEPS, train.LAYER_DECAY, train.LR_SCHEDULER.NAME
    if steps != 1:
        raise ConfigError(
            f"--accumulation-steps must be 1, got {steps}: a --batch-size {steps} times as large makes the same steps, "
            "and --use-checkpoint makes room for it"
        )
    if decay != 1:
        raise ConfigError(f"TRAIN.LAYER_DECAY must be 1, got {decay}: all layers learn at one rate")
    if schedule in ("linear", "multistep"):
        raise ConfigError(f"TRAIN.LR_SCHEDULER.NAME {schedule} is not offered: take cosine or step")


def notes(config: Config, args: argparse.Namespace) -> list[str]:
    """What the command line or the configuration asks for and does not get, one sentence each."""
    evaluation = evaluates(config)
    sentences = [
        f"{key} has no effect: {WITHOUT_EFFECT[key]}"
        for key in sorted(changed(config) & set(WITHOUT_EFFECT))
        if not evaluation or not key.startswith(("TRAIN.", "SAVE_FREQ"))
    ]
    if args.memory_limit_rate >= 0:
        sentences.append("--memory_limit_rate has no effect: a run takes the memory that it needs")
    if not config.TEST.CROP:
        sentences.append("TEST.CROP False keeps the middle square of a picture that is not square")
    if config.DATA.INTERPOLATION != "bicubic":
        sentences.append("DATA.INTERPOLATION is for training; pictures for evaluation are resized bicubically")
    if evaluation and not config.EVAL_MODE:
        sentences.append("--pretrained evaluates; to train from these weights, name them by --finetune")
    return sentences


def words_for(config: Config, args: argparse.Namespace, model: str) -> list[str]:
    """Return the command line of vim/main.py that does what a configuration says with the registered `model`."""
    data, ema = config.DATA, args.model_ema
    words: list[Any] = ["--model", model, "--data-path", data.DATA_PATH or DATA, "--batch-size", data.BATCH_SIZE]
    words += ["--input-size", *_sides(config), "--num_workers", data.NUM_WORKERS, "--dist-eval"]
    words += ["--seed", config.SEED] if config.SEED else []  # unsaid, it is that of the checkpoint
    words += [
        "--pin-mem" if data.PIN_MEMORY else "--no-pin-mem",
        "--eval-crop-ratio",
        0.875 if config.TEST.CROP else 1.0,
    ]
    words += ["--model-ema" if ema else "--no-model-ema", "--model-ema-decay", args.model_ema_decay]
    words += ["--model-ema-force-cpu"] * args.model_ema_force_cpu
    words += ["--device", args.device] if args.device else []
    words += ["--local-rank", args.local_rank] if args.local_rank is not None else []
    words += ["--if_amp" if config.AMP_ENABLE and _on_gpu(args) else "--no_amp"]
    if evaluates(config):
        words += ["--eval", "--resume", config.MODEL.RESUME or config.MODEL.PRETRAINED]
    else:
        words += _training_words(config, args)
    return [str(word) for word in words]


def _training_words(config: Config, args: argparse.Namespace) -> list[Any]:
    train = config.TRAIN
    words = [word for flag, key in TRAINING.items() for word in (flag, value_of(config, key))]
    scale = config.DATA.BATCH_SIZE * _processes() / REFERENCE_BATCH  # vim/main.py scales --lr alone
    words += ["--warmup-lr", train.WARMUP_LR * scale, "--min-lr", train.MIN_LR * scale]
    words += ["--cooldown-epochs", 0, "--no-repeated-aug", "--mend", "lr-lag", "--output_dir", _folder(config)]
    if train.CLIP_GRAD:
        words += ["--clip-grad", train.CLIP_GRAD]
    if "TRAIN.OPTIMIZER.BETAS" in changed(config):  # else the optimizer's own
        words += ["--opt-betas", *train.OPTIMIZER.BETAS]
    if config.AUG.CUTMIX_MINMAX is not None:
        words += ["--cutmix-minmax", *config.AUG.CUTMIX_MINMAX]
    words += ["--use-checkpoint"] * train.USE_CHECKPOINT + ["--auto-resume"] * train.AUTO_RESUME
    words += ["--resume", config.MODEL.RESUME] if config.MODEL.RESUME else []
    words += ["--finetune", args.finetune] if args.finetune else []
    return words


def _sides(config: Config) -> tuple[int, ...]:
    size = config.DATA.IMG_SIZE
    return (size,) if isinstance(size, int) else size


def _on_gpu(args: argparse.Namespace) -> bool:
    return args.device.startswith("cuda") if args.device else torch.cuda.is_available()


def _processes() -> int:
    text = os.environ.get("WORLD_SIZE", "1")
    return int(text) if text.isdecimal() else 1  # vim/main.py says what is wrong with it


def _is_first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _folder(config: Config) -> Path:
    return Path(config.OUTPUT) / config.MODEL.NAME / config.TAG


# --- running ----------------------------------------------------------------------------------------------------------


def with_a_folder(config: Config, goes_on: bool = False) -> Config:
    """Name the run after the time, in `output`, where nothing else is said; if it `goes_on`, as the newest one.

    Raises:
        ConfigError: its folder would not be below OUTPUT.
    """
    config = override(config, [] if config.OUTPUT else ["OUTPUT", "output"])
    for key in ("MODEL.NAME", "TAG"):
        name = value_of(config, key)
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ConfigError(f"{key} must be the name of a folder below OUTPUT, got {name!r}")
    if config.TAG:
        return config
    newest = _newest_run(Path(config.OUTPUT) / config.MODEL.NAME) if goes_on else None
    return override(config, ["TAG", _quoted(newest or time.strftime("%Y%m%d%H%M%S"))])


def _newest_run(folder: Path) -> str | None:
    """The name of the run in a folder of runs whose checkpoint is the newest."""
    checkpoints = sorted(folder.glob("*/checkpoint.pth"), key=lambda path: path.stat().st_mtime)
    return checkpoints[-1].parent.name if checkpoints else None


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    args = parse(arguments)
    try:
        config = with_a_folder(read_config(args), args.auto_resume)
        model = register(config, _called(config, find(args.cfg)))
        if config.THROUGHPUT_MODE:
            return _time(config, args, model)
        refuse(config, args)
    except ConfigError as error:
        print(f"error: {error}.", file=sys.stderr)
        return 2
    if _is_first():
        for sentence in notes(config, args):
            print(f"note: {sentence}")
    words = words_for(config, args, model)
    code: int = importlib.import_module("main").run(words, lambda: _keep(config), in_settings)
    return code


def in_settings(sentence: str) -> str:
    """A sentence of vim/main.py with the settings in the place of its flags."""
    known = TRAINING | FURTHER
    return re.sub(r"(?<!\S)--[\w-]+", lambda flag: known.get(flag[0], flag[0]), sentence)


def _called(config: Config, file: Path) -> str:
    """A name for the network: that of its file, or MODEL.NAME where the file is one that a run has kept."""
    return config.MODEL.NAME if file.name == KEPT else file.stem


def _time(config: Config, args: argparse.Namespace, model: str) -> int:
    """Print what the network costs, with random weights on grey pictures, which cost as much as any."""
    print("note: --throughput measures random weights on grey pictures; no checkpoint and no picture is read")
    device = args.device or ("cuda" if _on_gpu(args) else "cpu")
    words = ["--model", model, "--batch-size", config.DATA.BATCH_SIZE, "--num_classes", config.MODEL.NUM_CLASSES]
    words += ["--img-size", *_sides(config), "--device", device, "--repeat", TIMED_RUNS]
    code: int = importlib.import_module("test_flops").run([str(word) for word in words])
    return code


def _keep(config: Config) -> None:
    """Write the configuration into the folder of a run that begins; vim/main.py says what is wrong if it cannot."""
    if not _is_first():
        return
    checkpoint, path = importlib.import_module("checkpoint"), _folder(config) / KEPT
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise checkpoint.CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error
    checkpoint.write_whole(path, lambda file: file.write_text(as_yaml(config), encoding="utf-8"))


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # results and progress in order
    sys.exit(run())
