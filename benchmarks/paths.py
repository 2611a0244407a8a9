"""The ways to run a subject: contexts that choose its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from causal_conv1d.backend import use_backend
from mamba_ssm.ops.mamba_inner import compose
from mamba_ssm.ops.mamba_inner_training import of_both_directions
from mamba_ssm.ops.reference import scan_reference
from mamba_ssm.ops.selective_scan import FAMILY, PER_DIRECTION


def _scan(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op `selective_scan`, forward only, by its definition."""
    u, delta, A, B, C, D, delta_bias, z, softplus, reverse, _ = arguments
    out, last = scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus=softplus, reverse=reverse)
    return out, last, u.new_empty(0)


def _bidirectional_scan(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `bidirectional_scan`, forward only, by its definition: two scans whose sum is gated once."""
    *tensors, z, softplus, _ = arguments
    outs = []
    for start, reverse in ((0, False), (PER_DIRECTION, True)):
        u, delta, A, B, C, D, bias = tensors[start : start + PER_DIRECTION]
        out, _ = scan_reference(u, delta, A, B, C, D, None, bias, delta_softplus=softplus, reverse=reverse)
        outs.append(out)
    total = outs[0] + outs[1]
    return (total if z is None else total * F.silu(z)), total.new_empty(0)


def _bidirectional_inner(xz: Tensor, *arguments: Any) -> Tensor:
    """The op `bidirectional_inner`, composed of others, the scan above among them."""
    *parameters, scale = arguments
    return compose(xz, *of_both_directions(tuple(parameters)), scale)


LOOPS: dict[str, Callable[..., Any]] = {
    "selective_scan": _scan,
    "bidirectional_scan": _bidirectional_scan,
    "bidirectional_inner": _bidirectional_inner,
}


@contextmanager
def step_by_step() -> Iterator[None]:
    """Run every scan as the loop that defines it, which computes its exponential at each step; the rest as `torch`.

    Forward passes only.
    """
    with use_backend("torch"):
        kernels = {op: FAMILY.choose(op, "cpu") for op in LOOPS}
        _register(LOOPS)
        try:
            yield
        finally:
            _register(kernels)


def _register(kernels: dict[str, Callable[..., Any]]) -> None:
    for op, kernel in kernels.items():
        FAMILY.kernel("torch", op)(kernel)


Path = Callable[[], AbstractContextManager[None]]
PATHS: dict[str, Path] = {
    "auto": nullcontext,  # what runs by itself: the best backend that is there, or a network of another project
    "native": partial(use_backend, "native"),  # the compiled kernels, or an error: no op of it may step down
    "torch": partial(use_backend, "torch"),  # as with both FORCE_FALLBACK variables set
    "loop": step_by_step,
}
TITLES = {"auto": "", "native": "compiled kernels", "torch": "PyTorch path", "loop": "step-by-step loop"}


@contextmanager
def surroundings(case: Case) -> Iterator[None]:
    """What a call of a case runs in: its kernels, and no record of gradients where none are asked for."""
    with PATHS[case.path](), nullcontext() if case.mode in ("train", "step") else torch.inference_mode():
        yield
