"""VSSM, the network of VMamba: stages of SS2D blocks over maps that halve in size. Source: arXiv 2401.10166.

b batch, h height, w width, c channels. Everything lies in memory with the channels last; for the norms `ln2d` and `bn`
the tensors between modules are views (b, c, h, w) of that, for `ln` they are (b, h, w, c).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.layers import DropPath, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from vmamba.forward_types import refuse_unknown
from vmamba.layers import (
    ACTIVATIONS,
    DOWNSAMPLES,
    NORMS,
    PATCH_EMBEDS,
    Layer,
    Mlp,
    PatchMerging2D,
    Permute,
    at_least_fp32,
    channels_last,
    choose,
    gMlp,
)
from vmamba.options import check_options
from vmamba.ss2d import SS2D
from vmamba.timm_methods import TimmMethods, data_config, feature_info, init_linear

# What old configurations pass along and no network has a use for.
_IGNORED = ("ssm_rank_ratio",)


class VSSBlock(nn.Module):
    """A residual block of two branches, SS2D and a perceptron in every pixel: norm, mix, add; norm, mlp, add.

    Args:
        hidden_dim: c.
        drop_path: probability of dropping a branch, per picture, while training.
        norm_layer: makes the norms, for maps (b, c, h, w) if `channel_first` and (b, h, w, c) if not.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_act_layer, ssm_conv, ssm_conv_bias, ssm_drop_rate, ssm_init,
            forward_type: of SS2D; no such branch if `ssm_ratio` is not positive.
        mlp_ratio, mlp_act_layer, mlp_drop_rate: hidden channels over c, activation, dropout; no such branch if
            `mlp_ratio` is not positive. gmlp: `gMlp` instead of `Mlp`.
        use_checkpoint: keep only the block's input in training and compute the rest again in the backward pass.
        post_norm: norm the branch's output instead of its input.
        _SS2D: the class of the mixer.
    """

    def __init__(
        self,
        hidden_dim: int = 0,
        drop_path: float = 0.0,
        norm_layer: Layer = nn.LayerNorm,
        channel_first: bool = False,
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: Layer = nn.SiLU,
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: Layer = nn.GELU,
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        use_checkpoint: bool = False,
        post_norm: bool = False,
        _SS2D: Layer = SS2D,
    ) -> None:
        super().__init__()
        self.post_norm, self.use_checkpoint = post_norm, use_checkpoint
        self.ssm_branch, self.mlp_branch = ssm_ratio > 0, mlp_ratio > 0
        self.drop_path = DropPath(drop_path)
        if self.ssm_branch:
            sizes = {"ssm_ratio": ssm_ratio, "d_state": ssm_d_state, "dt_rank": ssm_dt_rank}
            convolution = {"d_conv": ssm_conv, "conv_bias": ssm_conv_bias, "act_layer": ssm_act_layer}
            scan = {"forward_type": forward_type, "initialize": ssm_init, "dropout": ssm_drop_rate}
            self.norm = norm_layer(hidden_dim)
            self.op = _SS2D(hidden_dim, channel_first=channel_first, **sizes, **convolution, **scan)
        if self.mlp_branch:
            perceptron, inner = gMlp if gmlp else Mlp, int(hidden_dim * mlp_ratio)
            self.norm2 = norm_layer(hidden_dim)
            self.mlp = perceptron(
                hidden_dim, inner, act_layer=mlp_act_layer, drop=mlp_drop_rate, channels_first=channel_first
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, h, w, c), or (b, c, h, w) if the channels come first, to the same shape."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return recompute_in_backward(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.ssm_branch:
            x = x + self.drop_path(self._branch(x, self.norm, self.op))
        if self.mlp_branch:
            x = x + self.drop_path(self._branch(x, self.norm2, self.mlp))
        return x

    def _branch(self, x: Tensor, norm: nn.Module, mix: nn.Module) -> Tensor:
        return norm(mix(x)) if self.post_norm else mix(norm(x))


class VSSM(TimmMethods, nn.Module):
    """Classify pictures of any size with stages of SS2D blocks.

    Args:
        patch_size, in_chans, num_classes: pixels, channels of the pictures, classes of the head (0 for none).
        depths, dims: blocks and channels of each stage; one number for `dims` doubles from stage to stage.
        ssm_d_state, ssm_ratio, ssm_dt_rank, ssm_conv, ssm_conv_bias, ssm_drop_rate, ssm_init, forward_type: of SS2D;
            `ssm_ratio` 0 for none.
        mlp_ratio, mlp_drop_rate, gmlp: of the perceptrons; `mlp_ratio` 0 for none.
        ssm_act_layer, mlp_act_layer: "silu", "gelu", "relu" or "sigmoid".
        drop_path_rate: stochastic depth, growing linearly over the blocks from 0.
        patch_norm: whether the patch embedding has norms.
        norm_layer: "ln" (maps are (b, h, w, c)), "ln2d" or "bn" (maps are (b, c, h, w)).
        downsample_version: "v1" (patch merging), "v2" or "v3" (convolution 2 x 2 or 3 x 3).
        patchembed_version: "v1" (one convolution) or "v2" (two).
        use_checkpoint: keep only the blocks' inputs in training and compute the rest again in the backward pass.
        posembed: a learned position embedding, made for pictures of `imgsize` pixels and resized (bicubic) for others.
        imgsize: one number or (height, width). img_size: the same in timm's name; wins if given.
        drop_rate: probability of dropout before the head.
        _SS2D: the class of the mixer.
        kwargs: `ssm_rank_ratio` of old configurations is accepted, without effect.
    Raises:
        TypeError: an unknown option; names the nearest one.
        ValueError: an option has an impossible value; see `options`.
    """

    def __init__(
        self,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        depths: Sequence[int] = (2, 2, 9, 2),
        dims: int | Sequence[int] = (96, 192, 384, 768),
        ssm_d_state: int = 16,
        ssm_ratio: float = 2.0,
        ssm_dt_rank: int | str = "auto",
        ssm_act_layer: str = "silu",
        ssm_conv: int = 3,
        ssm_conv_bias: bool = True,
        ssm_drop_rate: float = 0.0,
        ssm_init: str = "v0",
        forward_type: str = "v2",
        mlp_ratio: float = 4.0,
        mlp_act_layer: str = "gelu",
        mlp_drop_rate: float = 0.0,
        gmlp: bool = False,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        norm_layer: str = "LN",
        downsample_version: str = "v2",
        patchembed_version: str = "v1",
        use_checkpoint: bool = False,
        posembed: bool = False,
        imgsize: int | tuple[int, int] = 224,
        _SS2D: Layer = SS2D,
        *,
        img_size: int | tuple[int, int] | None = None,
        drop_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        options = dict(locals())
        super().__init__()
        refuse_unknown("VSSM", (name for name in kwargs if name not in _IGNORED), _option_names())
        self.dims = check_options(options)
        self.norm_layer = choose("norm_layer", norm_layer, NORMS)
        self.channel_first = self.norm_layer is not nn.LayerNorm
        self.num_classes, self.num_layers, self.drop_rate = num_classes, len(depths), drop_rate
        self.num_features = self.head_hidden_size = self.dims[-1]
        self.patch_size, self.in_chans = patch_size, in_chans
        self.img_size: tuple[int, int] = tuple(to_2tuple(imgsize if img_size is None else img_size))

        self.patch_embed = self._patch_embed(patchembed_version, patch_norm)
        if posembed:
            grid = (side // patch_size for side in self.img_size)
            self.pos_embed = nn.Parameter(trunc_normal_(torch.zeros(1, self.dims[0], *grid), std=0.02))
        # The block's options have the names that they have here.
        own = {name: options[name] for name in inspect.signature(VSSBlock).parameters if name in options}
        own |= {name: choose(name, own[name], ACTIVATIONS) for name in ("ssm_act_layer", "mlp_act_layer")}
        own |= {"norm_layer": self.norm_layer, "channel_first": self.channel_first}
        self.layers = self._stages(depths, drop_path_rate, downsample_version, functools.partial(VSSBlock, **own))
        self.classifier: Any = nn.Sequential(
            OrderedDict(
                norm=self.norm_layer(self.num_features),
                permute=nn.Identity() if self.channel_first else Permute(0, 3, 1, 2),
                avgpool=nn.AdaptiveAvgPool2d(1),
                flatten=nn.Flatten(1),
                head=nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity(),
            )
        )
        self.apply(init_linear)
        self.least_size = _least_size(self)
        self.feature_info = feature_info(self)
        self.pretrained_cfg = self.default_cfg = data_config(self)

    def _patch_embed(self, version: str, patch_norm: bool) -> nn.Sequential:
        make = choose("patchembed_version", version, PATCH_EMBEDS)
        norm = self.norm_layer if patch_norm else nn.Identity
        return make(self.in_chans, self.dims[0], self.patch_size, norm, self.channel_first)

    def _stages(
        self, depths: Sequence[int], drop_path_rate: float, version: str, block: Callable[..., VSSBlock]
    ) -> nn.ModuleList:
        make = choose("downsample_version", version, DOWNSAMPLES)
        last = max(sum(depths) - 1, 1)
        rates = (drop_path_rate * (i / last) for i in itertools.count())
        stages = []
        for depth, dim, following in itertools.zip_longest(depths, self.dims, self.dims[1:]):
            blocks = nn.Sequential(*(block(dim, drop_path=next(rates)) for _ in range(depth)))
            down = make(dim, following, self.norm_layer, self.channel_first) if following else nn.Identity()
            stages.append(nn.Sequential(OrderedDict(blocks=blocks, downsample=down)))
        return nn.ModuleList(stages)

    # ------------------------------------------------------------------------------------------------ forward

    def _embed(self, x: Tensor) -> Tensor:
        """Turn pictures (b, in_chans, h, w) into the first map, in this network's layout."""
        if x.ndim != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"the pictures must have shape (b, {self.in_chans}, h, w), got {tuple(x.shape)}")
        if x.shape[0] == 0:
            raise ValueError("there must be at least one picture, got a batch of none")
        height, width = x.shape[2:]
        if min(height, width) < self.least_size:
            raise ValueError(
                f"the picture is {height} x {width} pixels, but this network needs at least {self.least_size} x "
                f"{self.least_size}: enlarge the picture"
            )
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        pos_embed = getattr(self, "pos_embed", None)
        if pos_embed is None:
            return x
        if self.channel_first:
            return x + resize_pos_embed(pos_embed, x.shape[2:])
        return x + channels_last(resize_pos_embed(pos_embed, x.shape[1:3]))

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised maps after the last stage, (b, c, h, w), of pictures (b, in_chans, h, w).

        Raises:
            ValueError: the pictures have another number of channels, or are too small for the network.
        """
        x = self._embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.classifier.permute(self.classifier.norm(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool maps (b, c, h, w) and return the logits (b, num_classes), or with `pre_logits` the pooled (b, c)."""
        x = self.classifier.flatten(self.classifier.avgpool(x))
        x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (b, num_classes) of pictures (b, in_chans, h, w); see `forward_features`."""
        return self.forward_head(self.forward_features(x))


def _option_names() -> list[str]:
    return [name for name in inspect.signature(VSSM).parameters if name != "kwargs"]


def resize_pos_embed(pos_embed: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize (bicubic) a position embedding (1, c, rows, columns) to another grid; unchanged where it is the same.

    Any floating dtype, which the result has; computed in at least fp32.

    Raises:
        ValueError: it is no such embedding.
    """
    if pos_embed.ndim != 4 or pos_embed.shape[0] != 1 or 0 in pos_embed.shape:
        raise ValueError(
            f"`pos_embed` must have shape (1, c, rows, columns) without empty axes, got {tuple(pos_embed.shape)}"
        )
    if pos_embed.shape[2:] == torch.Size(grid):
        return pos_embed
    return F.interpolate(at_least_fp32(pos_embed), size=tuple(grid), mode="bicubic", align_corners=False).to(
        pos_embed.dtype
    )


def _side_before(side: int, part: nn.Module) -> int:
    """The least pixels of a side that one part of the network makes so many pixels of."""
    if isinstance(part, PatchMerging2D):
        return 2 * side - 1
    for conv in reversed([module for module in part.modules() if isinstance(module, nn.Conv2d)]):
        side = max((side - 1) * conv.stride[0] + conv.kernel_size[0] - 2 * int(conv.padding[0]), 1)
    return side


def _least_size(model: VSSM) -> int:
    """The least side of a picture: a patch, or what leaves every stage a pixel."""
    parts = [model.patch_embed, *(layer.downsample for layer in model.layers)]
    return max(functools.reduce(_side_before, reversed(parts), 1), model.patch_size)
