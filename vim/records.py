"""What a training run writes down beside its checkpoints: log.txt, summary.png, TensorBoard, MLflow."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from checkpoint_sources import CheckpointError, first_line
from command_line import pip_install
from flags import UsageError
from run_folder import LOG, SUMMARY, put_aside, remove_leftovers

Stats = dict[str, float | int]

FIRST_KEYS = ("train_lr", "train_loss", "test_loss", "test_acc1", "test_acc5", "epoch", "n_parameters")  # as upstream
LONGEST_PARAMETER = 500  # characters: what every MLflow server from 1.28 on takes
_NOT_MEASURED = ("epoch", "n_parameters")
_NOT_ARGUMENTS = ("given",)  # what flags.py notes for itself in a Namespace

# Okabe and Ito's colours, for every kind of sight; a colour stands for the same weights in all panels.
_BLUE, _RED, _GREEN = "#0072B2", "#D55E00", "#009E73"
_INK, _QUIET, _FAINT = "#24292f", "#57606a", "#d0d7de"
_SIZE, _DOTS_PER_INCH = (14, 4.6), 100  # inches
_FEW_EPOCHS = 40  # up to so many, each has its dot
# Heading: key, label, colour and style of each line.
_PANELS: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "loss": (
        ("train_loss", "training", _BLUE, "-"),
        ("test_loss", "validation", _RED, "-"),
        ("ema_loss", "validation, EMA", _GREEN, "-"),
    ),
    "accuracy in %": (
        ("test_acc1", "at 1", _RED, "-"),
        ("test_acc5", "at 5", _RED, "--"),
        ("ema_acc1", "at 1, EMA", _GREEN, "-"),
        ("ema_acc5", "at 5, EMA", _GREEN, "--"),
    ),
    "learning rate": (("train_lr", "learning rate", _BLUE, "-"),),
}


class _Tracker(Protocol):
    """Something outside this project that is told the numbers as well."""

    name: str

    def epoch(self, stats: Stats) -> None: ...
    def rewind(self) -> None: ...
    def close(self, finished: bool) -> None: ...


class RunRecord:
    """The written record of one training run, kept by the main process.

    `log.txt` has one line of JSON per epoch: the keys of `FIRST_KEYS`, then any others. A run that begins
    anew in a folder with a log or checkpoints puts these aside as log-1.txt, checkpoint-1.pth ...; one that is
    resumed goes on in them. What TensorBoard or MLflow fail at later on is noted once and never ends the training.

    Args:
        output_dir: folder for the record, made if need be; None: nothing is written.
        args: the command line; `tensorboard`, `mlflow`, `model` and `mend` are read, MLflow is told all of it.
        resume: go on with what earlier parts of the run wrote down; `rewind` then says from which epoch.
    Raises:
        UsageError: a package is missing, the folder cannot be written to, or MLflow cannot be reached.
    """

    def __init__(self, output_dir: Path | None, args: argparse.Namespace, *, resume: bool) -> None:
        self._folder, self._args = output_dir, args
        self._log = None if output_dir is None else output_dir / LOG
        # First what is missing, then what changes the disk, then what others see.
        starters = _find_trackers(output_dir, args)
        if self._log is not None:
            with _unwritable(self._log, UsageError):
                self._log.parent.mkdir(parents=True, exist_ok=True)
                remove_leftovers(self._log.parent)
                if not resume:
                    put_aside(self._log.parent)
                _write_whole(self._log, _whole_lines(self._log))
        self._trackers = [start() for start in starters]

    def rewind(self, epoch: int) -> None:
        """Forget the epochs from `epoch` (counted from 0) on: they are about to run again.

        Raises:
            CheckpointError: log.txt cannot be written; it stays as it was.
        """
        if self._log is not None:
            kept = [line for line in _whole_lines(self._log) if json.loads(line)["epoch"] < epoch]
            with _unwritable(self._log, CheckpointError):
                _write_whole(self._log, kept)
        self._tell(lambda tracker: tracker.rewind())

    def epoch(self, stats: Stats) -> None:
        """Write down one finished epoch; the line is on the disk when this returns.

        Args:
            stats: every key of `FIRST_KEYS`, losses in nats, accuracies in %; other keys follow as they come.
        Raises:
            CheckpointError: log.txt cannot be written.
        """
        ordered = {key: stats[key] for key in FIRST_KEYS}
        ordered.update(stats)  # keeps the places of those that are there
        if self._log is not None:
            with _unwritable(self._log, CheckpointError), open(self._log, "a", encoding="utf-8") as file:
                file.write(json.dumps(ordered) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._tell(lambda tracker: tracker.epoch(ordered))

    def close(self, finished: bool) -> None:
        """Draw summary.png and end TensorBoard's and MLflow's part; raises nothing.

        Args:
            finished: the training came to its end; False: it was stopped or failed.
        """
        self._tell(lambda tracker: tracker.close(finished))
        self._trackers = []
        if self._folder is None or not _whole_lines(self._folder / LOG):
            return
        chosen_by = "ema_acc1" if "ema-best" in getattr(self._args, "mend", ()) else "test_acc1"
        try:
            draw_summary(self._folder / LOG, self._folder / SUMMARY, title=self._args.model, chosen_by=chosen_by)
        except Exception as error:  # a picture is not worth the end of a long run, whatever matplotlib stumbles over
            print(f"note: {SUMMARY} was not drawn: {first_line(error)}", flush=True)

    def _tell(self, message: Callable[[_Tracker], None]) -> None:
        """Pass something on to TensorBoard and MLflow; one that fails is not told any more."""
        for tracker in list(self._trackers):
            try:
                message(tracker)
            except Exception as error:  # whatever their servers, disks and versions come up with
                print(f"note: {tracker.name} is told no more: {first_line(error)}", flush=True)
                self._trackers.remove(tracker)


def _find_trackers(folder: Path | None, args: argparse.Namespace) -> list[Callable[[], _Tracker]]:
    """Import what the command line asks for, and return what starts each."""
    starters: list[Callable[[], _Tracker]] = []
    if args.tensorboard:
        if folder is None:
            raise UsageError("--tensorboard writes into --output_dir, which is missing: name a folder.")
        module = _import("--tensorboard", "torch.utils.tensorboard", "tensorboard")
        starters.append(lambda: _TensorBoard(module.SummaryWriter, folder))
    if args.mlflow:
        mlflow = _import("--mlflow", "mlflow", "mlflow")
        starters.append(lambda: _MLflow(mlflow, None if folder is None else folder.absolute().name, args))
    return starters


def _import(flag: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UsageError(
            f"{flag} needs the package {package} ({first_line(error)}); {pip_install(package)} installs it."
        ) from error


class _TensorBoard:
    """Event files in the folder of the run."""

    name = "TensorBoard"

    def __init__(self, make_writer: Callable[..., Any], folder: Path) -> None:
        self._make_writer, self._folder = make_writer, folder
        self._writer: Any = None

    def epoch(self, stats: Stats) -> None:
        epoch = int(stats["epoch"])
        if self._writer is None:  # TensorBoard then leaves out what earlier files say of this epoch and later ones
            self._writer = self._make_writer(log_dir=str(self._folder), purge_step=epoch)
        for key, value in stats.items():
            if key not in _NOT_MEASURED:
                self._writer.add_scalar(key, value, epoch)
        self._writer.flush()

    def rewind(self) -> None:
        self.close(False)

    def close(self, finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None


class _MLflow:
    """One run of MLflow, where MLflow's own environment variables put it."""

    name = "MLflow"

    def __init__(self, mlflow: Any, run_name: str | None, args: argparse.Namespace) -> None:
        self._mlflow = mlflow
        self._counted = False
        try:
            mlflow.start_run(run_name=run_name)
        except Exception as error:  # MLflow's own, those of its database, those of its HTTP library
            raise UsageError(f"--mlflow: MLflow cannot start a run: {first_line(error)}.") from error
        for key, value in vars(args).items():
            if key not in _NOT_ARGUMENTS:
                self._log_param(key, value)

    def _log_param(self, key: str, value: Any) -> None:
        try:
            self._mlflow.log_param(key, str(value)[:LONGEST_PARAMETER])
        except Exception as error:  # such as another value in a run that MLFLOW_RUN_ID goes on with
            print(f"note: MLflow did not take the parameter {key}: {first_line(error)}", flush=True)

    def epoch(self, stats: Stats) -> None:
        if not self._counted:
            self._log_param("n_parameters", stats["n_parameters"])
            self._counted = True
        for key, value in stats.items():
            self._mlflow.log_metric(key, value, step=int(stats["epoch"]))

    def rewind(self) -> None:
        """Keep all: MLflow holds every value of a step, with its time."""

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "FAILED")


