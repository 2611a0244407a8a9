"""Read, use and write checkpoints; nothing in a checkpoint is ever executed.

Layouts that are read: {"model": weights, "model_ema": ..., "args": ..., "epoch": ...} of `main.py`,
{"state_dict": ...}, {"module": ...}, a bare {name: tensor}, and safetensors (class names, model name and picture size
in its metadata). Weights of a VMamba are renamed to those of the models here, whichever line they are of.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import other_family
from checkpoint_sources import CheckpointError, find_file, first_line
from pos_embed import resize_pos_embed
from weights import LoadReport, load_weights

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "LoadReport",
    "UnreadableCheckpointError",
    "load_weights",
    "read_checkpoint",
    "resize_pos_embed",
    "save_checkpoint",
    "write_whole",
]

_WEIGHT_ENTRIES = ("model", "state_dict", "module")
_METADATA = ("class_names", "model_name", other_family.SETTINGS, "img_size", "epoch")


class UnreadableCheckpointError(CheckpointError):
    """A file that is no whole checkpoint; `fault` says what is wrong with it, the message also what to do."""

    def __init__(self, fault: str, mend: str) -> None:
        super().__init__(f"{fault}; {mend}")
        self.fault = fault


@dataclass
class Checkpoint:
    """What a checkpoint file holds.

    Attributes:
        model, ema: weights by name; `ema` is their moving average, None if the file has none.
        args: the command line of the training run, if it was stored.
        epoch: the last finished epoch, counted from 0.
        class_names: names by class number.
        model_name, img_size: registered name and picture size (pixels) of the network, when the file says; the name
            of a published VMamba is found by the sizes of its weights, and a VMamba whose settings the file holds is
            registered.
        source: the file or repository that was read, for messages.
        extra: everything else: optimizer, lr_scheduler, scaler ...
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor] | None = None
    args: argparse.Namespace | None = None
    epoch: int | None = None
    class_names: list[str] | None = None
    model_name: str | None = None
    img_size: int | tuple[int, int] | None = None
    source: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Classes of the head: rows of its weight, 0 without a head."""
        heads = (self.model.get(name) for name in ("head.weight", "classifier.head.weight"))
        return next((head.shape[0] for head in heads if head is not None and head.ndim), 0)


def read_checkpoint(source: str, *, finetuned: bool = False, cache_dir: str | None = None) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Args:
        source: a .pth, .pt, .bin or .safetensors file; an https:// address of one; a Hugging Face repository
            "owner/name".
        finetuned: take a repository's fine-tuned (stride 8) weights.
        cache_dir: folder for downloads.
    Raises:
        CheckpointError: not found, not readable, truncated, of another format, or with code in it; one sentence.
    """
    path, name = find_file(str(source), finetuned, cache_dir)
    payload = _read_safetensors(path, name) if _is_safetensors(path) else _read_torch(path, name)
    return _interpret(payload, name)


def _is_safetensors(path: Path) -> bool:
    return path.suffix.lower() == ".safetensors"


def _read_safetensors(path: Path, name: str) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            payload: dict[str, Any] = {"model": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
            metadata = file.metadata() or {}
        payload.update({key: json.loads(metadata[key]) for key in _METADATA if key in metadata})
    except Exception as error:  # of a damaged header any of several libraries complains in its own way
        raise CheckpointError(
            f"{name} is not a whole safetensors file ({first_line(error)}): download or write it again"
        ) from error
    return payload


def _read_torch(path: Path, name: str) -> Any:
    reader = other_family.package().unpickling
    try:
        return reader.read_torch_file(path, name)
    except reader.DamagedError as error:
        raise UnreadableCheckpointError(error.fault, "download it again") from error
    except reader.RefusedError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {(error.strerror or str(error)).lower()}") from error


def _in_words(value: Any) -> str:
    return other_family.package().unpickling.in_words(value)


def _interpret(payload: Any, name: str) -> Checkpoint:
    """Sort the entries of a checkpoint into their places."""
    if not isinstance(payload, Mapping):
        raise CheckpointError(f"{name} holds {_in_words(payload)}, not the weights of a model by name")
    entries = dict(payload)
    key = next((key for key in _WEIGHT_ENTRIES if isinstance(entries.get(key), Mapping)), None)
    if key is None:
        if not entries or not all(isinstance(value, Tensor) for value in entries.values()):
            listed = ", ".join(str(entry) for entry in list(entries)[:8]) or "nothing"
            raise CheckpointError(f"{name} holds no weights: its entries are {listed}")
        weights = _checked_weights(entries, name)
        return Checkpoint(weights, model_name=_vmamba_name(weights), source=name)
    args = entries.pop("args", None)
    args = args if isinstance(args, argparse.Namespace) else None
    ema = entries.pop("model_ema", None)
    if "processes" in entries:  # of a run of ours, which writes down what others may not have or mean otherwise
        _refuse_damage(entries, args, name)
    img_size = entries.pop("img_size", getattr(args, "input_size", None))
    weights = _checked_weights(entries.pop(key), name)
    called = _typed(str, entries.pop("model_name", None) or getattr(args, "model", None))
    return Checkpoint(
        model=weights,
        ema=_checked_weights(ema, name) if isinstance(ema, Mapping) and ema else None,
        args=args,
        epoch=_typed(int, entries.pop("epoch", None)),
        class_names=_class_names(entries.pop("class_names", None), name),
        model_name=_model_name(called, entries.pop(other_family.SETTINGS, None), weights, name),
        img_size=_size(img_size),
        source=name,
        extra=entries,
    )


# What a run of ours writes down: in words, and as a test.
_RUN_STATE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "epoch": ("a number from -1 on", lambda value: _typed(int, value) is not None and value >= -1),
    "step": ("a number from 0 on", lambda value: _typed(int, value) is not None and value >= 0),
    "steps_per_epoch": ("a number from 1 on", lambda value: _typed(int, value) is not None and value >= 1),
    "max_accuracy": ("a number", lambda value: _typed((int, float), value) is not None),
    "img_size": ("one or two numbers of pixels", lambda value: _size(value) is not None),
    "args.seed": (
        "a 64-bit number",
        lambda value: _typed(int, value) is not None and -(2**63) <= value < 2**63 - 2**20,
    ),
    "args.val_split": ("between 0 and 1", lambda value: _typed((int, float), value) is not None and 0 < value < 1),
}


