"""Data sets of pictures, and the transforms of their pictures."""

from __future__ import annotations

import argparse
import copy
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

from class_folders import class_folders, folder_to_split, held_out, is_picture, paths_within
from class_match import ClassMatch, DataError, match_classes
from pictures import PICTURE_SUFFIXES, PictureError, eval_transform, open_picture

__all__ = [
    "Batch",
    "ClassMatch",
    "DataError",
    "INatDataset",
    "PictureFolder",
    "Replaced",
    "Unreadable",
    "build_dataset",
    "build_transform",
    "collate_readable",
    "match_classes",
]


@dataclass(frozen=True)
class Unreadable:
    """What a data set gives in place of a picture that cannot be read: the reason, naming the file."""

    reason: str


@dataclass(frozen=True)
class Replaced:
    """Another (image, class number) in place of one that cannot be read, and why, one reason per picture tried."""

    item: tuple[Tensor, int]
    reasons: tuple[str, ...]


class Batch(NamedTuple):
    """The readable pictures of one step, and what is wrong with the others.

    images: (b, 3, height, width) fp32, or (0,) where none could be read; targets: (b,) int64.
    """

    images: Tensor
    targets: Tensor
    unreadable: list[str]


def collate_readable(items: Sequence[tuple[Tensor, int] | Unreadable | Replaced]) -> Batch:
    """Stack what could be read into a `Batch`: the `collate_fn` for the data sets of this module."""
    readable: list[tuple[Tensor, int]] = []
    reasons: list[str] = []
    for item in items:
        if isinstance(item, Unreadable):
            reasons.append(item.reason)
        elif isinstance(item, Replaced):
            readable.append(item.item)
            reasons.extend(item.reasons)
        else:
            readable.append(item)
    images = torch.stack([image for image, _ in readable]) if readable else torch.empty(0)
    return Batch(images, torch.tensor([target for _, target in readable], dtype=torch.int64), reasons)


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
        note: what a person should know about where the pictures come from, if anything.
    Raises:
        DataError: there is no such folder, no class folder or no picture in it, or the classes do not match.
    """

    note: str | None = None

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        class_names: Sequence[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        folders = class_folders(Path(root))
        match = match_classes(folders, class_names=class_names, num_classes=num_classes)
        self._number_of, self.num_classes, self.found_by = match.number_of, match.num_classes, match.found_by
        super().__init__(str(root), transform, loader=open_picture, is_valid_file=is_picture, allow_empty=True)
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

    def split(self, part: float, seed: int) -> tuple[PictureFolder, PictureFolder]:
        """Return the pictures to train on and those kept for validation, with a `note`; see `held_out`."""
        kept = held_out(paths_within(self.root, [path for path, _ in self.samples]), part, seed)
        without = sorted(set(range(len(self))) - set(kept))
        note = (
            f"there is no val/, so of the {len(self)} pictures of {self.root!r} {len(kept)} are for validation and "
            f"{len(without)} for training; the same --val-split {part:g} and --seed {seed} draw the same ones again"
        )
        return self._only(without, note), self._only(kept, note)

    def _only(self, indices: Sequence[int], note: str) -> PictureFolder:
        some = copy.copy(self)
        some.samples = some.imgs = [self.samples[index] for index in indices]
        some.targets = [target for _, target in some.samples]
        some.note = note
        return some


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
        is_train: the training pictures with their augmentation, else those for validation. Where class folders
            have no val/ beside them, both are parts of the same folder; see `class_folders`.
        args: data_set, data_path, inat_category, val_split, seed, and what `build_transform` reads.
        class_names: the checkpoint's names by class number, None if it has none.
        num_classes: outputs of the model, None if it is to be built for the data.
    Raises:
        DataError: the data set is not there, or is not one for this model.
    """
    transform = build_transform(is_train, args)
    if args.data_set == "IMNET":
        data = Path(args.data_path)
        undivided = folder_to_split(data)
        folder = undivided or data / ("train" if is_train else "val")
        pictures = PictureFolder(folder, transform, class_names=class_names, num_classes=num_classes)
        if undivided is not None:
            training, validation = pictures.split(args.val_split, args.seed)
            pictures = training if is_train else validation
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
    "hflip": "hflip",
    "interpolation": "train_interpolation",
    "re_count": "recount",
    "re_mode": "remode",
    "re_prob": "reprob",
}


def build_transform(is_train: bool, args: argparse.Namespace) -> Callable[[Any], Tensor]:
    """Return what turns an RGB picture into the (3, height, width) fp32 input of the model.

    Args:
        is_train: timm's augmentation by `args` (for inputs of up to 32 pixels the picture, made to just cover the
            input, in a random crop with a margin of 4 instead of a random part; with `affine`, a small random move
            and then evaluation's own crop instead of either); else the same as inference does.
        args: input_size (pixels, or a (height, width) pair), eval_crop_ratio; for training also affine,
            color_jitter, aa, hflip, train_interpolation, reprob, remode, recount.
    """
    if not is_train:
        return eval_transform(args.input_size, args.eval_crop_ratio)
    from timm.data import create_transform

    from augment import Cover, RandomMove, mend_posterize

    options = {option: getattr(args, flag) for option, flag in _AUGMENTATION.items()}
    if options["auto_augment"] in ("", "none"):
        options["auto_augment"] = None
    try:
        steps = create_transform(args.input_size, is_training=True, **options)
    except (AssertionError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise DataError(
            f"The augmentation cannot be made ({error!r}); --aa takes none, rand-m9-mstd0.5-inc1 and what else timm "
            "knows, --remode const, rand or pixel."
        ) from error
    mend_posterize(steps)
    if args.affine:
        crop = eval_transform(args.input_size, args.eval_crop_ratio).crop
        steps.transforms[:1] = [RandomMove(args.train_interpolation), crop]
    elif isinstance(args.input_size, int) and args.input_size <= 32:
        side = args.input_size
        steps.transforms[:1] = [Cover((side, side)), transforms.RandomCrop(side, padding=4)]
    return steps
