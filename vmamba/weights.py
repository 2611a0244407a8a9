"""Read and write the weights of all four lines of VMamba: which names they have, and which model they fit.

The names of the package line (`classification/models/` upstream) are those of the models here. The archive line of
January 2024 and the single-file line of 2025 call the same weights otherwise, and detectors and wrappers put prefixes
before them; `rename` undoes all of that. Nothing in a file is executed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from vmamba.factories import VARIANTS
from vmamba.unpickling import in_words, read_torch_file
from vmamba.vssm import resize_pos_embed

__all__ = [
    "PUBLISHED",
    "export_single_file",
    "family",
    "fitting_variant",
    "load_into",
    "load_published",
    "published_url",
    "read_weights",
    "rename",
    "resize_pos_embed",
]

_log = logging.getLogger(__name__)

_RELEASES = "https://github.com/MzeroMiko/VMamba/releases/download"
# Tag and file of upstream's releases, by factory.
PUBLISHED = {
    "vanilla_vmamba_tiny": ("v0cls", "vssmtiny_dp01_ckpt_epoch_292.pth"),
    "vanilla_vmamba_small": ("v0cls", "vssmsmall_dp03_ckpt_epoch_238.pth"),
    "vanilla_vmamba_base": ("v0cls", "vssmbase_dp06_ckpt_epoch_241.pth"),
    "vmamba_tiny_s2l5": ("v2cls", "vssm_tiny_0230_ckpt_epoch_262.pth"),
    "vmamba_small_s2l15": ("v2cls", "vssm_small_0229_ckpt_epoch_222.pth"),
    "vmamba_base_s2l15": ("v2cls", "vssm_base_0229_ckpt_epoch_237.pth"),
    "vmamba_tiny_s1l8": ("v2cls", "vssm1_tiny_0230s_ckpt_epoch_264.pth"),
    "vmamba_small_s1l20": ("v2cls", "vssm1_small_0229s_ckpt_epoch_240.pth"),
    "vmamba_base_s1l20": ("v2cls", "vssm1_base_0229s_ckpt_epoch_225.pth"),
}
_PUBLISHED_CLASSES = 1000

_WEIGHT_ENTRIES = ("model", "state_dict", "module")
_HEAD = ("classifier.head.weight", "classifier.head.bias")
_DIRECTIONS = 4

_WRAPPERS = re.compile(r"(?:module\.)+")
_ARCHIVE = re.compile(
    r"(layers\.\d+\.blocks\.\d+\.)(ln_1|self_attention)(?=\.)|(patch_embed\.proj|patch_embed\.norm|norm|head)(?=\.)"
)
_SINCE_ARCHIVE = {
    "patch_embed.proj": "patch_embed.0",
    "patch_embed.norm": "patch_embed.2",
    "ln_1": "norm",
    "self_attention": "op",
    "norm": "classifier.norm",
    "head": "classifier.head",
}
_PROJECTION = re.compile(r"(.*\.op\.)(x_proj|dt_projs)\.weight")
_MERGING = re.compile(r"(layers\.\d+\.downsample\.)([12])\.(weight|bias)")
_BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
_MERGED = {"1": "norm", "2": "reduction"}
# What the models keep as matrices and other lines may keep as 1 x 1 convolutions.
_MATRIX = re.compile(r"(?:.*\.)?(?:in_proj|out_proj|fc1|fc2|reduction|head|x_proj|dt_projs)\.weight")


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of any line under the names, and in the shapes, of the models here.

    Args:
        state: weights by name. `module.` before the names is dropped. If any of them is in a `backbone.`, only these
            are kept, and the prefix dropped: the others are a detector's neck and heads.
    Returns:
        Views where a shape changes, else the tensors themselves; names that belong to no line as they are.
    Raises:
        ValueError: two names come to the same one, or a projection cannot be cut into four directions.
    """
    bare = {_WRAPPERS.sub("", name, count=1) if name.startswith("module.") else name: name for name in state}
    inside = {name.removeprefix("backbone."): given for name, given in bare.items() if name.startswith("backbone.")}
    names = inside or bare
    merging = {name[: -len("2.weight")] for name in names if re.fullmatch(r"layers\.\d+\.downsample\.2\.weight", name)}
    renamed: dict[str, Tensor] = {}
    for name, given in names.items():
        own, value = _in_our_words(name, _as_matrix(name, state[given]), merging)
        if own in renamed:
            raise ValueError(f"the weights hold {own} twice, once under the old name {name}: delete one of them")
        renamed[own] = value
    return renamed


