#!/usr/bin/env python3
"""Train, fine-tune and evaluate Vim, VMamba, or any timm model, on labelled pictures.

python vim/main.py --model NAME --data-path DIR --output_dir RUN               (pictures: DIR/train/CLASS/*.jpg)
python vim/main.py --finetune CHECKPOINT --data-path DIR --output_dir RUN      (other classes, another size)
python vim/main.py --eval --resume CHECKPOINT --data-path DIR                  (pictures: DIR/val/CLASS/*.jpg)
python vim/main.py --eval --resume FILE.onnx --data-path DIR                   (a file of vim/export_onnx.py)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

try:
    import timm
    import torch
    from torch import Tensor, nn
    from torch.utils.data import DataLoader

    import other_family
    import utils
    from checkpoint import Checkpoint, CheckpointError, load_weights
    from datasets import DataError, build_dataset, build_transform, collate_readable
    from engine import Evaluation, NonFiniteLossError, autocast_for, measure, name_unreadable
    from flags import UsageError, check, get_args_parser, is_given, without_effect
    from model_setup import build_model, input_shape, patch_grid, pick_device, read_checkpoint_for
    from onnx_network import OnnxError, is_onnx, network_for_evaluation, refuse_training
    from samplers import ShardSampler
    from training import Stopped, train
except KeyboardInterrupt:
    if __name__ != "__main__":
        raise
    print("error: stopped before it began.", file=sys.stderr)
    sys.exit(130)
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}; run `python3 setup_cpu_env.py` once, then this with its Python.", file=sys.stderr)
    sys.exit(2)

__all__ = ["get_args_parser", "main"]


def main(args: argparse.Namespace, starting: Callable[[], None] = lambda: None) -> None:
    """Do what the command line says; the results go to standard output. `starting`: see `train`.

    Raises:
        UsageError, DataError, CheckpointError, OnnxError: it cannot be done; one sentence says why.
    """
    check(args)
    args.model = other_family.registered(args.model)
    refuse_training(args)
    device = pick_device(args.device)
    utils.init_distributed_mode(args)
    try:
        if device.type == "cuda" and args.gpu is not None:
            device = torch.device("cuda", args.gpu)
        if args.eval and is_onnx(args.resume or args.finetune):
            evaluate_onnx(args)
        elif args.eval:
            evaluate_checkpoint(args, device)
        else:
            train(args, device, starting)
    finally:
        utils.leave_distributed_mode()


def evaluate_checkpoint(args: argparse.Namespace, device: torch.device) -> None:
    """Measure the weights that `args` names, then their moving average if there is one; print the results."""
    source = args.resume or args.finetune
    checkpoint = read_checkpoint_for(args.model, source) if source else None
    if checkpoint is not None and checkpoint.model_name and not is_given(args, "model"):
        args.model = checkpoint.model_name
    if checkpoint is not None and "processes" in checkpoint.extra:
        for dest in ("seed", "val_split"):  # which pictures of a folder without val/ were kept for validation
            saved = getattr(checkpoint.args, dest, None)
            if isinstance(saved, int | float) and not is_given(args, dest):
                setattr(args, dest, saved)
    dataset: Any
    dataset, num_classes = build_dataset(
        False,
        args,
        class_names=checkpoint.class_names if checkpoint else None,
        num_classes=_class_count(checkpoint, args.model) if checkpoint else None,
    )
    model = _build_model(args, num_classes, checkpoint).to(device)
    dataset.transform = build_transform(False, args)  # for the size that the model turned out to have
    loader = _build_loader(args, dataset, device)
    _describe(args, dataset, model, num_classes, device)
    for called, origin, weights in _weights_to_measure(args, checkpoint):
        print(f"weights: {origin}")
        if checkpoint is not None:
            _load(model, weights, checkpoint, args.pos_embed_resize)
        result = measure(loader, model, device, autocast_for(device, args.if_amp))
        _print_result(result, called)
    name_unreadable(result)


def evaluate_onnx(args: argparse.Namespace) -> None:
    """Measure the ONNX file that `args` names; print the results."""
    source = args.resume or args.finetune
    network, device = network_for_evaluation(args, source), torch.device("cpu")
    classes = len(network.model.class_names)
    dataset: Any
    dataset, _ = build_dataset(False, args, class_names=network.folder_names, num_classes=classes)
    loader = _build_loader(args, dataset, device)
    _describe(args, dataset, network, classes, device)
    random = " (random ones, so the results mean nothing)" if network.model.has_random_weights else ""
    print(f"weights: {source}{random}, run by onnxruntime")
    result = measure(loader, network, device)
    _print_result(result, "network")
    name_unreadable(result)


def _build_model(args: argparse.Namespace, num_classes: int, checkpoint: Checkpoint | None) -> nn.Module:
    """Return the model and set args.input_size: as typed, else the checkpoint's size, else the model's own."""
    size = args.input_size if is_given(args, "input_size") else checkpoint.img_size if checkpoint else None
    model = build_model(args.model, num_classes, size, seed=args.seed + utils.get_rank())
    _, height, width = input_shape(model, size)
    args.input_size = height if height == width else (height, width)
    return model


def _weights_to_measure(
    args: argparse.Namespace, checkpoint: Checkpoint | None
) -> list[tuple[str, str, dict[str, Tensor]]]:
    """Return what the network is called in its result, where its weights come from, and these weights."""
    if checkpoint is None:
        return [("network", "random (neither --resume nor --finetune), so the results mean nothing", {})]
    epoch = f", epoch {checkpoint.epoch}" if checkpoint.epoch is not None else ""
    measured = [("network", checkpoint.source + epoch, checkpoint.model)]
    if checkpoint.ema is not None and args.model_ema:
        measured.append(("ema network", "their moving average (EMA) in the same checkpoint", checkpoint.ema))
    return measured


def _class_count(checkpoint: Checkpoint, model_name: str) -> int:
    """Return the classes of the checkpoint's classifier, wherever the model keeps it (resnets: fc)."""
    described = timm.models.get_pretrained_cfg(model_name, allow_unregistered=True)
    if described is None and checkpoint.num_classes:  # ours, which timm knows by name alone
        return checkpoint.num_classes
    ours = "classifier.head" if other_family.is_vmamba(checkpoint.model) else "head"
    classifier = getattr(described, "classifier", None) or ours
    first = classifier if isinstance(classifier, str) else classifier[0]
    weight = checkpoint.model.get(f"{first}.weight")
    if weight is None or weight.ndim == 0:
        raise CheckpointError(
            f"{checkpoint.source} has no {first}.weight, the classifier of {model_name}; name the model that "
            "it was made with, or give a checkpoint with a classifier."
        )
    return weight.shape[0]


