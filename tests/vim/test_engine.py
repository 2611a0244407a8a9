"""Accuracy against a computation of its own; a training step against a plain PyTorch loop."""

import argparse
import copy
import functools
import math

import pytest
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional

from datasets import Batch, DataError
from engine import NonFiniteLossError, autocast_for, evaluate, measure, train_one_epoch
from flags import get_args_parser


def make_batches(sizes, classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(size, 3, 4, 4, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for size in sizes
    ]


def make_model(classes=7, seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 8), nn.Tanh(), nn.Linear(8, classes))


def first_of_three(images, outputs, targets):
    return functional.cross_entropy(outputs, targets)


def settings(*words) -> argparse.Namespace:
    return get_args_parser().parse_args(list(words))


def train(model, batches, *, lr=0.1, **options):
    optimizer = options.pop("optimizer", None) or torch.optim.SGD(model.parameters(), lr=lr)
    criterion = options.pop("criterion", first_of_three)
    return train_one_epoch(model, criterion, batches, optimizer, torch.device("cpu"), 3, **options)


@pytest.mark.parametrize("classes", [3, 7])
def test_measure_equals_its_definition(classes):
    batches, model = make_batches([4, 1, 6], classes), make_model(classes)
    model.append(nn.Dropout(0.5))  # has to be off
    losses, first, five = [], [], []
    with torch.no_grad():
        for image, target in [pair for batch in batches for pair in zip(*batch, strict=True)]:
            scores = model.eval()(image[None])[0].double()
            losses.append(-torch.log_softmax(scores, 0)[target].item())
            rank = int((scores > scores[target]).sum())
            first.append(rank == 0)
            five.append(rank < 5)
    model.train()
    result = measure(batches, model, "cpu")
    assert result.pictures == 11
    assert result.loss == pytest.approx(sum(losses) / 11, rel=1e-6)
    assert result.acc1 == pytest.approx(100 * sum(first) / 11)
    assert result.acc5 == pytest.approx(100 * sum(five) / 11)
    if classes == 3:
        assert result.acc5 == 100


def test_evaluate_prints_the_line_and_a_progress_line(capsys):
    batches, model = make_batches([2] * 50), make_model()
    result = evaluate(batches, model, torch.device("cpu"))
    assert list(result) == ["loss", "acc1", "acc5"]
    printed = capsys.readouterr()
    assert printed.out == (f"* Acc@1 {result['acc1']:.3f} Acc@5 {result['acc5']:.3f} loss {result['loss']:.3f}\n")
    assert "images/s" in printed.err
    assert len(printed.err.splitlines()) == 1


def test_pictures_that_cannot_be_read_are_named_and_not_counted(capsys):
    images, targets = make_batches([4])[0]
    broken = [
        Batch(images, targets, ["a.png is broken"]),
        Batch(torch.empty(0), targets[:0], ["b.png is broken"]),
    ]
    model = make_model()
    assert evaluate(broken, model, "cpu") == evaluate([(images, targets)], model, "cpu")
    printed = capsys.readouterr().err
    assert "2 of 6 pictures could not be read" in printed
    assert "a.png is broken" in printed
    assert "b.png is broken" in printed
    with pytest.raises(DataError, match=r"Not one picture .* b\.png is broken"):
        measure(broken[1:], model, "cpu")


def test_autocast_only_where_it_is_wanted():
    device = torch.device("cpu")
    linear, row = nn.Linear(3, 3), torch.randn(1, 3)
    with autocast_for(device, True)():
        assert linear(row).dtype == torch.bfloat16
    with autocast_for(device, False)():
        assert linear(row).dtype == torch.float32
    result = measure(make_batches([8]), make_model(), device, autocast_for(device, True))
    exact = measure(make_batches([8]), make_model(), device)
    assert result.loss == pytest.approx(exact.loss, rel=2e-2)
    assert result.loss != exact.loss


@pytest.mark.parametrize("max_norm", [0, None, 0.05])
@pytest.mark.parametrize("loss_scaler", [None, "none"])
def test_training_equals_a_plain_loop(max_norm, loss_scaler):
    batches, model = make_batches([5, 3]), make_model()
    plain = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    stats = train(model, batches, optimizer=optimizer, loss_scaler=loss_scaler, max_norm=max_norm)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.01, weight_decay=0.1)
    losses = []
    for images, targets in batches:
        loss = functional.cross_entropy(plain(images), targets)
        reference.zero_grad()
        loss.backward()
        if max_norm:
            total = math.sqrt(sum(weight.grad.square().sum().item() for weight in plain.parameters()))
            for weight in plain.parameters():
                weight.grad *= min(1.0, max_norm / total)
        reference.step()
        losses.append(loss.item())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert stats == {"lr": pytest.approx(0.01), "loss": pytest.approx(sum(losses) / 2)}


def test_a_scaler_gets_what_it_needs():
    seen = {}

    class Scaler:
        def __call__(self, loss, optimizer, *, clip_grad, parameters, create_graph):
            seen.update(clip_grad=clip_grad, parameters=list(parameters), create_graph=create_graph)
            loss.backward()
            optimizer.step()

    model = make_model()
    before = copy.deepcopy(model.state_dict())
    train(model, make_batches([4]), loss_scaler=Scaler(), max_norm=2.0)
    assert seen["clip_grad"] == 2.0
    assert seen["parameters"] == list(model.parameters())
    assert seen["create_graph"] is False
    assert not torch.equal(before["1.weight"], model.state_dict()["1.weight"])