def _as_matrix(name: str, value: Tensor) -> Tensor:
    """Drop the trailing sides of 1 that a matrix has as a convolution."""
    if value.ndim > 2 and set(value.shape[2:]) == {1} and _MATRIX.fullmatch(name):
        return value.flatten(1)
    return value


def _in_our_words(name: str, value: Tensor, merging: set[str]) -> tuple[str, Tensor]:
    """Return the name and value of one tensor; `merging`: the modules that merge patches in the single-file line."""
    old = _ARCHIVE.match(name)
    if old:
        prefix, word = old.group(1) or "", old.group(2) or old.group(3)
        name = prefix + _SINCE_ARCHIVE[word] + name[old.end() :]
    projection = _PROJECTION.fullmatch(name)
    if projection:
        if value.ndim != 2 or not value.shape[0] or value.shape[0] % _DIRECTIONS:
            raise ValueError(
                f"{name} must be a matrix whose rows are those of {_DIRECTIONS} directions, got {tuple(value.shape)}"
            )
        return f"{projection.group(1)}{projection.group(2)}_weight", value.unflatten(0, (_DIRECTIONS, -1))
    part = _MERGING.fullmatch(name)
    if part and part.group(1) in merging:
        return f"{part.group(1)}{_MERGED[part.group(2)]}.{part.group(3)}", value
    return name, value


