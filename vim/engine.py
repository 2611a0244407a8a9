"""One epoch of training, and the accuracy of a model on labelled pictures."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from datasets import DataError
from optimization import unwrapped
from progress import Progress
from samplers import ShardSampler
from utils import MetricLogger, SmoothedValue, is_dist_avail_and_initialized, is_main_process

AutocastFactory = Callable[[], AbstractContextManager[Any]]
PRINT_EVERY = 10  # steps


class NonFiniteLossError(RuntimeError):
    """The loss of a training step is NaN or infinite."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured on `pictures` readable pictures; the others are in `unreadable`, with reasons.

    loss: mean cross-entropy per picture, in nats; acc1, acc5: per cent of the pictures whose class is the
    first, or among the first five (all, for a model of fewer classes), of the model's answers.
    """

    loss: float
    acc1: float
    acc5: float
    pictures: int
    unreadable: tuple[str, ...] = ()

    def summary(self) -> str:
        """Return the line of results that upstream prints."""
        return f"* Acc@1 {self.acc1:.3f} Acc@5 {self.acc5:.3f} loss {self.loss:.3f}"


def autocast_for(device: torch.device, enabled: bool) -> AutocastFactory:
    """Return what makes the context for a forward pass on `device`: mixed precision, or nothing.

    bfloat16 on CPUs and on GPUs that have it, float16 otherwise.
    """
    if not enabled:
        return contextlib.nullcontext
    narrow = torch.bfloat16
    if device.type == "mps" or (device.type == "cuda" and not torch.cuda.is_bf16_supported()):
        narrow = torch.float16
    return lambda: torch.autocast(device.type, dtype=narrow)


def evaluate(
    data_loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str,
    amp_autocast: AutocastFactory = contextlib.nullcontext,
) -> dict[str, float]:
    """Measure `model` (see `measure`), print the results, and return {"loss", "acc1", "acc5"}."""
    result = measure(data_loader, model, device, amp_autocast)
    print(result.summary())
    name_unreadable(result)
    return {"loss": result.loss, "acc1": result.acc1, "acc5": result.acc5}


def name_unreadable(result: Evaluation) -> None:
    """Say on standard error which pictures were left out, if any, and why."""
    if result.unreadable:
        total = result.pictures + len(result.unreadable)
        print(f"warning: {len(result.unreadable)} of {total} pictures could not be read:", file=sys.stderr)
        for reason in result.unreadable:
            print(f"  {reason}", file=sys.stderr)


@torch.inference_mode()
def measure(
    data_loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str,
    amp_autocast: AutocastFactory = contextlib.nullcontext,
    label: str = "Test",
) -> Evaluation:
    """Run `model` in evaluation mode over labelled pictures and count.

    Every picture weighs the same, whatever batch it is in. Where the loader shares the pictures out with a
    `ShardSampler`, the figures are those of all processes together.

    Args:
        data_loader: yields (images, targets) or `datasets.Batch`; images (b, 3, h, w), targets (b,) int64.
        model: images to (b, classes) scores.
        amp_autocast: makes the context of a forward pass; see `autocast_for`.
        label: what the progress line begins with.
    Raises:
        DataError: there was not one readable picture.
    """
    device = torch.device(device)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64)  # loss, first right, in first five, pictures
    unreadable: list[str] = []
    sampler = getattr(data_loader, "sampler", None)
    progress = Progress(label, _length(sampler)) if is_main_process() else None
    for images, targets, *reasons in data_loader:
        if len(targets):
            with amp_autocast():
                scores = model(images.to(device, non_blocking=True))
            sums += _count_right(scores, targets.to(device, non_blocking=True))
        missed = reasons[0] if reasons else []
        unreadable += missed
        if progress is not None:
            progress.advance(len(targets) + len(missed))
    if progress is not None:
        progress.close()
    if isinstance(sampler, ShardSampler) and is_dist_avail_and_initialized():
        sums, unreadable = _add_over_processes(sums, unreadable, device)
    loss, first, five, pictures = sums.tolist()
    if not pictures:
        first_reason = f" The first of {len(unreadable)}: {unreadable[0]}" if unreadable else ""
        raise DataError(f"Not one picture could be read, so there is nothing to measure.{first_reason}")
    return Evaluation(loss / pictures, 100 * first / pictures, 100 * five / pictures, int(pictures), tuple(unreadable))


def _length(sampler: Any) -> int | None:
    try:
        return len(sampler)
    except TypeError:
        return None


def _count_right(scores: Tensor, targets: Tensor) -> Tensor:
    """Return (4,) fp64 on the CPU: sum of the losses, hits at first place, in the first five, pictures."""
    scores = scores.float()
    loss = functional.cross_entropy(scores, targets, reduction="sum")
    best = scores.topk(min(5, scores.shape[1]), dim=1).indices
    hits = best == targets[:, None]
    counts = torch.stack([loss, hits[:, 0].sum(), hits.sum()])
    return torch.cat([counts.cpu().double(), torch.tensor([len(targets)], dtype=torch.float64)])


def _add_over_processes(sums: Tensor, unreadable: list[str], device: torch.device) -> tuple[Tensor, list[str]]:
    on_device = sums.to(device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(on_device)
    gathered: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    with torch.inference_mode(False):  # torch 2.4 writes what it gathers from outside inference mode
        dist.all_gather_object(gathered, unreadable)
    return on_device.cpu(), [reason for part in gathered for reason in part]


def train_one_epoch(
    model: nn.Module,
    criterion: Callable[[Tensor, Any, Tensor], Tensor],
    data_loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    device: torch.device | str,
    epoch: int,
    loss_scaler: Any = None,
    amp_autocast: AutocastFactory = contextlib.nullcontext,
    max_norm: float | None = 0,
    model_ema: Any = None,
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    set_training_mode: bool = True,
    args: argparse.Namespace | None = None,
    *,
    first_step: int = 0,
    meters: MetricLogger | None = None,
    after_step: Callable[[int, MetricLogger], None] | None = None,
    unreadable: list[str] | None = None,
) -> dict[str, float]:
    """Train `model` on every batch of `data_loader` once.

    Args:
        criterion: called as criterion(images, outputs, targets); gives the scalar loss.
        data_loader: yields (images, targets) or `datasets.Batch`.
        epoch: number shown in the progress lines.
        loss_scaler: timm's NativeScaler, or None or "none" for a plain backward pass.
        amp_autocast: makes the context of the forward pass; see `autocast_for`.
        max_norm: the gradients' norm is clipped to it; 0 or None: it is not.
        model_ema: something with update(model), called after each step.
        mixup_fn: timm's Mixup; it turns class numbers into (b, classes) targets.
        set_training_mode: argument of model.train().
        args: the settings bce_loss, cosub, if_random_cls_token_position, if_random_token_rank,
            if_continue_inf and if_nan2num, each off where it is missing, and log_interval (10).
        first_step: steps of this epoch that were done before; `meters`: what they left.
        after_step: called with the number of steps done in this epoch, and the meters.
        unreadable: takes the reasons why pictures could not be read.
    Returns:
        The means over the epoch and all processes: {"lr", "loss"}.
    Raises:
        NonFiniteLossError: the loss is NaN or infinite, and not if_continue_inf.
        DataError: the loader yields no batch.
    """
    device = torch.device(device)
    settings = args if args is not None else argparse.Namespace()
    skip_non_finite = getattr(settings, "if_continue_inf", False)
    model.train(set_training_mode)
    meters = meters if meters is not None else epoch_meters()
    skipped, missed = 0, set[str]()
    every = getattr(settings, "log_interval", PRINT_EVERY)
    steps = meters.log_every(data_loader, every, f"Epoch: [{epoch}]", first_step)
    for done, (images, targets, *reasons) in enumerate(steps, first_step + 1):
        if reasons:
            missed.update(reasons[0])
            if unreadable is not None:
                unreadable += reasons[0]
        if len(targets):
            images, targets = images.to(device, non_blocking=True), targets.to(device, non_blocking=True)
            if mixup_fn is not None:
                images, targets = _mixed(mixup_fn, images, targets)
            with amp_autocast():
                loss = _training_loss(model, criterion, images, targets, settings)
            value = loss.item()
            if _finite_everywhere(value, device):
                _step(loss, model, optimizer, loss_scaler, max_norm)
                if model_ema is not None:
                    model_ema.update(unwrapped(model))
                meters.update(loss=value, lr=optimizer.param_groups[0]["lr"])
            elif skip_non_finite:
                skipped += 1
                print(f"Epoch: [{epoch}]  a step with the loss {value} is skipped ({skipped} so far)")
            else:
                raise NonFiniteLossError(
                    f"The loss of a step in epoch {epoch} is {value}, so training stops; try a smaller --lr, "
                    "--clip-grad 1 or --no_amp, or skip such steps with --if_continue_inf."
                )
        elif is_dist_avail_and_initialized():  # the other processes would wait for its gradients for ever
            raise DataError(f"Not one picture of a step in epoch {epoch} could be read: {'; '.join(*reasons)}")
        if after_step is not None:
            after_step(done, meters)
    if not meters.meters["lr"].count:
        raise DataError(f"Epoch {epoch} has trained nothing: {_why_nothing(skipped, missed)}.")
    meters.synchronize_between_processes()
    print("Averaged stats:", meters)
    return {name: meter.global_avg for name, meter in meters.meters.items()}


def _why_nothing(skipped: int, unreadable: set[str]) -> str:
    if skipped:
        return f"all {skipped} steps were skipped"
    if unreadable:
        first = min(unreadable).rstrip(".")
        return f"not one picture of {len(unreadable)} that were tried could be read; the first: {first}"
    return "the loader yields no batch of pictures; there may be fewer than --batch-size"


def epoch_meters(sums: dict[str, tuple[int, float]] | None = None) -> MetricLogger:
    """Return the meters of an epoch; `sums` are (count, total) of some, left by its steps before."""
    meters = MetricLogger(delimiter="  ")
    meters.add_meter("lr", SmoothedValue(window_size=1, fmt="{value:.4g}"))
    for name, (count, total) in (sums or {}).items():
        meter = meters.meters.setdefault(name, SmoothedValue())
        meter.count, meter.total = count, total
    return meters


def _mixed(
    mixup_fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], images: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix pictures in pairs; the one that an unreadable file left without a partner is mixed with itself."""
    if len(images) % 2:
        images, targets = torch.cat([images, images[-1:]]), torch.cat([targets, targets[-1:]])
    return mixup_fn(images, targets)