def _load(model: nn.Module, weights: dict[str, Tensor], checkpoint: Checkpoint, resize: str) -> None:
    grid = patch_grid(model, checkpoint.img_size)
    report = load_weights(model, weights, resize=resize, source_grid=grid)
    if report.resized is not None:
        before, after = report.resized
        print(f"note: the position embeddings were resized from {before} to {after} rows")


def _build_loader(args: argparse.Namespace, dataset: Any, device: torch.device) -> DataLoader[Any]:
    """Return the loader of the validation pictures, in order, with no more workers than are of use."""
    sampler = None
    if args.distributed and args.dist_eval:
        sampler = ShardSampler(dataset, utils.get_world_size(), utils.get_rank())
    return DataLoader(
        dataset,
        batch_size=args.val_batch_size,
        sampler=sampler,
        num_workers=utils.useful_workers(args.num_workers),
        collate_fn=collate_readable,
        pin_memory=args.pin_mem and device.type == "cuda",
    )


def _describe(args: argparse.Namespace, dataset: Any, model: nn.Module, num_classes: int, device: torch.device) -> None:
    height, width = args.input_size if isinstance(args.input_size, tuple) else (args.input_size,) * 2
    weights = [weight.numel() for weight in model.parameters()]
    parameters = f", {sum(weights) / 1e6:.2f} M parameters" if weights else ""  # torch does not see those of ONNX
    print(f"model: {args.model}{parameters}, {num_classes} classes, {height} x {width} pixels")
    print(f"data: {len(dataset)} pictures of {getattr(dataset, 'root', args.data_path)}")
    if getattr(dataset, "note", None):
        print(f"note: {dataset.note}")
    for sentence in without_effect(args):
        print(f"note: {sentence}")
    found_by = getattr(dataset, "found_by", None)
    if found_by is not None:
        print(f"classes: {len(dataset.classes)} of {num_classes} have a folder, numbered by {found_by}")
    precision = ", mixed precision" if args.if_amp else ""
    print(f"device: {device}, batch size {args.val_batch_size}{precision}")


def _print_result(result: Evaluation, called: str) -> None:
    print(result.summary())
    missing = len(result.unreadable)
    left_out = f" ({missing} of {result.pictures + missing} could not be read)" if missing else ""
    print(f"Accuracy of the {called} on the {result.pictures} test images: {result.acc1:.1f}%{left_out}")


def run(
    arguments: Sequence[str] | None = None,
    starting: Callable[[], None] = lambda: None,
    in_own_words: Callable[[str], str] = str,
) -> int:
    """Do what the command line says; return the exit code: 2, after one sentence, if it cannot be done.

    Args:
        arguments: the command line; that of the process if None.
        starting: called before a training that can be done; see `train`.
        in_own_words: makes that sentence one about the words of a caller with a command line of its own.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, parents=[get_args_parser()]
    )
    args = parser.parse_args(arguments)
    try:
        main(args, starting)
    except (UsageError, DataError, CheckpointError, OnnxError, NonFiniteLossError) as error:
        print(f"error: {in_own_words(str(error))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print("error: stopped before the end, so there is no result.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # results and progress in order
    sys.exit(run())