def test_moving_average_follows_each_step_and_mixup_mixes():
    class Average:
        updates = 0

        def update(self, model):
            assert model is network
            self.updates += 1

    network, average = make_model(), Average()
    seen = []

    def criterion(images, outputs, targets):
        seen.append((images, targets))
        return SoftTargetCrossEntropy()(outputs, targets)

    batches = make_batches([4, 4])
    mixup = Mixup(mixup_alpha=0.8, num_classes=7, label_smoothing=0.1)
    train(network, batches, model_ema=average, mixup_fn=mixup, criterion=criterion, args=settings())
    assert average.updates == 2
    assert seen[0][1].shape == (4, 7)
    assert seen[0][0].shape == batches[0][0].shape


def test_bce_loss_makes_ones_of_all_targets_above_zero():
    seen = []

    def criterion(images, outputs, targets):
        seen.append(targets)
        return functional.binary_cross_entropy_with_logits(outputs, targets)

    (images, numbers), mixed = make_batches([4])[0], torch.rand(4, 7) * (torch.arange(7) > 3)
    train(make_model(), [(images, numbers), (images, mixed)], criterion=criterion, args=settings("--bce-loss"))
    assert torch.equal(seen[0], functional.one_hot(numbers, 7).float())
    assert torch.equal(seen[1], (mixed > 0).float())


def test_cosub_loss_is_the_mean_of_its_four_terms():
    model, (images, targets) = make_model(), make_batches([4])[0]
    calls = []
    hook = model.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    stats = train(model, [(images, targets)], args=settings("--cosub"))
    hook.remove()
    (seen, outputs) = calls[0]
    assert torch.equal(seen, torch.cat([images, images]))
    one, two = outputs[:4].double(), outputs[4:].double()
    wanted = functional.one_hot(targets, 7).double()

    def bce(scores, aims):
        return -(aims * scores.sigmoid().log() + (1 - aims) * (-scores).sigmoid().log()).mean()

    terms = bce(one, wanted) + bce(two, wanted) + bce(one, two.sigmoid()) + bce(two, one.sigmoid())
    assert stats["loss"] == pytest.approx(terms.item() / 4, rel=1e-5)


def test_cosub_teaches_with_fixed_answers():
    """The gradient is that of the two terms of the targets alone where both halves answer alike."""
    model, (images, targets) = make_model(), make_batches([4])[0]
    plain = copy.deepcopy(model)
    train(model, [(images, targets)], args=settings("--cosub"), lr=1.0)
    outputs = plain(images)
    wanted = functional.one_hot(targets, 7).float()
    (0.5 * functional.binary_cross_entropy_with_logits(outputs, wanted)).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - theirs.grad, rtol=1e-5, atol=1e-6)


def test_random_token_options_reach_only_who_asked():
    class Recorder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.options = make_model(), []

        def forward(self, images, **options):
            self.options.append(options)
            return self.inner(images)

    model = Recorder()
    train(model, make_batches([2]))
    train(model, make_batches([2]), args=settings("--if_random_cls_token_position"))
    train(model, make_batches([2]), args=argparse.Namespace(if_random_token_rank=True))
    assert model.options == [{}, {"if_random_cls_token_position": True}, {"if_random_token_rank": True}]


@pytest.mark.parametrize("mode", [True, False])
def test_training_mode(mode):
    model = make_model()
    train(model, make_batches([2]), set_training_mode=mode)
    assert model.training is mode


def test_a_loss_that_is_not_finite(capsys):
    batches = make_batches([2, 2, 2])
    batches[1][0].fill_(float("nan"))
    model, rest = make_model(), make_model()
    with pytest.raises(NonFiniteLossError, match=r"epoch 3 is nan"):
        train(copy.deepcopy(model), batches)
    stats = train(model, batches, args=settings("--if_continue_inf"))
    assert "skipped" in capsys.readouterr().out
    expected = train(rest, [batches[0], batches[2]])
    assert stats == expected
    assert torch.equal(model[1].weight, rest[1].weight)
    with pytest.raises(DataError, match="all 1 steps were skipped"):
        train(model, batches[1:2], args=settings("--if_continue_inf"))


def test_nan2num_lets_a_step_pass():
    def broken(images, outputs, targets):
        return outputs.sum() * float("nan")

    stats = train(make_model(), make_batches([2]), criterion=broken, args=settings("--if_nan2num"))
    assert stats["loss"] == 0


def test_no_batch_at_all():
    with pytest.raises(DataError, match="yields no batch"):
        train(make_model(), [])


def test_progress_lines_every_ten_steps(capsys):
    train(make_model(), make_batches([2] * 25))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch: [3] [")]
    steps = [line.split("[3] [")[1].split("]")[0] for line in lines]
    assert steps == ["1/25", "11/25", "21/25", "25/25"]
    assert all("lr: 0.1" in line and "loss: " in line and "eta: " in line for line in lines)


def test_amp_training_runs_in_bfloat16():
    seen = []

    def criterion(images, outputs, targets):
        seen.append(outputs.dtype)
        return functional.cross_entropy(outputs, targets)

    autocast = autocast_for(torch.device("cpu"), True)
    stats = train(make_model(), make_batches([4]), criterion=criterion, amp_autocast=autocast)
    assert seen == [torch.bfloat16]
    assert math.isfinite(stats["loss"])
    assert isinstance(autocast, functools.partial) or callable(autocast)
