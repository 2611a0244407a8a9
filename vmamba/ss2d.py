"""SS2D, the mixer of VMamba: four selective scans over a map. Source: arXiv 2401.10166, section 4.2.

b batch, h height, w width, l = h w, m model channels, d inner channels, n state, r dt rank, k direction (0 to 3)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mamba_ssm.ops.mamba_inner import decay_rates
from mamba_ssm.ops.selective_scan_2d import selective_scan_2d
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from vmamba.cross_scan import PATTERNS, cross_merge_fn, cross_scan_fn
from vmamba.csms6s import project
from vmamba.forward_types import parse_forward_type
from vmamba.layers import (
    Layer,
    Permute,
    SoftmaxSpatial,
    activate,
    at_least_fp32,
    channels_first,
    channels_last,
    choose,
    linear_layer,
)

DIRECTIONS = 4


class mamba_init:  # noqa: N801  upstream's name
    """The initial values of a scan's parameters."""

    @staticmethod
    def dt_init(
        dt_rank: int,
        d_inner: int,
        dt_scale: float = 1.0,
        dt_init: str = "random",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
    ) -> nn.Linear:
        """Return the projection of one direction's step sizes, whose bias makes them log-uniform.

        Args:
            dt_rank, d_inner: r and d.
            dt_init: "random" or "constant" weights, of scale `dt_scale` / sqrt(r).
            dt_min, dt_max, dt_init_floor: the range of the step sizes, and the least of all.
        Raises:
            ValueError: `dt_init` is something else.
        """
        scale = dt_scale * dt_rank**-0.5
        least = choose("dt_init", dt_init, {"random": -scale, "constant": scale})
        projection = nn.Linear(dt_rank, d_inner)
        nn.init.uniform_(projection.weight, least, scale)
        low, high = math.log(dt_min), math.log(dt_max)
        with torch.no_grad():
            dt = torch.rand(d_inner).mul(high - low).add(low).exp().clamp(min=dt_init_floor)
            projection.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
        return projection

    @staticmethod
    def A_log_init(  # noqa: N802  upstream's name, as the next two
        d_state: int, d_inner: int, copies: int = -1, device: Any = None, merge: bool = True
    ) -> nn.Parameter:
        """Return ln(1), ..., ln(n) for every channel: (d, n); with copies, (copies * d, n) or, unmerged, of 3 axes."""
        row = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log()
        return _undecayed(_copied(row.repeat(d_inner, 1), copies, merge))

    @staticmethod
    def D_init(  # noqa: N802
        d_inner: int, copies: int = -1, device: Any = None, merge: bool = True
    ) -> nn.Parameter:
        """Return ones: (d,); with copies, (copies * d,) or, unmerged, (copies, d)."""
        return _undecayed(_copied(torch.ones(d_inner, device=device), copies, merge))

    @classmethod
    def init_dt_A_D(  # noqa: N802
        cls,
        d_state: int,
        dt_rank: int,
        d_inner: int,
        dt_scale: float,
        dt_init: str,
        dt_min: float,
        dt_max: float,
        dt_init_floor: float,
        k_group: int = DIRECTIONS,
    ) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter, nn.Parameter]:
        """Return A_logs (k d, n), Ds (k d,), dt_projs_weight (k, d, r) and dt_projs_bias (k, d); arguments as above."""
        steps = [
            cls.dt_init(dt_rank, d_inner, dt_scale, dt_init, dt_min, dt_max, dt_init_floor) for _ in range(k_group)
        ]
        return (
            cls.A_log_init(d_state, d_inner, copies=k_group),
            cls.D_init(d_inner, copies=k_group),
            nn.Parameter(torch.stack([step.weight.detach() for step in steps])),
            nn.Parameter(torch.stack([step.bias.detach() for step in steps])),
        )


def _copied(value: Tensor, copies: int, merge: bool) -> Tensor:
    if copies <= 0:
        return value
    stacked = value.expand(copies, *value.shape).clone()
    return stacked.flatten(0, 1) if merge else stacked


