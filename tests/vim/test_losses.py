"""The losses of training against their definitions, written out in fp64."""

import argparse
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from losses import DistillationLoss, build_criterion
from tolerances import assert_close

B, CLASSES, FEATURES = 5, 7, 4


class Teacher(nn.Module):
    """Linear scores; dropout tells training mode from evaluation mode."""

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.layer = nn.Linear(FEATURES, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, inputs):
        return self.dropout(self.layer(inputs))


@pytest.fixture
def case():
    """Teacher, its fp64 answers, inputs, scores, scores for the teacher, labels."""
    teacher = Teacher().double()
    inputs = torch.randn(B, FEATURES, dtype=torch.float64)
    answers = inputs @ teacher.layer.weight.T.detach() + teacher.layer.bias.detach()
    scores, scores_kd = (torch.randn(B, CLASSES, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return teacher, answers, inputs, scores, scores_kd, torch.randint(0, CLASSES, (B,))


def log_probabilities(scores):
    return scores - scores.exp().sum(1, keepdim=True).log()


def kd_by_definition(kind, scores, answers, tau):
    if kind == "hard":
        return -log_probabilities(scores)[range(B), answers.argmax(1)].mean()
    log_p, log_q = log_probabilities(scores / tau), log_probabilities(answers / tau)
    return tau**2 * (log_q.exp() * (log_q - log_p)).sum() / (B * CLASSES)


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.3, 4.0), (0.0, 2.0), (1.0, 0.5)])
@pytest.mark.parametrize("pair", [False, True])
def test_distillation_is_its_definition(case, kind, alpha, tau, pair):
    teacher, answers, inputs, scores, scores_kd, labels = case
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, alpha, tau)
    loss = criterion(inputs, (scores, scores_kd) if pair else scores, labels)
    base = -log_probabilities(scores)[range(B), labels].mean()
    expected = (1 - alpha) * base + alpha * kd_by_definition(kind, scores_kd if pair else scores, answers, tau)
    assert_close(loss, expected)
    students = [scores, scores_kd] if pair else [scores]
    for got, wanted in zip(torch.autograd.grad(loss, students), torch.autograd.grad(expected, students), strict=True):
        assert_close(got, wanted)


def test_gradients_reach_the_student_alone(case):
    teacher, _, inputs, scores, _, labels = case
    inputs.requires_grad_()
    DistillationLoss(nn.CrossEntropyLoss(), teacher, "soft", 0.5, 1.0)(inputs, scores, labels).backward()
    assert scores.grad is not None
    assert inputs.grad is None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_teacher_is_neither_trained_nor_saved(case):
    teacher, _, inputs, scores, _, labels = case
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher.train(), "hard", 0.5, 1.0)
    criterion.train()
    assert not teacher.training
    assert not list(criterion.parameters())
    assert not criterion.state_dict()
    assert criterion.teacher_model is teacher
    copied = copy.deepcopy(criterion)
    assert copied.teacher_model is not teacher
    assert torch.equal(copied(inputs, scores, labels), criterion(inputs, scores, labels))


@pytest.mark.parametrize("pair", [False, True])
def test_without_a_teacher_the_base_loss_remains(case, pair):
    _, _, inputs, scores, scores_kd, labels = case
    criterion = DistillationLoss(nn.CrossEntropyLoss(), None, "none", 0.5, 1.0)
    loss = criterion(inputs, (scores, scores_kd) if pair else scores, labels)
    assert torch.equal(loss, functional.cross_entropy(scores, labels))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_narrow_scores_are_widened(kind, dtype):
    teacher, inputs = Teacher(), torch.randn(B, FEATURES)
    labels = torch.randint(0, CLASSES, (B,))
    scores = torch.randn(B, CLASSES).to(dtype).requires_grad_()
    criterion = DistillationLoss(nn.CrossEntropyLoss(), teacher, kind, 0.5, 2.0)
    loss = criterion(inputs, scores, labels)
    assert loss.dtype == torch.float32
    wide = DistillationLoss(nn.CrossEntropyLoss(), copy.deepcopy(teacher).double(), kind, 0.5, 2.0)
    assert_close(loss, wide(inputs.double(), scores.double(), labels))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = criterion(inputs, scores, labels)
    assert mixed.dtype == torch.float32
    assert_close(mixed, loss, dtype=torch.bfloat16)  # the teacher itself answers in bfloat16
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.dtype == dtype


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_student_and_teacher_of_different_classes(kind):
    criterion = DistillationLoss(nn.CrossEntropyLoss(), Teacher(9), kind, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"student's scores have shape \(5, 7\) and the teacher's \(5, 9\)"):
        criterion(torch.randn(B, FEATURES), torch.randn(B, CLASSES), torch.zeros(B, dtype=torch.int64))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"distillation_type": "sotf"}, "must be none, soft or hard, got 'sotf'"),
        ({"alpha": 1.5}, r"`alpha` must lie in 0 \.\. 1, got 1.5"),
        ({"tau": 0.0}, "`tau` must be above 0, got 0.0"),
        ({"teacher_model": None}, "`teacher_model` must be a model for soft distillation"),
    ],
)
def test_arguments_that_are_none(changes, sentence):
    usual = {"teacher_model": Teacher(), "distillation_type": "soft", "alpha": 0.5, "tau": 1.0}
    with pytest.raises(ValueError, match=sentence):
        DistillationLoss(nn.CrossEntropyLoss(), **(usual | changes))


def smoothed(labels, smoothing):
    return functional.one_hot(labels, CLASSES).double() * (1 - smoothing) + smoothing / CLASSES


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixup_active", [False, True])
def test_cross_entropy_of_labels_and_of_mixtures(smoothing, mixup_active):
    scores, labels = torch.randn(B, CLASSES, dtype=torch.float64), torch.randint(0, CLASSES, (B,))
    targets = torch.rand(B, CLASSES, dtype=torch.float64).softmax(1)
    criterion = build_criterion(argparse.Namespace(bce_loss=False, smoothing=smoothing), mixup_active)
    loss = criterion(scores, targets if mixup_active else labels)
    wanted = targets if mixup_active else smoothed(labels, smoothing)
    assert_close(loss, -(wanted * log_probabilities(scores)).sum(1).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixup_active", [False, True])
def test_binary_cross_entropy_overrides_the_others(smoothing, mixup_active):
    scores, targets = torch.randn(B, CLASSES, dtype=torch.float64), torch.rand(B, CLASSES, dtype=torch.float64)
    criterion = build_criterion(argparse.Namespace(bce_loss=True, smoothing=smoothing), mixup_active)
    p = 1 / (1 + (-scores).exp())
    assert_close(criterion(scores, targets), -(targets * p.log() + (1 - targets) * (1 - p).log()).mean())
