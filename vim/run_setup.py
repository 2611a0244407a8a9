"""Put a training run together: data, model, optimizer and the rest, fresh or as a checkpoint left them."""

from __future__ import annotations

import argparse
import inspect
import os
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn

import utils
from checkpoint import Checkpoint, CheckpointError, load_weights
from checkpoint_sources import first_line
from datasets import collate_readable
from flags import UsageError, is_given
from int8 import refuse_quantized
from loaders import GuardedLoader
from losses import DistillationLoss, build_criterion
from model_setup import build_model, patch_grid, read_checkpoint_for
from optimization import (
    Schedule,
    load_optimizer_state,
    make_average,
    make_optimizer,
    scaled_rate,
    start_backward_steps_like_forward,
    train_attention_only,
)
from registry import VARIANTS
from run_state import Position, restore_run_state
from samplers import DrawBatches, RASampler, SeededPictures, ShardSampler, ShuffledSampler
from training_data import TrainingData, open_training_data

_HEADS = ("head", "head_dist", "fc", "classifier")


@dataclass
class Run:
    """What a training run consists of. `model` is the network itself, `network` what a step calls."""

    args: argparse.Namespace
    device: torch.device
    data: TrainingData
    model: nn.Module
    network: nn.Module
    average: ModelEmaV3 | None
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: Any
    criterion: nn.Module
    mixup: Mixup | None
    batches: DrawBatches
    loader: GuardedLoader
    val_loader: GuardedLoader
    position: Position

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)


def prepare(args: argparse.Namespace, device: torch.device, resumed: Checkpoint | None = None) -> Run:
    """Return a run ready for its first step, or its next one if `resumed` is given."""
    started = read_checkpoint_for(args.model, args.finetune) if args.finetune and resumed is None else None
    source = resumed or started
    if source is not None:
        refuse_quantized(source.model, source.source)
    if source is not None and source.model_name and not is_given(args, "model"):
        args.model = source.model_name
    if not is_given(args, "input_size"):
        args.input_size = (source.img_size if source is not None else None) or _own_size(args.model)
    if resumed is not None:
        _refuse_another_draw(args, resumed)
        _refuse_another_optimizer(args, resumed)
    data = open_training_data(args, class_names=resumed.class_names if resumed else None)
    model = _build_model(args, data.num_classes)
    if started is not None:
        _start_from(model, started, args)
    if args.attn_only:
        train_attention_only(model)
    model.to(device)
    _seed(args.seed + utils.get_rank())
    average = make_average(args, model)
    args.lr = scaled_rate(args)
    optimizer = make_optimizer(args, model)
    schedule = Schedule(args, optimizer)
    mixup = _make_mixup(args, data.num_classes)
    criterion = _make_criterion(args, data.num_classes, mixup is not None, device)
    batches, loader, val_loader = _make_loaders(args, data, device)
    run = Run(
        args=args,
        device=device,
        data=data,
        model=model,
        network=_wrapped(model, args, device),
        average=average,
        optimizer=optimizer,
        schedule=schedule,
        scaler=_make_scaler(args, device),
        criterion=criterion,
        mixup=mixup,
        batches=batches,
        loader=loader,
        val_loader=val_loader,
        position=Position(args.start_epoch, steps_per_epoch=batches.steps_per_epoch),
    )
    if resumed is not None:
        _resume(run, resumed)
    elif args.start_epoch:
        schedule.finish(args.start_epoch - 1)
    return run


def _refuse_another_draw(args: argparse.Namespace, resumed: Checkpoint) -> None:
    """Take --seed and --val-split from our own checkpoints: others would train on pictures kept for validation."""
    if "processes" not in resumed.extra:
        return
    for dest, flag in (("seed", "--seed"), ("val_split", "--val-split")):
        saved = getattr(resumed.args, dest, None)
        if saved is None or saved == getattr(args, dest):
            continue
        if is_given(args, dest):
            raise UsageError(
                f"{resumed.source} was trained with {flag} {saved}, so it cannot go on with {flag} "
                f"{getattr(args, dest)}: leave {flag} away, or start from its weights with --finetune."
            )
        setattr(args, dest, saved)