def _undecayed(value: Tensor) -> nn.Parameter:
    """A parameter with the mark by which some optimizers leave it out of weight decay."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


@torch.no_grad()
def _keep_values(mixer: SS2D) -> None:
    """As `mamba_init` made them."""


@torch.no_grad()
def _random_values(mixer: SS2D) -> None:
    mixer.A_logs.normal_()
    for steps in (mixer.dt_projs_weight, mixer.dt_projs_bias):
        steps.normal_(std=0.1)


@torch.no_grad()
def _small_values(mixer: SS2D) -> None:
    mixer.A_logs.zero_()
    for steps in (mixer.dt_projs_weight, mixer.dt_projs_bias):
        steps.uniform_(0, 0.1)


INITIALIZERS = {"v0": _keep_values, "v1": _random_values, "v2": _small_values}


def _depthwise(channels: int, size: int, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=(size - 1) // 2, groups=channels, bias=bias)


def _out_norm(kind: str, channels: int) -> nn.Module:
    """The norm of the scan's output (b, h, w, d), by its name in the forward type; its keys are the published ones."""
    if kind == "norm":
        return nn.LayerNorm(channels)
    if kind in ("ondwconv3", "oncnorm"):
        conv = (Permute(0, 3, 1, 2), _depthwise(channels, 3, bias=False), Permute(0, 2, 3, 1))
        return nn.Sequential(*conv) if kind == "ondwconv3" else nn.Sequential(nn.LayerNorm(channels), *conv)
    plain: dict[str, Layer] = {"onnone": nn.Identity, "onsoftmax": partial(SoftmaxSpatial, 1), "onsigmoid": nn.Sigmoid}
    return plain[kind]()


