"""The command line of `main.py`: every flag with its type, default and meaning, in groups."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from command_line import UsageError
from pictures import LEAST_CROP_RATIO

__all__ = ["MENDS", "UsageError", "check", "get_args_parser", "is_given", "without_effect"]


class _StoreAndRemember(argparse.Action):
    """Store the value, and note in `namespace.given` that it was typed and is not the default."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, values)
        namespace.given = (*getattr(namespace, "given", ()), self.dest)


class _StoreSize(_StoreAndRemember):
    """Store one number as it is and two as (height, width)."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        numbers = tuple(values or ())
        if len(numbers) not in (1, 2):
            raise argparse.ArgumentError(self, "takes one number (a square) or two (height and width)")
        super().__call__(parser, namespace, numbers if len(numbers) == 2 else numbers[0], option_string)


def is_given(args: argparse.Namespace, dest: str) -> bool:
    """Whether the person typed the flag stored under `dest`; known for those that `_StoreAndRemember` stores."""
    return dest in getattr(args, "given", ())


class _Flags:
    """One named group of flags; keeps the lines below short enough to be read as a table."""

    def __init__(self, parser: argparse.ArgumentParser, title: str) -> None:
        self._group = parser.add_argument_group(title)

    def value(self, names: str, kind: type, default: Any, meaning: str, **options: Any) -> None:
        """A flag with a value; other names for it may follow after a space."""
        shown = "" if default in (None, "", ()) else " (default: %(default)s)"
        self._group.add_argument(*names.split(), type=kind, default=default, help=meaning + shown, **options)

    def values(self, name: str, meaning: str) -> None:
        """A flag with one or more floats; unset by default."""
        self._group.add_argument(name, type=float, nargs="+", default=None, metavar="X", help=meaning)

    def switch(self, name: str, meaning: str) -> None:
        """A flag without a value, off by default."""
        self._group.add_argument(name, action="store_true", help=meaning)

    def pair(self, name: str, opposite: str, default: bool, meaning: str) -> None:
        """A flag and its opposite for one setting."""
        dest = name.lstrip("-").replace("-", "_")
        state = "on" if default else "off"
        self._group.add_argument(
            name, action="store_true", dest=dest, default=default, help=f"{meaning} (default: {state})"
        )
        self._group.add_argument(opposite, action="store_false", dest=dest, help=f"the opposite of {name}")


def get_args_parser() -> argparse.ArgumentParser:
    """Return the parser of `main.py`, without `--help`, to be used as a parent of other parsers."""
    parser = argparse.ArgumentParser(add_help=False)
    _add_run_flags(parser)
    _add_data_flags(parser)
    _add_model_flags(parser)
    _add_optimizer_flags(parser)
    _add_schedule_flags(parser)
    _add_augmentation_flags(parser)
    _add_mixing_flags(parser)
    _add_distillation_flags(parser)
    _add_precision_flags(parser)
    _add_process_flags(parser)
    return parser


def _add_run_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "what to run, and on what")
    flags.switch("--eval", "evaluate only: print Acc@1, Acc@5 and the loss on the validation pictures")
    flags.value(
        "--resume",
        str,
        "",
        "checkpoint to evaluate or to go on from: a file, an https:// URL, a hub id; to evaluate, also an ONNX file",
    )
    flags.value("--finetune", str, "", "checkpoint to start from; its head is dropped where the class count differs")
    flags.value(
        "--pos-embed-resize",
        str,
        "middle",
        "how position embeddings go to another size: middle keeps the class token's row where it is; "
        "upstream takes row 0 for it, as the fine-tuning recipe of the published + weights did",
        choices=("middle", "upstream"),
    )
    flags.switch("--auto-resume", "go on from checkpoint.pth of --output_dir if it is there, else begin")
    flags.value("--save-every", int, None, "also save after every so many steps (default: after each epoch only)")
    flags.value("--log-interval", int, 10, "steps between two lines of progress")
    flags.switch("--tensorboard", "also write what is logged for TensorBoard, into --output_dir")
    flags.switch("--mlflow", "also log to MLflow, as its own environment variables say")
    flags.value("--start_epoch", int, 0, "number of the first epoch")
    flags.value("--epochs", int, 300, "number of epochs")
    flags.value(
        "--mend",
        str,
        (),
        "depart from upstream's recipe where it is at fault: "
        + "; ".join(f"{name}: {what}" for name, what in MENDS.items()),
        nargs="+",
        choices=tuple(MENDS),
        metavar="FAULT",
    )
    flags.value("--output_dir", str, "", "folder for checkpoints and logs; nothing is saved without it")
    flags.value(
        "--device",
        str,
        _default_device(),
        "cpu, cuda, cuda:1 ...; CUDA where there is one, else the CPU",
        action=_StoreAndRemember,
    )
    flags.value(
        "--seed",
        int,
        0,
        "seed of the random numbers; the rank of the process is added",
        action=_StoreAndRemember,
    )


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


# What upstream's training does wrong and published recipes were run with; by name, so that each can be mended.
MENDS = {
    "lr-lag": "the learning rate is that of the running epoch, not of the one before",
    "ssm-decay": "no weight decay on A_log, D and their backward twins",
    "dt-bias": "the backward direction's dt_proj bias starts as the forward one's does, not at 0",
    "ema-best": "the best checkpoint is chosen by the moving average's accuracy, not the network's",
}


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "data")
    flags.value(
        "--data-path",
        str,
        "/datasets01/imagenet_full_size/061417/",
        "folder with train/ and val/, each with one folder of pictures per class; --eval needs val/ only; without "
        "val/, a part of train/, or of the class folders right in it, is kept for validation",
    )
    flags.value("--data-set", str, "IMNET", "kind of data set", choices=("CIFAR", "IMNET", "INAT", "INAT19"))
    flags.value(
        "--inat-category",
        str,
        "name",
        "what counts as a class of iNaturalist",
        choices=("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"),
    )
    flags.value(
        "--val-split",
        float,
        0.1,
        "part of each class kept for validation, drawn by --seed, where the data has no val/ of its own",
        action=_StoreAndRemember,
    )
    flags.value("--batch-size", int, 64, "pictures per step and process")
    flags.value("--val-batch-size", int, None, "pictures per step in evaluation (default: that of --batch-size)")
    flags.value("--eval-crop-ratio", float, 0.875, "part of the resized picture's edge that the crop keeps")
    flags.value("--num_workers", int, 10, "processes that read pictures, at most one per CPU; 0: none of their own")
    flags.pair("--pin-mem", "--no-pin-mem", True, "page-locked memory for quicker copies to a GPU")
    flags.switch("--dist-eval", "share the validation pictures out among the processes, each picture once")


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "model")
    flags.value(
        "--model",
        str,
        "deit_base_patch16_224",
        "a Vim of models_mamba.py, a VMamba or any timm model",
        action=_StoreAndRemember,
    )
    flags.value(
        "--input-size",
        int,
        224,
        "edge of the square input, or its height and width, pixels",
        action=_StoreSize,
        nargs="+",
        metavar="PIXELS",
    )
    flags.value("--drop", float, 0.0, "dropout rate")
    flags.value("--drop-path", float, 0.1, "stochastic depth rate of the last layer")
    flags.pair("--model-ema", "--no-model-ema", True, "moving average of the weights, and its evaluation")
    flags.value("--model-ema-decay", float, 0.99996, "decay of the moving average per step")
    flags.switch("--model-ema-force-cpu", "keep the moving average in CPU memory")
    flags.pair("--train-mode", "--no-train-mode", True, "train with dropout and batch statistics switched on")
    flags.switch(
        "--use-checkpoint", "compute each block's activations again in the backward pass: less memory, more time"
    )
    flags.switch("--attn-only", "train only attention, head and position embeddings (for models with attention)")
    flags.pair(
        "--if_random_cls_token_position",
        "--no_random_cls_token_position",
        False,
        "put the class token at a random position in each training step",
    )
    flags.pair(
        "--if_random_token_rank",
        "--no_random_token_rank",
        False,
        "shuffle the order of the tokens in each training step",
    )


def _add_optimizer_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "optimizer and loss")
    flags.value("--opt", str, "adamw", "a timm optimizer")
    flags.value("--opt-eps", float, 1e-8, "epsilon of the optimizer")
    flags.values("--opt-betas", "betas of the optimizer, its own by default")
    flags.value("--clip-grad", float, None, "largest norm of the gradients (default: no clipping)")
    flags.value("--momentum", float, 0.9, "momentum, for optimizers that have one")
    flags.value("--weight-decay", float, 0.05, "weight decay")
    flags.switch("--bce-loss", "binary cross-entropy over all classes, any target above 0 counting as 1")
    flags.value("--smoothing", float, 0.1, "label smoothing")
    flags.switch("--cosub", "co-sub training: each batch twice, each half also taught by the other")


def _add_schedule_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "learning rate")
    flags.value("--sched", str, "cosine", "a timm schedule")
    flags.value("--lr", float, 5e-4, "learning rate for 512 pictures per step, scaled to the real number")
    flags.switch("--unscale-lr", "take --lr as it is, not scaled by the pictures per step")
    flags.values("--lr-noise", "parts of the schedule between which noise is added to the learning rate")
    flags.value("--lr-noise-pct", float, 0.67, "limit of that noise, relative to the learning rate")
    flags.value("--lr-noise-std", float, 1.0, "standard deviation of that noise")
    flags.value("--warmup-lr", float, 1e-6, "learning rate at the start of the warm-up, never scaled")
    flags.value("--min-lr", float, 1e-5, "smallest learning rate of the schedule, never scaled")
    flags.value("--decay-epochs", float, 30, "epochs between two decays, for the step schedule")
    flags.value("--warmup-epochs", int, 5, "epochs of warm-up")
    flags.value("--cooldown-epochs", int, 10, "epochs at the smallest rate in the end")
    flags.value("--patience-epochs", int, 10, "epochs without progress that the plateau schedule waits")
    flags.value("--decay-rate --dr", float, 0.1, "factor of one decay")


def _add_augmentation_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "augmentation")
    flags.value("--color-jitter", float, 0.3, "strength of the colour jitter")
    flags.value("--aa", str, "rand-m9-mstd0.5-inc1", "AutoAugment or RandAugment policy, as timm writes it")
    flags.value(
        "--train-interpolation",
        str,
        "bicubic",
        "interpolation of the training crops, or of --affine",
        choices=("random", "bilinear", "bicubic"),
    )
    flags.pair("--repeated-aug", "--no-repeated-aug", True, "each picture several times per epoch, if distributed")
    flags.value("--hflip", float, 0.5, "probability that a training picture is mirrored; 0 for digits and text")
    flags.switch(
        "--affine",
        "instead of the random crop, turn and slant each training picture by up to 12 degrees, move it by up to 10 %% "
        "and size it to 85 to 115 %%, at random, then crop as in evaluation; what comes in from beyond the border has "
        "the border's colour; for pictures of which a crop would lose something, such as digits and scans",
    )
    flags.switch("--ThreeAugment", "3-Augment instead of --aa: one of grey, solarized, blurred")
    flags.switch("--src", "with --ThreeAugment: simple random crop")
    flags.value("--reprob", float, 0.25, "probability of random erasing")
    flags.value("--remode", str, "pixel", "what fills an erased region, as timm names it")
    flags.value("--recount", int, 1, "number of erased regions")
    flags.switch("--resplit", "without effect: kept because recipes pass it")


def _add_mixing_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "mixup and cutmix")
    flags.value("--mixup", float, 0.8, "alpha of mixup, 0 for none")
    flags.value("--cutmix", float, 1.0, "alpha of cutmix, 0 for none")
    flags.values("--cutmix-minmax", "smallest and largest part that cutmix replaces, instead of its alpha")
    flags.value("--mixup-prob", float, 1.0, "probability that a batch is mixed")
    flags.value("--mixup-switch-prob", float, 0.5, "probability of cutmix where both are on")
    flags.value("--mixup-mode", str, "batch", "what shares one mixing ratio", choices=("batch", "pair", "elem"))


def _add_distillation_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "distillation")
    flags.value("--teacher-model", str, "regnety_160", "timm model of the teacher")
    flags.value("--teacher-path", str, "", "checkpoint of the teacher, required for distillation")
    flags.value(
        "--distillation-type",
        str,
        "none",
        "what is learnt from the teacher",
        choices=("none", "soft", "hard"),
    )
    flags.value("--distillation-alpha", float, 0.5, "weight of the teacher's part of the loss")
    flags.value("--distillation-tau", float, 1.0, "temperature of soft distillation")


def _add_precision_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "precision")
    flags.pair("--if_amp", "--no_amp", False, "automatic mixed precision")
    flags.pair(
        "--if_continue_inf",
        "--no_continue_inf",
        False,
        "skip a step whose loss is not finite instead of stopping",
    )
    flags.pair("--if_nan2num", "--no_nan2num", False, "replace NaN and infinity in the loss by numbers")


def _add_process_flags(parser: argparse.ArgumentParser) -> None:
    flags = _Flags(parser, "several processes (set by torchrun and SLURM; seldom typed)")
    flags.switch("--distributed", "without effect: found out from the environment")
    flags.value("--world_size", int, 1, "number of processes; the environment's number goes first")
    flags.value("--dist_url", str, "env://", "where the processes meet")
    flags.value("--local-rank", int, 0, "number of the process on its machine")


_LARGEST = 1e30  # with room for what an optimizer makes of it in fp32

# What the numbers of a setting must do, in words and as a test; those that are None are not looked at.
_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "batch_size val_batch_size input_size epochs log_interval save_every recount": (
        "be at least 1",
        lambda number: number >= 1,
    ),
    "num_workers start_epoch mixup cutmix lr_noise lr_noise_std warmup_lr min_lr weight_decay momentum color_jitter "
    "warmup_epochs cooldown_epochs patience_epochs": ("be at least 0", lambda number: number >= 0),
    "lr opt_eps distillation_tau clip_grad lr_noise_pct decay_epochs decay_rate": (
        "be above 0",
        lambda number: number > 0,
    ),
    "drop drop_path hflip reprob mixup_prob mixup_switch_prob distillation_alpha cutmix_minmax": (
        "lie between 0 and 1",
        lambda number: 0 <= number <= 1,
    ),
    "smoothing model_ema_decay opt_betas": ("be at least 0 and below 1", lambda number: 0 <= number < 1),
    "eval_crop_ratio": (f"be above 0 (from {LEAST_CROP_RATIO} on)", lambda number: number >= LEAST_CROP_RATIO),
    "lr weight_decay": (f"be at most {_LARGEST:g}", lambda number: number <= _LARGEST),
}


def check(args: argparse.Namespace) -> None:
    """Refuse settings that no run can use, before anything is read; fill in --val-batch-size.

    Raises:
        UsageError: names the flag, what it got and what it may be.
    """
    if args.val_batch_size is None:
        args.val_batch_size = args.batch_size
    _refuse_no_numbers(args)
    for dests, (rule, holds) in _RULES.items():
        for dest in dests.split():
            value = getattr(args, dest)
            for number in value if isinstance(value, tuple | list) else (value,):
                if number is not None and not holds(number):
                    raise UsageError(f"{_spelling(dest)} must {rule}, got {number}.")
    if not -(2**63) <= args.seed < 2**63 - 2**20:
        raise UsageError(f"--seed must be a 64-bit number, got {args.seed}.")
    if not args.eval:
        _check_training(args)


def _refuse_no_numbers(args: argparse.Namespace) -> None:
    for dest, value in vars(args).items():
        for number in value if isinstance(value, tuple | list) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UsageError(f"{_spelling(dest)} must be a finite number, got {number}.")


def _check_training(args: argparse.Namespace) -> None:
    for dest in ("lr_noise", "cutmix_minmax"):
        ends = getattr(args, dest)
        if ends is not None and not (len(ends) == 2 and ends[0] < ends[1]):
            raise UsageError(f"{_spelling(dest)} must be two numbers, the smaller one first, got {_listed(ends)}.")
    wanted = 3 if "adan" in args.opt.lower() else 2
    if args.opt_betas is not None and len(args.opt_betas) != wanted:
        raise UsageError(f"--opt-betas must be {wanted} numbers for --opt {args.opt}, got {_listed(args.opt_betas)}.")
    if "ema-best" in args.mend and not args.model_ema:
        raise UsageError("--mend ema-best chooses by the moving average, which --no-model-ema leaves away; drop one.")
    if args.teacher_path and args.distillation_type == "none":
        raise UsageError("--teacher-path is for distillation: say also --distillation-type soft or hard.")
    for dest in ("ThreeAugment", "src"):
        if args.affine and getattr(args, dest):
            raise UsageError(f"--affine and --{dest} move or crop pictures each in its own way; choose one of them.")
    mixes = args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None
    if mixes and args.batch_size % 2:
        raise UsageError(f"Mixup and cutmix mix pictures in pairs: --batch-size {args.batch_size} must be even.")
    if args.cosub and args.distillation_type != "none":
        raise UsageError("--cosub has a loss of its own, so it does not go with --distillation-type.")


def without_effect(args: argparse.Namespace) -> list[str]:
    """Return what the command line asks for and does not get, as upstream's would not either: one sentence each."""
    sentences = []
    if args.resume and args.finetune:
        sentences.append(f"--finetune {args.finetune} has no effect beside --resume, whose weights are taken")
    if args.resplit and not args.eval:
        sentences.append("--resplit has no meaning here: each picture is augmented once")
    if args.src and not args.ThreeAugment and not args.eval:
        sentences.append("--src has no effect without --ThreeAugment")
    return sentences


def _listed(numbers: Sequence[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def _spelling(dest: str) -> str:
    """Return the flag of a setting as it is typed."""
    return "--" + (dest if dest in ("num_workers", "start_epoch") else dest.replace("_", "-"))
