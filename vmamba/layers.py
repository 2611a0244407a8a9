"""Layers of VMamba that PyTorch has not, and those that are chosen by name.

b batch, h height, w width, c or d channels. Two layouts: channels last, (b, h, w, c), and channels first, (b, c, h, w).
The layers for channels first compute on a view with the channels last: a network whose maps lie in memory with the
channels last is never copied, whichever way its axes are named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from vmamba.forward_types import nearest

Choice = TypeVar("Choice")
Layer = Callable[..., nn.Module]

ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "sigmoid": nn.Sigmoid}


def choose(option: str, name: str, table: Mapping[str, Choice]) -> Choice:
    """Return the entry of `table` for the value `name` of an option, in any case of letters.

    Raises:
        ValueError: the table has none; names them all and the nearest.
    """
    found = table.get(str(name).lower())
    if found is None:
        raise ValueError(
            f"`{option}` must be one of {', '.join(table)}, got {name!r}; the nearest is {nearest(name, table)!r}"
        )
    return found


def at_least_fp32(value: Tensor) -> Tensor:
    """The value in fp32, or as it is if it is wider."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def channels_last(x: Tensor) -> Tensor:
    """View (b, c, h, w) as (b, h, w, c)."""
    return x.permute(0, 2, 3, 1)


def channels_first(x: Tensor) -> Tensor:
    """View (b, h, w, c) as (b, c, h, w)."""
    return x.permute(0, 3, 1, 2)


class Linear2d(nn.Linear):
    """`nn.Linear` over the channels of (b, c, h, w).

    The weight is (out, in); (out, in, 1, 1), that of a 1 x 1 convolution, is accepted in a state dict.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in, h, w) to (b, out, h, w)."""
        return channels_first(F.linear(channels_last(x), self.weight, self.bias))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if given is not None and tuple(given.shape[2:]) == (1, 1):
            state_dict[prefix + "weight"] = given[:, :, 0, 0]
        super()._load_from_state_dict(state_dict, prefix, *rest)


class DownsamplingConv2d(nn.Conv2d):
    """`nn.Conv2d` that computes in fp32 on a CPU where a map in bfloat16 becomes one pixel wide.

    oneDNN's kernel for processors with AMX, in torch 2.15, gives other numbers there from call to call.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, in, h, w) to (b, out, h', w')."""
        reach = x.shape[-1] + 2 * int(self.padding[1]) - self.kernel_size[1]
        narrow = reach < self.stride[1] and x.device.type == "cpu"
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is torch.bfloat16
        if not narrow or not (autocast or x.dtype is torch.bfloat16):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            bias = None if self.bias is None else self.bias.float()
            y = F.conv2d(x.float(), self.weight.float(), bias, self.stride, self.padding)
        return y.to(torch.bfloat16)


class LayerNorm2d(nn.LayerNorm):
    """`nn.LayerNorm` over the channels of (b, c, h, w)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (b, c, h, w) in every pixel."""
        return channels_first(super().forward(channels_last(x)))


class GELU2d(nn.GELU):
    """`nn.GELU` of (b, c, h, w), on the view with the channels last, for which PyTorch has a faster kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply GELU to every value."""
        return channels_first(super().forward(channels_last(x)))


_IN_PLACE: dict[type[nn.Module], Callable[[Tensor], Tensor]] = {
    nn.GELU: torch.ops.aten.gelu_.default,
    GELU2d: torch.ops.aten.gelu_.default,
    nn.SiLU: torch.ops.aten.silu_.default,
}

_SOURCES = (nn.Linear, Linear2d, nn.Conv2d)  # what they return is theirs no more


def activate(act: nn.Module, x: Tensor, source: nn.Module) -> Tensor:
    """Apply an activation to what `source` has just returned and nothing but this reads.

    In place, which saves a map of memory, unless somebody may see it: autograd, a hook, a compiler, or a source that is
    none of the layers here, which may return what it keeps.
    """
    run = _IN_PLACE.get(type(act)) if type(source) in _SOURCES else None
    hooked = (
        _global_forward_hooks
        or _global_forward_pre_hooks
        or any(module._forward_hooks or module._forward_pre_hooks for module in (act, source))
    )
    exact = getattr(act, "approximate", "none") == "none"
    if run is None or x.requires_grad or hooked or not exact or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return act(x)
    run(channels_last(x) if type(act) is GELU2d else x)
    return x


class Permute(nn.Module):
    """`torch.permute` with fixed axes: a view."""

    def __init__(self, *args: int) -> None:
        super().__init__()
        self.args = args

    def forward(self, x: Tensor) -> Tensor:
        """Permute the axes of `x`."""
        return x.permute(*self.args)

    def extra_repr(self) -> str:
        """The axes, for `print(model)`."""
        return ", ".join(map(str, self.args))


