"""Training runs: a step against a plain loop, what sets the weights, and the flags, each by what it changes."""

import json
import math
import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional
from training_runs import CLASSES, MODEL, PLAIN, load, settings, write_pictures

import main
import run_setup
import training
from causal_conv1d.backend import use_backend
from checkpoint import CheckpointError, save_checkpoint
from engine import train_one_epoch
from flags import UsageError
from models_mamba import VisionMamba
from optimization import Schedule, make_average, make_optimizer, scaled_rate


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Small networks: threads would wait for each other, and for other tests' threads even longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(capsys, *words) -> tuple[int, str, str]:
    code = main.run([str(word) for word in words])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def prepared(data, *words):
    torch.use_deterministic_algorithms(True)
    try:
        return run_setup.prepare(settings(*PLAIN, "--data-path", data, *words), torch.device("cpu"))
    finally:
        torch.use_deterministic_algorithms(False)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_an_epoch_equals_a_plain_loop(data, kernels):
    """Loss, gradients of the last step and weights after three steps of AdamW, written from their definitions."""
    own = prepared(data, "--clip-grad", "0.5")
    plain = timm.create_model(MODEL, num_classes=3, drop_path_rate=0.0)
    plain.load_state_dict(own.model.state_dict())
    rate, decay, (b1, b2), eps = own.args.lr, 0.05, (0.9, 0.999), 1e-8
    moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in plain.named_parameters()}
    own.batches.set_epoch(0, 0)
    batches = [(batch.images, batch.targets) for batch in own.loader]
    own.batches.set_epoch(0, 0)
    losses = []
    with use_backend(kernels):
        stats = train_one_epoch(
            own.network, own.criterion, own.loader, own.optimizer, own.device, 0, max_norm=0.5, args=own.args
        )
        for step, (images, targets) in enumerate(batches, 1):
            loss = functional.cross_entropy(plain.train()(images), targets)
            losses.append(loss.item())
            gradients = torch.autograd.grad(loss, list(plain.parameters()))
            norm = torch.stack([g.pow(2).sum() for g in gradients]).sum().sqrt()
            factor = min(1.0, 0.5 / (norm.item() + 1e-6))
            with torch.no_grad():
                for (name, weight), gradient in zip(plain.named_parameters(), gradients, strict=True):
                    first, second = moments[name]
                    first.mul_(b1).add_((1 - b1) * factor * gradient)
                    second.mul_(b2).add_((1 - b2) * (factor * gradient) ** 2)
                    if weight.ndim > 1 and name not in ("pos_embed", "cls_token"):
                        weight.mul_(1 - rate * decay)
                    step_size = (first / (1 - b1**step)) / ((second / (1 - b2**step)).sqrt() + eps)
                    weight.sub_(rate * step_size)
    assert stats["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert stats["lr"] == pytest.approx(rate)
    weights = dict(plain.named_parameters())
    for name, weight in own.model.named_parameters():
        torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_of_a_whole_network():
    """In fp64, of every weight and of the picture, against differences."""
    torch.manual_seed(0)
    model = (
        VisionMamba(img_size=8, patch_size=4, stride=4, depth=2, embed_dim=8, d_state=2, num_classes=3).double().eval()
    )
    names = [name for name, _ in model.named_parameters()]
    picture = torch.randn(1, 3, 8, 8, dtype=torch.float64, requires_grad=True)

    def scores(picture, *weights):
        return torch.func.functional_call(model, dict(zip(names, weights, strict=True)), (picture,))

    with use_backend("torch"):
        weights = [weight.detach().clone().requires_grad_() for weight in model.parameters()]
        assert torch.autograd.gradcheck(scores, (picture, *weights), fast_mode=True)


# --- rates, decay, average, first weights ----------------------------------------------------------------------------


def rates(*words, epochs=9):
    args = settings("--model", MODEL, *words)
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([weight], lr=scaled_rate(args))
    schedule, used = Schedule(args, optimizer), []
    for epoch in range(epochs):
        used.append(optimizer.param_groups[0]["lr"])
        schedule.finish(epoch)
    return used


def test_learning_rates_of_upstream_and_mended():
    expected = [1e-6 + (5e-4 - 1e-6) * k / 5 for k in range(5)]
    late = rates("--batch-size", "512")
    assert late[:7] == pytest.approx([1e-6, *expected, late[6]])
    cosine = [1e-5 + (5e-4 - 1e-5) * (1 + math.cos(math.pi * k / 300)) / 2 for k in range(9)]
    assert late[6:] == pytest.approx(cosine[5:8])
    timely = rates("--batch-size", "512", "--mend", "lr-lag")
    assert timely[:8] == pytest.approx(late[1:])


@pytest.mark.parametrize(("words", "rate"), [((), 5e-4 * 64 / 512), (("--unscale-lr",), 5e-4)])
def test_scaled_rate(words, rate):
    assert scaled_rate(settings("--model", MODEL, *words)) == pytest.approx(rate)


@pytest.mark.parametrize("mended", [False, True])
def test_weight_decay(mended):
    args = settings("--model", MODEL, *(["--mend", "ssm-decay"] if mended else []))
    model = timm.create_model(MODEL, num_classes=3)
    decay_of = {
        id(weight): group["weight_decay"]
        for group in make_optimizer(args, model).param_groups
        for weight in group["params"]
    }
    for name, weight in model.named_parameters():
        short = name.rpartition(".")[2]
        free = weight.ndim == 1 or name in ("pos_embed", "cls_token") or (mended and short in ("A_log", "A_b_log"))
        assert decay_of[id(weight)] == (0.0 if free else 0.05), name


def test_average():
    args = settings("--model", MODEL, "--model-ema-decay", "0.9")
    model = nn.Linear(3, 2)
    average = make_average(args, model)
    expected = model.weight.detach().clone()
    for _ in range(4):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        average.update(model)
        expected = 0.9 * expected + 0.1 * model.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)
    assert make_average(settings("--model", MODEL, "--no-model-ema"), model) is None


