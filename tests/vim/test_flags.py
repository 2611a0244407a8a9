"""The command line of main.py: every flag, its type, its default."""

import argparse
import re

import pytest
import torch

from flags import UsageError, check, get_args_parser, is_given, without_effect

DEFAULT_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# flag, what is typed after it, the value that gives, the default (specification 5.1)
VALUES = [
    ("--batch-size", "3", 3, 64),
    ("--val-batch-size", "3", 3, None),
    ("--epochs", "3", 3, 300),
    ("--model", "vim_x", "vim_x", "deit_base_patch16_224"),
    ("--input-size", "96", 96, 224),
    ("--input-size", "48 96", (48, 96), 224),
    ("--drop", "0.5", 0.5, 0.0),
    ("--drop-path", "0.5", 0.5, 0.1),
    ("--model-ema-decay", "0.9", 0.9, 0.99996),
    ("--opt", "sgd", "sgd", "adamw"),
    ("--opt-eps", "1e-6", 1e-6, 1e-8),
    ("--opt-betas", "0.8 0.9", [0.8, 0.9], None),
    ("--clip-grad", "1", 1.0, None),
    ("--momentum", "0.8", 0.8, 0.9),
    ("--weight-decay", "0.1", 0.1, 0.05),
    ("--sched", "step", "step", "cosine"),
    ("--lr", "1e-3", 1e-3, 5e-4),
    ("--lr-noise", "0.4 0.9", [0.4, 0.9], None),
    ("--lr-noise-pct", "0.5", 0.5, 0.67),
    ("--lr-noise-std", "0.5", 0.5, 1.0),
    ("--warmup-lr", "1e-5", 1e-5, 1e-6),
    ("--min-lr", "1e-6", 1e-6, 1e-5),
    ("--decay-epochs", "2.5", 2.5, 30),
    ("--warmup-epochs", "2", 2, 5),
    ("--cooldown-epochs", "2", 2, 10),
    ("--patience-epochs", "2", 2, 10),
    ("--decay-rate", "0.2", 0.2, 0.1),
    ("--color-jitter", "0.2", 0.2, 0.3),
    ("--aa", "original", "original", "rand-m9-mstd0.5-inc1"),
    ("--smoothing", "0.2", 0.2, 0.1),
    ("--train-interpolation", "random", "random", "bicubic"),
    ("--hflip", "0", 0.0, 0.5),
    ("--reprob", "0.5", 0.5, 0.25),
    ("--remode", "const", "const", "pixel"),
    ("--recount", "2", 2, 1),
    ("--mixup", "0.2", 0.2, 0.8),
    ("--cutmix", "0.2", 0.2, 1.0),
    ("--cutmix-minmax", "0.2 0.8", [0.2, 0.8], None),
    ("--mixup-prob", "0.5", 0.5, 1.0),
    ("--mixup-switch-prob", "0.1", 0.1, 0.5),
    ("--mixup-mode", "pair", "pair", "batch"),
    ("--teacher-model", "resnet50", "resnet50", "regnety_160"),
    ("--teacher-path", "t.pth", "t.pth", ""),
    ("--distillation-type", "soft", "soft", "none"),
    ("--distillation-alpha", "0.1", 0.1, 0.5),
    ("--distillation-tau", "3", 3.0, 1.0),
    ("--finetune", "f.pth", "f.pth", ""),
    ("--pos-embed-resize", "upstream", "upstream", "middle"),
    ("--data-path", "here", "here", "/datasets01/imagenet_full_size/061417/"),
    ("--data-set", "CIFAR", "CIFAR", "IMNET"),
    ("--inat-category", "genus", "genus", "name"),
    ("--output_dir", "out", "out", ""),
    ("--device", "cuda:1", "cuda:1", DEFAULT_DEVICE),
    ("--seed", "7", 7, 0),
    ("--resume", "r.pth", "r.pth", ""),
    ("--start_epoch", "3", 3, 0),
    ("--eval-crop-ratio", "1", 1.0, 0.875),
    ("--val-split", "0.2", 0.2, 0.1),
    ("--save-every", "50", 50, None),
    ("--log-interval", "3", 3, 10),
    ("--mend", "lr-lag dt-bias", ["lr-lag", "dt-bias"], ()),
    ("--num_workers", "0", 0, 10),
    ("--world_size", "2", 2, 1),
    ("--dist_url", "tcp://a:1", "tcp://a:1", "env://"),
    ("--local-rank", "1", 1, 0),
]
SWITCHES = [
    "--auto-resume",
    "--tensorboard",
    "--mlflow",
    "--use-checkpoint",
    "--bce-loss",
    "--unscale-lr",
    "--model-ema-force-cpu",
    "--affine",
    "--ThreeAugment",
    "--src",
    "--resplit",
    "--cosub",
    "--attn-only",
    "--eval",
    "--dist-eval",
    "--distributed",
]
# flag, its opposite, default
PAIRS = [
    ("--model-ema", "--no-model-ema", True),
    ("--repeated-aug", "--no-repeated-aug", True),
    ("--train-mode", "--no-train-mode", True),
    ("--pin-mem", "--no-pin-mem", True),
    ("--if_amp", "--no_amp", False),
    ("--if_continue_inf", "--no_continue_inf", False),
    ("--if_nan2num", "--no_nan2num", False),
    ("--if_random_cls_token_position", "--no_random_cls_token_position", False),
    ("--if_random_token_rank", "--no_random_token_rank", False),
]
CHOICES = {
    "--train-interpolation": ["random", "bilinear", "bicubic"],
    "--distillation-type": ["none", "soft", "hard"],
    "--data-set": ["CIFAR", "IMNET", "INAT", "INAT19"],
    "--inat-category": ["kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"],
    "--pos-embed-resize": ["middle", "upstream"],
    "--mixup-mode": ["batch", "pair", "elem"],
}


