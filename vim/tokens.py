"""Where the class tokens stand in a token sequence: the one place that inserts, follows, reads and removes them.

Glossary: b batch, m patches, k class tokens, l = m + k tokens, c channels. A row is an index along the token axis.

The sequence is built in three steps: class tokens go in (`insert_class_tokens`), then the rows may be permuted, then
they may be reversed. `TokenOrder` remembers all three, so that the class tokens are found again and the patches can be
put back in picture order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PLACEMENTS = ("none", "first", "middle", "both")


def class_token_rows(placement: str, patches: int) -> tuple[int, ...]:
    """Return the rows that the class tokens take among `patches` patches, in ascending order.

    Args:
        placement: one of PLACEMENTS: no class token, before the patches, before patch m // 2, or one at each end.
        patches: m.
    Raises:
        ValueError: `placement` is unknown.
    """
    rows = {"none": (), "first": (0,), "middle": (patches // 2,), "both": (0, patches + 1)}
    if placement not in rows:
        raise ValueError(f"`placement` must be one of {', '.join(PLACEMENTS)}, got {placement!r}")
    return rows[placement]


def insert_class_tokens(patches: Tensor, class_tokens: Sequence[Tensor], rows: Sequence[int]) -> Tensor:
    """Insert class tokens so that token i stands in row `rows[i]` of the result.

    Args:
        patches: (b, m, c).
        class_tokens: k tensors of shape (1, 1, c), shared by the whole batch.
        rows: k ascending rows of the result.
    Returns:
        (b, m + k, c).
    """
    pieces = []
    taken = 0
    for already, (row, token) in enumerate(zip(rows, class_tokens, strict=True)):
        upto = row - already
        pieces += [patches[:, taken:upto], token.expand(patches.shape[0], -1, -1)]
        taken = upto
    return torch.cat([*pieces, patches[:, taken:]], dim=1) if pieces else patches


def remove_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return (b, l, c) without the given rows, as (b, l - len(rows), c)."""
    pieces = []
    start = 0
    for row in sorted(rows):
        pieces.append(x[:, start:row])
        start = row + 1
    return torch.cat([*pieces, x[:, start:]], dim=1) if pieces else x


@dataclass(frozen=True)
class TokenOrder:
    """How a sequence was arranged after its class tokens were inserted.

    Attributes:
        inserted: rows of the class tokens at insertion, ascending.
        permutation: (l,) int64 or None; row i of the permuted sequence holds row permutation[i] of the original.
        flipped: whether the (permuted) sequence was reversed afterwards.
    """

    inserted: tuple[int, ...]
    permutation: Tensor | None = None
    flipped: bool = False

    def arrange(self, x: Tensor) -> Tensor:
        """Bring (b, l, c) from the order of insertion into this order."""
        if self.permutation is not None:
            x = x[:, self.permutation.to(x.device)]
        return x.flip(1) if self.flipped else x

    def restore(self, x: Tensor) -> Tensor:
        """Bring (b, l, c) from this order back into the order of insertion."""
        if self.flipped:
            x = x.flip(1)
        return x if self.permutation is None else x[:, self.permutation.argsort().to(x.device)]

    def class_rows(self, length: int) -> tuple[int, ...]:
        """Return the rows in which the class tokens stand now, in a sequence of `length` tokens."""
        rows = self.inserted
        if self.permutation is not None:
            places = self.permutation.argsort().tolist()
            rows = tuple(places[row] for row in rows)
        return tuple(length - 1 - row for row in rows) if self.flipped else rows

    def unflipped(self) -> TokenOrder:
        """Return this order as it was before the reversal."""
        return TokenOrder(self.inserted, self.permutation)

    def read_class_token(self, x: Tensor) -> Tensor:
        """Return the state of the class token (the mean if there are two): (b, l, c) to (b, c)."""
        states = [x[:, row] for row in self.class_rows(x.shape[1])]
        return states[0] if len(states) == 1 else torch.stack(states).mean(dim=0)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Separate (b, l, c) into the patches in picture order (b, m, c) and the class tokens (b, k, c)."""
        x = self.restore(x)
        return remove_rows(x, self.inserted), x[:, list(self.inserted)]
