"""A training run from the command line's settings: what it consists of, its epochs, and how it stops and goes on."""

from __future__ import annotations

import argparse
import datetime
import inspect
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.distributed as dist
from timm.data import Mixup
from timm.utils import ModelEmaV3, NativeScaler
from torch import nn
from torch.utils.data import DataLoader

import utils
from checkpoint import Checkpoint, CheckpointError, load_weights, save_checkpoint
from checkpoint_sources import first_line
from datasets import DataError, collate_readable
from engine import Evaluation, NonFiniteLossError, autocast_for, epoch_meters, measure, name_unreadable, train_one_epoch
from flags import UsageError, is_given
from losses import DistillationLoss, build_criterion
from model_setup import build_model, input_shape, patch_grid, read_checkpoint_for
from optimization import (
    Schedule,
    make_average,
    make_optimizer,
    scaled_rate,
    start_backward_steps_like_forward,
    train_attention_only,
)
from records import RunRecord
from registry import VARIANTS
from run_state import Position, gather_run_state, restore_run_state
from samplers import DrawBatches, RASampler, SeededPictures, ShardSampler, ShuffledSampler
from training_data import TrainingData, open_training_data

LATEST, BEST = "checkpoint.pth", "best_checkpoint.pth"
_HEADS = ("head", "head_dist", "fc", "classifier")


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, and has saved where it is; `signal` is the number of the request."""

    def __init__(self, signal_number: int, saved: str) -> None:
        super().__init__(saved)
        self.signal = signal_number


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
    loader: DataLoader[Any]
    val_loader: DataLoader[Any]
    position: Position

    @property
    def parameter_count(self) -> int:
        """Number of trained parameters."""
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Run the training that `args` describes, or the rest of it.

    Raises:
        UsageError, DataError, CheckpointError: it cannot be done; one sentence says why.
        NonFiniteLossError: the loss is NaN or infinite; the last checkpoint stays.
        Stopped: SIGTERM or Ctrl-C; everything is saved.
    """
    resumed = _checkpoint_to_resume(args)
    run = prepare(args, device, resumed)
    folder = Path(args.output_dir) if args.output_dir else None
    record = RunRecord(folder, args, resume=resumed is not None) if utils.is_main_process() else None
    if record is not None:
        record.rewind(run.position.epoch)
    _describe(run)
    finished = False
    try:
        with _requests_to_stop() as asked:
            _run_epochs(run, record, asked)
        finished = True
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{error} {_how_to_go_on(args)}") from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"A process that reads pictures was lost ({first_line(error)}); if memory ran out, lower --num_workers. "
            f"{_how_to_go_on(args)}"
        ) from error
    finally:
        if record is not None:
            record.close(finished=finished)


def _checkpoint_to_resume(args: argparse.Namespace) -> Checkpoint | None:
    """Return the checkpoint of an interrupted run: that of --auto-resume if there is one, else of --resume."""
    if args.auto_resume:
        if not args.output_dir:
            raise UsageError("--auto-resume looks for checkpoint.pth in --output_dir, so it needs one.")
        latest = Path(args.output_dir) / LATEST
        if latest.exists():
            return read_checkpoint_for(args.model, str(latest))
        print(f"note: there is no {latest} yet, so training begins")
    return read_checkpoint_for(args.model, args.resume) if args.resume else None


# --- putting a run together ------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, device: torch.device, resumed: Checkpoint | None = None) -> Run:
    """Return a run ready for its first step, or its next one if `resumed` is given."""
    started = read_checkpoint_for(args.model, args.finetune) if args.finetune and resumed is None else None
    source = resumed or started
    if source is not None and source.model_name and not is_given(args, "model"):
        args.model = source.model_name
    if not is_given(args, "input_size"):
        args.input_size = (source.img_size if source is not None else None) or _own_size(args.model)
    if resumed is not None:
        _refuse_another_draw(args, resumed)
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
    dropped = {name.split(".")[0] for name in fresh}
    report = load_weights(
        model,
        weights,
        resize=args.pos_embed_resize,
        drop_head="head" in dropped,
        strict=not dropped - {"head"},
        source_grid=patch_grid(model, started.img_size),
    )
    print(f"weights: {started.source}" + (", with a new head for these classes" if dropped else ""))
    if report.resized is not None:
        before, after = report.resized
        print(f"note: the position embeddings were resized from {before} to {after} rows")