def export_single_file(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of any line under the names of upstream's single file `vmamba.py`, which its loaders of the other
    lines cannot read; the opposite of `rename` for it.

    Raises:
        ValueError: as `rename`.
    """
    exported = {}
    for name, value in rename(state).items():
        projection = re.fullmatch(r"(.*\.op\.)(x_proj|dt_projs)_weight", name)
        merging = re.fullmatch(r"(layers\.\d+\.downsample\.)(norm|reduction)(\.\w+)", name)
        if projection:
            name, value = f"{projection.group(1)}{projection.group(2)}.weight", value.flatten(0, 1)
        elif merging:
            name = f"{merging.group(1)}{1 if merging.group(2) == 'norm' else 2}{merging.group(3)}"
        exported[name] = value
    return exported


def family(state: Mapping[str, Any]) -> str | None:
    """Return "VMamba" or "Vim", whichever model the weights of these names are of; None if neither is certain."""
    ends = {name.rpartition(".")[2] for name in state if isinstance(name, str)}
    if "A_logs" in ends:
        return "VMamba"
    return "Vim" if "A_log" in ends and any(".mixer." in name for name in state) else None


def read_weights(source: str | Path | Mapping[str, Any], key: str = "model") -> dict[str, Tensor]:
    """Return the weights in a checkpoint, of any line, under the names of the models here, on the CPU.

    Args:
        source: a .safetensors file, any other file of `torch.save`, the https:// address of one, or what is in one: a
            mapping of weights by name, or one that has them in an entry.
        key: the entry. For "model", also "state_dict", "module" or the mapping itself where there is no such entry;
            "model_ema" is the moving average that training keeps beside the weights.
    Raises:
        ValueError: there is no such file, it is damaged or holds code, or there are no weights in it; one sentence.
        RuntimeError: the address cannot be fetched; says where to put the file instead.
    """
    if isinstance(source, Mapping):
        return rename(_weights_of(source, key, "the given mapping"))
    path = _downloaded(source) if isinstance(source, str) and "://" in source else Path(os.path.expanduser(source))
    if not os.path.isfile(path):  # unlike that of Path, without an error for a name that none can have
        raise ValueError(f"there is no checkpoint file {source}")
    payload = _read_safetensors(path) if path.suffix.lower() == ".safetensors" else _read_torch(path)
    return rename(_weights_of(payload, key, str(source)))


def _read_torch(path: Path) -> Any:
    try:
        return read_torch_file(path)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"reading {path} needs a package: {sys.executable} -m pip install safetensors") from error
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): download or write it again") from error


def _weights_of(payload: Any, key: str, source: str) -> dict[str, Tensor]:
    """Return the entry `key` of a checkpoint, after making sure that it is weights by name."""
    if not isinstance(payload, Mapping):
        raise ValueError(f"{source} holds {in_words(payload)}, not the weights of a model by name")
    candidates = [key, *(entry for entry in _WEIGHT_ENTRIES if key == "model" and entry != key)]
    found = next((payload[entry] for entry in candidates if isinstance(payload.get(entry), Mapping)), None)
    if found is None and key == "model" and all(isinstance(value, Tensor) for value in payload.values()):
        found = payload
    if not found:
        listed = ", ".join(map(str, list(payload)[:8])) or "nothing"
        raise ValueError(f"{source} holds no weights under {key!r}; its entries are {listed}")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ValueError(f"{source} holds {in_words(value)} under {name!r}, not a tensor under its name")
        if value.is_meta or value.is_quantized or value.layout != torch.strided or value.is_complex():
            raise ValueError(f"{source} holds under {name!r} a tensor that is no array of real numbers")
    return dict(found)


def load_into(
    model: nn.Module, source: str | Path | Mapping[str, Any], key: str = "model", *, new_head: bool = False
) -> list[str]:
    """Copy weights of any line into a `VSSM` or `Backbone_VSSM`; the model is not changed if an error is raised.

    A backbone has no classifier, so that of the weights is left out; its output norms (`outnorm*`), which the
    checkpoint of a classifier has not, keep the values that they have. A position embedding of another grid is resized.

    Args:
        source, key: see `read_weights`.
        new_head: keep the model's own head where that of the weights is for another number of classes.
    Returns:
        The names of the weights that the model keeps as they were; also logged.
    Raises:
        ValueError: the weights cannot be read, or are another model's: the first names that the model has alone, that
            the weights have alone, or that differ in shape, and how many there are.
    """
    own = model.state_dict()
    state = read_weights(source, key)
    if not any(name.startswith("classifier.") for name in own):
        state = {name: value for name, value in state.items() if not name.startswith("classifier.")}
    state = {name: value for name, value in state.items() if not name.startswith("outnorm") or name in own}
    if getattr(model, "num_classes", None) == 0 or (new_head and _another_head(own, state)):
        state = {name: value for name, value in state.items() if name not in _HEAD}
    optional = [name for name in own if name.startswith("outnorm") or (new_head and name in _HEAD)]
    kept = [name for name in optional if name not in state]
    if "pos_embed" in own and "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], own["pos_embed"].shape[2:])
    _refuse_misfits(own, state, kept)
    model.load_state_dict(state, strict=False)
    if kept:
        _log.info("the checkpoint has nothing for these, which stay as they were: %s", ", ".join(kept))
    return kept


def _another_head(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    return any(name in own and name in state and own[name].shape != state[name].shape for name in _HEAD)


def _refuse_misfits(own: Mapping[str, Tensor], state: Mapping[str, Tensor], kept: list[str]) -> None:
    missing = [name for name in own if name not in state and name not in kept]
    unexpected = [name for name in state if name not in own]
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    if wrong and not missing and not unexpected and set(wrong) <= set(_HEAD) and state[wrong[0]].ndim:
        given, classes = state[wrong[0]].shape[0], own[wrong[0]].shape[0]
        raise ValueError(
            f"the weights are for {given} classes but the model has {classes}: build it with num_classes={given}, or "
            "load with new_head=True for a head of its own"
        )
    shapes = [f"{name} {tuple(state[name].shape)}, the model's is {tuple(own[name].shape)}" for name in wrong]
    parts = [
        f"{what}: {'; '.join(names[:3])}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    fitting = fitting_variant(state)
    if parts and fitting and fitting == fitting_variant(own):
        raise ValueError(f"the weights are those of {fitting}, as the model is, but not whole ({', '.join(parts)})")
    if parts:
        raise ValueError(f"the weights are not those of this VMamba but {_whose(state)} ({', '.join(parts)})")


def _whose(state: Mapping[str, Tensor]) -> str:
    """Say which model weights are of."""
    fitting = fitting_variant(state)
    if fitting:
        return f"fit {fitting}"
    kind = family(state)
    return "another VMamba's" if kind == "VMamba" else f"a {kind}'s" if kind else "another model's"


def blocks_of_stages(names: Iterable[str]) -> list[int]:
    """Return how many blocks each stage has, by the names of renamed weights."""
    blocks = {match.groups() for match in map(_BLOCK.match, names) if match}
    return [count for _, count in sorted(Counter(int(stage) for stage, _ in blocks).items())]


def fitting_variant(state: Mapping[str, Tensor]) -> str | None:
    """Return the published variant that renamed weights are of, by their sizes; None if there is none."""
    norm, rates = state.get("layers.0.blocks.0.norm.weight"), state.get("layers.0.blocks.0.op.A_logs")
    if norm is None or rates is None or norm.ndim != 1 or rates.ndim != 2 or 0 in norm.shape:
        return None
    depths, width = tuple(blocks_of_stages(state)), norm.shape[0]
    found = (depths, width, rates.shape[0] / (_DIRECTIONS * width), rates.shape[1])
    sizes = ("depths", "dims", "ssm_ratio", "ssm_d_state")
    return next((name for name, own in VARIANTS.items() if tuple(own[size] for size in sizes) == found), None)


def published_url(name: str) -> str:
    """Return the address of the weights that upstream published for a factory.

    Raises:
        ValueError: there are none for this name.
    """
    if name not in PUBLISHED:
        raise ValueError(f"there are no published weights for {name}: they are for {', '.join(PUBLISHED)}")
    tag, file = PUBLISHED[name]
    return f"{_RELEASES}/%23{tag}/{file}"


def load_published(model: nn.Module, name: str) -> None:
    """Load the weights that upstream published for the factory `name`, downloaded once into torch.hub's cache.

    A model for other classes than the published 1000 keeps its own new head, which is logged; one for pictures of other
    channels than three gets the first convolution's weights fitted to them: timm's conventions.

    Raises:
        ValueError: there are no published weights for this name, or they do not fit the model.
        RuntimeError: they cannot be downloaded; says where to put the file instead.
    """
    state = read_weights(published_url(name))
    stem, channels = state.get("patch_embed.0.weight"), getattr(model, "in_chans", 3)
    if stem is not None and stem.shape[1] == 3 != channels:
        state["patch_embed.0.weight"] = adapt_input_conv(channels, stem)
    load_into(model, state, new_head=getattr(model, "num_classes", None) != _PUBLISHED_CLASSES)


def _downloaded(url: str) -> Path:
    """Return the file at an address, from torch.hub's cache or put there now."""
    if not url.startswith("https://"):
        raise ValueError(f"only https:// addresses are fetched, got {url}")
    name = url.rpartition("/")[2].partition("?")[0] or "checkpoint"
    if not url.startswith(_RELEASES):  # many projects call their file checkpoint.pth
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise RuntimeError(f"cannot fetch {url} ({reason}): download it elsewhere and put it at {path}") from error
    return path
