"""What changes the weights in training: which of them are trained, the optimizer, its schedule, the moving average."""

from __future__ import annotations

import argparse
import warnings
from typing import Any

import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from checkpoint_sources import first_line
from flags import UsageError

REFERENCE_BATCH = 512  # pictures per step that --lr is meant for
_STATE_SPACE = ("A_log", "A_b_log", "D", "D_b", "A_logs", "Ds", "dt_projs_bias")
_OF_THE_WEIGHTS_SHAPE = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")  # of an optimizer's state


def unwrapped(model: nn.Module) -> Any:
    """Return the network inside what torch.compile and DistributedDataParallel put around it."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inner: Any = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
        model = inner
    return model


def start_backward_steps_like_forward(model: nn.Module) -> None:
    """Give the backward direction of each v2 mixer the step biases of the forward one (`--mend dt-bias`).

    Upstream's initialisation of the whole network sets them to 0, a step of softplus(0) = 0.69 where the forward
    direction begins between 0.001 and 0.1.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "dt_proj") and hasattr(module, "dt_proj_b"):
            module.dt_proj_b.bias.data.copy_(module.dt_proj.bias.data)


def train_attention_only(model: nn.Module) -> None:
    """Freeze all but the attention layers, the head and the position embedding (`--attn-only`).

    Raises:
        UsageError: the model has no attention.
    """
    if not any(".attn." in name for name, _ in model.named_parameters()):
        raise UsageError("--attn-only needs a model with attention layers, and this one has none: leave it away.")
    for name, weight in model.named_parameters():
        weight.requires_grad = ".attn." in name or name == "pos_embed" or name.startswith(("head.", "head_dist."))


def scaled_rate(args: argparse.Namespace) -> float:
    """Return the learning rate of the whole step: --lr is for 512 pictures unless --unscale-lr."""
    if args.unscale_lr:
        return args.lr
    return args.lr * args.batch_size * args.world_size / REFERENCE_BATCH


def make_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.Optimizer:
    """Return the timm optimizer that `args` names (opt, lr, weight_decay, momentum, opt_eps, opt_betas).

    No weight decay on vectors (norms, biases, D) and on what model.no_weight_decay() names. Upstream's decay of
    A_log, a matrix, stays unless `--mend ssm-decay`; of VMamba, that of A_logs and dt_projs_bias.

    Raises:
        UsageError: there is no such optimizer, or not with these settings.
    """
    options: dict[str, Any] = optimizer_kwargs(args)
    parameters: Any = model
    if "ssm-decay" in args.mend:
        parameters = _groups_without_state_space(model, args.weight_decay)
        options["weight_decay"] = 0.0  # each group has its own
    try:
        optimizer: Any = create_optimizer_v2(parameters, **options)
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise UsageError(
            f"The optimizer {args.opt!r} cannot be made: {error}; see timm.optim.list_optimizers()."
        ) from error
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(
            f"--opt {args.opt} needs second derivatives, which are not computed here; take one without, such as adamw."
        )
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Put a saved state into an optimizer.

    Raises:
        ValueError, KeyError, TypeError: it is not of such an optimizer, or not of these weights; torch itself would
            find out only at the next step.
    """
    settings = [set(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, names in zip(optimizer.param_groups, settings, strict=True):
        if names - set(group):
            raise ValueError(f"it has no {', '.join(sorted(names - set(group)))}")
        for weight in group["params"]:
            for name, value in optimizer.state.get(weight, {}).items():
                if name in _OF_THE_WEIGHTS_SHAPE and isinstance(value, Tensor) and not _fits(value, weight):
                    raise ValueError(f"{name} has the shape {tuple(value.shape)} for weights of {tuple(weight.shape)}")


def _fits(value: Tensor, weight: Tensor) -> bool:
    """Whether `value` has the shape of `weight`; NovoGrad keeps one number in its place."""
    return not value.ndim or value.shape == weight.shape


def _groups_without_state_space(model: Any, decay: float) -> list[dict[str, Any]]:
    listed = model.no_weight_decay() if callable(getattr(model, "no_weight_decay", None)) else set()
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            free = weight.ndim <= 1 or name in listed or name.rpartition(".")[2] in _STATE_SPACE
            (kept if free else decayed).append(weight)
    return [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": decay}]


class Schedule:
    """The learning rate of each epoch, by one of timm's schedulers.

    Upstream asks for the rate of the epoch just finished and uses it in the next one, so that the whole schedule
    comes an epoch late; `--mend lr-lag` asks for that of the epoch to come.

    Raises:
        UsageError: there is no such schedule.
    """

    def __init__(self, args: argparse.Namespace, optimizer: torch.optim.Optimizer) -> None:
        try:
            with warnings.catch_warnings():
                # timm means to drop the plateau schedule, because it does not save its state; ours is saved below.
                warnings.filterwarnings("ignore", "PlateauLRScheduler", FutureWarning)
                self._scheduler, _ = create_scheduler(args, optimizer)
        except (AssertionError, ValueError, KeyError) as error:
            raise UsageError(f"The schedule {args.sched!r} cannot be made: {first_line(error)}.") from error
        if self._scheduler is None:
            raise UsageError(
                f"There is no schedule {args.sched!r}; timm has cosine, tanh, step, multistep, plateau, poly."
            )
        self._ahead = 1 if "lr-lag" in args.mend else 0

    def finish(self, epoch: int, accuracy: float | None = None) -> None:
        """Set the rate for the epoch after `epoch`; the plateau schedule looks at the accuracy."""
        self._scheduler.step(epoch + self._ahead, accuracy)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs."""
        plateau = getattr(self._scheduler, "lr_scheduler", None)
        if plateau is None:
            return self._scheduler.state_dict()
        return {**plateau.state_dict(), "restore_lr": self._scheduler.restore_lr}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""
        plateau = getattr(self._scheduler, "lr_scheduler", None)
        if plateau is None:
            return self._scheduler.load_state_dict(state)
        state = dict(state)
        self._scheduler.restore_lr = state.pop("restore_lr", None)
        plateau.load_state_dict(state)


def make_average(args: argparse.Namespace, model: nn.Module) -> ModelEmaV3 | None:
    """Return the moving average of the weights, average = decay * average + (1 - decay) * weights; None if unwanted."""
    if not args.model_ema:
        return None
    return ModelEmaV3(
        model, decay=args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None
    )