@pytest.mark.parametrize("mended", [False, True])
def test_first_step_sizes(data, mended):
    mixer = prepared(data, *(["--mend", "dt-bias"] if mended else [])).model.layers[0].mixer
    forward, backward = (functional.softplus(p.bias) for p in (mixer.dt_proj, mixer.dt_proj_b))
    assert (forward > 0.0009).all()
    assert (forward < 0.11).all()
    if mended:
        assert torch.equal(forward, backward)
    else:
        assert torch.equal(mixer.dt_proj_b.bias, torch.zeros_like(mixer.dt_proj_b.bias))


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_train_then_name_a_picture(data, tmp_path, capsys):
    out = tmp_path / "run"
    words = (*PLAIN, "--data-path", data, "--output_dir", out, "--epochs", "6", "--lr", "0.2", "--reprob", "0")
    code, text, errors = run(capsys, *words, "--aa", "none", "--mend", "ema-best", "--model-ema-decay", "0.5")
    assert code == 0, errors
    lines = [json.loads(line) for line in (out / "log.txt").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(6))
    assert list(lines[0])[:7] == [
        *("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters")
    ]
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    best = max(line["ema_acc1"] for line in lines)
    assert f"Max accuracy: {best:.2f}% (EMA)" in text
    assert re.findall(r"(\d) epochs? to go, about \d+:\d\d:\d\d", text) == list("54321")
    saved = load(out / "checkpoint.pth")
    assert (saved["epoch"], saved["step"], saved["max_accuracy"]) == (5, 0, best)
    assert saved["class_names"] == sorted(CLASSES)
    assert (out / "best_checkpoint.pth").exists()
    assert (out / "summary.png").stat().st_size > 5000
    code, text, errors = run(
        capsys, "--eval", "--resume", out / "best_checkpoint.pth", "--data-path", data, "--device", "cpu"
    )
    assert code == 0, errors
    assert "classes: 3 of 3 have a folder, numbered by the checkpoint's class names" in text
    assert f"Accuracy of the ema network on the 12 test images: {best:.1f}%" in text
    saved["args"].seed = None  # of a run with other ideas
    torch.save(saved, out / "other.pth")
    code, _, errors = run(capsys, "--eval", "--resume", out / "other.pth", "--data-path", data, "--device", "cpu")
    assert code == 0, errors


FLAGS = [
    ("--bce-loss",),
    ("--cosub",),
    ("--mixup", "0.8", "--cutmix", "1.0", "--smoothing", "0.1"),
    ("--mixup", "0.8", "--mixup-mode", "elem"),
    ("--cutmix-minmax", "0.2", "0.6", "--bce-loss"),
    ("--smoothing", "0.1"),
    ("--drop", "0.1", "--drop-path", "0.2"),
    ("--if_amp",),
    ("--no-train-mode",),
    ("--if_random_token_rank",),
    ("--if_random_cls_token_position",),
    ("--affine",),
    ("--affine", "--aa", "none", "--input-size", "32", "48"),
    ("--ThreeAugment",),
    ("--ThreeAugment", "--src", "--color-jitter", "0"),
    ("--use-checkpoint",),
    ("--clip-grad", "0.01"),
    ("--opt", "sgd", "--momentum", "0.5"),
    ("--opt-betas", "0.8", "0.9"),
    ("--sched", "plateau"),
    ("--lr-noise", "0.0", "1.0"),
    ("--no-model-ema",),
    ("--no-repeated-aug", "--no-pin-mem"),
    ("--resplit",),
]


