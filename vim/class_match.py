"""How the names of class folders become the class numbers of a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labels import imagenet_wnids

IMAGENET_CLASSES = 1000


class DataError(ValueError):
    """A data set that cannot be used; its text is one sentence that names the place and the mend."""


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
            f"There are {len(folders)} class folders ({first_few(folders)}) but the model has only "
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
        f"{len(strangers)} of {len(folders)} class folders are none of {found_by}: {first_few(strangers)} "
        f"(known are {first_few(names)}); rename the folders, or use the checkpoint trained on them."
    )


def first_few(names: Sequence[str], count: int = 5) -> str:
    shown = ", ".join(repr(name) for name in names[:count])
    return shown if len(names) <= count else f"{shown} and {len(names) - count} more"