@contextlib.contextmanager
def _unwritable(path: Path, kind: type[UsageError] | type[CheckpointError]) -> Iterator[None]:
    """Say in one sentence, as `kind`, which file could not be written and why."""
    try:
        yield
    except OSError as error:
        raise kind(f"Cannot write {path}: {error.strerror or first_line(error)}.") from error


def _whole_lines(log: Path) -> list[str]:
    """Return the lines of a log that are the record of an epoch: not the half of one that a kill left behind."""
    if not log.exists():
        return []
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if _is_record(line)]


def _is_record(line: str) -> bool:
    try:
        content = json.loads(line)
    except ValueError:
        return False
    return isinstance(content, dict) and isinstance(content.get("epoch"), int)


def _write_whole(path: Path, lines: Sequence[str]) -> None:
    """Write a text file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def draw_summary(log: Path, out: Path, *, title: str | None = None, chosen_by: str = "test_acc1") -> None:
    """Draw losses, accuracies and learning rate over the epochs of a log.txt.

    Args:
        log: a log.txt, upstream's too; of an epoch that is in it twice, the last line counts.
        out: the PNG file to write.
        title: what stands above; the name of the folder of `log` by default.
        chosen_by: the key whose highest value makes an epoch the best; test_acc1 where it is missing.
    Raises:
        UsageError: matplotlib is not installed, `log` holds no epoch, or a file cannot be read or written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            f"drawing needs matplotlib ({first_line(error)}); {pip_install('matplotlib')} installs it"
        ) from error
    epochs = _read_epochs(log)
    figure: Any = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, facecolor="white", layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    best = _best(epochs, chosen_by)
    name = title or log.absolute().parent.name
    figure.suptitle(name, x=0.01, ha="left", fontsize=13, color=_INK, parse_math=False)
    for axes, (heading, series) in zip(figure.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        _draw_panel(axes, heading, series, epochs, best)
    try:
        figure.savefig(out, format="png")
    except OSError as error:
        raise UsageError(f"{out} cannot be written: {error.strerror}") from error


def _read_epochs(log: Path) -> list[dict[str, Any]]:
    try:
        lines = _whole_lines(log)
    except OSError as error:
        raise UsageError(f"{log} cannot be read: {error.strerror}") from error
    by_number = {content["epoch"]: content for content in map(json.loads, lines)}
    if not by_number:
        raise UsageError(f"{log} holds no finished epoch, so there is nothing to draw")
    return [by_number[number] for number in sorted(by_number)]


def _points(epochs: Sequence[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (epoch, value) for every epoch that has a number, and a finite one, under `key`."""
    values = ((entry["epoch"], entry.get(key)) for entry in epochs)
    return [(number, value) for number, value in values if isinstance(value, int | float) and math.isfinite(value)]


def _best(epochs: Sequence[dict[str, Any]], chosen_by: str) -> tuple[int, str] | None:
    """Return the first epoch with the highest value, and a label that says so; None if nothing was measured."""
    key = chosen_by if _points(epochs, chosen_by) else "test_acc1"
    points = _points(epochs, key)
    if not points:
        return None
    number, value = max(points, key=lambda point: point[1])
    whose = " (EMA)" if key.startswith("ema") else ""
    return number, f"best epoch: {number}, {value:.2f} % at 1{whose}"


def _draw_panel(
    axes: Any,
    heading: str,
    series: Sequence[tuple[str, str, str, str]],
    epochs: Sequence[dict[str, Any]],
    best: tuple[int, str] | None,
) -> None:
    marker = "o" if len(epochs) <= _FEW_EPOCHS else ""
    values: list[float] = []
    for key, label, colour, style in series:
        points = _points(epochs, key)
        if not points:
            continue
        values += [value for _, value in points]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linestyle=style, linewidth=2, marker=marker,
            markersize=4)  # fmt: skip
        for point in points:
            if best is not None and point[0] == best[0]:
                axes.plot(*point, color=colour, marker="o", markersize=8, markeredgecolor="white", clip_on=False)
    if best is not None:
        line = axes.axvline(best[0], color=_QUIET, linestyle=":", linewidth=1.5, zorder=1)
        if heading.startswith("accuracy"):  # says it for all panels
            line.set_label(best[1])
    axes.set_ylim(*_limits(values))
    first, last = epochs[0]["epoch"], epochs[-1]["epoch"]
    margin = max(0.5, 0.04 * (last - first))
    axes.set_xlim(first - margin, last + margin)
    _dress(axes, heading)


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """Return the ends of an axis: from 0 on, unless that would press the lines flat."""
    lowest, highest = min(values, default=0), max(values, default=0)
    margin = 0.06 * (highest - lowest)
    if margin > 0 and lowest > highest / 2:
        return lowest - margin, highest + margin
    return 0, 1.06 * highest or 1


def _dress(axes: Any, heading: str) -> None:
    """Heading, axes, a quiet grid, no frame; the legend below, where it hides no line."""
    axes.set_title(heading, fontsize=12, color=_INK, loc="left")
    axes.set_xlabel("epoch", color=_INK)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    axes.tick_params(colors=_INK, length=0, pad=7)
    axes.grid(color=_FAINT, linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_FAINT)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False, fontsize=9, labelcolor=_INK,
        handlelength=3.2)  # fmt: skip
