"""Vision Mamba: a bidirectional state space model on a sequence of image patches, and its registered variants.

Glossary: b batch, m patches, k class tokens (0 to 2), l = m + k tokens, c channels. Source: arXiv 2401.09417.

This module is the import door of all public names of the model. Importing it registers the variants of
`registry.VARIANTS` with timm, so that `timm.create_model(name, ...)` finds them.
"""

from __future__ import annotations

import difflib
import inspect
import random
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, trunc_normal_
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from blocks import Block, PatchEmbed, create_block, init_mixer_weights, segm_init_weights
from mamba_ssm.modules.mamba_simple import run_blocks
from mamba_ssm.ops.norm import RMSNorm, layer_norm_fn, rms_norm_fn
from registry import VARIANTS, data_config, entry_point
from rope import VisionRotaryEmbeddingFast
from timm_methods import TimmMethods
from tokens import TokenOrder, class_token_rows, insert_class_tokens

__all__ = [
    "Block",
    "PatchEmbed",
    "RMSNorm",
    "VisionMamba",
    "create_block",
    "layer_norm_fn",
    "rms_norm_fn",
    "segm_init_weights",
]

POOL_TYPES = ("none", "mean", "max", "all")
_RENAMED = {"in_chans": "channels", "if_devide_out": "if_divide_out"}
# What timm.create_model and main.py pass along and this model has no use for.
_IGNORED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "drop_block_rate")


