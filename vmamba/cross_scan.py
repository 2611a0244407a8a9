"""Read an image as four sequences, and bring four sequences back to one image.

    b batch, c channels, h w height and width, l = h * w length, k direction

    k   order of the pixels, `scans=0`
    0   row by row
    1   column by column
    2   row by row, from the last pixel to the first
    3   column by column, from the last pixel to the first

A merge is the adjoint of the scan with the same arguments: its gradient is the scan, and the scan's gradient is the
merge. Both are made of views, flips and one stack or sum, on every device, so that an exporter sees what is computed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor

from mamba_ssm.ops.reference import ROUTES, take_route, undo_route

__all__ = [
    "CrossMerge",
    "CrossMergeF",
    "CrossMergeTriton",
    "CrossMergeTritonF",
    "CrossMerge_Ab_1direction",
    "CrossMerge_Ab_2direction",
    "CrossScan",
    "CrossScanF",
    "CrossScanTriton",
    "CrossScanTriton1b1",
    "CrossScanTriton1b1F",
    "CrossScanTritonF",
    "CrossScan_Ab_1direction",
    "CrossScan_Ab_2direction",
    "cross_merge1b1_fwd",
    "cross_merge_fn",
    "cross_merge_fwd",
    "cross_scan1b1_fwd",
    "cross_scan_fn",
    "cross_scan_fwd",
    "getCSM",
]


PATTERNS = {0: "cross", 1: "rows", 2: "both"}  # the routes of each `scans`


def cross_scan_fn(
    x: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Lay the pixels of an image out as four sequences.

    Args:
        x: (b, c, h, w), or (b, h, w, c) without `in_channel_first`. With `one_by_one` an image for each direction:
            (b, 4, c, h, w) or (b, h, w, 4, c). Any dtype and strides.
        in_channel_first, out_channel_first: the layouts of the image and of the sequences.
        scans: 0 the four orders above; 1 row by row four times; 2 row by row twice, then twice from the end.
        force_torch: without effect, as PyTorch does it in any case.

    Returns:
        (b, 4, c, l), or (b, l, 4, c) without `out_channel_first`; shares no memory with `x`.

    Raises:
        ValueError: a shape above does not hold, or there is no such `scans`.
    Source: arXiv 2401.10166, section 4.2.
    """
    del force_torch
    routes = _routes(scans)
    images = _images("x", x, in_channel_first, one_by_one)
    return _stacked((take_route(image, *route) for image, route in zip(images, routes, strict=True)), out_channel_first)


def cross_merge_fn(
    y: Tensor,
    in_channel_first: bool = True,
    out_channel_first: bool = True,
    one_by_one: bool = False,
    scans: int = 0,
    force_torch: bool = False,
) -> Tensor:
    """Bring four sequences back to the order of the image's rows, and sum them up: the adjoint of `cross_scan_fn`.

    The flags are those of the scan: `out_channel_first` is the layout that is read, `in_channel_first` the one that is
    returned. merge(scan(x)) = 4 x.

    Args:
        y: (b, 4, c, h, w), or (b, h, w, 4, c) without `out_channel_first`: the l tokens of each sequence in its own
            order, under the height and the width of the image. Any dtype and strides.
        one_by_one: do not sum.
        scans, force_torch: as for the scan.

    Returns:
        (b, c, l), or (b, l, c) without `in_channel_first`; with `one_by_one` (b, 4, c, l) or (b, l, 4, c).

    Raises:
        ValueError: a shape above does not hold, or there is no such `scans`.
    """
    del force_torch
    routes = _routes(scans)
    images = _images("y", y, out_channel_first, one_by_one=True)
    height = images[0].shape[1]
    pixels = [
        undo_route(image.flatten(1, 2), *route, height).flatten(1, 2)
        for image, route in zip(images, routes, strict=True)
    ]
    if one_by_one:
        return _stacked(pixels, in_channel_first)
    merged = reduce(add, pixels)
    return (merged.transpose(1, 2) if in_channel_first else merged).contiguous()


def _routes(scans: int) -> tuple[tuple[bool, bool], ...]:
    """For each direction, whether it goes by columns and whether it begins at the end."""
    if scans not in PATTERNS:
        raise ValueError(f"`scans` must be 0 (cross), 1 (rows) or 2 (rows from both ends), got {scans!r}")
    return ROUTES[PATTERNS[scans]]