def _wrapped(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    network = model
    if os.environ.get("TORCH_COMPILE", "").strip().lower() in ("1", "true", "yes", "on"):
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


def _make_criterion(args: argparse.Namespace, num_classes: int, mixed: bool, device: torch.device) -> nn.Module:
    criterion = build_criterion(args, mixed)
    teacher = None
    if args.distillation_type != "none":
        if not args.teacher_path:
            raise UsageError("Distillation needs the teacher's weights: give them with --teacher-path.")
        checkpoint = read_checkpoint_for(args.teacher_model, args.teacher_path)
        teacher = build_model(args.teacher_model, num_classes, args.input_size, seed=args.seed, global_pool="avg")
        load_weights(teacher, checkpoint.model, source_grid=patch_grid(teacher, checkpoint.img_size))
        teacher.to(device)
    return DistillationLoss(criterion, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)


def _make_loaders(
    args: argparse.Namespace, data: TrainingData, device: torch.device
) -> tuple[DrawBatches, DataLoader[Any], DataLoader[Any]]:
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
        "worker_init_fn": _leave_interrupts_to_the_main_process,
        "generator": torch.Generator(),  # for the workers' seeds, which the generator of the steps must not pay for
    }
    keep = shared["num_workers"] > 0
    loader: DataLoader[Any] = DataLoader(
        SeededPictures(data.train), batch_sampler=batches, persistent_workers=keep, **shared
    )
    shard = ShardSampler(data.val, replicas, rank) if args.distributed and args.dist_eval else None
    val_loader: DataLoader[Any] = DataLoader(data.val, args.val_batch_size, sampler=shard, **shared)
    return batches, loader, val_loader


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- epochs ----------------------------------------------------------------------------------------------------------


def _run_epochs(run: Run, record: RunRecord | None, asked: Callable[[], int]) -> None:
    args, position = run.args, run.position
    if position.epoch >= args.epochs:
        print(f"All {args.epochs} epochs were trained before; there is nothing left to do.")
        return
    print(f"Start training for {args.epochs} epochs")
    start = time.monotonic()
    while position.epoch < args.epochs:
        if not position.step:
            position.sums = {}
        unreadable: list[str] = []
        stats = _train_epoch(run, asked, unreadable)
        _save(run)
        result, averaged = _evaluate(run)
        accuracy = averaged.acc1 if averaged is not None and "ema-best" in args.mend else result.acc1
        run.schedule.finish(position.epoch, accuracy)
        if accuracy > position.best_accuracy:
            position.best_accuracy = accuracy
            _save_as(run, BEST, next_epoch=True)
        print(f"Max accuracy: {position.best_accuracy:.2f}%")
        if record is not None:
            record.epoch(_log_line(run, stats, result, averaged, unreadable))
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        _save(run)
        stop = _any_process(asked(), run.device)
        if stop:
            raise Stopped(stop, _saved_sentence(run))
    spent = datetime.timedelta(seconds=int(time.monotonic() - start))
    print(f"Training time {spent}")


def _train_epoch(run: Run, asked: Callable[[], int], unreadable: list[str]) -> dict[str, float]:
    args, position = run.args, run.position
    run.batches.set_epoch(position.epoch, position.step)

    def after_step(done: int, meters: utils.MetricLogger) -> None:
        position.step = done
        position.sums = {name: (meter.count, meter.total) for name, meter in meters.meters.items()}
        stop = _any_process(asked(), run.device)
        if stop or (args.save_every and done % args.save_every == 0 and done < position.steps_per_epoch):
            _save(run)
        if stop:
            raise Stopped(stop, _saved_sentence(run))

    stats = train_one_epoch(
        run.network,
        run.criterion,
        run.loader,
        run.optimizer,
        run.device,
        position.epoch,
        run.scaler,
        autocast_for(run.device, args.if_amp),
        args.clip_grad,
        run.average,
        run.mixup,
        args.train_mode,
        args,
        first_step=position.step,
        meters=epoch_meters(position.sums),
        after_step=after_step,
        unreadable=unreadable,
    )
    _name_unreadable_in_training(unreadable)
    return stats


def _name_unreadable_in_training(unreadable: list[str]) -> None:
    reasons = sorted(set(unreadable))
    if reasons:
        print(
            f"warning: {len(reasons)} training pictures could not be read, others took their places:", file=sys.stderr
        )
        for reason in reasons:
            print(f"  {reason}", file=sys.stderr)


