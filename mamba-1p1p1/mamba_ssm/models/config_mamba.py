"""The configuration of a Mamba language model."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MambaConfig"]


@dataclass
class MambaConfig:
    """What `config.json` of a Mamba language model says; the defaults are the published 2.8B model's.

    There are no feed-forward and no attention layers: what describes them must keep its default.
    """

    d_model: int = 2560  # features of the residual stream
    d_intermediate: int = 0  # of feed-forward layers
    n_layer: int = 64
    vocab_size: int = 50277  # tokens, before padding
    ssm_cfg: dict[str, Any] = field(default_factory=dict)  # more arguments of `Mamba`, and "layer": "Mamba1"
    attn_layer_idx: list[int] = field(default_factory=list)
    attn_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True  # RMS instead of layer normalisation
    residual_in_fp32: bool = True  # keep the residual stream in at least fp32
    fused_add_norm: bool = True  # upstream's choice of a kernel; results do not depend on it
    pad_vocab_size_multiple: int = 8  # the embedding's rows are vocab_size rounded up to a multiple of this
    tie_embeddings: bool = True  # the head's weight is the embedding's

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MambaConfig:
        """Build a configuration from the contents of a `config.json`.

        Raises:
            ValueError: a key is none of the fields above; names the nearest field.
        """
        known = [entry.name for entry in dataclasses.fields(cls)]
        refuse_unknown(values, known, "a Mamba configuration")
        return cls(**values)


def refuse_unknown(values: dict[str, Any], known: list[str], owner: str) -> None:
    """Raise a ValueError for the first key of `values` that is not in `known`, and name the nearest."""
    for key in values:
        if key not in known:
            nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            hint = f"did you mean `{nearest[0]}`?" if nearest else "it takes none."
            raise ValueError(f"{owner} has no option `{key}`; {hint} Known are: {', '.join(known)}.")
