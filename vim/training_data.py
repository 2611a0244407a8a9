"""The pictures of a training run: those to train on and those to validate on, and the names of their classes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.datasets import VisionDataset

from class_folders import class_folders, folder_to_split
from class_match import DataError, first_few
from datasets import PictureFolder, build_dataset, build_transform
from pictures import PICTURE_SUFFIXES


@dataclass(frozen=True)
class TrainingData:
    """What a training run sees.

    Attributes:
        train: (image, class number) with the training transform, or `datasets.Unreadable`.
        val: the same with the evaluation transform.
        num_classes: outputs that the model needs.
        class_names: names by class number, for the checkpoint; None where there are none.
        notes: what a person should know about the pictures, each to follow the word "note: ".
    """

    train: VisionDataset
    val: VisionDataset
    num_classes: int
    class_names: list[str] | None
    notes: tuple[str, ...] = ()


def open_training_data(args: argparse.Namespace, *, class_names: Sequence[str] | None = None) -> TrainingData:
    """Open the data set that `args` names for training.

    Class folders may lie in DATA/train and DATA/val, in DATA/train alone, or in DATA itself; without val/, a part of
    each class is kept for validation (`class_folders.held_out`). They are numbered in sorted order, which for
    ImageNet's is its own order, or as `class_names` says.

    Args:
        args: data_set, data_path, inat_category, val_split, seed (the same in all processes), batch_size, world_size
            (1 where it is missing), ThreeAugment, and what `datasets.build_transform` and
            `augment.new_data_aug_generator` read.
        class_names: names by class number of the run that goes on; the classes must be exactly these.
    Raises:
        DataError: the data cannot be trained on; one sentence names the place and the mend.
    """
    training: Any
    validation: Any
    if args.data_set == "IMNET":
        training, validation, names = _open_folders(args, class_names)
        validation.transform = build_transform(False, args)
    else:
        (training, _), (validation, _) = build_dataset(True, args), build_dataset(False, args)
        names = list(training.classes)
        _refuse_other_classes(names, class_names, args.data_set)
    training.transform = training_transform(args)
    _refuse_unusable(training, validation, names, args)
    note = getattr(training, "note", None)
    return TrainingData(training, validation, len(names), names, () if note is None else (note,))


def training_transform(args: argparse.Namespace) -> Callable[[Any], Tensor]:
    """Return what turns an RGB picture into an input to train on: 3-Augment by --ThreeAugment, else timm's."""
    if not args.ThreeAugment:
        return build_transform(True, args)
    from augment import new_data_aug_generator

    return new_data_aug_generator(args)


def _open_folders(
    args: argparse.Namespace, class_names: Sequence[str] | None
) -> tuple[PictureFolder, PictureFolder, list[str]]:
    """Return the pictures to train on, those to validate on, and the class names by number."""
    data = Path(args.data_path)
    undivided = folder_to_split(data)
    root = undivided or data / "train"
    folders = class_folders(root)
    if class_names is None:
        names, found_by = folders, "the sorted order of the folders"
    else:
        names, found_by = list(class_names), "the checkpoint's class names"
        _refuse_other_classes(folders, sorted(names), str(root))
    whole = PictureFolder(root, class_names=names)
    _refuse_empty_classes(whole)
    if undivided is not None:
        training, validation = whole.split(args.val_split, args.seed)
    else:
        _refuse_other_folders_in_val(data, folders)
        training, validation = whole, PictureFolder(data / "val", class_names=names)
    training.found_by = validation.found_by = found_by
    return training, validation, names


def _refuse_other_classes(own: Sequence[str], expected: Sequence[str] | None, place: str) -> None:
    if expected is not None and list(own) != list(expected):
        difference = _difference(own, "the data", expected, "the checkpoint") or "the same in another order"
        raise DataError(
            f"The classes of {place!r} are not those that the checkpoint was trained on ({difference}); resume with "
            "the pictures of its training, or start from its weights with --finetune."
        )


def _refuse_other_folders_in_val(data: Path, folders: Sequence[str]) -> None:
    difference = _difference(folders, "train", class_folders(data / "val"), "val")
    if difference:
        raise DataError(
            f"The folders train/ and val/ of {str(data)!r} hold different classes ({difference}); "
            "give both the same class folders."
        )


def _difference(one: Sequence[str], called: str, other: Sequence[str], other_called: str) -> str:
    """Return in words which names are in one list alone; nothing if they hold the same names."""
    parts = []
    for name, own, others in ((called, one, set(other)), (other_called, other, set(one))):
        alone = [entry for entry in own if entry not in others]
        if alone:
            parts.append(f"only in {name}: {first_few(alone)}")
    return "; ".join(parts)


def _refuse_empty_classes(pictures: PictureFolder) -> None:
    filled = set(pictures.targets)
    empty = [name for name in pictures.classes if pictures.class_to_idx[name] not in filled]
    if empty:
        raise DataError(
            f"{len(empty)} of the {len(pictures.classes)} class folders of {pictures.root!r} hold no pictures: "
            f"{first_few(empty)}; remove them, or put pictures in (known are the endings "
            f"{', '.join(sorted(PICTURE_SUFFIXES))})."
        )


def _refuse_unusable(training: Any, validation: Any, names: Sequence[str], args: argparse.Namespace) -> None:
    if len(names) < 2:
        raise DataError(
            f"{args.data_path!r} has {len(names)} class ({first_few(names)}); a classifier needs at least two, "
            "each with a folder of its own."
        )
    if not len(training) or not len(validation):
        part = "validation" if len(training) else "training"
        raise DataError(f"{args.data_path!r} names no pictures for {part}; add some.")
    processes = max(getattr(args, "world_size", 1) or 1, 1)
    if len(training) < args.batch_size * processes:
        at_once = f" in each of {processes} processes" if processes > 1 else ""
        raise DataError(
            f"There are {len(training)} training pictures, too few for one step of --batch-size {args.batch_size}"
            f"{at_once}; lower --batch-size to {max(len(training) // processes, 1)} or less."
        )
