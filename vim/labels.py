"""Names for classes: ImageNet's own, a file's, or the ones a checkpoint carries."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

MAX_LABEL_BYTES = 16 * 2**20  # a list of names is a small file; anything larger is the wrong file


class LabelError(ValueError):
    """A list of class names cannot be used; the message is one sentence that names the file and the mend."""


@functools.lru_cache(maxsize=1)
def _imagenet() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (names, wnids) of the 1000 ImageNet classes in training order, from timm's own tables."""
    try:
        from timm.data import ImageNetInfo
    except ImportError as error:  # ONNX files run where it is not installed, and bring their names along
        raise LabelError(
            f"The words for WordNet ids such as n01440764 are timm's, which cannot be imported ({error}): install it, "
            "or give --labels a file with words."
        ) from error

    info = ImageNetInfo("imagenet-1k")
    indices = range(info.num_classes())
    return (
        tuple(info.index_to_description(index) for index in indices),
        tuple(info.index_to_label_name(index) for index in indices),
    )


def imagenet_names() -> list[str]:
    """Return the 1000 ImageNet class names in training order, such as "tench, Tinca tinca"."""
    return list(_imagenet()[0])


def imagenet_wnids() -> list[str]:
    """Return the 1000 WordNet ids of ImageNet in training order, such as "n01440764"."""
    return list(_imagenet()[1])


def class_names_for(num_classes: int, *, labels_file: str | None, checkpoint_names: Sequence[str] | None) -> list[str]:
    """Return one printable name per class, for people to read.

    A labels file wins over the checkpoint's names; without either, a head of 1000 classes gets ImageNet's
    names and any other "Class 0", "Class 1" and so on. WordNet ids are replaced by the words they stand for
    and control characters by spaces, so match folders with the checkpoint's own names, not with these.

    Args:
        num_classes: rows of the classifier.
        labels_file: path to a text file (one name per line) or JSON (a list, or {index: name}); None: none.
        checkpoint_names: names that the checkpoint carries, in class order; None: it carries none.
    Raises:
        LabelError: the file cannot be read, or a list has another length than `num_classes`.
    """
    if labels_file is not None:
        names, owner = read_labels(labels_file), f"The labels file {labels_file!r}"
    elif checkpoint_names is not None:
        names, owner = list(checkpoint_names), "The checkpoint"
    elif num_classes == 1000:
        return imagenet_names()
    else:
        return [f"Class {index}" for index in range(num_classes)]
    if len(names) != num_classes:
        raise LabelError(
            f"{owner} has {len(names)} names but the model has {num_classes} classes; "
            f"give --labels a file with {num_classes} names."
        )
    return _readable(names)


def read_labels(path: str | Path) -> list[str]:
    """Read class names from a text file (one per line) or JSON (list, or {index: name or [wnid, name]}).

    Raises:
        LabelError: the file is missing, unreadable, no text, too large, or not of these shapes.
    """
    text = _read_text(path)
    if Path(path).suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        names = _names_from_json(path, text)
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    for index, name in enumerate(names):
        if not name.strip():
            raise LabelError(f"The labels file {str(path)!r} has an empty name for class {index}; fill it in.")
    if not names:
        raise LabelError(f"The labels file {str(path)!r} is empty; it needs one name per line, or JSON.")
    return names


def _read_text(path: str | Path) -> str:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_LABEL_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise LabelError(f"Cannot read the labels file {str(path)!r}: {reason}.") from error
    if len(raw) > MAX_LABEL_BYTES:
        raise LabelError(
            f"The labels file {str(path)!r} is larger than {MAX_LABEL_BYTES // 2**20} MiB; "
            "it needs one name per line, or JSON."
        )
    # Notepad on Windows writes UTF-16 with a mark; everything else in use today is UTF-8.
    encoding = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise LabelError(f"The labels file {str(path)!r} is not UTF-8 text: save it as UTF-8.") from error
    if "\0" in text:
        raise LabelError(f"The labels file {str(path)!r} is not a text file; it needs one name per line, or JSON.")
    return text


def _names_from_json(path: str | Path, text: str) -> list[str]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise LabelError(f"The labels file {str(path)!r} is not valid JSON: {error}.") from error
    if isinstance(data, dict):
        data = _in_index_order(path, data)
    if not isinstance(data, list):
        raise LabelError(f"The labels file {str(path)!r} must hold a JSON list of names or {{index: name}}.")
    return [_name_of(path, index, value) for index, value in enumerate(data)]


def _in_index_order(path: str | Path, table: dict[str, object]) -> list[object]:
    """Turn {"0": a, "1": b} into [a, b]; every index from 0 must be there once."""
    by_index = {int(key): value for key, value in table.items() if key.isascii() and key.isdigit()}
    for index in range(len(table)):
        if index not in by_index:
            raise LabelError(
                f"The labels file {str(path)!r} has {len(table)} entries but none for index {index}; "
                "a JSON object must map every index from 0 on to a name."
            )
    return [by_index[index] for index in range(len(table))]


def _name_of(path: str | Path, index: int, value: object) -> str:
    """Take a name as it is, or out of the [wnid, name] pair that the Keras ImageNet file has."""
    if isinstance(value, list) and len(value) == 2:
        value = value[1]
    if not isinstance(value, str):
        raise LabelError(f"The labels file {str(path)!r} has {value!r} for class {index}; a name must be text.")
    return value


def _readable(names: list[str]) -> list[str]:
    """Replace WordNet ids by words and unprintable characters (terminal escapes too) by spaces."""
    if any(len(name) == 9 and name[0] == "n" and name[1:].isdigit() for name in names):
        words = dict(zip(imagenet_wnids(), imagenet_names(), strict=True))
        names = [words.get(name, name) for name in names]
    printable = ("".join(c if c.isprintable() else " " for c in name) for name in names)
    return [" ".join(name.split()) for name in printable]