@pytest.mark.parametrize("words", FLAGS, ids=lambda words: " ".join(words))
def test_each_way_to_train(data, tmp_path, capsys, words):
    out = tmp_path / "run"
    code, text, errors = run(capsys, *PLAIN, "--data-path", data, "--output_dir", out, "--epochs", "1", *words)
    assert code == 0, errors
    assert json.loads((out / "log.txt").read_text())["train_loss"] > 0
    assert ("model_ema" in load(out / "checkpoint.pth")) == ("--no-model-ema" not in words)
    assert ("--resplit has no meaning" in text) == ("--resplit" in words)


def test_recomputed_activations_change_no_weight(data):
    """--use-checkpoint saves memory, nothing else."""
    results = []
    for words in ((), ("--use-checkpoint",)):
        own = prepared(data, "--drop-path", "0.3", *words)
        own.batches.set_epoch(0, 0)
        train_one_epoch(own.network, own.criterion, own.loader, own.optimizer, own.device, 0, args=own.args)
        results.append(own.model.state_dict())
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_distillation(data, tmp_path, capsys, kind):
    teacher = timm.create_model("resnet10t", num_classes=3)
    save_checkpoint(tmp_path / "teacher.pth", {"model": teacher.state_dict()})
    code, _, errors = run(
        capsys, *PLAIN, "--data-path", data, "--epochs", "1", "--distillation-type", kind,
        "--teacher-model", "resnet10t", "--teacher-path", tmp_path / "teacher.pth",
    )  # fmt: skip
    assert code == 0, errors


@pytest.mark.parametrize(
    ("name", "pooling"),
    [("vit_tiny_patch16_224", {}), ("vit_tiny_patch16_224", {"global_pool": "avg"}), ("resnet10t", {})],
)
def test_a_teacher_pools_as_its_weights_were_made_for(data, tmp_path, name, pooling):
    torch.manual_seed(1)
    teacher = timm.create_model(name, num_classes=3, **pooling).eval()
    save_checkpoint(tmp_path / "teacher.pth", {"model": teacher.state_dict()})
    words = ("--teacher-model", name, "--teacher-path", tmp_path / "teacher.pth", "--input-size", "224")
    own = prepared(data, *words, "--distillation-type", "hard").criterion.teacher_model
    pictures = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(own(pictures), teacher(pictures))


