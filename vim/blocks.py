"""The parts that `VisionMamba` is built from: patch embedding, one block, and their initialisation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import lecun_normal_, to_2tuple, trunc_normal_
from torch import Tensor, nn
from torch.nn import functional

from causal_conv1d.backend.machine import has_fast_bf16
from mamba_ssm.models.mixer_seq_simple import _init_weights as init_mixer_weights
from mamba_ssm.modules.mamba_simple import Block, Mamba
from mamba_ssm.ops.norm import RMSNorm

__all__ = ["Block", "PatchEmbed", "create_block", "init_mixer_weights", "segm_init_weights"]


class PatchEmbed(nn.Module):
    """Cut a picture into (possibly overlapping) patches and map each to one token.

    Args:
        img_size: height and width in pixels, or one number for both.
        patch_size: height and width of a patch in pixels, or one number for both.
        stride: pixels between neighbouring patches, in both directions.
        in_chans: channels of the picture.
        embed_dim: c, channels of a token.
        norm_layer: called with `embed_dim`; its module normalises the tokens.
        flatten: return tokens in row-major order (b, m, c) instead of a map (b, c, rows, columns).
    Raises:
        ValueError: the picture is smaller than one patch, or the stride is not positive.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int = 16,
        in_chans: int = 3,
        embed_dim: int = 768,
        norm_layer: Callable[[int], nn.Module] | None = None,
        flatten: bool = True,
    ) -> None:
        super().__init__()
        self.img_size: tuple[int, int] = tuple(to_2tuple(img_size))
        self.patch_size: tuple[int, int] = tuple(to_2tuple(patch_size))
        self.stride = stride
        self.flatten = flatten
        if stride < 1:
            raise ValueError(f"`stride` must be at least 1 pixel, got {stride}")
        if any(side < patch for side, patch in zip(self.img_size, self.patch_size, strict=True)):
            raise ValueError(
                f"`img_size` must be at least one patch of {_size_text(self.patch_size)}, "
                f"got {_size_text(self.img_size)}"
            )
        rows, columns = (
            (side - patch) // stride + 1 for side, patch in zip(self.img_size, self.patch_size, strict=True)
        )
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=self.patch_size, stride=stride)
        self.norm = nn.Identity() if norm_layer is None else norm_layer(embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Embed pictures (b, in_chans, height, width).

        Raises:
            ValueError: the pictures are not of the size, or have not the channels, that this module was built for.
        """
        if x.ndim != 4 or x.shape[1] != self.proj.in_channels:
            raise ValueError(
                f"`x` must have shape (batch, {self.proj.in_channels}, height, width), got {tuple(x.shape)}"
            )
        if (x.shape[2], x.shape[3]) != self.img_size:
            got = (x.shape[2], x.shape[3])
            raise ValueError(
                f"the picture is {_size_text(got)} but the model was built for {_size_text(self.img_size)}: resize the "
                f"picture, or create the model with img_size=({got[0]}, {got[1]})"
            )
        x = self._project(x)
        if self.flatten:
            x = x.flatten(2).transpose(1, 2)
        return self.norm(x)

    def _project(self, x: Tensor) -> Tensor:
        """The convolution; in fp32 on a CPU that PyTorch's convolution of bf16 takes thirty times as long on."""
        proj = self.proj
        if x.dtype is not torch.bfloat16 or x.device.type != "cpu" or torch.is_grad_enabled() or has_fast_bf16():
            return proj(x)
        if type(proj) is not nn.Conv2d or proj._forward_hooks or proj._forward_pre_hooks:
            return proj(x)
        bias = None if proj.bias is None else proj.bias.float()
        return functional.conv2d(x.float(), proj.weight.float(), bias, proj.stride).to(x.dtype)


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]} pixels (height x width)"


def create_block(
    d_model: int,
    d_state: int = 16,
    ssm_cfg: dict[str, Any] | None = None,
    norm_epsilon: float = 1e-5,
    drop_path: float = 0.0,
    rms_norm: bool = False,
    residual_in_fp32: bool = False,
    fused_add_norm: bool = False,
    layer_idx: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    if_bimamba: bool = False,
    bimamba_type: str = "none",
    if_divide_out: bool = False,
    init_layer_scale: float | None = None,
) -> Block:
    """Build one block: add, normalise, mix.

    Args:
        ssm_cfg: further arguments of `Mamba`; none of those that this function passes itself.
        drop_path: probability of dropping the *previous* block's output, per sample, while training.
        if_bimamba: force bimamba_type="v1".
    Raises:
        TypeError: `ssm_cfg` repeats an argument of this function or names none of `Mamba`.
    """
    factory: dict[str, Any] = {"device": device, "dtype": dtype}
    mixer = partial(
        Mamba,
        d_state=d_state,
        layer_idx=layer_idx,
        bimamba_type="v1" if if_bimamba else bimamba_type,
        if_divide_out=if_divide_out,
        init_layer_scale=init_layer_scale,
        **factory,
    )
    repeated = sorted(set(ssm_cfg or {}) & set(mixer.keywords))
    if repeated:
        raise TypeError(f"`ssm_cfg` must not hold {', '.join(repeated)}: pass it to create_block itself")
    norm = partial(RMSNorm if rms_norm else nn.LayerNorm, eps=norm_epsilon, **factory)
    block = Block(
        d_model,
        partial(mixer, **(ssm_cfg or {})),
        norm_cls=norm,
        fused_add_norm=fused_add_norm,
        residual_in_fp32=residual_in_fp32,
        drop_path=drop_path,
    )
    block.layer_idx = layer_idx
    return block


def segm_init_weights(module: nn.Module) -> None:
    """Initialise one module of the patch embedding or the head; for use with `nn.Module.apply`.

    Linear: normal, standard deviation 0.02; convolution: normal, standard deviation 1 / sqrt(fan in); norms: ones;
    every bias: zeros.
    """
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Conv2d):
        lecun_normal_(module.weight)
    elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)
