"""From what a person names to a checkpoint file on this disk: a path, an https address or a Hugging Face repository."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import urllib.parse
from collections.abc import Sequence
from pathlib import Path

import torch

from command_line import pip_install

_LONGEST_SHOWN = 300  # characters of a path
SUFFIXES = (".pth", ".pt", ".bin", ".safetensors")
_HUB_PREFIXES = ("hf-hub:", "hf_hub:")
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read, written or used for this model; the message is one clear sentence."""


def find_file(source: str, finetuned: bool = False, cache_dir: str | None = None) -> tuple[Path, str]:
    """Return the file that `source` means, downloaded if need be, and a name for it that says which one it is.

    Args:
        source: a path; an https:// address; or a Hugging Face repository "owner/name", also as "hf-hub:owner/name" or
            "hf-hub:owner/name/FILE". A path that exists wins.
        finetuned: in a repository that holds several, take the fine-tuned (`_ft_`, stride 8) weights.
        cache_dir: folder for downloads; the libraries' own if None.
    Raises:
        CheckpointError: there is no such file, or it cannot be fetched.
    """
    if "://" in source:
        return _download(source, cache_dir), source
    path = Path(os.path.expanduser(source))  # unlike that of Path, without an error for a user who is not there
    if os.path.isdir(path):
        raise CheckpointError(f"{source} is a folder: name the checkpoint file in it")
    if os.path.exists(path):
        return path, source
    name = source
    for prefix in _HUB_PREFIXES:
        name = name.removeprefix(prefix)
    if name == source and (not _HUB_ID.fullmatch(source) or source.lower().endswith(SUFFIXES)):
        shown = source if len(source) <= _LONGEST_SHOWN else f"{source[:_LONGEST_SHOWN]} ..."
        raise CheckpointError(f"there is no checkpoint file {shown}")
    owner, _, rest = name.partition("/")
    repository, _, wanted = rest.partition("/")
    if not owner or not repository:
        raise CheckpointError(f"{source} is no Hugging Face repository: write hf-hub:OWNER/NAME")
    return _from_hub(f"{owner}/{repository}", wanted, finetuned, cache_dir)


def _download(url: str, cache_dir: str | None) -> Path:
    """Fetch an https address into the cache; a file name that ends in -HASH.SUFFIX is checked against its SHA-256."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" or not parts.netloc:
        raise CheckpointError(f"only https:// addresses are fetched, got {url}")
    name = Path(urllib.parse.unquote(parts.path)).name or "checkpoint"
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    # Many projects call their file checkpoint.pth, so the name in the cache tells the addresses apart.
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if path.exists():
        return path
    checksum = re.search(r"-([0-9a-f]{8,})\.", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=checksum and checksum.group(1), progress=sys.stderr.isatty()
        )
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"cannot fetch {url}: {first_line(error)}") from error
    return path


def _from_hub(repository: str, wanted: str, finetuned: bool, cache_dir: str | None) -> tuple[Path, str]:
    """Fetch a file of a Hugging Face repository, or find it in the local cache when the hub cannot be reached."""
    try:
        import huggingface_hub
    except ImportError as error:
        raise CheckpointError(
            f"there is no file {repository}, and to read it as a Hugging Face repository the package huggingface_hub "
            f"is needed: {pip_install('huggingface_hub')} installs it"
        ) from error
    name = wanted
    try:
        if not name:
            listing = huggingface_hub.HfApi().model_info(repository, timeout=20).siblings or []
            name = choose_weights_file(repository, [entry.rfilename for entry in listing], finetuned)
        path = Path(huggingface_hub.hf_hub_download(repository, name, cache_dir=cache_dir))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's client raises the errors of whatever HTTP library it is built on
        cached = _cached_files(repository, cache_dir)
        if cached and not name:
            name = choose_weights_file(repository, list(cached), finetuned)
        if name not in cached:
            raise CheckpointError(
                f"there is no file {wanted or repository}, and the Hugging Face repository {repository} cannot be read "
                f"({first_line(error)}): check the name and the network, or download the weights elsewhere and "
                "name the file"
            ) from error
        path = cached[name]
    return path, f"{repository}/{name}"


def _cached_files(repository: str, cache_dir: str | None) -> dict[str, Path]:
    """Return the files of a repository that are on this disk already, by their name in it."""
    import huggingface_hub

    try:
        folder = Path(huggingface_hub.snapshot_download(repository, cache_dir=cache_dir, local_files_only=True))
    except (OSError, ValueError):
        return {}
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return {file.relative_to(folder).as_posix(): file for file in files}


def choose_weights_file(repository: str, files: Sequence[str], finetuned: bool = False) -> str:
    """Return the name of the weights among a repository's files.

    In this order: model.safetensors, a .pth without `_ft_` in its name, pytorch_model.bin. The fine-tuned weights are
    the .safetensors or .pth with `_ft_` in its name.

    Raises:
        CheckpointError: there is none; names the files that there are.
    """
    marked = [name for name in sorted(files) if "_ft_" in name]
    plain = [name for name in sorted(files) if "_ft_" not in name]
    if finetuned:
        candidates = [name for name in marked if name.endswith((".safetensors", ".pth"))]
    else:
        candidates = [name for name in plain if name == "model.safetensors"]
        candidates += [name for name in plain if name.endswith(".pth")]
        candidates += [name for name in plain if name == "pytorch_model.bin"]
    if not candidates:
        kind = "fine-tuned (_ft_) weights" if finetuned else "weights"
        raise CheckpointError(
            f"the Hugging Face repository {repository} holds no {kind}; it has {', '.join(files) or 'no files'}"
        )
    return candidates[0]


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type if it has none; for use inside a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
