"""Rotary position embedding of a two-dimensional grid of patches.

Each pair of neighbouring channels (a, b) is turned by an angle that grows with the position of its token: the first
half of the channels with the row, the second half with the column. Source: arXiv 2104.09864 (RoPE), arXiv 2303.11331
(its use on images, with positions scaled to the grid of the pre-training).

The names, signatures and buffers are those of hustvl/Vim's `rope` module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokens import insert_class_tokens, remove_rows

__all__ = ["VisionRotaryEmbedding", "VisionRotaryEmbeddingFast", "broadcat", "rotate_half"]


def broadcat(tensors: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Concatenate tensors of equal rank along `dim` after broadcasting all their other axes.

    Raises:
        ValueError: the ranks differ.
    """
    ranks = {tensor.ndim for tensor in tensors}
    if len(ranks) != 1:
        raise ValueError(f"`tensors` must all have the same number of axes, got {sorted(ranks)}")
    axis = dim % ranks.pop()
    others = [(*tensor.shape[:axis], 1, *tensor.shape[axis + 1 :]) for tensor in tensors]
    shape = torch.broadcast_shapes(*others)
    wide = [tensor.expand(*shape[:axis], tensor.shape[axis], *shape[axis + 1 :]) for tensor in tensors]
    return torch.cat(wide, dim=axis)


def rotate_half(x: Tensor) -> Tensor:
    """Turn every channel pair by 90 degrees: (a, b) becomes (-b, a) along the last axis, which must be even."""
    first, second = x[..., 0::2], x[..., 1::2]
    return torch.stack((-second, first), dim=-1).flatten(-2)


def _frequencies(kind: str, dim: int, theta: float, max_freq: float, num_freqs: int) -> Tensor:
    """Return the angular frequency of each channel pair: (dim // 2,), or (num_freqs,) for "constant"."""
    if kind == "lang":
        return theta ** -(torch.arange(0, dim - dim % 2, 2).float() / dim)
    if kind == "pixel":
        return torch.linspace(1.0, max_freq / 2, dim // 2) * math.pi
    if kind == "constant":
        return torch.ones(num_freqs)
    raise ValueError(f"`freqs_for` must be lang, pixel or constant, got {kind!r}")


def _grid_angles(frequencies: Tensor, grid: tuple[int, int], trained: int) -> Tensor:
    """Return the angles of every grid point: (rows, columns, 4 * len(frequencies)), row angles before column angles."""
    axes = []
    for count in grid:
        positions = torch.arange(count) / count * trained
        axes.append(torch.outer(positions, frequencies).repeat_interleave(2, dim=-1))
    return broadcat((axes[0][:, None, :], axes[1][None, :, :]), dim=-1)


class VisionRotaryEmbedding(nn.Module):
    """Rotate a slice of the channels of a map (..., rows, columns, channels).

    Args:
        dim: channels per axis; the slice that is rotated has 2 * dim channels.
        pt_seq_len: patches along one side of the grid of the pre-training.
        ft_seq_len: patches along one side of this grid, or (rows, columns); `pt_seq_len` if None.
        custom_freqs: (dim // 2,) frequencies that replace the computed ones.
        freqs_for: "lang" (theta ** (-2 i / dim)), "pixel" (pi * linspace(1, max_freq / 2)) or "constant" (ones).
    Raises:
        ValueError: `freqs_for` is unknown.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self,
        dim: int,
        pt_seq_len: int,
        ft_seq_len: int | tuple[int, int] | None = None,
        custom_freqs: Tensor | None = None,
        freqs_for: str = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
    ) -> None:
        super().__init__()
        if custom_freqs is None:
            custom_freqs = _frequencies(freqs_for, dim, theta, max_freq, num_freqs)
        side = pt_seq_len if ft_seq_len is None else ft_seq_len
        grid = (side, side) if isinstance(side, int) else (side[0], side[1])
        angles = _grid_angles(custom_freqs, grid, pt_seq_len)
        self.register_buffer("freqs_cos", self._lay_out(angles.cos()))
        self.register_buffer("freqs_sin", self._lay_out(angles.sin()))

    @staticmethod
    def _lay_out(table: Tensor) -> Tensor:
        """Return the (rows, columns, channels) table in the shape in which the buffers keep it."""
        return table

    def _turn(self, t: Tensor) -> Tensor:
        return t * self.freqs_cos + rotate_half(t) * self.freqs_sin

    def forward(self, t: Tensor, start_index: int = 0) -> Tensor:
        """Rotate the channels from `start_index` on; those before and after the slice pass unchanged.

        Raises:
            ValueError: the slice does not fit into the channels of `t`.
        """
        end = start_index + self.freqs_cos.shape[-1]
        if end > t.shape[-1]:
            raise ValueError(f"`t` must have at least {end} channels, got {t.shape[-1]}")
        return torch.cat((t[..., :start_index], self._turn(t[..., start_index:end]), t[..., end:]), dim=-1)


class VisionRotaryEmbeddingFast(VisionRotaryEmbedding):
    """Rotate all channels of a token sequence (b, l, 2 * dim); the buffers are (rows * columns, 2 * dim), row-major."""

    def __init__(
        self,
        dim: int,
        pt_seq_len: int = 16,
        ft_seq_len: int | tuple[int, int] | None = None,
        custom_freqs: Tensor | None = None,
        freqs_for: str = "lang",
        theta: float = 10000,
        max_freq: float = 10,
        num_freqs: int = 1,
    ) -> None:
        super().__init__(dim, pt_seq_len, ft_seq_len, custom_freqs, freqs_for, theta, max_freq, num_freqs)

    @staticmethod
    def _lay_out(table: Tensor) -> Tensor:
        return table.flatten(0, 1)

    def forward(self, t: Tensor, class_rows: Sequence[int] = ()) -> Tensor:  # type: ignore[override]
        """Rotate the patches of a sequence by the angles of their grid points.

        Args:
            t: (b, l, 2 * dim). With m grid points: if l == m every token is rotated; if l == m + 1 and odd, token 0
                passes unchanged and tokens 1 to m are rotated, whatever they are (upstream's convention, with the class
                token in the middle too); any other sequence is rotated in its patches only.
            class_rows: ascending rows of `t` that are no patches; needed in the last case.
        Raises:
            ValueError: `t` without the class rows has not m tokens.
        """
        points = self.freqs_cos.shape[0]
        length = t.shape[1]
        if length == points:
            return self._turn(t)
        if length == points + 1 and length % 2 == 1:
            return torch.cat((t[:, :1], self._turn(t[:, 1:])), dim=1)
        if length != points + len(class_rows):
            raise ValueError(
                f"`t` must have {points} patches besides its class tokens, got {length} tokens of which "
                f"{len(class_rows)} are class tokens; build the embedding with ft_seq_len=(rows, columns)"
            )
        turned = self._turn(remove_rows(t, class_rows))
        kept = [t[:, row : row + 1] for row in class_rows]
        return insert_class_tokens(turned, kept, class_rows)
