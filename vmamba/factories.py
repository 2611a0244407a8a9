"""The published variants of VMamba, as data, and the builders behind their names; registered with timm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from timm.models import register_model
from torch import nn

from vmamba.vssm import VSSM

_COMMON = {"patch_size": 4, "in_chans": 3, "num_classes": 1000, "ssm_dt_rank": "auto", "ssm_conv": 3}
_V2 = {
    **_COMMON,
    "ssm_d_state": 1,
    "ssm_conv_bias": False,
    "ssm_act_layer": "silu",
    "ssm_init": "v0",
    "forward_type": "v05_noz",
    "mlp_ratio": 4.0,
    "mlp_act_layer": "gelu",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}
_VANILLA = {
    **_COMMON,
    "ssm_d_state": 16,
    "ssm_ratio": 2.0,
    "ssm_conv_bias": True,
    "forward_type": "v0",
    "mlp_ratio": 0.0,
    "downsample_version": "v1",
    "patchembed_version": "v1",
}


def _v2(dim: int, third: int, ratio: float, drop_path: float) -> dict[str, Any]:
    """The options of a network of the second version, with so many blocks in its third stage."""
    return {**_V2, "dims": dim, "depths": (2, 2, third, 2), "ssm_ratio": ratio, "drop_path_rate": drop_path}


def _vanilla(dim: int, third: int, drop_path: float) -> dict[str, Any]:
    return {**_VANILLA, "dims": dim, "depths": (2, 2, third, 2), "drop_path_rate": drop_path}


VARIANTS: dict[str, dict[str, Any]] = {
    "vanilla_vmamba_tiny": _vanilla(96, 9, 0.2),
    "vanilla_vmamba_small": _vanilla(96, 27, 0.3),
    "vanilla_vmamba_base": _vanilla(128, 27, 0.6),
    "vmamba_tiny_s2l5": _v2(96, 5, 2.0, 0.2),
    "vmamba_small_s2l15": _v2(96, 15, 2.0, 0.3),
    "vmamba_base_s2l15": _v2(128, 15, 2.0, 0.6),
    "vmamba_tiny_s1l8": _v2(96, 8, 1.0, 0.2),
    "vmamba_small_s1l20": _v2(96, 20, 1.0, 0.3),
    "vmamba_base_s1l20": _v2(128, 20, 1.0, 0.5),
}


def build_variant(
    name: str,
    pretrained: bool = False,
    channel_first: bool = True,
    *,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    cache_dir: str | None = None,
    features_only: bool = False,
    out_indices: Any = 4,
    **options: Any,
) -> nn.Module:
    """Build one published variant.

    Args:
        name: one of VARIANTS.
        pretrained: load the published weights, or those that `file` or `url` of `pretrained_cfg` name.
        channel_first: maps are (b, c, h, w) between the modules (norm `ln2d`) instead of (b, h, w, c) (`ln`): the same
            names, shapes and results.
        pretrained_cfg, pretrained_cfg_overlay: entries that replace those of the variant's description.
        cache_dir: accepted for timm, without effect.
        features_only, out_indices: return timm's wrapper that puts out the maps of these stages (the last n for a
            number).
        options: replace the variant's own arguments of `VSSM`.
    Raises:
        TypeError: an unknown option; names the nearest one.
        ValueError: an option has an impossible value, or the weights cannot be read or do not fit.
        RuntimeError: the weights cannot be downloaded; says where to put the file instead.
    """
    layout = {"norm_layer": "ln2d" if channel_first else "ln"}
    model: Any = VSSM(**{**VARIANTS[name], **layout, **options})
    config: dict[str, Any] = {**model.default_cfg, "architecture": name}
    given: Any
    for given in (pretrained_cfg, pretrained_cfg_overlay):
        config.update(given.to_dict() if hasattr(given, "to_dict") else given or {})
    model.pretrained_cfg = model.default_cfg = config
    if pretrained:
        _load(model, name)
    if features_only:
        from timm.models._features import FeatureGetterNet  # not exported by timm.models

        features: Any = FeatureGetterNet(model, out_indices=out_indices)
        features.pretrained_cfg = features.default_cfg = config
        return features
    return model


def _load(model: Any, name: str) -> None:
    """Load the weights that the model's `pretrained_cfg` names, or those that were published."""
    from vmamba import weights  # imports the networks in turn

    source = model.pretrained_cfg.get("file") or model.pretrained_cfg.get("url")
    if source:
        weights.load_into(model, str(source), new_head=True)
    else:
        weights.load_published(model, name)


def vmamba(**kwargs: Any) -> VSSM:
    """Build a network from the arguments of `VSSM`, with none of a published variant."""
    return VSSM(**kwargs)


def _entry_point(name: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, channel_first: bool = True, **kwargs: Any) -> nn.Module:
        return build_variant(name, pretrained, channel_first, **kwargs)

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build {name}; the options are those of `build_variant` and of `VSSM`."
    return build


def _refusal(name: str, instead: str) -> Callable[..., NoReturn]:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"{name} is not offered, as its weights were never published: the nearest is {instead}")

    refuse.__name__ = refuse.__qualname__ = name
    refuse.__doc__ = f"Raise ValueError: the weights of {name} were never published."
    return refuse


vanilla_vmamba_tiny = register_model(_entry_point("vanilla_vmamba_tiny"))
vanilla_vmamba_small = register_model(_entry_point("vanilla_vmamba_small"))
vanilla_vmamba_base = register_model(_entry_point("vanilla_vmamba_base"))
vmamba_tiny_s2l5 = register_model(_entry_point("vmamba_tiny_s2l5"))
vmamba_small_s2l15 = register_model(_entry_point("vmamba_small_s2l15"))
vmamba_base_s2l15 = register_model(_entry_point("vmamba_base_s2l15"))
vmamba_tiny_s1l8 = register_model(_entry_point("vmamba_tiny_s1l8"))
vmamba_small_s1l20 = register_model(_entry_point("vmamba_small_s1l20"))
vmamba_base_s1l20 = register_model(_entry_point("vmamba_base_s1l20"))
vmamba_tiny_m2 = _refusal("vmamba_tiny_m2", "vmamba_tiny_s1l8")
vmamba_small_m2 = _refusal("vmamba_small_m2", "vmamba_small_s1l20")
vmamba_base_m2 = _refusal("vmamba_base_m2", "vmamba_base_s1l20")
