"""Attention maps of selective scans: how much each token takes from each other one. Source: arXiv 2401.10166, sec. 5.

b batch, d channels, l tokens, n state, k direction, t output token (row), s input token (column)

A map is the matrix of a scan (`scan_matrix`), averaged over the channels, with rows and columns in the picture's order.
`attnmap_mamba` and `get_attnmap_mamba` take what upstream's functions of these names take.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from analyze.recording import Direction, Recording, paths_of, read_registers
from analyze.scan_matrix import find_mode, scan_matrix

NORMS = {"": 0, "norm": 1, "absnorm": 2}  # the words in the mode strings of `get_attnmap_mamba`
_log = logging.getLogger(__name__)


def map_names(recording: Recording) -> list[str]:
    """Return the maps that a recording has: "a0", "ao0" ... for each direction, "all", "nall"."""
    numbers = range(len(recording.directions))
    return [*(f"a{k}" for k in numbers), *(f"ao{k}" for k in numbers), "all", "nall"]


def check_map_name(name: str, known: Sequence[str]) -> str:
    """Return `name` if it is one of the maps `known`.

    Raises:
        ValueError: it is not; names them all and the nearest.
    """
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise ValueError(f"`ret` must be one of {', '.join(known)}, got {name!r}; the nearest is {near!r}")
    return name


def attention_map(recording: Recording, mode: str = "CB", ret: str = "all", absnorm: int = 0, image: int = 0) -> Tensor:
    """Return a map of one picture, (l, l), row t for what token t takes from each token s.

    Args:
        mode: see `scan_matrix.MODES`.
        ret: "a0", "a1" ...: one direction, brought into the picture's order. "ao0" ...: in the order in which it
            runs. "all": the sum of the directions. "nall": the mean of the directions, each one normalised (as
            `absnorm` says, by 1 if that is 0).
        absnorm: 0 none; 1 (x - min) / (max - min), 2 |x| / max |x|, both over the whole map. A map that is the same
            everywhere becomes 0 by the first, one that is 0 stays 0 by the second.
        image: number of the picture in the batch.
    Returns:
        at least fp32. Two or three (l, l) are held at a time, and a constant (see `scan_matrix`).
    Raises:
        ValueError: an unknown mode, map or norm, or a picture that is not there.
    """
    check_map_name(ret, map_names(recording))
    _check(recording, mode, absnorm, image)
    if ret.startswith("ao"):
        return normalise(_in_scan_order(recording.directions[int(ret[2:])], mode, image), absnorm)
    if ret in ("all", "nall"):
        maps = (_in_picture_order(direction, mode, image) for direction in recording.directions)
        if ret == "nall":
            total = _sum(normalise(found, absnorm or 1) for found in maps)
            return normalise(total / len(recording.directions), absnorm)
        return normalise(_sum(maps), absnorm)
    return normalise(_in_picture_order(recording.directions[int(ret[1:])], mode, image), absnorm)


def attention_row(recording: Recording, token: int, mode: str = "CB", ret: str = "all", image: int = 0) -> Tensor:
    """Return row `token` of `attention_map` with absnorm 0, without computing the rest: (l,).

    Args:
        token: number of the token in the picture's order, class tokens included.
        ret: not "nall", which needs the whole. Of "ao0" ... it is the row of the step that reads this token.
    Raises:
        ValueError: as `attention_map`; "nall"; a token that is not there.
    """
    check_map_name(ret, [name for name in map_names(recording) if name != "nall"])
    _check(recording, mode, 0, image)
    if not 0 <= token < recording.length:
        raise ValueError(f"`token` must lie between 0 and {recording.length - 1}, got {token}")
    numbers = range(len(recording.directions)) if ret == "all" else [int(ret.removeprefix("ao").removeprefix("a"))]
    return _sum(
        _row(recording.directions[k], token, mode, image, in_picture_order=not ret.startswith("ao")) for k in numbers
    )


def _check(recording: Recording, mode: str, absnorm: int, image: int) -> None:
    find_mode(mode)
    if absnorm not in NORMS.values():
        raise ValueError(f"`absnorm` must be 0, 1 or 2, got {absnorm!r}")
    if not 0 <= image < recording.batch:
        raise ValueError(f"`image` must lie between 0 and {recording.batch - 1}, got {image}")


def _sum(maps: Iterable[Tensor]) -> Tensor:
    """The sum of maps, of which only one at a time is there."""
    rest = iter(maps)
    total = next(rest)
    for found in rest:
        total += found
    return total


def _in_scan_order(direction: Direction, mode: str, image: int) -> Tensor:
    return scan_matrix(direction.scan(image), mode).mul_(direction.weight)


def _in_picture_order(direction: Direction, mode: str, image: int) -> Tensor:
    """The map of a direction with the tokens in the picture's order, for any height and width."""
    places = direction.places.to(direction.dt.device)
    found = _in_scan_order(direction, mode, image)
    return found.index_select(0, places).index_select(1, places)


def _row(direction: Direction, token: int, mode: str, image: int, *, in_picture_order: bool) -> Tensor:
    step = direction.places[token : token + 1]
    row = scan_matrix(direction.scan(image), mode, step)[0] * direction.weight
    return row[direction.places.to(row.device)] if in_picture_order else row