class SS2D(nn.Module):
    """Mix the pixels of a map (b, h, w, m), or (b, m, h, w), with selective scans along four paths.

    Attributes:
        __DEBUG__: if true, the next calls leave what the scans took and gave in `__data__`, for attention maps: `us`,
            `dts` (before bias and softplus) (b, 4, d, l), `Bs`, `Cs` (b, 4, n, l), `ys` (b, 4, d, h, w), all in each
            path's own order; `y` (b, d, l), their sum in the picture's order; `A_logs` (4 d, n), `Ds` (4 d),
            `delta_bias` (4 d), `H`, `W`. Detached.

    Args:
        d_model, d_state: m and n.
        ssm_ratio: d = int(ssm_ratio * m).
        dt_rank: r; "auto" is ceil(m / 16).
        act_layer: makes the activation after the convolution and that of the gate.
        d_conv: side of the depth-wise convolution, odd; less than 2 for none. conv_bias: whether it has a bias.
        dropout: probability, on the output.
        bias: whether the outer projections have a bias.
        dt_min, dt_max, dt_init, dt_scale, dt_init_floor: see `mamba_init.dt_init`.
        initialize: first values of the scan's parameters: "v0" (as Mamba's), "v1" (A_logs and steps random) or "v2"
            (A_logs 0, steps small and not negative).
        forward_type: see `forward_types`; "v0" and "v0seq" take nothing but their own act_layer, d_conv, conv_bias and
            initialize.
        channel_first: maps are (b, m, h, w).
    Raises:
        ValueError: an option has an impossible value.
    """

    __DEBUG__ = False

    def __init__(
        self,
        d_model: int = 96,
        d_state: int = 16,
        ssm_ratio: float = 2.0,
        dt_rank: int | str = "auto",
        act_layer: Layer = nn.SiLU,
        d_conv: int = 3,
        conv_bias: bool = True,
        dropout: float = 0.0,
        bias: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        initialize: str = "v0",
        forward_type: str = "v2",
        channel_first: bool = False,
    ) -> None:
        super().__init__()
        self.variant = parse_forward_type(forward_type)
        if self.variant.vanilla:
            act_layer, d_conv, conv_bias, initialize = nn.SiLU, 3, True, "v0"
        self.d_model, self.d_state, self.d_conv = d_model, d_state, d_conv
        self.d_inner = int(ssm_ratio * d_model)
        if d_conv > 1 and d_conv % 2 == 0:
            raise ValueError(f"`d_conv` must be odd, or less than 2 for no convolution, got {d_conv}")
        if isinstance(dt_rank, str) and dt_rank != "auto":
            raise ValueError(f"`dt_rank` must be a number or 'auto', got {dt_rank!r}")
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        for name in ("d_model", "d_state", "d_inner", "dt_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}")
        self.channel_first = channel_first
        self.k_group = DIRECTIONS

        # In the order of the published state dicts, on which the indices of an optimizer's state depend.
        bound = self.d_inner**-0.5
        projected = self.dt_rank + 2 * d_state
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, projected, self.d_inner).uniform_(-bound, bound))
        sizes = (d_state, self.dt_rank, self.d_inner)
        made = mamba_init.init_dt_A_D(*sizes, dt_scale, dt_init, dt_min, dt_max, dt_init_floor)
        self.A_logs, self.Ds, self.dt_projs_weight, self.dt_projs_bias = made
        choose("initialize", initialize, INITIALIZERS)(self)
        linear = linear_layer(channel_first)
        self.out_norm = _out_norm(self.variant.out_norm, self.d_inner)
        self.in_proj = linear(d_model, self.d_inner * (2 if self.variant.gate else 1), bias=bias)
        self.act = act_layer()
        if self.with_dconv:
            self.conv2d = _depthwise(self.d_inner, d_conv, conv_bias)
        self.out_act = nn.GELU() if self.variant.out_act else nn.Identity()
        self.out_proj = linear(self.d_inner, d_model, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()

    @property
    def with_dconv(self) -> bool:
        """Whether there is a convolution."""
        return self.d_conv > 1

    # ------------------------------------------------------------------------------------------------ forward

    def forward(self, x: Tensor) -> Tensor:
        """Mix the pixels of (b, h, w, m), or of (b, m, h, w) if `channel_first`; any height and width.

        The scans keep their state in at least fp32, whatever the dtype of `x`.

        Raises:
            ValueError: `x` is no such map.
        """
        axis = 1 if self.channel_first else -1
        if x.ndim != 4 or x.shape[axis] != self.d_model:
            layout = f"(b, {self.d_model}, h, w)" if self.channel_first else f"(b, h, w, {self.d_model})"
            raise ValueError(f"`x` must have shape {layout}, got {tuple(x.shape)}")
        x = self.in_proj(x)
        if self.channel_first:
            x = channels_last(x)
        gate = None
        if self.variant.gate:
            x, gate = x.chunk(2, dim=-1)
        x = self._convolve(x)  # under its name, as what follows: a large map is given back when it has been read
        dtype = x.dtype
        x = self.out_act(self._normalize(self._scan(x)).to(dtype))
        if gate is not None:
            x = x * (self.act(gate) if self.variant.gate_act else gate)
        if self.channel_first:
            x = channels_first(x)
        return self.dropout(self.out_proj(x))

    def _convolve(self, x: Tensor) -> Tensor:
        """The depth-wise convolution, if any, and the activation, on (b, h, w, d)."""
        if not self.with_dconv:
            return self.act(x)
        return activate(self.act, channels_last(self.conv2d(channels_first(x))), self.conv2d)

    def _normalize(self, y: Tensor) -> Tensor:
        """The out-norm on (b, h, w, d), in the dtype of its parameters where it has some."""
        weight = next(self.out_norm.parameters(), None)
        return self.out_norm(y if weight is None else y.to(weight.dtype))

    def _project(self, u: Tensor) -> Tensor:
        """(dt, B, C) of every pixel of (b, h, w, d) and direction: (b, h, w, 4, r + 2 n)."""
        return project(u, self.x_proj_weight, getattr(self, "x_proj_bias", None))

    def _rates(self) -> tuple[Tensor, Tensor, Tensor]:
        """A (4, d, n), D (4, d) and the bias of the steps (4, d), in at least fp32."""
        A = decay_rates(self.A_logs).unflatten(0, (DIRECTIONS, -1))
        return A, at_least_fp32(self.Ds).unflatten(0, (DIRECTIONS, -1)), at_least_fp32(self.dt_projs_bias)

    def _scan(self, u: Tensor) -> Tensor:
        """The four scans of (b, h, w, d), and their sum in the picture's order; at least fp32."""
        if self.variant.directions == "cascade":
            return self._cascade(u)
        A, D, bias = self._rates()
        projected = self._project(u)
        y = selective_scan_2d(
            u, projected, self.dt_projs_weight, A, D=D, dt_bias=bias, directions=self.variant.directions
        )
        if self.__DEBUG__:
            self._record(u.detach(), projected.detach())
        return y

    # ------------------------------------------------------------------------------------------------ cascade

    def _cascade(self, u: Tensor) -> Tensor:
        """Scan the rows of (b, h, w, d) both ways, then the columns of the result; a plain norm before either."""
        if self.__DEBUG__:
            raise ValueError("a cascade scans no picture in four directions: use another forward_type to record scans")
        y = self._scan_rows(u, slice(0, 2), u.dtype)
        return self._scan_rows(y.transpose(1, 2), slice(2, 4), u.dtype).transpose(1, 2)

    def _scan_rows(self, x: Tensor, directions: slice, dtype: torch.dtype) -> Tensor:
        """Scan each row of (b, h, w, d) forward and reversed, with the parameters of two directions.

        The output of the reversed scan is added as it comes, in its own order: that is how the published variant is
        defined.
        """
        rows = F.layer_norm(x, x.shape[-1:]).to(dtype).flatten(0, 1)
        sequences = torch.stack([rows, rows.flip(1)], dim=2)
        bias = getattr(self, "x_proj_bias", None)
        projected = torch.einsum("blkd,kcd->blkc", sequences, self.x_proj_weight[directions])
        if bias is not None:
            projected = projected + bias[directions]
        steps, B, C = projected.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = torch.einsum("blkr,kdr->blkd", steps, self.dt_projs_weight[directions])
        A, D, dt_bias = (value[directions].flatten(0, 1) for value in self._rates())
        u, delta = (at_least_fp32(value).flatten(2).transpose(1, 2) for value in (sequences, delta))
        B, C = (at_least_fp32(value).permute(0, 2, 3, 1) for value in (B, C))
        y: Any = selective_scan_fn(u, delta, A, B, C, D, delta_bias=dt_bias, delta_softplus=True)
        return y.unflatten(1, (2, -1)).sum(1).transpose(1, 2).unflatten(0, x.shape[:2])

    # ------------------------------------------------------------------------------------------------ recording

    @torch.no_grad()
    def _record(self, u: Tensor, projected: Tensor) -> None:
        """Keep in `__data__` what the four scans of (b, h, w, d) take and give; see the class."""
        pattern = list(PATTERNS.values()).index(self.variant.directions)
        height, width = u.shape[1:3]
        xs = cross_scan_fn(at_least_fp32(u), in_channel_first=False, scans=pattern)
        rows = cross_scan_fn(at_least_fp32(projected), in_channel_first=False, one_by_one=True, scans=pattern)
        steps, B, C = rows.split([self.dt_rank, self.d_state, self.d_state], dim=2)
        dts = torch.einsum("bkrl,kdr->bkdl", steps, self.dt_projs_weight.to(steps.dtype))
        A, D, bias = (value.flatten(0, 1) for value in self._rates())
        u, delta = xs.flatten(1, 2), dts.flatten(1, 2)
        flat: Any = selective_scan_fn(u, delta, A, B, C, D, delta_bias=bias, delta_softplus=True)
        ys = flat.unflatten(1, (DIRECTIONS, -1)).unflatten(-1, (height, width))
        self.__data__ = {
            "A_logs": self.A_logs.detach(),
            "Bs": B,
            "Cs": C,
            "Ds": self.Ds.detach(),
            "us": xs,
            "dts": dts,
            "delta_bias": bias.detach(),
            "ys": ys,
            "y": cross_merge_fn(ys, scans=pattern),
            "H": height,
            "W": width,
        }


SS2Dv0 = SS2Dv2 = SS2D


class SS2Dv3(nn.Module):
    """The name of a variant that no published network uses; constructing it raises.

    Raises:
        ValueError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("SS2Dv3 is not offered, as no published weights use it: use SS2D with forward_type='v05'")


class SS2Dm0(nn.Module):
    """The name of the variant on Mamba-2; constructing it raises.

    Raises:
        ValueError: always.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "SS2Dm0 is not offered, as its weights were never published: use SS2D with forward_type='v05_noz'"
        )