class VisionMamba(TimmMethods, nn.Module):
    """Classify pictures with a stack of Mamba blocks over their patches.

    Args:
        img_size, patch_size: pixels, one number or (height, width). stride: pixels between patches.
        depth, embed_dim, d_state: number of blocks, c, state size of the mixers.
        channels: channels of the pictures (timm's `in_chans` is accepted too).
        num_classes: classes of the head; 0 for none.
        ssm_cfg: further arguments of `Mamba`.
        drop_rate: dropout after the position embedding and before the head. drop_path_rate: stochastic depth, growing
            linearly over the blocks.
        norm_epsilon, rms_norm: kind of the norms. fused_add_norm, residual_in_fp32: passed to the blocks.
        initializer_cfg: arguments of `init_mixer_weights`.
        device, dtype: of all parameters (A_log and D stay fp32).
        ft_seq_len: accepted, without effect. pt_hw_seq_len: side of the patch grid of the pre-training, for the rotary
            embedding (`if_rope`, on the residual too with `if_rope_residual`).
        if_bidirectional: use the blocks in pairs, the second of each on the reversed sequence; an odd last block is
            unused.
        final_pool_type: without class token: "none" (last token), "mean", "max" (of the logits) or "all" (every token).
        if_abs_pos_embed: learned position embedding, added after the class token went in.
        flip_img_sequences_ratio: probability of reversing the sequence, drawn once per call, in evaluation too.
        if_bimamba, bimamba_type, if_divide_out, init_layer_scale: passed to the mixers.
        if_cls_token: one class token, in the middle (`use_middle_cls_token`) or first; or one at each end, averaged
            (`use_double_cls_token`, which wins).
    Raises:
        TypeError: an unknown option; names the nearest one.
        ValueError: an option has an impossible value.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int = 16,
        depth: int = 24,
        embed_dim: int = 192,
        d_state: int = 16,
        channels: int = 3,
        num_classes: int = 1000,
        ssm_cfg: dict[str, Any] | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        norm_epsilon: float = 1e-5,
        rms_norm: bool = True,
        initializer_cfg: dict[str, Any] | None = None,
        fused_add_norm: bool = True,
        residual_in_fp32: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        ft_seq_len: int | None = None,
        pt_hw_seq_len: int = 14,
        if_bidirectional: bool = False,
        final_pool_type: str = "none",
        if_abs_pos_embed: bool = True,
        if_rope: bool = False,
        if_rope_residual: bool = False,
        flip_img_sequences_ratio: float = -1.0,
        if_bimamba: bool = False,
        bimamba_type: str = "v2",
        if_cls_token: bool = True,
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
        use_double_cls_token: bool = False,
        use_middle_cls_token: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        renamed = _renamed_options(kwargs)
        channels = renamed.get("channels", channels)
        if_divide_out = renamed.get("if_divide_out", if_divide_out)
        if if_rope and embed_dim % 4:
            raise ValueError(f"`embed_dim` must be divisible by 4 with if_rope=True, got {embed_dim}")

        self.if_cls_token = if_cls_token
        self.use_middle_cls_token = use_middle_cls_token
        self.use_double_cls_token = use_double_cls_token
        self.num_tokens = self.num_prefix_tokens = len(class_token_rows(self.class_token_placement, 0))
        self.if_abs_pos_embed = if_abs_pos_embed
        self.if_rope, self.if_rope_residual = if_rope, if_rope_residual
        self.flip_img_sequences_ratio = flip_img_sequences_ratio
        self.if_bidirectional = if_bidirectional
        self.fused_add_norm, self.residual_in_fp32 = fused_add_norm, residual_in_fp32
        self.final_pool_type = self._checked_pool_type(final_pool_type)
        self.num_classes = num_classes
        self.d_model = self.num_features = self.embed_dim = self.head_hidden_size = embed_dim
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans=channels, embed_dim=embed_dim)
        self._add_tokens(drop_rate, factory)
        if if_rope:
            grid = self.patch_embed.grid_size
            self.rope = VisionRotaryEmbeddingFast(embed_dim // 2, pt_seq_len=pt_hw_seq_len, ft_seq_len=grid)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._new_head(num_classes)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        norm = {"rms_norm": rms_norm, "norm_epsilon": norm_epsilon}
        stream = {"fused_add_norm": fused_add_norm, "residual_in_fp32": residual_in_fp32}
        mixer = {"d_state": d_state, "ssm_cfg": ssm_cfg, "init_layer_scale": init_layer_scale}
        direction = {"bimamba_type": bimamba_type, "if_bimamba": if_bimamba, "if_divide_out": if_divide_out}
        block_options = {**norm, **stream, **mixer, **direction, **factory}
        # Block i drops what block i - 1 has put out, so the rates stand one block late; drop_path has the last one.
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(
            create_block(embed_dim, layer_idx=i, drop_path=rates[i], **block_options) for i in range(depth)
        )
        self.norm_f = (RMSNorm if rms_norm else nn.LayerNorm)(embed_dim, eps=norm_epsilon, **factory)
        self._init_weights(depth, initializer_cfg or {})
        for part in (self.patch_embed, self.head):
            part.to(**factory)
        self.feature_info = self._describe_features(stride)
        self.pretrained_cfg = self.default_cfg = kwargs.get("pretrained_cfg") or data_config(self)

    def _add_tokens(self, drop_rate: float, factory: dict[str, Any]) -> None:
        """Register the class tokens and the position embedding, zero for now."""
        for name in self._class_token_names():
            setattr(self, name, nn.Parameter(torch.zeros(1, 1, self.embed_dim, **factory)))
        if self.if_abs_pos_embed:
            length = self.patch_embed.num_patches + self.num_tokens
            self.pos_embed = nn.Parameter(torch.zeros(1, length, self.embed_dim, **factory))
            self.pos_drop = nn.Dropout(drop_rate)

    def _new_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()

    def _init_weights(self, depth: int, initializer_cfg: dict[str, Any]) -> None:
        """Initialise the whole network; the order of the random draws is part of the contract."""
        self.patch_embed.apply(segm_init_weights)
        self.head.apply(segm_init_weights)
        tokens = ["pos_embed"] if self.if_abs_pos_embed else []
        for name in [*tokens, *self._class_token_names()]:
            trunc_normal_(getattr(self, name), std=0.02)
        self.apply(partial(init_mixer_weights, n_layer=depth, **initializer_cfg))

    def _describe_features(self, stride: int) -> list[dict[str, Any]]:
        last_blocks = [2 * i + 1 if self.if_bidirectional else i for i in range(self.num_steps)]
        return [{"module": f"layers.{i}", "num_chs": self.embed_dim, "reduction": stride} for i in last_blocks]

    @staticmethod
    def _checked_pool_type(pool_type: str) -> str:
        if pool_type not in POOL_TYPES:
            raise ValueError(f"`final_pool_type` must be one of {', '.join(POOL_TYPES)}, got {pool_type!r}")
        return pool_type

    @property
    def num_steps(self) -> int:
        """Steps of the stack: its blocks, or its pairs of blocks with `if_bidirectional`."""
        return len(self.layers) // 2 if self.if_bidirectional else len(self.layers)

    @property
    def class_token_placement(self) -> str:
        """Where the class tokens go in: one of `tokens.PLACEMENTS`."""
        if not self.if_cls_token:
            return "none"
        if self.use_double_cls_token:
            return "both"
        return "middle" if self.use_middle_cls_token else "first"

    def _class_token_names(self) -> list[str]:
        return {"none": [], "both": ["cls_token_head", "cls_token_tail"]}.get(self.class_token_placement, ["cls_token"])

    # ------------------------------------------------------------------------------------------------ forward

    def _embed(self, x: Tensor, random_position: bool = False, random_rank: bool = False) -> tuple[Tensor, TokenOrder]:
        """Turn pictures into the arranged token sequence (b, l, c) and its bookkeeping."""
        x = self.patch_embed(x)
        rows = class_token_rows(self.class_token_placement, x.shape[1])
        if random_position and self.class_token_placement == "first":
            rows = (random.randint(0, x.shape[1]),)
        x = insert_class_tokens(x, [getattr(self, name) for name in self._class_token_names()], rows)
        if self.if_abs_pos_embed:
            x = self.pos_drop(x + self.pos_embed)
        permutation = torch.randperm(x.shape[1]) if random_rank else None
        ratio = self.flip_img_sequences_ratio
        order = TokenOrder(rows, permutation, flipped=ratio > 0 and ratio - random.random() > 1e-5)
        return order.arrange(x), order

    def _rotate(self, x: Tensor, order: TokenOrder) -> Tensor:
        """Apply the rotary embedding in the order before the reversal."""
        rows = sorted(order.unflipped().class_rows(x.shape[1]))
        if order.flipped:
            return self.rope(x.flip(1), rows).flip(1)
        return self.rope(x, rows)

    def _call_block(
        self, index: int, hidden: Tensor, residual: Tensor | None, inference_params: Any
    ) -> tuple[Tensor, Tensor]:
        block = self.layers[index]
        if self.grad_checkpointing and torch.is_grad_enabled() and inference_params is None:
            return recompute_in_backward(block, hidden, residual, use_reentrant=False)
        return block(hidden, residual, inference_params=inference_params)

    def _step(self, step: int, hidden: Tensor, residual: Tensor | None, inference_params: Any) -> tuple[Tensor, Tensor]:
        """Run one step of the stack: a block, or a pair of blocks that read the sequence in opposite directions."""
        if not self.if_bidirectional:
            return self._call_block(step, hidden, residual, inference_params)
        flipped = None if residual is None else residual.flip(1)
        ahead, ahead_residual = self._call_block(2 * step, hidden, residual, inference_params)
        back, back_residual = self._call_block(2 * step + 1, hidden.flip(1), flipped, inference_params)
        return ahead + back.flip(1), ahead_residual + back_residual.flip(1)

    def _run_steps(
        self,
        tokens: Tensor,
        order: TokenOrder,
        inference_params: Any = None,
        keep: Collection[int] = (),
        count: int | None = None,
    ) -> tuple[Tensor, Tensor | None, dict[int, tuple[Tensor, Tensor]]]:
        """Run the first `count` steps (all if None) and keep (hidden, residual) as they are after the steps `keep`."""
        hidden, residual = tokens, None
        kept: dict[int, tuple[Tensor, Tensor]] = {}
        steps = self.num_steps if count is None else count
        plain = not (keep or self.if_rope or self.if_bidirectional) and inference_params is None
        if plain and not torch.is_grad_enabled():
            return (*run_blocks(self.layers[:steps], hidden, residual), kept)
        for step in range(steps):
            if self.if_rope:
                hidden = self._rotate(hidden, order)
                if residual is not None and self.if_rope_residual:
                    residual = self._rotate(residual, order)
            hidden, residual = self._step(step, hidden, residual, inference_params)
            if step in keep:
                kept[step] = (hidden, residual)
        return hidden, residual, kept

    def _norm_stream(self, hidden: Tensor, residual: Tensor | None) -> Tensor:
        """Normalise the sum of the residual stream and the last mixer's output: (b, l, c)."""
        norm = rms_norm_fn if isinstance(self.norm_f, RMSNorm) else layer_norm_fn
        return norm(
            self.drop_path(hidden),
            self.norm_f.weight,
            self.norm_f.bias,
            residual=residual,
            eps=self.norm_f.eps,
            prenorm=False,
            residual_in_fp32=self.residual_in_fp32,
        )

    def _pool(self, x: Tensor, order: TokenOrder) -> Tensor:
        """Reduce the normalised tokens (b, l, c) to what the head reads."""
        if self.if_cls_token:
            return order.read_class_token(x)
        if self.final_pool_type == "none":
            return x[:, -1]
        return x.mean(dim=1) if self.final_pool_type == "mean" else order.restore(x)

    def forward_features(
        self,
        x: Tensor,
        inference_params: Any = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Return the pooled features of pictures (b, channels, height, width).

        Args:
            inference_params: passed to the mixers; bidirectional ones (v1, v2) refuse it.
            if_random_cls_token_position: insert a first class token before a random patch instead, one for the batch.
            if_random_token_rank: permute the tokens at random, one permutation for the batch.
        Returns:
            (b, c); (b, m, c) in picture order without class token and with final_pool_type "max" or "all".
        Raises:
            ValueError: the pictures have not the size that the model was built for; names both and the mend.
        """
        tokens, order = self._embed(x, if_random_cls_token_position, if_random_token_rank)
        hidden, residual, _ = self._run_steps(tokens, order, inference_params)
        return self._pool(self._norm_stream(hidden, residual), order)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Apply dropout and the head to what `forward_features` returned; without the head if `pre_logits`."""
        x = self.head_drop(x)
        if pre_logits:
            return x
        x = self.head(x)
        return x.max(dim=1).values if self.final_pool_type == "max" and not self.if_cls_token else x

    def forward(
        self,
        x: Tensor,
        return_features: bool = False,
        inference_params: Any = None,
        if_random_cls_token_position: bool = False,
        if_random_token_rank: bool = False,
    ) -> Tensor:
        """Return the logits (b, num_classes) of pictures, or with `return_features` what `forward_features` returns."""
        features = self.forward_features(
            x,
            inference_params,
            if_random_cls_token_position=if_random_cls_token_position,
            if_random_token_rank=if_random_token_rank,
        )
        return features if return_features else self.forward_head(features)


def _renamed_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given under another name, by their own name.

    Raises:
        TypeError: an option is unknown; names the nearest one.
    """
    for name in options:
        if name not in _RENAMED and name not in _IGNORED:
            valid = [key for key in inspect.signature(VisionMamba.__init__).parameters if key not in ("self", "kwargs")]
            near = difflib.get_close_matches(name, [*valid, *_RENAMED], n=1, cutoff=0.0)[0]
            raise TypeError(f"VisionMamba has no option {name!r}; the nearest is {near!r}")
    return {_RENAMED[name]: value for name, value in options.items() if name in _RENAMED}


for _name in VARIANTS:
    globals()[_name] = register_model(entry_point(VisionMamba, _name, __name__))
