"""What timm and its users expect of a model besides `forward`: intermediate features, classifier, parameter groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from blocks import segm_init_weights
from checkpoint import load_weights, read_checkpoint


def take_indices(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return the wanted indices of `count` features: the last n for a number, all for None; negative ones from the end.

    Raises:
        ValueError: an index is out of range.
    """
    if indices is None:
        return list(range(count))
    if isinstance(indices, int):
        if not 0 < indices <= count:
            raise ValueError(f"`indices` must ask for the last 1 to {count} features, got {indices}")
        return list(range(count - indices, count))
    for index in indices:
        if not -count <= index < count:
            raise ValueError(f"`indices` must lie between {-count} and {count - 1}, got {index}")
    return [index % count for index in indices]


class TimmMethods:
    """Methods of `VisionMamba` in timm's names and shapes; b batch, c channels, k class tokens."""

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return the final tokens and the maps after chosen steps of the stack.

        A feature is the residual stream plus the last output, without the class tokens, in picture order.

        Args:
            x: pictures (b, channels, height, width).
            indices: steps to keep: the last n, a sequence, or all (None). A step is a block, or a pair of blocks in a
                model with if_bidirectional.
            return_prefix_tokens: return (map, class tokens (b, k, c)) in place of each map, if there are class tokens.
            norm: apply the final norm to the maps too.
            stop_early: do not run the steps after the last one that is kept.
            output_fmt: "NCHW" for maps (b, c, rows, columns), "NLC" for (b, rows * columns, c).
            intermediates_only: return the list of maps alone.
        Returns:
            (tokens, maps): the tokens (b, l, c) in order of insertion, class tokens included, after the final norm.
        Raises:
            ValueError: an unknown format or an index out of range.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"`output_fmt` must be NCHW or NLC, got {output_fmt!r}")
        taken = take_indices(self.num_steps, indices)
        tokens, order = self._embed(x)
        count = max(taken, default=-1) + 1 if stop_early else None
        hidden, residual, kept = self._run_steps(tokens, order, keep=taken, count=count)
        features = []
        for step in taken:
            stream = self._norm_stream(*kept[step]) if norm else sum(kept[step]).to(kept[step][0].dtype)
            patches, class_tokens = order.split(stream)
            if output_fmt == "NCHW":
                patches = patches.transpose(1, 2).unflatten(2, self.patch_embed.grid_size).contiguous()
            features.append((patches, class_tokens) if return_prefix_tokens and self.num_tokens else patches)
        if intermediates_only:
            return features
        return order.restore(self._norm_stream(hidden, residual)), features

    def get_intermediate_layers(
        self: Any,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> list[Any]:
        """Return the features of the last `n` steps, or of the steps `n`, as maps if `reshape` (DINO's interface)."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def get_classifier(self: Any) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self: Any, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` classes (0 for none), and the pooling if one is named.

        Raises:
            ValueError: `global_pool` is no value of `final_pool_type`.
        """
        if global_pool is not None:
            self.final_pool_type = self._checked_pool_type(global_pool)
        self.num_classes = num_classes
        head = self._new_head(num_classes)
        head.apply(segm_init_weights)
        self.head = head.to(self.patch_embed.proj.weight)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters that no optimizer should decay, besides the one-dimensional ones."""
        return {"pos_embed", "cls_token", "dist_token", "cls_token_head", "cls_token_tail"}

    def set_grad_checkpointing(self: Any, enable: bool = True) -> None:
        """Keep only the inputs of every block in training and compute the rest again in the backward pass."""
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns by which timm assigns parameters to layers, for layer-wise learning rates."""
        blocks = r"layers\.(\d+)" if coarse else [(r"layers\.(\d+)", None), (r"norm_f", (99999,))]
        return {"stem": r"patch_embed|pos_embed|cls_token", "blocks": blocks}

    def allocate_inference_cache(
        self: Any, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> dict[int, Any]:
        """Return the empty states of every block's mixer, by block number."""
        return {
            i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)
            for i, layer in enumerate(self.layers)
        }

    def load_pretrained(self: Any, checkpoint_path: str, prefix: str = "") -> None:
        """Load the weights of a checkpoint (any source of `read_checkpoint`) whose keys start with `prefix`.

        Raises:
            CheckpointError: the checkpoint cannot be read or belongs to another model.
        """
        state = read_checkpoint(checkpoint_path).model
        load_weights(self, {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)})
