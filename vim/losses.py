"""What training minimizes: the loss on the labels, and what a teacher adds to it."""

from __future__ import annotations

import argparse

import torch
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

DISTILLATION_TYPES = ("none", "soft", "hard")


def build_criterion(args: argparse.Namespace, mixup_active: bool) -> nn.Module:
    """Return the loss on the labels, called as criterion(scores (b, classes), targets) and giving their mean.

    Args:
        args: bce_loss: binary cross-entropy over all classes, whatever else is set, targets (b, classes);
            smoothing: label smoothing, 0 for none.
        mixup_active: the targets are (b, classes) probabilities, which mixup has smoothed already; else
            they are (b,) class numbers.
    """
    if args.bce_loss:
        return nn.BCEWithLogitsLoss()
    if mixup_active:
        return SoftTargetCrossEntropy()
    if args.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=args.smoothing)
    return nn.CrossEntropyLoss()


class DistillationLoss(nn.Module):
    """The loss on the labels, mixed with that on a teacher's answers to the same pictures.

        loss = (1 - alpha) * base_criterion(outputs, labels) + alpha * kd
        soft: kd = tau^2 * sum(q * (log q - log p)) / (b * classes),
              q = softmax(teacher / tau), p = softmax(outputs_kd / tau)
        hard: kd = cross-entropy of outputs_kd against the class that the teacher likes best

    The teacher is no submodule: it is neither trained nor saved, `train()` does not reach it, and its device
    is the caller's care. It is put into evaluation mode here and runs without gradients.

    Args:
        base_criterion: (outputs (b, classes), labels) to a scalar.
        teacher_model: pictures to (b, classes) scores; may be None for the type "none".
        distillation_type: "none" (base_criterion alone), "soft" or "hard".
        alpha: weight of the teacher's part, 0 .. 1.
        tau: temperature of "soft", above 0.
    Raises:
        ValueError: an argument is not one of those above.
    Computes in fp32 at least, also under autocast (fp64 stays fp64). Source: arXiv 2012.12877, section 4.
    """

    teacher_model: nn.Module | None

    def __init__(
        self,
        base_criterion: nn.Module,
        teacher_model: nn.Module | None,
        distillation_type: str,
        alpha: float,
        tau: float,
    ) -> None:
        super().__init__()
        if distillation_type not in DISTILLATION_TYPES:
            raise ValueError(f"`distillation_type` must be none, soft or hard, got {distillation_type!r}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"`alpha` must lie in 0 .. 1, got {alpha}")
        if not tau > 0:
            raise ValueError(f"`tau` must be above 0, got {tau}")
        if teacher_model is None and distillation_type != "none":
            raise ValueError(f"`teacher_model` must be a model for {distillation_type} distillation, got None")
        self.base_criterion = base_criterion
        object.__setattr__(self, "teacher_model", teacher_model)  # past Module's, which would make it a submodule
        self.distillation_type, self.alpha, self.tau = distillation_type, alpha, tau
        if teacher_model is not None:
            teacher_model.eval()

    def forward(self, inputs: Tensor, outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor) -> Tensor:
        """Return the scalar loss.

        Args:
            inputs: the pictures that the student saw, for the teacher.
            outputs: (b, classes) scores that serve both parts, or a pair: those for the labels, those for the teacher.
            labels: whatever `base_criterion` takes.
        Raises:
            ValueError: student and teacher differ in their number of classes.
        """
        scores, scores_kd = (outputs, outputs) if isinstance(outputs, Tensor) else outputs
        base = self.base_criterion(_widen(scores), labels)
        if self.distillation_type == "none":
            return base
        return base * (1 - self.alpha) + self._from_teacher(inputs, _widen(scores_kd)) * self.alpha

    def _from_teacher(self, inputs: Tensor, scores: Tensor) -> Tensor:
        assert self.teacher_model is not None
        with torch.no_grad():
            answers = _widen(self.teacher_model(inputs))
        if answers.shape != scores.shape:
            raise ValueError(
                f"The student's scores have shape {tuple(scores.shape)} and the teacher's {tuple(answers.shape)}, so "
                "it cannot learn from them; take a teacher with as many classes as the student."
            )
        if self.distillation_type == "hard":
            return functional.cross_entropy(scores, answers.argmax(dim=1))
        log_p = functional.log_softmax(scores / self.tau, dim=1)
        log_q = functional.log_softmax(answers / self.tau, dim=1)
        divergence = functional.kl_div(log_p, log_q, reduction="sum", log_target=True)
        return divergence * (self.tau * self.tau / scores.numel())


def _widen(scores: Tensor) -> Tensor:
    """Return the scores in fp32 at least."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32))