def _images(name: str, value: Tensor, channel_first: bool, one_by_one: bool) -> list[Tensor]:
    """The image of each direction as (b, h, w, c), views of `value`."""
    if not one_by_one:
        if value.dim() != 4:
            layout = "(b, c, h, w)" if channel_first else "(b, h, w, c)"
            raise ValueError(f"`{name}` must have shape {layout}, got {tuple(value.shape)}")
        return [value.permute(0, 2, 3, 1) if channel_first else value] * 4
    if value.dim() != 5 or value.shape[1 if channel_first else 3] != 4:
        layout = "(b, 4, c, h, w)" if channel_first else "(b, h, w, 4, c)"
        raise ValueError(f"`{name}` must have shape {layout}, got {tuple(value.shape)}")
    return list((value.permute(0, 1, 3, 4, 2) if channel_first else value.movedim(3, 1)).unbind(1))


def _stacked(sequences: Iterable[Tensor], channel_first: bool) -> Tensor:
    """(b, 4, c, l) or (b, l, 4, c) of four (b, l, c)."""
    if channel_first:
        return torch.stack([sequence.transpose(1, 2) for sequence in sequences], dim=1)
    return torch.stack(list(sequences), dim=2)


# --- names that other code calls --------------------------------------------------------------------------------------


def cross_scan_fwd(x: Tensor, in_channel_first: bool = True, out_channel_first: bool = True, scans: int = 0) -> Tensor:
    """`cross_scan_fn` of one image for all directions."""
    return cross_scan_fn(x, in_channel_first, out_channel_first, False, scans)


def cross_merge_fwd(y: Tensor, in_channel_first: bool = True, out_channel_first: bool = True, scans: int = 0) -> Tensor:
    """`cross_merge_fn` with the sum."""
    return cross_merge_fn(y, in_channel_first, out_channel_first, False, scans)


def cross_scan1b1_fwd(
    x: Tensor, in_channel_first: bool = True, out_channel_first: bool = True, scans: int = 0
) -> Tensor:
    """`cross_scan_fn` of an image for each direction."""
    return cross_scan_fn(x, in_channel_first, out_channel_first, True, scans)


def cross_merge1b1_fwd(
    y: Tensor, in_channel_first: bool = True, out_channel_first: bool = True, scans: int = 0
) -> Tensor:
    """`cross_merge_fn` without the sum."""
    return cross_merge_fn(y, in_channel_first, out_channel_first, True, scans)


class CrossScanF(torch.autograd.Function):
    """The name under which code calls `cross_scan_fn` through `apply`, with the same positional arguments."""

    apply = staticmethod(cross_scan_fn)


class CrossMergeF(torch.autograd.Function):
    """The name under which code calls `cross_merge_fn` through `apply`, with the same positional arguments."""

    apply = staticmethod(cross_merge_fn)


class CrossScanTriton1b1F(torch.autograd.Function):
    """`apply(x, in_channel_first, out_channel_first, scans)` is `cross_scan1b1_fwd`."""

    apply = staticmethod(cross_scan1b1_fwd)


class CrossScan_Ab_1direction(torch.autograd.Function):  # noqa: N801
    """`apply(x)`: (b, c, h, w) to (b, 4, c, l), row by row in each direction."""

    apply = staticmethod(partial(cross_scan_fn, scans=1))


class CrossMerge_Ab_1direction(torch.autograd.Function):  # noqa: N801
    """`apply(y)`: (b, 4, c, h, w) to (b, c, l), the adjoint of `CrossScan_Ab_1direction`."""

    apply = staticmethod(partial(cross_merge_fn, scans=1))


class CrossScan_Ab_2direction(torch.autograd.Function):  # noqa: N801
    """`apply(x)`: (b, c, h, w) to (b, 4, c, l), row by row twice, then twice from the end."""

    apply = staticmethod(partial(cross_scan_fn, scans=2))


class CrossMerge_Ab_2direction(torch.autograd.Function):  # noqa: N801
    """`apply(y)`: (b, 4, c, h, w) to (b, c, l), the adjoint of `CrossScan_Ab_2direction`."""

    apply = staticmethod(partial(cross_merge_fn, scans=2))


CrossScan = CrossScanTriton = CrossScanTritonF = CrossScanF
CrossMerge = CrossMergeTriton = CrossMergeTritonF = CrossMergeF
CrossScanTriton1b1 = CrossScanTriton1b1F

_PAIRS = {
    0: (CrossScan, CrossMerge),
    1: (CrossScan_Ab_1direction, CrossMerge_Ab_1direction),
    2: (CrossScan_Ab_2direction, CrossMerge_Ab_2direction),
}


def getCSM(mode: int = 0) -> tuple[type[torch.autograd.Function], type[torch.autograd.Function]]:  # noqa: N802
    """The classes of scan and merge for `scans=mode`.

    Raises:
        ValueError: there is no such mode.
    """
    _routes(mode)
    return _PAIRS[mode]