def value_of(args: argparse.Namespace, flag: str) -> object:
    return getattr(args, flag.lstrip("-").replace("-", "_"))


@pytest.mark.parametrize(("flag", "typed", "value", "default"), VALUES, ids=[" ".join(row[:2]) for row in VALUES])
def test_flag_with_value(flag, typed, value, default):
    given = value_of(get_args_parser().parse_args([flag, *typed.split()]), flag)
    absent = value_of(get_args_parser().parse_args([]), flag)
    assert (given, absent) == (value, default)
    assert type(given) is type(value)


@pytest.mark.parametrize("flag", SWITCHES)
def test_switch(flag):
    assert value_of(get_args_parser().parse_args([flag]), flag) is True
    assert value_of(get_args_parser().parse_args([]), flag) is False


@pytest.mark.parametrize(("flag", "opposite", "default"), PAIRS, ids=[row[0] for row in PAIRS])
def test_pair(flag, opposite, default):
    typed = [[flag], [opposite], []]
    values = [value_of(get_args_parser().parse_args(line), flag) for line in typed]
    assert values == [True, False, default]


@pytest.mark.parametrize("flag", CHOICES)
def test_choices(flag, capsys):
    for choice in CHOICES[flag]:
        assert value_of(get_args_parser().parse_args([flag, choice]), flag) == choice
    with pytest.raises(SystemExit):
        get_args_parser().parse_args([flag, "nonsense"])
    assert "invalid choice" in capsys.readouterr().err


def test_the_tables_name_every_flag_and_each_has_a_meaning():
    actions = get_args_parser()._actions
    here = {row[0] for row in VALUES} | set(SWITCHES) | {name for row in PAIRS for name in row[:2]} | {"--dr"}
    assert {name for action in actions for name in action.option_strings} == here
    assert not [action.option_strings for action in actions if not action.help]


def test_short_name_of_decay_rate_and_use_as_parent():
    parser = argparse.ArgumentParser(parents=[get_args_parser()])  # fails if the parent has a --help of its own
    assert parser.parse_args(["--dr", "0.5"]).decay_rate == 0.5
    assert "--val-batch-size" in parser.format_help()


def test_what_was_typed_is_known():
    args = get_args_parser().parse_args(["--input-size", "224"])
    assert is_given(args, "input_size")
    assert not is_given(args, "model")
    assert not is_given(get_args_parser().parse_args([]), "input_size")


