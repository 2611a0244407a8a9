"""The matrix of a selective scan: what each token gives to each later one.

b batch, d channels, l length, n state, t output token (row), s input token (column)

A scan is linear in its input: y[t] = sum over s <= t of M[t, s] u[s], for every channel of its own, with
    M[t, s] = sum_n C[n, t] exp(A[n] (S[t] - S[s])) B[n, s] dt[s],        S = cumulative sum of dt
The exponent is a difference, never positive. Written as a quotient of two exponentials, as it often is, both underflow
once the sum of |A| dt since the start passes 100, and the matrix is lost; here nothing is divided.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_NUMBERS = 2**22  # of an intermediate result (16 MiB in fp32), unless a single channel has more


@dataclass(frozen=True)
class Mode:
    """What a map is made of: query(t) times key(s), and what happens to the state between s and t.

    Attributes:
        contents: C as query and B as key; without them both are 1.
        steps: the key is multiplied with dt.
        decay: exp(A (S[t] - S[s])), what is left at t of a state that was written at s.
    """

    contents: bool
    steps: bool
    decay: bool


MODES = {
    "CB": Mode(contents=True, steps=False, decay=False),
    "CBdt": Mode(contents=True, steps=True, decay=False),
    "CwBw": Mode(contents=True, steps=False, decay=True),
    "CwBdtw": Mode(contents=True, steps=True, decay=True),
    "ww": Mode(contents=False, steps=False, decay=True),
}


def find_mode(name: str) -> Mode:
    """Return the mode called `name`.

    Raises:
        ValueError: there is none; names them all and the nearest.
    """
    if name not in MODES:
        near = difflib.get_close_matches(name, MODES, n=1, cutoff=0.0)[0]
        raise ValueError(f"`mode` must be one of {', '.join(MODES)}, got {name!r}; the nearest is {near!r}")
    return MODES[name]


@dataclass(frozen=True)
class Scan:
    """One scan of one picture, in the order in which it runs.

    Attributes:
        dt: (d, l), step sizes: after the bias and softplus.
        A: (d, n), not positive.
        B, C: (n, l).
    """

    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        for name in ("dt", "A"):
            if getattr(self, name).ndim != 2:
                raise ValueError(f"`{name}` must have two axes, got shape {tuple(getattr(self, name).shape)}")
        channels, length, states = *self.dt.shape, self.A.shape[1]
        for name, expected in {"A": (channels, states), "B": (states, length), "C": (states, length)}.items():
            if getattr(self, name).shape != expected:
                raise ValueError(f"`{name}` must have shape {expected}, got {tuple(getattr(self, name).shape)}")

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.dt.shape[1]


def scan_matrix(scan: Scan, mode: str = "CwBdtw", rows: Tensor | None = None) -> Tensor:
    """Return rows of the scan's matrix, averaged over the channels.

    Mode "CwBdtw" is the matrix M of the scan itself, without the skip D; of a scan of one channel it is exactly the
    operator of that channel. The other modes leave out factors: the exponential ("CB", "CBdt"), dt ("CB", "CwBw"), or
    all but the exponential ("ww"). In all of them what lies above the diagonal, the future, is 0.

    Args:
        rows: int64, the output tokens wanted, in any order; None: all of them.
    Returns:
        (rows, l), at least fp32. Intermediate results have at most `MOST_NUMBERS` numbers (n * l, or 64 n, where that
        is more), so the memory is that of the result and a constant.
    Raises:
        ValueError: an unknown mode, a row that is none.
    """
    chosen = find_mode(mode)
    wanted = torch.arange(scan.length) if rows is None else rows.cpu()
    if bool(((wanted < 0) | (wanted >= scan.length)).any()):
        raise ValueError(f"`rows` must lie between 0 and {scan.length - 1}, got {wanted.tolist()}")
    dtype = torch.promote_types(torch.promote_types(scan.dt.dtype, scan.A.dtype), torch.float32)
    ones = torch.ones_like(scan.B, dtype=dtype)
    query, key = (scan.C.to(dtype), scan.B.to(dtype)) if chosen.contents else (ones, ones)
    gain = scan.dt.to(dtype) if chosen.steps else torch.ones_like(scan.dt, dtype=dtype)
    if not chosen.decay:
        index = wanted.to(query.device)
        future = torch.arange(scan.length, device=query.device) > index[:, None]
        return (query[:, index].T @ (key * gain.mean(0))).masked_fill_(future, 0)
    return _decayed(query, key, gain, scan.A.to(dtype), scan.dt, wanted)


def _decayed(query: Tensor, key: Tensor, gain: Tensor, A: Tensor, dt: Tensor, wanted: Tensor) -> Tensor:
    """Rows `wanted`, with decay: tile by tile of rows, and the channels in portions.

    The sums of dt are fp64: differences of sums in fp32 would be off by a millionth of the whole sum.
    """
    channels, length = dt.shape
    out = query.new_zeros(len(wanted), length)
    sums = dt.to(torch.float64).cumsum(-1)
    for first, places, times in _tiles(wanted, length):
        last = int(times.max()) + 1
        index = times.to(query.device)
        block = query.new_zeros(len(times), last)
        numbers = A.shape[1] * max(first, len(times) * (last - first))
        for some in torch.arange(channels).split(max(1, MOST_NUMBERS // numbers)):
            part = slice(int(some[0]), int(some[-1]) + 1)
            of_part = (gain[part], A[part], sums[part])
            if first:
                block[:, :first] += _earlier_tiles(query[:, index], key, *of_part, index, first)
            block[:, first:] += _own_tile(query[:, index], key, *of_part, index, first, last)
        out[places.to(out.device), :last] = block / channels
    return out


def _tiles(wanted: Tensor, length: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first token of the tile, places in `wanted`, the tokens there) for each tile with a wanted row.

    A tile is about as long as the exponentials are fewest with: l / (2 tile) + tile per token, channel and state.
    """
    tile = max(8, math.isqrt(length // 2))
    numbers = wanted // tile
    for number in numbers.unique().tolist():
        places = (numbers == number).nonzero().flatten()
        yield number * tile, places, wanted[places]


def _earlier_tiles(
    query: Tensor, key: Tensor, gain: Tensor, A: Tensor, sums: Tensor, times: Tensor, first: int
) -> Tensor:
    """What the tokens before `first` give to `times`: (times, first), summed over the channels.

    The decay from s to t is that from s to `first` - 1 times that from there to t. Neither is above 1, so whatever
    underflows belongs to a product that does; and a product of matrices does the rest.
    """
    border = sums[:, first - 1 : first]
    since = (sums[:, times] - border).to(A.dtype)
    until = (border - sums[:, :first]).to(A.dtype)
    queries = torch.exp(A[..., None] * since[:, None]) * query
    keys = torch.exp(A[..., None] * until[:, None]) * (key[:, :first] * gain[:, None, :first])
    return queries.flatten(0, 1).T @ keys.flatten(0, 1)


def _own_tile(
    query: Tensor, key: Tensor, gain: Tensor, A: Tensor, sums: Tensor, times: Tensor, first: int, last: int
) -> Tensor:
    """What the tokens from `first` to `last` - 1 give to `times`: (times, last - first), summed over the channels."""
    between = (sums[:, times, None] - sums[:, None, first:last]).to(A.dtype)
    past = torch.arange(first, last, device=times.device) <= times[:, None]
    decay = torch.exp(A[:, :, None, None] * between.clamp_(min=0)[:, None])  # the future is taken out below
    return torch.einsum("nt,ns,ds,dnts->ts", query, key[:, first:last], gain[:, first:last], decay) * past
