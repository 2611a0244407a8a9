#!/usr/bin/env python3
"""Train the small Vim on the handwritten digits: python train.py --data-path DATA --output-dir RUN

Reads DATA/train and DATA/val (see make_dataset.py), keeps the epoch that is best on DATA/val, and writes
RUN/vim_pico_digits.safetensors, RUN/training.json and, where matplotlib is installed, RUN/training.png.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "vim"))

import torch
from make_dataset import CLASS_NAMES, SIDE
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms

from checkpoint import CheckpointError, save_checkpoint
from datasets import DataError, PictureFolder, collate_readable
from engine import NonFiniteLossError, measure, train_one_epoch
from model_setup import build_model
from pictures import eval_transform
from progress import format_seconds

MODEL = "vim_pico_patch4_32"
CHECKPOINT = "vim_pico_digits.safetensors"
WHITE = (255, 255, 255)
WARMUP_EPOCHS = 2
LOWEST_LR = 1e-5
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1
LARGEST_GRADIENT = 1.0
EMA_DECAY = 0.99  # per step: the weights that are kept are a moving average over about three epochs


def load_split(folder: Path, batch_size: int, *, augment: bool) -> DataLoader[Any]:
    """Return the loader of the pictures in `folder`/CLASS; the classes are numbered as in `CLASS_NAMES`.

    Args:
        augment: shuffle, and turn, move, slant and size each picture a little at random (never mirrored: digits
            are not symmetric). Otherwise the pictures pass as in evaluation, in order.
    Raises:
        DataError: there is no such folder, or its classes are others.
    """
    jitter = transforms.RandomAffine(
        12, (0.1, 0.1), (0.85, 1.15), 12, interpolation=transforms.InterpolationMode.BILINEAR, fill=WHITE
    )
    steps = [jitter, eval_transform(SIDE)] if augment else [eval_transform(SIDE)]
    pictures = PictureFolder(folder, transforms.Compose(steps), class_names=CLASS_NAMES)
    return DataLoader(pictures, batch_size, shuffle=augment, collate_fn=collate_readable)


def smoothed_cross_entropy(images: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, every target being 90 % its class and 10 % all of them."""
    return nn.functional.cross_entropy(outputs, targets, label_smoothing=SMOOTHING)


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train from scratch, write the checkpoint whenever an epoch is the best so far, and return the record.

    Args:
        args: data_path, output_dir, epochs, batch_size, lr and seed, as on the command line.
    Raises:
        DataError, CheckpointError, NonFiniteLossError: it cannot be done; one sentence says why.
    """
    model = build_model(MODEL, len(CLASS_NAMES), SIDE, seed=args.seed)
    average = ModelEmaV3(model, decay=EMA_DECAY)
    train_loader = load_split(args.data_path / "train", args.batch_size, augment=True)
    val_loader = load_split(args.data_path / "val", args.batch_size, augment=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY)
    schedule = CosineLRScheduler(
        optimizer, args.epochs, lr_min=LOWEST_LR, warmup_t=WARMUP_EPOCHS, warmup_lr_init=args.lr / 10
    )
    epochs: list[dict[str, float]] = []
    for epoch in range(args.epochs):
        start = time.monotonic()
        schedule.step(epoch)
        with _without_its_own_lines():
            trained = train_one_epoch(
                model,
                smoothed_cross_entropy,
                train_loader,
                optimizer,
                "cpu",
                epoch,
                max_norm=LARGEST_GRADIENT,
                model_ema=average,
            )
            train_seconds = time.monotonic() - start
            measured = measure(val_loader, average.module, "cpu")
        entry = {"epoch": epoch, **trained, "val_loss": measured.loss, "val_acc1": measured.acc1}
        epochs.append({**entry, "train_seconds": train_seconds, "seconds": time.monotonic() - start})
        _report(epochs, args.epochs, len(train_loader.dataset))  # type: ignore[arg-type]
        if _best(epochs) is epochs[-1]:
            _save(average.module, args.output_dir / CHECKPOINT, epoch)
    return _record(args, epochs)


def _best(epochs: list[dict[str, float]]) -> dict[str, float]:
    """Return the epoch of the lowest validation loss, which is finer than the accuracy on 269 pictures."""
    return min(epochs, key=lambda entry: entry["val_loss"])


@contextlib.contextmanager
def _without_its_own_lines() -> Iterator[None]:
    """Keep the progress lines inside an epoch off the screen: there is one line for each epoch instead."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _report(epochs: list[dict[str, float]], total: int, pictures: int) -> None:
    last = epochs[-1]
    left = (total - len(epochs)) * sum(entry["seconds"] for entry in epochs) / len(epochs)
    print(
        f"epoch {len(epochs)}/{total}: loss {last['loss']:.3f}, validation {last['val_acc1']:.2f} % "
        f"(loss {last['val_loss']:.3f}), lr {last['lr']:.6f}, {pictures / last['train_seconds']:.0f} images/s, "
        f"{format_seconds(left)} left",
        flush=True,
    )


def _save(model: nn.Module, path: Path, epoch: int) -> None:
    contents = {
        "model": model.state_dict(),
        "model_name": MODEL,
        "img_size": SIDE,
        "class_names": list(CLASS_NAMES),
        "epoch": epoch,
    }
    save_checkpoint(path, contents)


def _record(args: argparse.Namespace, epochs: list[dict[str, float]]) -> dict[str, Any]:
    """Return what training.json holds: how it was trained, and what each epoch gave."""
    best = _best(epochs)
    return {
        "model": MODEL,
        "seed": args.seed,
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": sum(entry["seconds"] for entry in epochs),
        "best_epoch": best["epoch"],
        "best_val_acc1": best["val_acc1"],
        "epochs": epochs,
    }


def write_record(record: dict[str, Any], folder: Path) -> None:
    """Write training.json and the curves, training.png, into `folder`."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    try:
        import matplotlib
    except ImportError:
        print("note: matplotlib is not installed, so training.png was not drawn")
        return
    matplotlib.use("agg")
    from matplotlib import pyplot

    epochs = [entry["epoch"] + 1 for entry in record["epochs"]]
    figure, (losses, accuracy) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for key, label in (("loss", "training (smoothed targets, augmented)"), ("val_loss", "validation")):
        losses.plot(epochs, [entry[key] for entry in record["epochs"]], label=label)
    losses.set(xlabel="epoch", ylabel="cross-entropy (nats)", ylim=(0, None))
    losses.legend()
    accuracy.plot(epochs, [100 - entry["val_acc1"] for entry in record["epochs"]], color="C1")
    accuracy.axvline(record["best_epoch"] + 1, color="grey", linestyle=":", label="epoch that was kept")
    accuracy.set(xlabel="epoch", ylabel="validation error (%)", yscale="symlog", ylim=(0, 100))
    accuracy.legend()
    figure.savefig(folder / "training.png", dpi=100)
    pyplot.close(figure)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; its defaults are the recipe of the shipped checkpoint."""
    parser = argparse.ArgumentParser(description="Train the small Vim on the handwritten digits.")
    parser.add_argument("--data-path", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--epochs", type=int, default=40, help="number of epochs (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="pictures per step (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    return parser


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done."""
    parser = build_parser()
    args = parser.parse_args(arguments)
    if min(args.epochs, args.batch_size, args.threads) < 1:
        parser.error("--epochs, --batch-size and --threads must be at least 1")
    torch.set_num_threads(args.threads)
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_record(train(args), args.output_dir)
    except (DataError, CheckpointError, NonFiniteLossError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: Cannot write to {str(args.output_dir)!r}: {error.strerror or error}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run())
