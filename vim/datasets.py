"""Data sets of pictures, and how class folders become the class numbers of a model."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import CIFAR100, ImageFolder, VisionDataset

from labels import imagenet_wnids
from pictures import PICTURE_SUFFIXES, PictureError, eval_transform, open_picture

IMAGENET_CLASSES = 1000


class DataError(ValueError):
    """A data set that cannot be used; its text is one sentence that names the place and the mend."""


@dataclass(frozen=True)
class Unreadable:
    """What a data set gives in place of a picture that cannot be read: the reason, naming the file."""

    reason: str


class Batch(NamedTuple):
    """The readable pictures of one step, and what is wrong with the others.

    images: (b, 3, height, width) fp32, or (0,) where none could be read; targets: (b,) int64.
    """

    images: Tensor
    targets: Tensor
    unreadable: list[str]


def collate_readable(items: Sequence[tuple[Tensor, int] | Unreadable]) -> Batch:
    """Stack what could be read into a `Batch`: the `collate_fn` for the data sets of this module."""
    readable = [item for item in items if not isinstance(item, Unreadable)]
    reasons = [item.reason for item in items if isinstance(item, Unreadable)]
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return Batch(images, torch.tensor([target for _, target in readable], dtype=torch.int64), reasons)


@dataclass(frozen=True)
class ClassMatch:
    """The class number of each folder, how many numbers the model has, and in words how they were found."""

    number_of: dict[str, int]
    num_classes: int
    found_by: str


def match_classes(
    folders: Sequence[str], *, class_names: Sequence[str] | None = None, num_classes: int | None = None
) -> ClassMatch:
    """Find the class number of each folder, so that a part of the folders gives the same numbers as all.

    Tried in this order: the names that the checkpoint carries; ImageNet's WordNet ids if there are 1000
    classes; the sorted order of the folders, which is how torchvision's ImageFolder numbers them in training.

    Args:
        folders: names of the class folders.
        class_names: the checkpoint's names by class number, None if it has none.
        num_classes: outputs of the model; None: as many as the way of matching gives.
    Raises:
        DataError: some folders are none of the names, a name stands for several classes, or the numbers
            of names, folders and outputs do not go together.
    """
    if class_names is not None and num_classes not in (None, len(class_names)):
        raise DataError(
            f"The checkpoint names {len(class_names)} classes but its model has {num_classes} outputs; "
            "write the checkpoint again with as many names as outputs."
        )
    candidates: list[tuple[str, Sequence[str]]] = []
    if class_names is not None:
        candidates.append(("the checkpoint's class names", class_names))
    if num_classes in (None, IMAGENET_CLASSES):
        candidates.append(("ImageNet's WordNet ids", imagenet_wnids()))
    for found_by, names in candidates:
        number_of = {name: number for number, name in enumerate(names)}
        if all(folder in number_of for folder in folders):
            _refuse_ambiguous(folders, names)
            return ClassMatch({folder: number_of[folder] for folder in folders}, len(names), found_by)
    for found_by, names in candidates:
        known = set(names)
        strangers = [folder for folder in folders if folder not in known]
        if class_names is not None or len(strangers) < len(folders):
            raise DataError(_describe_strangers(strangers, folders, found_by, names))
    if num_classes is not None and len(folders) > num_classes:
        raise DataError(
            f"There are {len(folders)} class folders ({_first_few(folders)}) but the model has only "
            f"{num_classes} outputs; use the checkpoint that was trained on these classes."
        )
    number_of = {folder: number for number, folder in enumerate(sorted(folders))}
    found_by = "the sorted order of the folders"
    if num_classes is not None and len(folders) < num_classes:
        found_by += " (a guess, for the model has more classes and no names for them)"
    return ClassMatch(number_of, num_classes or len(folders), found_by)


def _refuse_ambiguous(folders: Sequence[str], names: Sequence[str]) -> None:
    for folder in folders:
        numbers = [number for number, name in enumerate(names) if name == folder]
        if len(numbers) > 1:
            raise DataError(
                f"The class folder {folder!r} could be any of the classes {numbers}, which share that name; "
                "use a checkpoint whose class names differ."
            )


def _describe_strangers(strangers: Sequence[str], folders: Sequence[str], found_by: str, names: Sequence[str]) -> str:
    return (
        f"{len(strangers)} of {len(folders)} class folders are none of {found_by}: {_first_few(strangers)} "
        f"(known are {_first_few(names)}); rename the folders, or use the checkpoint trained on them."
    )


def _first_few(names: Sequence[str], count: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"


class PictureFolder(ImageFolder):
    """ROOT/CLASS/picture as (image, class number); a picture that cannot be read comes out as `Unreadable`.

    Folders and files whose names begin with a dot are not looked at; class folders may be empty.

    Args:
        root: the folder that holds the class folders.
        transform: applied to each RGB picture.
        class_names, num_classes: see `match_classes`.
    Attributes:
        found_by: how the class numbers were found, in words.
        num_classes: outputs that a model for these numbers has.
    Raises:
        DataError: there is no such folder, no class folder or no picture in it, or the classes do not match.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        folders = _class_folders(Path(root))
        match = match_classes(folders, class_names=class_names, num_classes=num_classes)
        self._number_of, self.num_classes, self.found_by = match.number_of, match.num_classes, match.found_by
        super().__init__(str(root), transform, loader=open_picture, is_valid_file=_is_picture, allow_empty=True)
        if not self.samples:
            raise DataError(
                f"The class folders of {str(root)!r} hold no pictures; known are the endings "
                f"{', '.join(sorted(PICTURE_SUFFIXES))}."
            )

    def find_classes(self, directory: str | os.PathLike[str]) -> tuple[list[str], dict[str, int]]:
        """Return the folder names and their class numbers (called by torchvision)."""
        return list(self._number_of), dict(self._number_of)

    def __getitem__(self, index: int) -> Any:
        """Return (image, class number), or `Unreadable`."""
        try:
            return super().__getitem__(index)
        except (PictureError, OSError) as error:
            return Unreadable(str(error))


