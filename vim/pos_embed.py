"""Resize a learned position embedding to another patch grid, with the class tokens' rows where they really are."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tokens import class_token_rows, insert_class_tokens, remove_rows

RESIZE_MODES = ("middle", "upstream")


def resize_pos_embed(
    pos_embed: Tensor,
    grid: tuple[int, int],
    *,
    placement: str = "middle",
    mode: str = "middle",
    source_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Interpolate (bicubic) a position embedding to a new grid; unchanged where the grid is the same.

    Args:
        pos_embed: (1, m + k, c), any floating dtype; the result has this dtype. Computed in at least fp32.
        grid: rows and columns of patches that are wanted.
        placement: where the k class tokens stand, one of `tokens.PLACEMENTS`.
        mode: "middle" takes the class tokens' rows out, resizes the patches and puts them back at their place in the
            new sequence. "upstream" is the published fine-tuning recipe: it takes the first k rows for the class tokens
            whatever `placement` says, so a class token in the middle is blended with its neighbours; square grids only.
        source_grid: rows and columns that `pos_embed` has now; a square if None.
    Returns:
        (1, rows * columns + k, c).
    Raises:
        ValueError: the shapes do not fit, or `mode` or `placement` is unknown; says which.
    """
    if mode not in RESIZE_MODES:
        raise ValueError(f"`mode` must be one of {', '.join(RESIZE_MODES)}, got {mode!r}")
    extra = len(class_token_rows(placement, 0))
    if pos_embed.ndim != 3 or pos_embed.shape[0] != 1 or pos_embed.shape[1] <= extra:
        raise ValueError(f"`pos_embed` must have shape (1, patches + {extra}, channels), got {tuple(pos_embed.shape)}")
    old = source_grid or _square(pos_embed.shape[1] - extra)
    if old[0] * old[1] != pos_embed.shape[1] - extra:
        raise ValueError(f"`source_grid` must have {pos_embed.shape[1] - extra} patches, got {old[0]} x {old[1]}")
    if mode == "upstream" and (grid[0] != grid[1] or old[0] != old[1]):
        raise ValueError(f"mode 'upstream' resizes square grids only, got {old} to {grid}: use mode 'middle'")
    if old == tuple(grid):
        return pos_embed
    before = tuple(range(extra)) if mode == "upstream" else class_token_rows(placement, old[0] * old[1])
    after = before if mode == "upstream" else class_token_rows(placement, grid[0] * grid[1])
    tokens = [pos_embed[:, row : row + 1] for row in before]
    patches = _interpolate(remove_rows(pos_embed, before), old, grid)
    return insert_class_tokens(patches, tokens, after)


def _square(patches: int) -> tuple[int, int]:
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"the position embedding has {patches} patches, which is no square grid: say `source_grid`")
    return side, side


def _interpolate(patches: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resize row-major patches (1, m, c) from one grid to another."""
    picture = patches.unflatten(1, old).permute(0, 3, 1, 2)
    wide = picture.to(torch.promote_types(picture.dtype, torch.float32))
    resized = functional.interpolate(wide, size=tuple(new), mode="bicubic", align_corners=False)
    return resized.to(patches.dtype).flatten(2).transpose(1, 2)