def normalise(attention: Tensor, absnorm: int) -> Tensor:
    """Return a map with its values brought to 0 ... 1 as `absnorm` says; see `attention_map`."""
    if absnorm == 0 or not attention.numel():
        return attention
    if absnorm == 1:
        low, high = attention.aminmax()
        return (attention - low) / (high - low) if high > low else torch.zeros_like(attention)
    size = attention.abs()
    largest = size.max()
    return size / largest if largest > 0 else size


def rollout(maps: Iterable[Tensor]) -> Tensor:
    """Follow the attention through blocks: (l, l), row t for what token t of the last one takes from the first's input.

    Every block mixes a token half with itself (the residual stream) and half with what it attends to; the rows of
    (map + identity) / 2 are divided by their sums, so that each says where a whole comes from, and the blocks are
    multiplied. Source: arXiv 2005.00928.

    Args:
        maps: (l, l) of each block, the first one first, values in 0 ... 1.
    Raises:
        ValueError: no map, maps of several sizes, or values outside 0 ... 1.
    """
    total = None
    for found in maps:
        low, high = (float(value) for value in found.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(
                f"a rollout needs maps with values from 0 to 1, got {low:.3g} to {high:.3g}; use absnorm 1 or 2"
            )
        mixed = (found + torch.eye(len(found), dtype=found.dtype, device=found.device)) / 2
        mixed = mixed / mixed.sum(-1, keepdim=True)
        if total is not None and total.shape != mixed.shape:
            raise ValueError(f"the maps of a rollout must have one size, got {len(total)} and {len(mixed)} tokens")
        total = mixed if total is None else mixed @ total
    if total is None:
        raise ValueError("a rollout needs the map of at least one block")
    return total


# --- upstream's names -----------------------------------------------------------------------------------------------


def attnmap_mamba(
    regs: Mapping[str, Any],
    mode: str = "CB",
    ret: str = "all",
    absnorm: int = 0,
    scale: float = 1,
    verbose: bool = False,
    device: torch.device | str | None = None,
    *,
    image: int = 0,
    directions: str = "cross",
) -> tuple[Tensor, int, int]:
    """Return an attention map of an SS2D, (l, l), and the height and width of its map.

    Args:
        regs: `SS2D.__data__`, which a forward pass leaves if `SS2D.__DEBUG__` is true.
        mode, ret, absnorm: see `attention_map`.
        scale: the map is multiplied with it, and what exceeds the largest value of before becomes that value.
        verbose: log the sizes.
        device: where it is computed and lies; None: where the recording lies.
        image: number of the picture in the batch.
        directions: paths of the scans, "cross", "rows" or "both".
    Raises:
        ValueError: as `attention_map` and `read_registers`.
    """
    if device is not None:
        regs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in regs.items()}
    recording = read_registers(regs, directions)
    height, width = recording.grid
    if verbose:
        _log.info("map of %d x %d tokens, %d pictures, mode %s, %s", height, width, recording.batch, mode, ret)
    return _scaled(attention_map(recording, mode, ret, absnorm, image), scale), height, width


def get_attnmap_mamba(
    ss2ds: Sequence[Sequence[Any]],
    stage: int = -1,
    mode: str = "all_absnorm_CB",
    raw_attn: bool = False,
    block_id: int = 0,
    scale: float = 1,
    verbose: bool = False,
    device: torch.device | str | None = None,
    *,
    image: int = 0,
) -> Tensor:
    """Return the attention map, (l, l), of one block, or of all blocks of a stage by `rollout`.

    Args:
        ss2ds: the SS2D modules by stage and block, each with its `__data__`.
        stage: number of the stage.
        mode: "<ret>_<mode>", "<ret>_norm_<mode>" (absnorm 1) or "<ret>_absnorm_<mode>" (absnorm 2), such as
            "a0_norm_CB". A rollout needs one of the latter two.
        raw_attn: the map of block `block_id` alone.
        scale, verbose, device, image: see `attnmap_mamba`.
    Raises:
        ValueError: a mode string, stage or block that is none, an SS2D without recording, or as `attnmap_mamba`.
    """
    ret, absnorm, of = _parse(mode)
    blocks = _pick(ss2ds, stage, "stage")
    chosen = [_pick(blocks, block_id, "block_id")] if raw_attn else list(blocks)

    def maps() -> Iterable[Tensor]:
        for block in chosen:
            regs = getattr(block, "__data__", None)
            if regs is None:
                raise ValueError("an SS2D has no __data__: set __DEBUG__ = True on it and run the network first")
            yield attnmap_mamba(
                regs, of, ret, absnorm, scale, verbose, device, image=image, directions=paths_of(block)
            )[0]

    return next(iter(maps())) if raw_attn else rollout(maps())


def _parse(mode: str) -> tuple[str, int, str]:
    """Split "<ret>[_norm|_absnorm]_<mode>"."""
    ret, _, rest = mode.partition("_")
    norm, _, of = rest.rpartition("_")
    if not of or norm not in NORMS:
        raise ValueError(f"`mode` must read like 'a0_CB', 'a0_norm_CB' or 'a0_absnorm_CB', got {mode!r}")
    return ret, NORMS[norm], of


def _pick(items: Sequence[Any], index: int, name: str) -> Any:
    if not -len(items) <= index < len(items):
        raise ValueError(f"`{name}` must lie between {-len(items)} and {len(items) - 1}, got {index}")
    return items[index]


def _scaled(attention: Tensor, scale: float) -> Tensor:
    return attention if scale == 1 or not attention.numel() else (attention * scale).clamp_(max=attention.max())