def _training_loss(
    model: nn.Module,
    criterion: Callable[[Tensor, Any, Tensor], Tensor],
    images: Tensor,
    targets: Tensor,
    settings: argparse.Namespace,
) -> Tensor:
    """Return the loss of one step; called inside the autocast context.

    Co-sub (arXiv 2212.04884): the batch goes through the model twice, under two draws of stochastic depth,
    and each half learns from the targets and from the other half's probabilities, a quarter of the loss each.
    """
    options = {
        name: True
        for name in ("if_random_cls_token_position", "if_random_token_rank")
        if getattr(settings, name, False)  # only Vim knows them, so other models are not even asked
    }
    cosub = getattr(settings, "cosub", False)
    outputs = model(torch.cat([images, images]) if cosub else images, **options)
    if getattr(settings, "bce_loss", False) or cosub:
        targets = _as_scores(targets, outputs)
    if getattr(settings, "bce_loss", False):
        targets = (targets > 0).to(targets.dtype)
    if cosub:
        one, two = outputs.chunk(2)
        pairs = ((one, targets), (two, targets), (one, two.detach().sigmoid()), (two, one.detach().sigmoid()))
        terms = [functional.binary_cross_entropy_with_logits(half, aim.to(half.dtype)) for half, aim in pairs]
        loss = 0.25 * torch.stack(terms).sum()
    else:
        loss = criterion(images, outputs, targets)
    return torch.nan_to_num(loss) if getattr(settings, "if_nan2num", False) else loss


def _as_scores(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return class numbers (b,) as ones and zeros (b, classes); targets that are mixed already stay."""
    if targets.ndim > 1:
        return targets
    return functional.one_hot(targets, outputs.shape[-1]).float()


def _finite_everywhere(value: float, device: torch.device) -> bool:
    """Whether the loss is finite in every process: all step or none, else they would wait for each other."""
    if not is_dist_avail_and_initialized():
        return math.isfinite(value)
    flag = torch.tensor(int(math.isfinite(value)), device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def _step(
    loss: Tensor,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_scaler: Any,
    max_norm: float | None,
) -> None:
    optimizer.zero_grad()
    if loss_scaler is None or loss_scaler == "none":
        loss.backward()
        if max_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()
        return
    loss_scaler(
        loss,
        optimizer,
        clip_grad=max_norm or None,
        parameters=model.parameters(),
        create_graph=getattr(optimizer, "is_second_order", False),
    )
