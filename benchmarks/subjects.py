"""What can be measured, by name: what turns a case into a call. Random weights and inputs, the same for every build.

b batch, d channels, l length, n state
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models_mamba  # noqa: F401  (registers Vim with timm)
from benchmarks import exports, peers
from benchmarks.cases import Case
from benchmarks.work import Recipe, Work
from blocks import create_block
from causal_conv1d import causal_conv1d_fn
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.mamba_inner import DirectionParameters, bidirectional_inner
from mamba_ssm.ops.norm import rms_norm_fn
from mamba_ssm.ops.selective_scan import FAMILY, bidirectional_scan, selective_scan_fn
from mamba_ssm.ops.selective_scan_2d import selective_scan_2d
from vmamba.ss2d import SS2D

# Vim-Tiny: features of the tokens, channels of its scans, their state, width of its convolutions, pixels of a patch
FEATURES, CHANNELS, STATE, WIDTH, PATCH = 192, 384, 16, 4, 16


@dataclass(frozen=True)
class Subject:
    """Something to measure.

    Attributes:
        title: its name, for people.
        build: makes the fp32 recipe of a case; draws weights and inputs from torch's generator.
        computes: subjects that share it compute the same from the same draws; their results are compared.
        package: the package of others that it needs.
        requirements: the file in `requirements/` that lists it.
        states: what is counted per channel and token, for subjects whose claims need it: state updates, or 1.
    """

    title: str
    build: Callable[[Case], Recipe]
    computes: str = field(default="")
    package: str | None = None
    requirements: str = "peers.txt"
    states: int = 0

    def elements(self, case: Case) -> int:
        """How many (b, d, l, n) there are."""
        return case.batch * CHANNELS * tokens(case.pixels) * self.states


def build(case: Case) -> Work:
    """The work that a case measures; equal weights and inputs at every build.

    Raises:
        RuntimeError: a package that it needs cannot be used.
    """
    torch.manual_seed(0)
    return Work.of(SUBJECTS[case.subject].build(case), case)


def result_key(case: Case) -> tuple[str, int, int, bool]:
    """Cases with one key must compute one result."""
    return SUBJECTS[case.subject].computes or case.subject, case.pixels, case.batch, case.mode in ("train", "step")


def missing(case: Case) -> str | None:
    """Why a case cannot run here and what mends it, as a clause; None where it can."""
    subject = SUBJECTS[case.subject]
    if subject.package is not None and find_spec(subject.package) is None:
        return f"{subject.package} is not installed; `pip install -r requirements/{subject.requirements}` installs it"
    if case.path != "native" or FAMILY.missing("native") is None:
        return None
    return f"the compiled kernels cannot run here: {FAMILY.missing('native')}"


def tokens(pixels: int) -> int:
    """The tokens that Vim makes of a square picture: its patches and the class token."""
    return (pixels // PATCH) ** 2 + 1


# --- networks -------------------------------------------------------------------------------------------------------


def _network(name: str, case: Case) -> Recipe:
    model = timm.create_model(name, img_size=case.pixels).eval()
    picture = torch.randn(case.batch, 3, case.pixels, case.pixels)
    return Recipe(model, (picture,), model, only_parameters=True)


def _recomputed(name: str, case: Case) -> Recipe:
    """A network that computes its activations again in the backward pass."""
    recipe = _network(name, case)
    model: Any = recipe.module
    model.set_grad_checkpointing(True)
    return recipe


class _Unscanned(SS2D):
    """A mixer that copies what the scans would read: its products and convolution, but for those of the step sizes."""

    def _scan(self, u: Tensor) -> Tensor:
        self._project(u)
        return u.clone()


def _unscanned(case: Case) -> Recipe:
    model = timm.create_model("vmamba_tiny_s2l5", img_size=case.pixels, _SS2D=_Unscanned).eval()
    picture = torch.randn(case.batch, 3, case.pixels, case.pixels)
    return Recipe(model, (picture,), model, only_parameters=True)


def _block(case: Case) -> Recipe:
    block = create_block(
        FEATURES, d_state=STATE, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, layer_idx=0,
        bimamba_type="v2", if_divide_out=True,
    ).eval()  # fmt: skip
    return Recipe(lambda hidden, residual: block(hidden, residual)[0], _two_streams(case), block)


def _two_streams(case: Case) -> tuple[Tensor, ...]:
    return torch.randn(2, case.batch, tokens(case.pixels), FEATURES).unbind()


def _mixer(wrap: Callable[[Mamba], nn.Module], case: Case) -> Recipe:
    """A mixer of one direction; `wrap` may put its weights into one of another package."""
    hidden = torch.randn(case.batch, tokens(case.pixels), FEATURES)
    mixer = wrap(Mamba(FEATURES, d_state=STATE, d_conv=WIDTH)).eval()
    return Recipe(mixer, (hidden,), mixer)


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


def _scan(make: Callable[[], Callable[..., Any]], case: Case) -> Recipe:
    """A scan with softplus, skip and gate; `make` gives what takes (u, delta, A, B, C, D, z, delta_bias)."""
    *scanned, bias = _direction(case)
    arguments = (*scanned, _sequence(case), bias)
    return Recipe(make(), arguments)


def _own_scan() -> Callable[..., Any]:
    return partial(selective_scan_fn, delta_softplus=True)


def _bidirectional_scan(case: Case) -> Recipe:
    ahead, back = _direction(case), _direction(case)

    def run(z: Tensor, *both: Tensor) -> Tensor:
        return bidirectional_scan(both[: len(ahead)], both[len(ahead) :], z, True)

    return Recipe(run, (_sequence(case), *ahead, *back))


def _inner(case: Case) -> Recipe:
    mixer = Mamba(FEATURES, d_state=STATE, d_conv=WIDTH, bimamba_type="v2")
    ahead, back = _direction_of(mixer, ""), _direction_of(mixer, "_b")

    def run(xz: Tensor, *both: Tensor) -> Tensor:
        one, two = DirectionParameters(*both[: len(ahead)]), DirectionParameters(*both[len(ahead) :])
        return bidirectional_inner(xz, one, two, 0.5)

    return Recipe(run, (_sequence(case, 2 * CHANNELS), *ahead, *back))


def _direction_of(mixer: Mamba, end: str) -> list[Tensor]:
    """The fields of `DirectionParameters` of the direction whose parameters' names have this ending."""
    parts = (
        "conv1d{}.weight",
        "conv1d{}.bias",
        "x_proj{}.weight",
        "dt_proj{}.weight",
        "A{}_log",
        "D{}",
        "dt_proj{}.bias",
    )
    return [mixer.get_parameter(part.format(end)).detach() for part in parts]


