"""VSSM as the backbone of detection and segmentation networks: the maps of its stages, each with a norm of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from vmamba.timm_methods import take_indices
from vmamba.vssm import VSSM


class Backbone_VSSM(VSSM):  # noqa: N801  upstream's name
    """VSSM without classifier, whose forward pass returns maps of several stages; methods about a classifier raise.

    Args:
        out_indices: the stages whose maps are wanted, negative ones from the end; of none, the last map alone.
        pretrained: a checkpoint whose weights are loaded, see `load_pretrained`. None and "" ask for none.
        norm_layer: as for `VSSM`.
        kwargs: the other arguments of `VSSM`.
    Raises:
        TypeError: an unknown option; names the nearest one.
        ValueError: an option has an impossible value, or the checkpoint cannot be loaded.
        RuntimeError: the checkpoint cannot be downloaded.
    """

    def __init__(
        self,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        pretrained: str | None = None,
        norm_layer: str = "ln",
        **kwargs: Any,
    ) -> None:
        super().__init__(norm_layer=norm_layer, **{"num_classes": 0, **kwargs})
        del self.classifier
        self.out_indices = tuple(take_indices(self.num_layers, tuple(out_indices)))
        for index in self.out_indices:
            self.add_module(f"outnorm{index}", self.norm_layer(self.dims[index]))
        if pretrained:
            self.load_pretrained(pretrained)

    def load_pretrained(self, ckpt: str, key: str = "model") -> None:
        """Load the weights of a checkpoint: a path or URL, with the weights under `key`.

        The weights of a classifier and norms of the stages that the checkpoint has not are no error; anything else is.

        Raises:
            ValueError: the checkpoint cannot be read, or belongs to another network; says why.
            RuntimeError: it cannot be downloaded; says where to put the file instead.
        """
        from vmamba.weights import load_into  # imports the networks in turn

        load_into(self, ckpt, key=key)

    def forward(self, x: Tensor) -> Any:
        """Return the maps of `out_indices`, a list of contiguous (b, c, h, w), each before it is made smaller.

        Of no `out_indices`, the last map alone, without a norm.

        Args:
            x: pictures (b, in_chans, h, w).
        """
        x = self._embed(x)
        maps: dict[int, Tensor] = {}
        for stage, layer in enumerate(self.layers):
            x = layer.blocks(x)
            if stage in self.out_indices:
                maps[stage] = self._formatted(self.get_submodule(f"outnorm{stage}")(x), "NCHW")
            x = layer.downsample(x)
        if self.out_indices:
            return [maps[stage] for stage in self.out_indices]
        return self._formatted(x, "NCHW")

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last map (b, c, h, w) of pictures (b, in_chans, h, w), without a norm."""
        x = self._embed(x)
        for layer in self.layers:
            x = layer(x)
        return self._formatted(x, "NCHW")

    def _has_no_classifier(self, *_args: Any, **_options: Any) -> NoReturn:
        """Raise ValueError: a backbone has no classifier."""
        raise ValueError("a Backbone_VSSM has no classifier: build a VSSM, which has one")

    forward_head = get_classifier = reset_classifier = prune_intermediate_layers = _has_no_classifier
