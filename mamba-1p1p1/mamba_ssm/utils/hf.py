"""Read models from local folders and from the Hugging Face hub, and write files whole or not at all.

Nothing here is needed to import the package: huggingface_hub and safetensors are imported when they are used.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["load_config_hf", "load_state_dict_hf", "write_atomically"]

CONFIG_NAME = "config.json"
WEIGHT_NAMES = ("model.safetensors", "pytorch_model.bin")


def load_config_hf(model_name: str) -> dict[str, Any]:
    """Return the contents of a model's `config.json`.

    Args:
        model_name: a local folder, or a repository "owner/name" of the Hugging Face hub.

    Raises:
        ValueError: there is no such model or file, or the file is not a JSON object.
        RuntimeError: the hub cannot be reached, or huggingface_hub is not installed.
    """
    path = _find_file(model_name, (CONFIG_NAME,))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(config).__name__}.")
    return config


def load_state_dict_hf(
    model_name: str, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Return the weights in a model's `model.safetensors`, or else `pytorch_model.bin`.

    Args:
        model_name: a local folder, or a repository "owner/name" of the Hugging Face hub.
        device: where to put the weights; the CPU by default.
        dtype: what to convert floating-point weights to; by default they stay as stored.

    Raises:
        ValueError: there is no such model or file, or the file is damaged, or holds more than tensors.
        RuntimeError: the hub cannot be reached, or a package that reads the file is not installed.

    No code from the file is run.
    """
    path = _find_file(model_name, WEIGHT_NAMES)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    return {
        name: tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name, tensor in state.items()
    }


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Let `write` fill a temporary file beside `path`, and rename it to `path` once it is on the disk."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _find_file(model_name: str, names: tuple[str, ...]) -> Path:
    """Return the local path of the first of `names` that the model has, downloading it if need be."""
    folder = Path(model_name)
    if folder.is_dir():
        for name in names:
            if (folder / name).is_file():
                return folder / name
        raise ValueError(f"The folder {folder} has no {' or '.join(names)}.")
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise RuntimeError(
            f"{model_name!r} is no local folder, and reading it from the Hugging Face hub needs a package: "
            "pip install huggingface_hub."
        ) from error
    for name in names:
        try:
            return Path(huggingface_hub.hf_hub_download(model_name, name))
        except (errors.HFValidationError, errors.RepositoryNotFoundError) as error:
            raise ValueError(
                f"{model_name!r} is neither a local folder nor a repository of the Hugging Face hub that is "
                "open to you."
            ) from error
        except errors.LocalEntryNotFoundError as error:
            raise _unreachable(model_name, name) from error
        except errors.EntryNotFoundError:
            continue
        except (errors.HfHubHTTPError, OSError) as error:
            raise _unreachable(model_name, name) from error
    raise ValueError(f"The repository {model_name!r} of the Hugging Face hub has no {' or '.join(names)}.")


def _unreachable(model_name: str, name: str) -> RuntimeError:
    return RuntimeError(
        f"{model_name!r} is no local folder, and its {name} could not be downloaded from the Hugging Face "
        "hub; check the network, or give a local folder."
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise RuntimeError(f"Reading {path} needs a package: pip install safetensors.") from error
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}.") from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or holds more than weights; nothing of it was run.") from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} must hold a dictionary of tensors by parameter name.")
    return state