def test_input_size_is_one_number_or_two(capsys):
    assert is_given(get_args_parser().parse_args(["--input-size", "32", "64"]), "input_size")
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--input-size", "32", "64", "96"])
    assert "one number (a square) or two (height and width)" in capsys.readouterr().err


OUT_OF_RANGE = [
    *("--hflip 1.5", "--hflip -0.1", "--input-size 32 0", "--mixup -1", "--cutmix -0.5", "--smoothing 1"),
    *("--min-lr -1", "--warmup-lr -1", "--weight-decay -0.1", "--momentum -1", "--color-jitter -1", "--recount 0"),
    *("--warmup-epochs -1", "--cooldown-epochs -1", "--patience-epochs -1", "--decay-epochs 0", "--decay-rate 0"),
    *("--lr-noise-pct 0", "--lr-noise-std -1", "--lr-noise 0.5", "--lr-noise 0.9 0.1", "--lr-noise 0.1 -1"),
    *("--cutmix-minmax 0.2", "--cutmix-minmax 0.5 0.5", "--cutmix-minmax 0.5 1.5", "--cutmix-minmax 0.1 0.2 0.3"),
    *("--opt-betas 0.9", "--opt-betas 0.9 1", "--opt-betas 0.9 -0.1", "--opt-betas 0.9 0.99 0.999", "--lr 1e+300"),
    *("--eval-crop-ratio 0", "--model-ema-decay 1", "--clip-grad 0"),
]


@pytest.mark.parametrize("typed", OUT_OF_RANGE)
def test_value_out_of_range_is_refused(typed):
    flag, *words = typed.split()
    with pytest.raises(UsageError, match=f"^{flag} must .*{re.escape(words[-1])}"):
        check(get_args_parser().parse_args([flag, *words]))


FLOATS = [row for row in VALUES if isinstance(row[2][0] if isinstance(row[2], list) else row[2], float)]


@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("row", FLOATS, ids=[row[0] for row in FLOATS])
def test_numbers_that_are_none_are_refused(row, number):
    flag, typed, *_ = row
    words = [number if place == 0 else word for place, word in enumerate(typed.split())]
    with pytest.raises(UsageError, match=rf"^{flag} must be a finite number, got {number}\.$"):
        check(get_args_parser().parse_args([f"{flag}={words[0]}"] if len(words) == 1 else [flag, *words]))


@pytest.mark.parametrize("row", FLOATS, ids=[row[0] for row in FLOATS])
def test_usual_numbers_are_taken(row):
    check(get_args_parser().parse_args([row[0], *row[1].split()]))


def test_adan_has_three_betas():
    check(get_args_parser().parse_args(["--opt", "adan", "--opt-betas", "0.9", "0.92", "0.99"]))


@pytest.mark.parametrize("other", ["--ThreeAugment", "--src"])
def test_two_ways_to_crop_are_refused(other):
    with pytest.raises(UsageError, match=rf"^--affine and {other} .*\.$"):
        check(get_args_parser().parse_args(["--affine", other]))
    check(get_args_parser().parse_args([other]))
    check(get_args_parser().parse_args(["--affine"]))
    check(get_args_parser().parse_args(["--affine", other, "--eval"]))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--mend ema-best --no-model-ema", "^--mend ema-best chooses by .* --no-model-ema .*; drop one.$"),
        ("--teacher-path t.pth", "^--teacher-path is for distillation: say also --distillation-type soft or hard.$"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words, sentence):
    args = get_args_parser().parse_args(words.split())
    with pytest.raises(UsageError, match=sentence):
        check(args)
    args.eval = True
    check(args)


@pytest.mark.parametrize(
    ("words", "starts"),
    [
        ("", []),
        ("--src --ThreeAugment --finetune a", []),
        ("--src", ["--src has no effect"]),
        ("--resplit", ["--resplit has no meaning"]),
        ("--src --resplit --eval", []),
        ("--resume a --finetune b", ["--finetune b has no effect"]),
        ("--resume a --finetune b --eval", ["--finetune b has no effect"]),
    ],
)
def test_what_has_no_effect_is_said(words, starts):
    sentences = without_effect(get_args_parser().parse_args(words.split()))
    assert len(sentences) == len(starts)
    assert all(sentence.startswith(start) for sentence, start in zip(sentences, starts, strict=True))