def test_finetuning_upstreams_checkpoint(data, tmp_path, capsys):
    """Another class count, another size; a Namespace inside, as upstream saves it."""
    import argparse

    before = timm.create_model(MODEL, num_classes=10)
    payload = {"model": before.state_dict(), "args": argparse.Namespace(model=MODEL, input_size=32), "epoch": 3}
    torch.save(payload, tmp_path / "upstream.pth")
    args = settings(*PLAIN, "--data-path", data, "--finetune", tmp_path / "upstream.pth", "--input-size", "48")
    own = run_setup.prepare(args, torch.device("cpu"))
    assert "with a new head" in capsys.readouterr().out
    weights = own.model.state_dict()
    assert weights["head.weight"].shape == (3, before.embed_dim)
    assert weights["pos_embed"].shape[1] == 12 * 12 + 1
    middle = 12 * 12 // 2
    assert torch.equal(weights["pos_embed"][:, middle], before.pos_embed[:, 8 * 8 // 2])
    for name, weight in before.state_dict().items():
        if name.partition(".")[0] not in ("head", "pos_embed"):
            assert torch.equal(weights[name], weight), name
    assert own.position.epoch == 0


def test_attention_only(data):
    words = ("--model", "deit_tiny_patch16_224", "--input-size", "32", "--attn-only")
    model = prepared(data, *words).model
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {
        name
        for name, _ in model.named_parameters()
        if ".attn." in name or name == "pos_embed" or name.startswith("head.")
    }


def test_unreadable_pictures_are_named(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "data")
    (pictures / "train/red/00.png").write_bytes(b"no picture")
    code, _, errors = run(capsys, *PLAIN, "--data-path", pictures, "--output_dir", tmp_path / "run", "--epochs", "1")
    assert code == 0
    assert "1 training pictures could not be read" in errors
    assert "red/00.png" in errors
    assert json.loads((tmp_path / "run/log.txt").read_text())["unreadable"] == 1


def test_not_one_readable_picture_to_train_on(tmp_path, capsys):
    pictures = write_pictures(tmp_path / "data")
    for path in (pictures / "train").glob("*/*.png"):
        path.write_bytes(b"no picture")
    code, _, errors = run(capsys, *PLAIN, "--data-path", pictures, "--epochs", "1")
    assert code == 2
    assert re.search(
        r"Epoch 0 has trained nothing: not one picture of \d+ .* could be read; the first: .*/\d\d\.png", errors
    )
    assert errors.count("\n") == 1


def test_compiled(data, capsys, monkeypatch):
    compiled = []
    monkeypatch.setenv("TORCH_COMPILE", "1")
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)
    code, _, errors = run(capsys, *PLAIN, "--data-path", data, "--epochs", "1")
    assert code == 0, errors
    assert len(compiled) == 1


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--batch-size", "26"), "26"),
        (("--batch-size", "7", "--mixup", "0.8"), "--batch-size 7 must be even"),
        (("--device", "cuda"), "this torch finds no CUDA device"),
        (("--model", "no_such_model"), "There is no model called 'no_such_model'"),
        (("--opt", "nonsense"), "The optimizer 'nonsense' cannot be made"),
        (("--sched", "nonsense"), "The schedule 'nonsense' cannot be made"),
        (("--attn-only",), "--attn-only needs a model with attention layers"),
        (("--distillation-type", "hard"), "--teacher-path"),
        (("--auto-resume",), "--output_dir"),
        (("--epochs", "0"), "--epochs must be at least 1, got 0"),
        (("--lr", "0"), "--lr must be above 0, got 0.0"),
        (("--resume", "/nowhere/x.pth"), "there is no checkpoint file /nowhere/x.pth"),
        (("--finetune", "/nowhere/x.pth"), "there is no checkpoint file /nowhere/x.pth"),
        (("--data-path", "/nowhere"), "'/nowhere'"),
        (("--data-path", __file__), f"'{__file__}' is a file; --data-path names a folder"),
        (("--cosub", "--distillation-type", "soft"), "--cosub has a loss of its own"),
        (("--opt", "adahessian"), "--opt adahessian needs second derivatives"),
        (("--lr", "1e300"), "--lr must be at most 1e+30"),
    ],
)
def test_refusals(data, capsys, words, sentence):
    if words == ("--device", "cuda") and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    code, _, errors = run(capsys, *PLAIN, "--data-path", data, *words)
    assert code == 2
    assert sentence in errors
    assert errors.count("\n") == 1, errors


def test_another_models_checkpoint_is_refused(data, tmp_path, capsys):
    save_checkpoint(tmp_path / "other.pth", {"model": timm.create_model("resnet10t", num_classes=3).state_dict()})
    for flag in ("--resume", "--finetune"):
        code, _, errors = run(capsys, *PLAIN, "--data-path", data, flag, tmp_path / "other.pth")
        assert code == 2
        assert errors.startswith("error: ")
        assert errors.count("\n") == 1


def test_a_teacher_of_another_kind_or_of_other_classes_is_named(data, tmp_path, capsys):
    save_checkpoint(tmp_path / "teacher.pth", {"model": timm.create_model("resnet10t", num_classes=5).state_dict()})
    for name in ("resnet10t", "vit_tiny_patch16_224"):
        words = ("--distillation-type", "soft", "--teacher-model", name, "--teacher-path", tmp_path / "teacher.pth")
        code, _, errors = run(capsys, *PLAIN, "--data-path", data, *words)
        assert code == 2
        assert errors.startswith(
            f"error: The teacher cannot be {name} (--teacher-model) with 3 classes and the weights in"
        )
        assert errors.count("\n") == 1


def test_random_tokens_need_a_vim(data, capsys):
    words = ("--model", "resnet10t", "--input-size", "32", "--if_random_token_rank")
    code, _, errors = run(capsys, *PLAIN, "--data-path", data, *words)
    assert code == 2
    assert "resnet10t" in errors
    assert "--if_random_token_rank" in errors


def test_zero_accuracy_still_leaves_a_checkpoint_and_usage_errors_are_ours():
    with pytest.raises(UsageError, match="--clip-grad must be above 0"):
        settings(*PLAIN, "--clip-grad", "-1")
    assert issubclass(CheckpointError, ValueError)


def test_the_time_left_counts_the_part_of_an_epoch_that_was_trained(monkeypatch, capsys):
    monkeypatch.setattr(training.time, "monotonic", lambda: 110.0)
    training._say_how_long(100.0, 0.25, 2)  # ten seconds for a quarter of an epoch
    training._say_how_long(100.0, 1.0, 1)
    training._say_how_long(100.0, 1.0, 0)
    assert capsys.readouterr().out == (
        "2 epochs to go, about 0:01:20 (h:mm:ss)\n1 epoch to go, about 0:00:10 (h:mm:ss)\n"
    )