class SoftmaxSpatial(nn.Softmax):
    """Softmax over the pixels of a map, for each channel: dim=-1 for (b, c, h, w), dim=1 for (b, h, w, c).

    Raises:
        ValueError: another `dim`.
    """

    def __init__(self, dim: int = -1) -> None:
        if dim not in (-1, 1):
            raise ValueError(f"`dim` must be -1 for maps (b, c, h, w) or 1 for maps (b, h, w, c), got {dim}")
        super().__init__(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return a map of the shape of `x` whose pixels sum to 1 in each channel."""
        if self.dim == -1:
            return channels_first(_pixel_softmax(channels_last(x)))
        return _pixel_softmax(x)


def _pixel_softmax(x: Tensor) -> Tensor:
    return x.flatten(1, 2).softmax(1).unflatten(1, x.shape[1:3])


class PatchMerging2D(nn.Module):
    """Halve height and width: four neighbouring pixels become one of four times the channels, then fewer.

    Odd sizes are padded with zeros at the bottom and at the right.

    Args:
        dim: c, channels of the input.
        out_dim: channels of the output; 2 c if -1.
        norm_layer: norm of the 4 c channels; `nn.LayerNorm` means `LayerNorm2d` where the channels come first.
        channel_first: maps are (b, c, h, w) instead of (b, h, w, c).
    """

    def __init__(
        self, dim: int, out_dim: int = -1, norm_layer: Layer = nn.LayerNorm, channel_first: bool = False
    ) -> None:
        super().__init__()
        self.dim = dim
        self.channel_first = channel_first
        if channel_first and norm_layer is nn.LayerNorm:
            norm_layer = LayerNorm2d
        self.reduction = linear_layer(channel_first)(4 * dim, 2 * dim if out_dim < 0 else out_dim, bias=False)
        self.norm = norm_layer(4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, h, w, c) to (b, ceil(h / 2), ceil(w / 2), out_dim), or the same with the channels first."""
        if self.channel_first:
            x = channels_last(x)
        x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
        phases = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        merged = torch.cat(phases, dim=-1)
        if self.channel_first:
            merged = channels_first(merged)
        return self.reduction(self.norm(merged))


class Mlp(nn.Module):
    """Two linear layers with an activation between them, in every pixel: fc1, act, drop, fc2, drop.

    Args:
        in_features, hidden_features, out_features: channels; the last two are `in_features` if None.
        act_layer: makes the activation.
        drop: probability of dropout.
        channels_first: maps are (b, c, h, w) instead of (b, h, w, c).
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.GELU,
        drop: float = 0.0,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        linear = linear_layer(channels_first)
        hidden = hidden_features or in_features
        self.fc1 = linear(in_features, hidden)
        self.act = _activation(act_layer, channels_first)
        self.fc2 = linear(hidden, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map a map of `in_features` channels to one of `out_features`."""
        return self.drop(self.fc2(self.drop(activate(self.act, self.fc1(x), self.fc1))))


class gMlp(nn.Module):  # noqa: N801  upstream's name
    """Two linear layers with a gate between them: fc1 makes (x, z), then fc2(x * act(z)), drop; arguments of `Mlp`."""

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Layer = nn.GELU,
        drop: float = 0.0,
        channels_first: bool = False,
    ) -> None:
        super().__init__()
        linear = linear_layer(channels_first)
        hidden = hidden_features or in_features
        self.channel_first = channels_first
        self.fc1 = linear(in_features, 2 * hidden)
        self.act = _activation(act_layer, channels_first)
        self.fc2 = linear(hidden, out_features or in_features)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Map a map of `in_features` channels to one of `out_features`."""
        x, z = self.fc1(x).chunk(2, dim=1 if self.channel_first else -1)
        return self.drop(self.fc2(x * self.act(z)))


def linear_layer(channel_first: bool) -> type[nn.Linear]:
    """The linear layer of a layout."""
    return Linear2d if channel_first else nn.Linear


def _activation(layer: Layer, channel_first: bool) -> nn.Module:
    return GELU2d() if channel_first and layer is nn.GELU else layer()


def _to_first(channel_first: bool) -> nn.Module:
    """From a network's own layout to (b, c, h, w)."""
    return nn.Identity() if channel_first else Permute(0, 3, 1, 2)


def _to_own(channel_first: bool) -> nn.Module:
    """From (b, c, h, w) to a network's own layout."""
    return nn.Identity() if channel_first else Permute(0, 2, 3, 1)


def patch_embed_v1(in_chans: int, dim: int, patch_size: int, norm: Layer, channel_first: bool) -> nn.Sequential:
    """One convolution, which cuts the picture (b, in_chans, h, w) into patches, and the norm."""
    conv = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
    return nn.Sequential(conv, _to_own(channel_first), norm(dim))


def patch_embed_v2(in_chans: int, dim: int, patch_size: int, norm: Layer, channel_first: bool) -> nn.Sequential:
    """Two overlapping convolutions of half the patch each, with norms, and GELU between them; 2 or more of each."""
    conv = partial(nn.Conv2d, kernel_size=patch_size // 2 + 1, stride=patch_size // 2, padding=1)
    return nn.Sequential(
        conv(in_chans, dim // 2),
        _to_own(channel_first),
        norm(dim // 2),
        _to_first(channel_first),
        GELU2d(),
        conv(dim // 2, dim),
        _to_own(channel_first),
        norm(dim),
    )


def downsample_v2(dim: int, out_dim: int, norm: Layer, channel_first: bool) -> nn.Module:
    """A convolution 2 x 2 of stride 2, and the norm: an odd last row or column is left out."""
    conv = DownsamplingConv2d(dim, out_dim, kernel_size=2, stride=2)
    return nn.Sequential(_to_first(channel_first), conv, _to_own(channel_first), norm(out_dim))


def downsample_v3(dim: int, out_dim: int, norm: Layer, channel_first: bool) -> nn.Module:
    """A convolution 3 x 3 of stride 2, and the norm."""
    conv = DownsamplingConv2d(dim, out_dim, kernel_size=3, stride=2, padding=1)
    return nn.Sequential(_to_first(channel_first), conv, _to_own(channel_first), norm(out_dim))


NORMS: dict[str, type[nn.Module]] = {"ln": nn.LayerNorm, "ln2d": LayerNorm2d, "bn": nn.BatchNorm2d}
PATCH_EMBEDS: dict[str, Callable[..., nn.Sequential]] = {"v1": patch_embed_v1, "v2": patch_embed_v2}
DOWNSAMPLES: dict[str, Layer] = {"v1": PatchMerging2D, "v2": downsample_v2, "v3": downsample_v3}