def _refuse_damage(entries: Mapping[str, Any], args: argparse.Namespace | None, name: str) -> None:
    found = {**entries, **{f"args.{key}": value for key, value in vars(args or argparse.Namespace()).items()}}
    for key, (what, holds) in _RUN_STATE.items():
        if found.get(key) is not None and not holds(found[key]):
            raise CheckpointError(
                f"{name} is damaged: its {key} is {str(found[key])[:40]}, not {what}; take another one"
            )
    step, length = found.get("step") or 0, found.get("steps_per_epoch")
    if length is not None and step > length:
        raise CheckpointError(f"{name} is damaged: it names step {step} of the {length} of an epoch; take another one")


def _typed(kind: type | tuple[type, ...], value: Any) -> Any:
    return value if isinstance(value, kind) and not isinstance(value, bool) else None


def _size(value: Any) -> int | tuple[int, int] | None:
    """Return a picture size, one number or two; None for anything else."""
    sides = value if isinstance(value, list | tuple) else [value]
    if len(sides) not in (1, 2) or any(_typed(int, side) is None or side < 1 for side in sides):
        return None
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def _class_names(value: Any, name: str) -> list[str] | None:
    if value is None:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(entry, str) for entry in value):
        raise CheckpointError(f"{name} holds class_names that are no list of texts")
    return list(value)


def _checked_weights(weights: Mapping[str, Any], name: str) -> dict[str, Tensor]:
    """Return weights by name, without the prefix that torch's data-parallel wrapper puts before every name."""
    if not weights:
        raise CheckpointError(f"{name} holds no weights")
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{name} holds {_in_words(value)} under {key!r}, not a tensor under its name")
        if value.is_meta or value.is_quantized or value.layout != torch.strided or value.is_complex():
            raise CheckpointError(f"{name} holds under {key!r} a tensor that is no array of real numbers")
    if other_family.is_vmamba(weights):
        try:
            return other_family.package().weights.rename(weights)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be used: {error}") from error
    prefix = "module." if all(key.startswith("module.") for key in weights) else ""
    return {key[len(prefix) :]: value for key, value in weights.items()}


def _model_name(called: str | None, settings: Any, weights: Mapping[str, Tensor], name: str) -> str | None:
    """Return the registered name of a network by what a checkpoint calls it; no file that it names is looked for."""
    if settings is not None:
        try:
            return other_family.described(settings, called or "vssm", weights)
        except ValueError as error:
            raise CheckpointError(f"{name} cannot be used: {error}") from error
    return called if called and not other_family.is_configuration(called) else _vmamba_name(weights)


def _vmamba_name(weights: Mapping[str, Tensor]) -> str | None:
    """Return the registered name of the VMamba that weights fit; the published files do not say it."""
    return other_family.package().weights.fitting_variant(weights) if other_family.is_vmamba(weights) else None


def save_checkpoint(path: str | Path, contents: dict[str, Any]) -> None:
    """Write a checkpoint whole or not at all: to a temporary file beside it, flushed to the disk, then renamed.

    Args:
        path: ends in .safetensors for weights alone (with class_names, model_name, img_size and epoch as metadata); any
            other name for torch's format.
        contents: "model" (weights by name) and what else belongs in it.
    Raises:
        CheckpointError: it cannot be written, or holds what safetensors has no place for; an older file stays.
    """
    path = Path(path)
    if _is_safetensors(path):
        unfit = sorted(set(contents) - {"model", *_METADATA})
        if unfit:
            raise CheckpointError(
                f"a .safetensors file holds weights and {', '.join(_METADATA)} alone, not {', '.join(unfit)}: "
                f"call {path.name} .pth instead"
            )
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in contents["model"].items()}
        metadata = {key: json.dumps(contents[key]) for key in _METADATA if contents.get(key) is not None}
        # Not safetensors' save_file: it makes files that only their owner can read.
        write_whole(path, lambda file: file.write_bytes(save(tensors, metadata={"format": "pt", **metadata})))
    else:
        write_whole(path, lambda file: torch.save(contents, file))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and put it in the place of `path`.

    Raises:
        CheckpointError: it cannot be written; an older file stays.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot write {path}: {_why_unwritten(path, error)}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _why_unwritten(path: Path, error: BaseException) -> str:
    """Say what torch, which names a line of its own source code, does not."""
    if "inline_container" not in str(error) and getattr(error, "errno", None) != errno.ENOSPC:
        return first_line(error)
    reason = "the disk may be full" if isinstance(error, RuntimeError) else first_line(error)
    with contextlib.suppress(OSError):
        reason += f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB are free on it)"
    return f"{reason}; make room or name another folder"
