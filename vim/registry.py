"""The registered variants of Vision Mamba, as data, and the one builder behind all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from torch import nn

from checkpoint import CheckpointError, load_weights, read_checkpoint

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """One registered name.

    Attributes:
        options: arguments of `VisionMamba`.
        weights: Hugging Face repository of its published weights, or None.
        finetuned: whether those are the fine-tuned (stride 8) weights of the repository.
    """

    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    finetuned: bool = False


_WIDTHS = {"tiny": 192, "small": 384, "base": 768}
_COMMON = {
    "img_size": 224,
    "patch_size": 16,
    "depth": 24,
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "final_pool_type": "mean",
    "if_abs_pos_embed": True,
    "if_rope": False,
    "if_rope_residual": False,
    "bimamba_type": "v2",
    "if_cls_token": True,
    "use_middle_cls_token": True,
    "if_divide_out": True,
}
_ROPE = {
    **_COMMON,
    "if_rope": True,
    "if_rope_residual": True,
    "if_cls_token": False,
    "use_middle_cls_token": False,
    "if_divide_out": False,
}
_POOLED = "bimambav2_final_pool_mean_abs_pos_embed"


def _middle_token(size: str, **options: Any) -> Variant:
    """Describe a network of the published family: one class token in the middle, halved sums."""
    return Variant(
        {**_COMMON, "embed_dim": _WIDTHS[size], **options},
        weights=f"hustvl/Vim-{size}-midclstok",
        finetuned=options.get("stride") == 8,
    )


def _rope(size: str, **options: Any) -> Variant:
    """Describe a network of the older family: rotary embedding, summed directions, no published weights here."""
    return Variant({**_ROPE, "embed_dim": _WIDTHS[size], **options})


def _variants() -> dict[str, Variant]:
    table: dict[str, Variant] = {}
    for size in _WIDTHS:
        for ending in ("with_midclstok_div2", "with_middle_cls_token_div2"):
            table[f"vim_{size}_patch16_224_{_POOLED}_{ending}"] = _middle_token(size)
        for pixels in (224, 384):
            table[f"vim_{size}_patch16_{pixels}"] = _middle_token(size, img_size=pixels)
        table[f"vim_{size}_patch16_224_{_POOLED}_rope_also_residual"] = _rope(size)
    for size in ("tiny", "small"):
        table[f"vim_{size}_patch16_384_{_POOLED}_with_midclstok_div2"] = _middle_token(size, img_size=384)
        for ending in ("with_midclstok_div2", "with_middle_cls_token_div2"):
            table[f"vim_{size}_patch16_stride8_224_{_POOLED}_{ending}"] = _middle_token(size, stride=8)
    first = {"if_cls_token": True}
    small_patches = {"patch_size": 8, "stride": 8}
    rope = f"{_POOLED}_rope_also_residual"
    table[f"vim_tiny_patch16_224_{rope}_with_cls_token"] = _rope("tiny", **first)
    table[f"vim_tiny_patch8_224_{rope}"] = _rope("tiny", **small_patches)
    table[f"vim_tiny_patch8_224_{rope}_with_cls_token"] = _rope("tiny", **small_patches, **first)
    table["vim_pico_patch4_32"] = Variant(
        {**_COMMON, "img_size": 32, "patch_size": 4, "stride": 4, "embed_dim": 64, "depth": 6, "d_state": 8}
    )
    return table


VARIANTS = _variants()


def entry_point(model_class: Callable[..., nn.Module], name: str, module: str) -> Callable[..., nn.Module]:
    """Make the function that timm's registry calls for `name`; it is a member of the module named `module`."""

    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        return build_variant(model_class, name, pretrained, **options)

    build.__name__ = build.__qualname__ = name
    build.__module__ = module
    build.__doc__ = f"Build {name}; the options are those of `VisionMamba` and of `build_variant`."
    return build


def build_variant(
    model_class: Callable[..., nn.Module],
    name: str,
    pretrained: bool = False,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    out_indices: Any = 3,
    **options: Any,
) -> nn.Module:
    """Build one registered variant.

    Args:
        pretrained: load the published weights; position embedding and head are resized or replaced where they differ.
        pretrained_cfg, pretrained_cfg_overlay: entries that replace those of the variant's description; `file`, `url`
            or `hf_hub_id` say where other weights are.
        cache_dir: where downloads are kept.
        features_only, out_indices: return timm's wrapper that puts out maps of these steps (the last n for a number).
        options: replace the variant's own arguments of `model_class`.
    Raises:
        CheckpointError: the weights cannot be had or do not fit; says why.
    """
    model: Any = model_class(**{**VARIANTS[name].options, **options})
    config = {**data_config(model), "architecture": name, "hf_hub_id": VARIANTS[name].weights}
    given: Any
    for given in (pretrained_cfg, pretrained_cfg_overlay):
        config.update(given.to_dict() if hasattr(given, "to_dict") else given or {})
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        _load_published(name, model, cache_dir)
    if features_only:
        from timm.models._features import FeatureGetterNet  # not exported by timm.models

        features: Any = FeatureGetterNet(model, out_indices=out_indices)
        features.pretrained_cfg = features.default_cfg = config
        return features
    return model


def data_config(model: Any) -> dict[str, Any]:
    """Describe how pictures are prepared for `model`, in timm's keys (sizes in pixels)."""
    embed = model.patch_embed
    return {
        "num_classes": model.num_classes,
        "input_size": (embed.proj.in_channels, *embed.img_size),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


def _load_published(name: str, model: Any, cache_dir: str | None) -> None:
    """Load the weights that the model's `pretrained_cfg` names."""
    config = model.pretrained_cfg
    source = config.get("file") or config.get("url") or config.get("hf_hub_id")
    if not source:
        raise CheckpointError(
            f"there are no published weights for {name}: create it with pretrained=False, or name weights in "
            "pretrained_cfg_overlay={'file': PATH}"
        )
    found = read_checkpoint(str(source), finetuned=VARIANTS[name].finetuned, cache_dir=cache_dir)
    _log.info("%s: weights from %s", name, found.source)
    state = dict(found.model)
    stem = state.get("patch_embed.proj.weight")
    channels = model.patch_embed.proj.in_channels
    if stem is not None and stem.ndim == 4 and stem.shape[1] == 3 != channels:
        state["patch_embed.proj.weight"] = adapt_input_conv(channels, stem)
    load_weights(model, state, drop_head=found.num_classes != model.num_classes)
