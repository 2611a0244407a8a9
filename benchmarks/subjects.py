"""What can be measured, by name: builders that turn a case into a call. fp32, inference, random weights and inputs.

b batch, d channels, l length, n state
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import models_mamba  # noqa: F401  (registers Vim with timm)
from benchmarks.cases import Case
from blocks import create_block
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.ops.norm import rms_norm_fn
from mamba_ssm.ops.selective_scan import bidirectional_scan, selective_scan_fn

Call = Callable[[], Tensor]
# Vim-Tiny: features of the tokens, channels of its scans, their state, width of its convolutions, pixels of a patch
FEATURES, CHANNELS, STATE, WIDTH, PATCH = 192, 384, 16, 4, 16


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        title: its name, for people.
        build: makes the call to be timed; draws weights and inputs from torch's generator.
        computes: subjects that share it compute the same from the same draws; their results are compared.
    """

    title: str
    build: Callable[[Case], Call]
    computes: str = field(default="")


def build(case: Case) -> Call:
    """The call that a case measures; equal weights and inputs at every build."""
    torch.manual_seed(0)
    return SUBJECTS[case.subject].build(case)


def result_key(case: Case) -> tuple[str, int, int]:
    """Cases with one key must compute one result."""
    return SUBJECTS[case.subject].computes or case.subject, case.pixels, case.batch


def tokens(pixels: int) -> int:
    """The tokens that Vim makes of a square picture: its patches and the class token."""
    return (pixels // PATCH) ** 2 + 1


# --- networks -------------------------------------------------------------------------------------------------------


def _network(name: str, case: Case) -> Call:
    model = timm.create_model(name, img_size=case.pixels).eval()
    picture = torch.randn(case.batch, 3, case.pixels, case.pixels)
    return partial(model, picture)


def _block(case: Case) -> Call:
    block = create_block(
        FEATURES, d_state=STATE, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, layer_idx=0,
        bimamba_type="v2", if_divide_out=True,
    ).eval()  # fmt: skip
    hidden, residual = torch.randn(2, case.batch, tokens(case.pixels), FEATURES).unbind()
    return lambda: block(hidden, residual)[0]


# --- ops ------------------------------------------------------------------------------------------------------------


def _sequence(case: Case, channels: int = CHANNELS) -> Tensor:
    """(b, d, l), channels contiguous, as the projections of a block leave it."""
    return torch.randn(case.batch, tokens(case.pixels), channels).transpose(1, 2)


def _direction(case: Case) -> tuple[Tensor, ...]:
    """(u, delta, A, B, C, D, delta_bias) with steps of the size that Vim starts with, 0.001 to 0.1."""
    u, delta = _sequence(case), _sequence(case) / 10
    A = -torch.arange(1.0, STATE + 1).repeat(CHANNELS, 1)
    B, C = _sequence(case, STATE), _sequence(case, STATE)
    step = torch.logspace(-3, -1, CHANNELS)
    return u, delta, A, B, C, torch.ones(CHANNELS), step + torch.log(-torch.expm1(-step))


def _scan(case: Case) -> Call:
    *scanned, bias = _direction(case)
    return partial(_only_output, selective_scan_fn, *scanned, _sequence(case), bias, True)


def _only_output(function: Callable[..., Tensor | tuple[Tensor, Tensor]], *arguments: object) -> Tensor:
    out = function(*arguments)
    assert isinstance(out, Tensor)  # no states were asked for
    return out


def _bidirectional_scan(case: Case) -> Call:
    return partial(bidirectional_scan, _direction(case), _direction(case), _sequence(case), True)


def _taps(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence(case), torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)


def _conv(case: Case) -> Call:
    x, weight, bias = _taps(case)
    return lambda: _only_output(causal_conv1d_fn, x, weight, bias, None, None, False, None, "silu")


def _conv_grouped(case: Case) -> Call:
    x, weight, bias = _taps(case)
    length = x.shape[-1]
    return lambda: F.silu(F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)[..., :length])


def _norm_inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    branch, residual = torch.randn(2, case.batch, tokens(case.pixels), FEATURES).unbind()
    return branch, residual, torch.randn(FEATURES)


def _norm(case: Case) -> Call:
    branch, residual, weight = _norm_inputs(case)
    return lambda: rms_norm_fn(branch, weight, None, residual=residual, eps=1e-5, prenorm=True)[0]


def _norm_builtin(case: Case) -> Call:
    branch, residual, weight = _norm_inputs(case)
    return lambda: F.rms_norm(branch + residual, (FEATURES,), weight, 1e-5)


def _networks() -> dict[str, Subject]:
    table = {"vim_pico": Subject("Vim-Pico", partial(_network, "vim_pico_patch4_32"))}
    for width in ("tiny", "small", "base"):
        for family, title in (("vim", "Vim"), ("deit", "DeiT")):
            builder = partial(_network, f"{family}_{width}_patch16_224")
            table[f"{family}_{width}"] = Subject(f"{title}-{width.title()}", builder)
    return table


SUBJECTS = {
    **_networks(),
    "block": Subject("block", _block),
    "scan": Subject("scan", _scan),
    "bidirectional_scan": Subject("both scans", _bidirectional_scan),
    "conv": Subject("convolution", _conv),
    "conv_grouped": Subject("torch's grouped conv1d", _conv_grouped, computes="conv"),
    "norm": Subject("add and norm", _norm),
    "norm_builtin": Subject("torch's rms_norm after an addition", _norm_builtin, computes="norm"),
}