def _refuse_another_optimizer(args: argparse.Namespace, resumed: Checkpoint) -> None:
    made_with = getattr(resumed.args, "opt", None)
    if "optimizer" in resumed.extra and isinstance(made_with, str) and made_with.lower() != args.opt.lower():
        raise UsageError(
            f"{resumed.source} was trained with --opt {made_with}, so it cannot go on with --opt {args.opt}: say "
            f"--opt {made_with}, or start from its weights with --finetune."
        )


def _own_size(model_name: str) -> int | tuple[int, int]:
    """Return the picture size that a registered model is made for, 224 where it does not say."""
    if model_name in VARIANTS:
        return VARIANTS[model_name].options["img_size"]
    config = timm.models.get_pretrained_cfg(model_name, allow_unregistered=True)
    _, height, width = getattr(config, "input_size", None) or (3, 224, 224)
    return height if height == width else (height, width)


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the model with its first weights: the same in every process."""
    model: Any = build_model(
        args.model,
        num_classes,
        args.input_size,
        seed=args.seed,
        drop_rate=args.drop,
        drop_path_rate=args.drop_path,
        drop_block_rate=None,
    )
    for flag in ("if_random_cls_token_position", "if_random_token_rank"):
        if getattr(args, flag) and flag not in inspect.signature(model.forward).parameters:
            raise UsageError(f"{args.model} has no --{flag}, which is for Vim: leave it away.")
    if "dt-bias" in args.mend:
        start_backward_steps_like_forward(model)
    if args.use_checkpoint:
        if not hasattr(model, "set_grad_checkpointing"):
            raise UsageError(f"{args.model} cannot compute its activations again; leave --use-checkpoint away.")
        model.set_grad_checkpointing(True)
    return model


def _start_from(model: nn.Module, started: Checkpoint, args: argparse.Namespace) -> None:
    """Put the weights of --finetune into `model`; a head of another class count stays new."""
    own = model.state_dict()
    weights = dict(started.model)
    fresh = [
        name
        for name in weights
        if name.split(".")[0] in _HEADS and name in own and own[name].shape != weights[name].shape
    ]
    extra = [name for name in weights if name.startswith("head_dist.") and name not in own]
    for name in [*fresh, *extra]:
        del weights[name]
    dropped = {name.rpartition(".")[0] for name in fresh}
    ours = {"head", "classifier.head"}
    report = load_weights(
        model,
        weights,
        resize=args.pos_embed_resize,
        drop_head=bool(dropped & ours),
        strict=not dropped - ours,
        source_grid=patch_grid(model, started.img_size),
    )
    print(f"weights: {started.source}" + (", with a new head for these classes" if dropped else ""))
    if report.resized is not None:
        before, after = report.resized
        print(f"note: the position embeddings were resized from {before} to {after} rows")


def _wrapped(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    network = model
    if os.environ.get("TORCH_COMPILE", "").strip().lower() in ("1", "true", "yes", "on"):
        print("note: TORCH_COMPILE is set: the first steps compile the network, which takes minutes")
        network = torch.compile(network)  # type: ignore[assignment]
    if args.distributed:
        network = nn.parallel.DistributedDataParallel(
            network, device_ids=[device.index] if device.type == "cuda" else None
        )
    return network


def _make_scaler(args: argparse.Namespace, device: torch.device) -> Any:
    """Return what scales the loss, which only fp16 needs, or None."""
    if not args.if_amp or device.type != "cuda" or torch.cuda.is_bf16_supported():
        return None
    return NativeScaler()


def _make_mixup(args: argparse.Namespace, num_classes: int) -> Mixup | None:
    if not (args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None):
        return None
    return Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def _load_teacher(args: argparse.Namespace, num_classes: int) -> nn.Module:
    checkpoint = read_checkpoint_for(args.teacher_model, args.teacher_path)
    pooling = {"global_pool": "avg"} if "fc_norm.weight" in checkpoint.model else {}  # else the model's own
    teacher = build_model(args.teacher_model, num_classes, args.input_size, seed=args.seed, **pooling)
    load_weights(teacher, checkpoint.model, source_grid=patch_grid(teacher, checkpoint.img_size))
    return teacher


def _make_criterion(args: argparse.Namespace, num_classes: int, mixed: bool, device: torch.device) -> nn.Module:
    criterion = build_criterion(args, mixed)
    teacher = None
    if args.distillation_type != "none":
        if not args.teacher_path:
            raise UsageError("Distillation needs the teacher's weights: give them with --teacher-path.")
        try:
            teacher = _load_teacher(args, num_classes).to(device)
        except CheckpointError as error:
            raise CheckpointError(
                f"The teacher cannot be {args.teacher_model} (--teacher-model) with {num_classes} classes and the "
                f"weights in {args.teacher_path}: {error}"
            ) from error
    return DistillationLoss(criterion, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


def _make_loaders(
    args: argparse.Namespace, data: TrainingData, device: torch.device
) -> tuple[DrawBatches, GuardedLoader, GuardedLoader]:
    replicas, rank = utils.get_world_size(), utils.get_rank()
    sampler: RASampler | ShuffledSampler
    if args.distributed and args.repeated_aug:
        sampler = RASampler(data.train, replicas, rank)
    else:
        sampler = ShuffledSampler(data.train, replicas, rank, seed=args.seed)
    batches = DrawBatches(sampler, args.batch_size, seed=args.seed, num_replicas=replicas, rank=rank)
    if not batches.steps_per_epoch:
        raise UsageError(
            f"An epoch of {len(data.train)} training pictures has not one step of --batch-size {args.batch_size} "
            f"on {replicas} processes: lower --batch-size."
        )
    shared: dict[str, Any] = {
        "num_workers": utils.useful_workers(args.num_workers),
        "collate_fn": collate_readable,
        "pin_memory": args.pin_mem and device.type == "cuda",
        "generator": torch.Generator(),  # for the workers' seeds, which the generator of the steps must not pay for
    }
    keep = shared["num_workers"] > 0
    loader = GuardedLoader(SeededPictures(data.train), batch_sampler=batches, persistent_workers=keep, **shared)
    shard = ShardSampler(data.val, replicas, rank) if args.distributed and args.dist_eval else None
    val_loader = GuardedLoader(data.val, args.val_batch_size, sampler=shard, **shared)
    return batches, loader, val_loader


def _resume(run: Run, resumed: Checkpoint) -> None:
    """Put a saved state into a run."""
    load_weights(run.model, resumed.model, source_grid=patch_grid(run.model, resumed.img_size))
    if run.average is not None:
        load_weights(run.average.module, resumed.ema if resumed.ema is not None else resumed.model)
    extra = resumed.extra
    if "optimizer" not in extra or "lr_scheduler" not in extra:
        print(f"note: {resumed.source} holds weights alone, so the optimizer and the schedule begin anew")
        return
    try:
        load_optimizer_state(run.optimizer, extra["optimizer"])
        run.schedule.load_state_dict(extra["lr_scheduler"])
        if run.scaler is not None and isinstance(extra.get("scaler"), dict):
            run.scaler.load_state_dict(extra["scaler"])
        run.position = restore_run_state(extra, resumed.epoch, run.batches.steps_per_epoch)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the optimizer's state in {resumed.source} is not for this run with --opt {run.args.opt} "
            f"({first_line(error)}); resume with the settings that it was trained with, or start from its weights with "
            "--finetune"
        ) from error
    print(f"resumed: {resumed.source}, epoch {run.position.epoch}, step {run.position.step}")