def _class_folders(root: Path) -> list[str]:
    if not root.parent.is_dir():
        raise DataError(
            f"The data folder {str(root.parent)!r} does not exist; --data-path names the folder that holds "
            f"{root.name}/ with one folder of pictures per class."
        )
    if not root.is_dir():
        raise DataError(
            f"{str(root.parent)!r} has no folder {root.name!r}; --data-path names the folder that holds "
            f"{root.name}/ with one folder of pictures per class."
        )
    try:
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"The folder {str(root)!r} cannot be read: {error.strerror}.") from error
    for folder in folders:
        if not os.access(root / folder, os.R_OK | os.X_OK):  # torchvision would take it for an empty one
            raise DataError(f"The class folder {str(root / folder)!r} cannot be read: permission denied.")
    if not folders:
        raise DataError(f"{str(root)!r} holds no class folders; it needs one folder of pictures per class.")
    return folders


def _is_picture(path: str) -> bool:
    name = Path(path)
    return name.suffix.lower() in PICTURE_SUFFIXES and not name.name.startswith(".")


class INatDataset(PictureFolder):
    """iNaturalist as its contest of `year` laid it out; a class is a value of `category`.

    Classes are numbered in the order in which the training annotations first name them. The picture of the
    entry "a/b/c/d" lies in ROOT/a/c/d, and c is the number of its category in categories.json.

    Args:
        root: folder of {train,val}YEAR.json, categories.json and the pictures.
        train: the training pictures, else those for validation.
        year: 2018 or 2019.
        category: kingdom, phylum, class, order, supercategory, family, genus or name.
        loader: opens the picture at a path.
    Raises:
        DataError: a JSON file is missing or of another shape.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        train: bool = True,
        year: int = 2018,
        transform: Callable[[Any], Any] | None = None,
        target_transform: Callable[[int], int] | None = None,
        category: str = "name",
        loader: Callable[[str], Any] = open_picture,
    ) -> None:
        VisionDataset.__init__(self, str(root), transform=transform, target_transform=target_transform)
        self.loader = loader
        folder = Path(root)
        try:
            categories = _read_json(folder / "categories.json")
            training = _read_json(folder / f"train{year}.json")
            listed = training if train else _read_json(folder / f"val{year}.json")
            named = (categories[int(entry["category_id"])][category] for entry in training["annotations"])
            self.class_to_idx = {name: number for number, name in enumerate(dict.fromkeys(named))}
            self.samples = []
            for entry in listed["images"]:
                top, _, number, file = entry["file_name"].split("/")[:4]
                target = self.class_to_idx[categories[int(number)][category]]
                self.samples.append((str(folder / top / number / file), target))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"The JSON files of {str(root)!r} are not those of iNaturalist {year}: {error!r}."
            ) from error
        self.classes = list(self.class_to_idx)
        self.imgs, self.targets = self.samples, [target for _, target in self.samples]
        self.nb_classes = self.num_classes = len(self.classes)
        self.found_by = f"the {category} of the training annotations"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"Cannot read {str(path)!r}, which iNaturalist needs: {error}.") from error


def build_dataset(
    is_train: bool,
    args: argparse.Namespace,
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
) -> tuple[Dataset[Any], int]:
    """Return the data set that `args` names, and the number of classes of a model for it.

    Args:
        is_train: the training pictures with their augmentation, else those for validation.
        args: data_set, data_path, inat_category, and what `build_transform` reads.
        class_names: the checkpoint's names by class number, None if it has none.
        num_classes: outputs of the model, None if it is to be built for the data.
    Raises:
        DataError: the data set is not there, or is not one for this model.
    """
    transform = build_transform(is_train, args)
    if args.data_set == "IMNET":
        folder = Path(args.data_path) / ("train" if is_train else "val")
        pictures = PictureFolder(folder, transform, class_names=class_names, num_classes=num_classes)
        return pictures, pictures.num_classes
    dataset: Dataset[Any]
    if args.data_set == "CIFAR":
        dataset, count = _open_cifar(args.data_path, is_train, transform), 100
    elif args.data_set in ("INAT", "INAT19"):
        year = 2018 if args.data_set == "INAT" else 2019
        dataset = INatDataset(args.data_path, is_train, year, category=args.inat_category, transform=transform)
        count = dataset.nb_classes
    else:
        raise DataError(f"`data_set` must be CIFAR, IMNET, INAT or INAT19, got {args.data_set!r}.")
    if num_classes not in (None, count):
        raise DataError(
            f"{args.data_set} has {count} classes but the model has {num_classes} outputs; "
            "use a checkpoint that was trained on it."
        )
    return dataset, count


def _open_cifar(folder: str, is_train: bool, transform: Callable[[Any], Any]) -> CIFAR100:
    """Open CIFAR-100; torchvision unpickles its files only after it found their known MD5 sums."""
    try:
        return CIFAR100(folder, train=is_train, transform=transform)
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"{str(folder)!r} does not hold CIFAR-100 as torchvision lays it out (cifar-100-python/): {error}"
        ) from error


_AUGMENTATION = {  # option of timm's create_transform: where `args` has it
    "auto_augment": "aa",
    "color_jitter": "color_jitter",
    "interpolation": "train_interpolation",
    "re_count": "recount",
    "re_mode": "remode",
    "re_prob": "reprob",
}


def build_transform(is_train: bool, args: argparse.Namespace) -> Callable[[Any], Tensor]:
    """Return what turns an RGB picture into the (3, height, width) fp32 input of the model.

    Args:
        is_train: timm's augmentation by `args` (pictures of up to 32 pixels: a random crop with a margin of
            4 instead of a random part); else the same as inference does.
        args: input_size (pixels, or a (height, width) pair), eval_crop_ratio; for training also color_jitter,
            aa, train_interpolation, reprob, remode, recount.
    """
    if not is_train:
        return eval_transform(args.input_size, args.eval_crop_ratio)
    from timm.data import create_transform

    options = {option: getattr(args, flag) for option, flag in _AUGMENTATION.items()}
    steps = create_transform(args.input_size, is_training=True, **options)
    if isinstance(args.input_size, int) and args.input_size <= 32:
        steps.transforms[0] = transforms.RandomCrop(args.input_size, padding=4)
    return steps
