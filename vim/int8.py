"""Models of this checkout with weights in int8: making them, what is stored of them, and loading that.

How layers are quantised is said in `mamba_ssm.modules.int8`. A quantised checkpoint is one by the names in it: each
quantised layer has an int8 `weight`, fp32 `weight_scales` and, with static steps, `input_step`. What is not quantised
is stored in fp16 and computed in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

import other_family
from checkpoint_sources import CheckpointError
from mamba_ssm.modules import int8
from mamba_ssm.modules.int8 import SCHEMES, is_quantized

__all__ = ["INT8_NAMES", "SCHEMES", "is_quantized", "make_quantized", "quantize_model", "refuse_quantized", "stored"]

INT8_NAMES = ("weight_scales", "input_step")  # what a quantised layer has besides the names of a plain one
_LARGEST_FP16 = 65504.0


def _replacements_for(model: nn.Module) -> Mapping[type[nn.Module], int8.Replacement]:
    if not other_family.is_vmamba(model.state_dict()):
        return int8.REPLACEMENTS
    other_family.package()
    from vmamba.int8 import REPLACEMENTS

    return REPLACEMENTS


def quantize_model(model: nn.Module, scheme: str, calibration: Iterable[Tensor] = ()) -> nn.Module:
    """Quantise a model in place, as `mamba_ssm.modules.int8.quantize` does, and round the rest to what is stored of it.

    Args:
        calibration: batches of prepared pictures, (b, 3, h, w), for the scheme "static".
    Raises:
        ValueError: as there.
    """
    int8.quantize(model, scheme, calibration, replacements=_replacements_for(model))
    model.load_state_dict(stored(model))
    return model


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a file holds of a quantised model: its state dict, what is not quantised in fp16 if that has room for it."""
    return {name: _narrowed(name, value) for name, value in model.state_dict().items()}


def _narrowed(name: str, value: Tensor) -> Tensor:
    if not value.is_floating_point() or name.rpartition(".")[2] in INT8_NAMES:
        return value
    return value.to(torch.float16) if bool((value.abs() <= _LARGEST_FP16).all()) else value


def make_quantized(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give a model the quantised layers that a state dict has weights for.

    Raises:
        CheckpointError: they are another model's, or damaged.
    """
    try:
        int8.prepare(model, state, _replacements_for(model))
    except ValueError as error:
        raise CheckpointError(f"the quantized checkpoint is damaged or belongs to another model: {error}") from error


def refuse_quantized(state: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for the weights of a quantised model, which cannot be trained."""
    if is_quantized(state):
        raise CheckpointError(
            f"{source} is quantized to int8, which can be evaluated but not trained; train the checkpoint that it was "
            "made of, and quantize the result"
        )