def _scan_2d(states: int, case: Case) -> Recipe:
    """The scans of a block of VMamba-Tiny's first stage, a quarter of the picture's side."""
    side, channels, rank = case.pixels // 4, 192, 6
    pixels = torch.randn(case.batch, side, side, channels)
    projected = torch.randn(case.batch, side, side, 4, rank + 2 * states)
    weight, A = torch.randn(4, channels, rank) / rank**0.5, -torch.arange(1.0, states + 1).repeat(4, channels, 1)

    def run(x: Tensor, projected: Tensor, weight: Tensor, A: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        return selective_scan_2d(x, projected, weight, A, D=D, dt_bias=bias)

    return Recipe(run, (pixels, projected, weight, A, torch.ones(4, channels), torch.randn(4, channels) - 4))


def _taps(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    return _sequence(case), torch.randn(CHANNELS, WIDTH), torch.randn(CHANNELS)


def _conv(case: Case) -> Recipe:
    return Recipe(partial(causal_conv1d_fn, activation="silu"), _taps(case))


def _conv_grouped(case: Case) -> Recipe:
    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        padded = F.conv1d(x, weight[:, None], bias, padding=WIDTH - 1, groups=CHANNELS)
        return F.silu(padded[..., : x.shape[-1]])

    return Recipe(run, _taps(case))


def _copy(case: Case) -> Recipe:
    """What any op on such a sequence costs at least: reading it once and writing as much."""
    sequence = _sequence(case)
    return Recipe(lambda target, source: target.copy_(source), (torch.empty_like(sequence), sequence))


def _norm(case: Case) -> Recipe:
    def run(branch: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return rms_norm_fn(branch, weight, None, residual=residual, eps=1e-5, prenorm=True)[0]

    return Recipe(run, (*_two_streams(case), torch.randn(FEATURES)))


def _norm_builtin(case: Case) -> Recipe:
    def run(branch: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(branch + residual, (FEATURES,), weight, 1e-5)

    return Recipe(run, (*_two_streams(case), torch.randn(FEATURES)))


# --- the table ------------------------------------------------------------------------------------------------------


def _networks() -> dict[str, Subject]:
    table = {"vim_pico": Subject("Vim-Pico", partial(_network, "vim_pico_patch4_32"))}
    for width in ("tiny", "small", "base"):
        for family, title in (("vim", "Vim"), ("deit", "DeiT")):
            builder = partial(_network, f"{family}_{width}_patch16_224")
            table[f"{family}_{width}"] = Subject(f"{title}-{width.title()}", builder)
    again = partial(_recomputed, "vim_tiny_patch16_224")
    vmamba = partial(_network, "vmamba_tiny_s2l5")
    table["vmamba_tiny"] = Subject("VMamba-Tiny", vmamba)
    table["vmamba_tiny_unscanned"] = Subject("VMamba-Tiny with a copy for each scan", _unscanned)
    table["swin_tiny"] = Subject("Swin-Tiny", partial(_network, "swin_tiny_patch4_window7_224"))
    table["vim_tiny_recomputed"] = Subject("Vim-Tiny, activations computed again", again, computes="vim_tiny")
    return table


def _of_others() -> dict[str, Subject]:
    scan, mixer = partial(Subject, computes="scan", states=STATE), partial(Subject, computes="mixer")
    parallel = partial(peers.mambapy_scan, FEATURES)
    sequential = partial(peers.mambapy_scan, FEATURES, parallel=False)
    return {
        "mambapy_scan": scan("mambapy's scan", partial(_scan, parallel), package="mambapy"),
        "mambapy_scan_sequential": scan("mambapy's sequential scan", partial(_scan, sequential), package="mambapy"),
        "mambapy_mixer": mixer("mambapy's mixer", partial(_mixer, peers.mambapy_mixer), package="mambapy"),
        "transformers_mixer": mixer(
            "transformers' mixer", partial(_mixer, peers.transformers_mixer), package="transformers"
        ),
    }


def _exports() -> dict[str, Subject]:
    """Vim-Tiny and VMamba-Tiny as ONNX files and in int8."""
    table = {}
    for key, name in (("vim_tiny", "vim_tiny_patch16_224"), ("vmamba_tiny", "vmamba_tiny_s2l5")):
        title = {"vim_tiny": "Vim-Tiny", "vmamba_tiny": "VMamba-Tiny"}[key]
        onnx = partial(exports.onnx_network, name)
        file = partial(Subject, package="onnxruntime", requirements="test.txt")
        for scheme in ("chunks", "steps", "chunk24"):
            way = f"{title} in onnxruntime, {scheme}"
            table[f"{key}_onnx_{scheme}"] = file(way, partial(onnx, scheme=scheme), computes=key)
        way = f"{title} in onnxruntime, our operators"
        table[f"{key}_onnx_operators"] = file(way, partial(onnx, library=True), computes=key)
        for int8 in ("dynamic", "static"):
            own = partial(exports.int8_network, name, scheme=int8)
            table[f"{key}_int8_{int8}"] = Subject(f"{title} in int8, {int8}", own)
            quantised = partial(onnx, library=True, int8=int8)
            table[f"{key}_onnx_int8_{int8}"] = file(f"{way}, int8, {int8}", quantised)
    return table


SUBJECTS = {
    **_networks(),
    **_exports(),
    "block": Subject("block", _block),
    "mixer": Subject("mixer", partial(_mixer, lambda own: own)),
    "inner": Subject("inside of a block", _inner, states=2 * STATE),
    "scan": Subject("scan", partial(_scan, _own_scan), states=STATE),
    "bidirectional_scan": Subject("both scans", _bidirectional_scan, states=2 * STATE),
    **{f"scan_2d_{n}": Subject(f"four scans, {n} states", partial(_scan_2d, n)) for n in (1, 16)},
    "conv": Subject("convolution", _conv, states=1),
    "conv_grouped": Subject("torch's grouped conv1d", _conv_grouped, computes="conv"),
    "copy": Subject("copy of sequences", _copy, states=1),
    "norm": Subject("add and norm", _norm),
    "norm_builtin": Subject("torch's rms_norm after an addition", _norm_builtin, computes="norm"),
    **_of_others(),
}
