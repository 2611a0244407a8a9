"""A training run from the settings of a command line: its epochs, what it saves, and how it stops and goes on."""

from __future__ import annotations

import argparse
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist

import other_family
import utils
from checkpoint import Checkpoint, CheckpointError, UnreadableCheckpointError, save_checkpoint
from checkpoint_sources import first_line
from datasets import DataError
from engine import Evaluation, NonFiniteLossError, autocast_for, epoch_meters, measure, name_unreadable, train_one_epoch
from flags import UsageError, without_effect
from model_setup import input_shape, read_checkpoint_for
from progress import format_seconds
from records import RunRecord
from run_folder import BEST, LATEST
from run_setup import Run, prepare
from run_state import Position, gather_run_state


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """The run was asked to stop, and has saved where it is; `signal` is the number of the request."""

    def __init__(self, signal_number: int, saved: str) -> None:
        super().__init__(saved)
        self.signal = signal_number


def train(args: argparse.Namespace, device: torch.device, starting: Callable[[], None] = lambda: None) -> None:
    """Run the training that `args` describes, or the rest of it.

    Args:
        starting: called when nothing but the training is left to do, before anything is written.
    Raises:
        UsageError, DataError, CheckpointError: it cannot be done; one sentence says why.
        NonFiniteLossError: the loss is NaN or infinite; the last checkpoint stays.
        Stopped: SIGTERM or Ctrl-C; everything is saved.
    """
    source = _where_to_resume(args)
    resumed: Checkpoint | None = None
    if isinstance(source, Path):
        resumed = _read_latest(source, args.model)
    elif source is not None:
        resumed = read_checkpoint_for(args.model, source)
    run = prepare(args, device, resumed)
    starting()
    with _requests_to_stop() as asked:
        _train_on_record(run, asked, anew=not _is_in(source, args.output_dir))


def _train_on_record(run: Run, asked: Callable[[], int], *, anew: bool) -> None:
    args = run.args
    folder = Path(args.output_dir) if args.output_dir else None
    record = RunRecord(folder, args, resume=not anew) if utils.is_main_process() else None
    if record is not None:
        record.rewind(run.position.epoch)
    _describe(run)
    finished = False
    try:
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


def _where_to_resume(args: argparse.Namespace) -> Path | str | None:
    """Return the file of --auto-resume (a Path) if there is one, else what --resume names, if anything."""
    if args.auto_resume:
        if not args.output_dir:
            raise UsageError("--auto-resume looks for checkpoint.pth in --output_dir, so it needs one.")
        latest = Path(args.output_dir) / LATEST
        if os.path.exists(latest):
            return latest
        print(f"note: there is no {latest} yet, so training begins")
    return args.resume or None


def _is_in(source: Path | str | None, folder: str) -> bool:
    """Whether a run that is resumed is the one in its --output_dir, which may hold another one."""
    return source is not None and bool(folder) and Path(source).resolve().parent == Path(folder).resolve()


def _read_latest(latest: Path, model_name: str) -> Checkpoint:
    """Read a run's own checkpoint, which cannot be fetched from anywhere again."""
    try:
        return read_checkpoint_for(model_name, str(latest))
    except UnreadableCheckpointError as error:
        best = latest.with_name(BEST)
        instead = f"say --resume {best} in place of --auto-resume, or " if best.exists() else ""
        raise CheckpointError(f"{error.fault}; {instead}remove it to begin anew") from error


# --- epochs ----------------------------------------------------------------------------------------------------------


def _run_epochs(run: Run, record: RunRecord | None, asked: Callable[[], int]) -> None:
    args, position = run.args, run.position
    if position.epoch >= args.epochs:
        print(f"All {args.epochs} epochs were trained before; there is nothing left to do.")
        return
    print(f"Start training for {args.epochs} epochs")
    start, first = time.monotonic(), position.epoch + position.step / position.steps_per_epoch
    while position.epoch < args.epochs:
        if not position.step:
            position.sums = {}
        unreadable: list[str] = []
        stats = _train_epoch(run, asked, unreadable)
        _save(run)
        result, averaged = _evaluate(run)
        accuracy = result.acc1 if averaged is None else averaged.acc1
        run.schedule.finish(position.epoch, accuracy)
        if accuracy > position.best_accuracy:
            position.best_accuracy = accuracy
            _save_as(run, BEST, next_epoch=True)
        print(f"Max accuracy: {position.best_accuracy:.2f}%{' (EMA)' if averaged is not None else ''}")
        if record is not None:
            record.epoch(_log_line(run, stats, result, averaged, unreadable))
        position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
        _save(run)
        _say_how_long(start, position.epoch - first, args.epochs - position.epoch)
        stop = _any_process(asked(), run.device)
        if stop:
            raise Stopped(stop, _saved_sentence(run))
    spent = datetime.timedelta(seconds=int(time.monotonic() - start))
    print(f"Training time {spent}")


def _say_how_long(start: float, done: float, left: int) -> None:
    """Say how long the epochs that are left will take, if as long as those that were trained since `start`.

    Says nothing where none was trained: a resumed run may have had only the evaluation of its first epoch to do.
    """
    if left and done > 0:
        rest = (time.monotonic() - start) / done * left
        print(f"{left} {'epoch' if left == 1 else 'epochs'} to go, about {format_seconds(rest)} (h:mm:ss)")


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
    latest = Path(args.output_dir) / LATEST
    if not os.path.exists(latest):
        return f"Nothing was saved yet, so there is no {latest} to go on from."
    return f"{latest} is the last checkpoint: go on with the same command and --auto-resume."


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
        **other_family.entries_for(run.args.model),
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
    print(f"data: {len(data.train)} pictures to train on, {len(data.val)} to validate on")
    print(
        f"device: {run.device}, {utils.get_world_size()} x {args.batch_size} pictures a step, "
        f"{run.batches.steps_per_epoch} steps an epoch, learning rate {args.lr:g}"
    )
    for sentence in without_effect(args):
        print(f"note: {sentence}")
    if not args.output_dir:
        print("note: nothing will be kept, for there is no --output_dir")
    print(f"versions: torch {torch.__version__}, timm {timm.__version__}")