def _any_process(number: int, device: torch.device) -> int:
    """Return the largest `number` of all processes, so that all stop at the same step."""
    if not utils.is_dist_avail_and_initialized():
        return number
    flag = torch.tensor(number, device=device if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return int(flag.item())


def _evaluate(run: Run) -> tuple[Evaluation, Evaluation | None]:
    """Measure the network and, where the best checkpoint goes by it, its moving average."""
    autocast = autocast_for(run.device, run.args.if_amp)
    result = measure(run.val_loader, run.model, run.device, autocast)
    print(result.summary())
    print(f"Accuracy of the network on the {result.pictures} test images: {result.acc1:.1f}%")
    if utils.is_main_process():
        name_unreadable(result)
    if run.average is None or "ema-best" not in run.args.mend:
        return result, None
    where = next(run.average.module.parameters()).device  # the CPU with --model-ema-force-cpu
    averaged = measure(run.val_loader, run.average.module, where, autocast_for(where, run.args.if_amp), "Test EMA")
    print(f"Accuracy of the ema network on the {averaged.pictures} test images: {averaged.acc1:.1f}%")
    return result, averaged


def _log_line(
    run: Run, stats: dict[str, float], result: Evaluation, averaged: Evaluation | None, unreadable: list[str]
) -> dict[str, float | int]:
    line: dict[str, float | int] = {f"train_{name}": stats[name] for name in ("lr", "loss")}
    line |= {"test_loss": result.loss, "test_acc1": result.acc1, "test_acc5": result.acc5}
    line |= {"epoch": run.position.epoch, "n_parameters": run.parameter_count}
    if averaged is not None:
        line |= {"ema_loss": averaged.loss, "ema_acc1": averaged.acc1, "ema_acc5": averaged.acc5}
    if unreadable:
        line["unreadable"] = len(set(unreadable))
    return line


# --- stopping and going on -------------------------------------------------------------------------------------------


def _save(run: Run) -> None:
    _save_as(run, LATEST)


def _how_to_go_on(args: argparse.Namespace) -> str:
    if not args.output_dir:
        return "Nothing is saved, for there is no --output_dir."
    return f"{Path(args.output_dir) / LATEST} is the last checkpoint: go on with the same command and --auto-resume."


def _saved_sentence(run: Run) -> str:
    if not run.args.output_dir:
        return "stopped; nothing is saved, for there is no --output_dir."
    path = Path(run.args.output_dir) / LATEST
    return f"stopped; {path} holds everything up to here: go on with the same command and --auto-resume."


def _save_as(run: Run, name: str, *, next_epoch: bool = False) -> None:
    """Write a checkpoint from which the run goes on as if it had never stopped; called by all processes."""
    if not run.args.output_dir:
        return
    position = run.position
    if next_epoch:
        position = Position(position.epoch + 1, 0, position.steps_per_epoch, position.best_accuracy)
    contents: dict[str, Any] = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict() if run.scaler is not None else "none",
        "args": argparse.Namespace(**{key: value for key, value in vars(run.args).items() if key != "given"}),
        "class_names": run.data.class_names,
        "model_name": run.args.model,
        "img_size": run.args.input_size,
        **gather_run_state(position),
    }
    if run.average is not None:
        contents["model_ema"] = run.average.module.state_dict()
    failure = ""
    if utils.is_main_process():
        try:
            save_checkpoint(Path(run.args.output_dir) / name, contents)
        except CheckpointError as error:
            failure = str(error)
    if _any_process(int(bool(failure)), run.device):
        raise CheckpointError(failure or "the main process could not write its checkpoint")


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
        run.optimizer.load_state_dict(extra["optimizer"])
        run.schedule.load_state_dict(extra["lr_scheduler"])
        if run.scaler is not None and isinstance(extra.get("scaler"), dict):
            run.scaler.load_state_dict(extra["scaler"])
        run.position = restore_run_state(extra, resumed.epoch, run.batches.steps_per_epoch)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"the optimizer's state in {resumed.source} is not for this run ({error}); resume with the settings "
            "that it was trained with, or start from its weights with --finetune"
        ) from error
    print(f"resumed: {resumed.source}, epoch {run.position.epoch}, step {run.position.step}")


@contextmanager
def _requests_to_stop() -> Iterator[Callable[[], int]]:
    """Note SIGTERM and Ctrl-C instead of dying of them; a second one ends the process as usual.

    Yields what returns the number of the signal that came, 0 before.
    """
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        del frame
        came.append(number)
        signal.signal(number, before[number])
        print("stopping after this step, and saving ...", file=sys.stderr, flush=True)

    before: dict[int, Any] = {}
    try:
        for asked_by in (signal.SIGTERM, signal.SIGINT):
            before[asked_by] = signal.signal(asked_by, note)
    except ValueError:  # not the main thread, which alone gets signals
        before.clear()
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _describe(run: Run) -> None:
    args, data = run.args, run.data
    for text in data.notes:
        print(f"note: {text}")
    size = args.input_size
    height, width = size if isinstance(size, tuple) else input_shape(run.model, size)[1:]
    print(
        f"model: {args.model}, {run.parameter_count / 1e6:.2f} M trained parameters, {data.num_classes} classes, "
        f"{height} x {width} pixels"
    )
    print(f"data: {len(data.train)} pictures to train on, {len(data.val)} to test")
    print(
        f"device: {run.device}, {utils.get_world_size()} x {args.batch_size} pictures a step, "
        f"{run.batches.steps_per_epoch} steps an epoch, learning rate {args.lr:g}"
    )
    if args.resplit:
        print("note: --resplit has no meaning here: each picture is augmented once")
    print(f"versions: torch {torch.__version__}, timm {timm.__version__}")
