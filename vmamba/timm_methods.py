"""What timm and its users expect of a network besides `forward`: maps of stages, classifier, parameter groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import trunc_normal_
from torch import Tensor, nn

from vmamba.layers import channels_first, channels_last
from vmamba.options import is_whole


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer: normal, cut off, of standard deviation 0.02; for use with `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return the wanted indices of `count` stages: the last n for a number, all for None; negative ones from the end.

    Raises:
        ValueError: an index is out of range.
    """
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"`indices` must ask for the last 1 to {count} stages, got {indices}")
        return list(range(count - indices, count))
    chosen = range(count) if indices is None else indices
    for index in chosen:
        if not -count <= index < count:
            raise ValueError(f"`indices` must lie between {-count} and {count - 1}, got {index}")
    return [index % count for index in chosen]


def data_config(model: Any) -> dict[str, Any]:
    """Describe how pictures are prepared for `model`, in timm's keys (sizes in pixels)."""
    return {
        "num_classes": model.num_classes,
        "input_size": (model.in_chans, *model.img_size),
        "fixed_input_size": False,
        "crop_pct": 0.875,  # resized to 256 / 224 of the size first
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0",
        "classifier": "classifier.head",
    }


def feature_info(model: Any) -> list[dict[str, Any]]:
    """What timm wants to know of each stage: channels, pixels of the picture per pixel of the map, name."""
    stem = math.prod(conv.stride[0] for conv in model.patch_embed if isinstance(conv, nn.Conv2d))
    return [
        {"num_chs": dim, "reduction": stem * 2**stage, "module": f"layers.{stage}.blocks"}
        for stage, dim in enumerate(model.dims)
    ]


class TimmMethods:
    """Methods of `VSSM` in timm's names and shapes; b batch, h height, w width, c channels."""

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final maps and those of chosen stages, each before it is made smaller.

        Args:
            x: pictures (b, in_chans, h, w).
            indices: stages to keep: the last n, a sequence, or all (None).
            norm: apply the final norm to the last stage's map.
            stop_early: do not run the stages after the last one that is kept.
            output_fmt: "NCHW" or "NHWC", the layout of the kept maps, which are contiguous.
            intermediates_only: return the list of maps alone.
        Returns:
            (final, maps): what `forward_features` returns and the list; where `stop_early` stopped, the last map is the
            final one, without the norm.
        Raises:
            ValueError: an unknown format, an index out of range, or the norm of a network that has none.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(f"`output_fmt` must be NCHW or NHWC, got {output_fmt!r}")
        classifier = getattr(self, "classifier", None)  # a backbone has none
        if norm and classifier is None:
            raise ValueError("`norm` must be False for a Backbone_VSSM, whose norms are those of its `forward`")
        taken = take_indices(len(self.layers), indices)
        count = max(taken, default=0) + 1 if stop_early else len(self.layers)
        x = final = self._embed(x)
        kept: dict[int, Tensor] = {}
        for stage, layer in enumerate(self.layers[:count]):
            x = layer.blocks(x)
            last = stage == self.num_layers - 1
            final = classifier.norm(x) if last and classifier is not None and (norm or not intermediates_only) else x
            if stage in taken:
                kept[stage] = self._formatted(final if norm else x, output_fmt)
            if stage < count - 1:
                x = layer.downsample(x)
        maps = [kept[stage] for stage in taken]
        return maps if intermediates_only else (final if self.channel_first else channels_first(final), maps)

    def _formatted(self: Any, x: Tensor, output_fmt: str) -> Tensor:
        """A map in this network's layout as a contiguous one in another."""
        if self.channel_first != (output_fmt == "NCHW"):
            x = channels_last(x) if self.channel_first else channels_first(x)
        return x.contiguous()

    def prune_intermediate_layers(
        self: Any, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the maps of these stages do not need, and return the stages' numbers."""
        taken = take_indices(len(self.layers), indices)
        self.layers = self.layers[: max(taken) + 1]
        self.layers[-1].downsample = nn.Identity()
        if prune_norm:
            self.classifier.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return taken

    def get_classifier(self: Any) -> nn.Module:
        """Return the head."""
        return self.classifier.head

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` classes, 0 for none.

        Raises:
            ValueError: `global_pool` names another pooling than "avg", the only one there is; no number of classes.
        """
        if not is_whole(num_classes, 0):
            raise ValueError(f"`num_classes` must be a whole number from 0 on, got {num_classes!r}")
        if global_pool not in (None, "avg"):
            raise ValueError(f"`global_pool` must be 'avg', got {global_pool!r}")
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        head.apply(init_linear)
        self.classifier.head = head.to(self.patch_embed[0].weight)

    def no_weight_decay(self: Any) -> set[str]:
        """Return the names of the parameters that no optimizer should decay, besides the one-dimensional ones."""
        return {"pos_embed"}

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Keep only the inputs of every block in training and compute the rest again in the backward pass."""
        for layer in self.layers:
            for block in layer.blocks:
                block.use_checkpoint = enable

    def group_matcher(self: Any, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm assigns parameters to layers, for layer-wise learning rates."""
        blocks = [(r"layers\.(\d+)\.blocks\.(\d+)", None), (r"layers\.(\d+)\.downsample", (99999,))]
        norm = (r"classifier\.norm", (99999,))
        return {"stem": r"patch_embed|pos_embed", "blocks": r"layers\.(\d+)" if coarse else [*blocks, norm]}
