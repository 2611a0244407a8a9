"""Put weights into a model: strictly, with what changes with the picture size adapted and every misfit named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

import other_family
from checkpoint_sources import CheckpointError
from int8 import INT8_NAMES, is_quantized, make_quantized
from pos_embed import resize_pos_embed

_HEAD = ("head.weight", "head.bias", "classifier.head.weight", "classifier.head.bias")
_QUANTIZED_HEAD = tuple(f"{head}.{name}" for head in ("head", "classifier.head") for name in INT8_NAMES)
# Computed from the model's own grid, never learned.
_COMPUTED = ("rope.freqs_cos", "rope.freqs_sin")


@dataclass
class LoadReport:
    """What `load_weights` did besides copying.

    Attributes:
        resized: rows of the position embedding before and after, if it was resized.
        dropped: names that were left out of the weights.
        missing, unexpected: names that only the model or only the weights have; empty after a strict load, but for a
            dropped head.
    """

    resized: tuple[int, int] | None = None
    dropped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def load_weights(
    model: nn.Module,
    state: dict[str, Tensor],
    *,
    resize: str = "middle",
    strict: bool = True,
    drop_head: bool = False,
    source_grid: tuple[int, int] | None = None,
) -> LoadReport:
    """Copy weights into `model`; `state` is not changed, and `model` neither if an error is raised.

    The position embedding is resized to the model's patch grid, rotary tables are the model's own, and the head is left
    out where the model has none. Weights of a VMamba must have the names that `read_checkpoint` gives them. Where the
    weights are int8, the model gets quantised layers first, and keeps them if an error is raised.

    Args:
        state: tensors by name.
        resize: how the position embedding is resized, see `pos_embed.resize_pos_embed`.
        strict: names that only one side has are an error; wrong shapes always are.
        drop_head: keep the model's own, new head.
        source_grid: rows and columns of patches that the weights were made for; a square if None.
    Raises:
        CheckpointError: the weights are another model's; names the first keys that do not fit.
    """
    state = dict(state)
    report = LoadReport()
    if drop_head or getattr(model, "num_classes", None) == 0:
        report.dropped = [key for key in (*_HEAD, *_QUANTIZED_HEAD) if state.pop(key, None) is not None]
    if is_quantized(state):
        make_quantized(model, state)
    own = model.state_dict()
    for key in _COMPUTED:
        if key in own:
            state[key] = own[key]
    report.missing = [key for key in own if key not in state]
    report.unexpected = [key for key in state if key not in own]
    lost = [key for key in report.missing if not (drop_head and key in _HEAD)]
    if strict and (lost or report.unexpected):
        raise CheckpointError(_names_differ(_owner(state, own), lost, report.unexpected))
    if "pos_embed" in own and "pos_embed" in state and hasattr(model, "class_token_placement"):
        state["pos_embed"] = _fit_pos_embed(model, state["pos_embed"], own["pos_embed"], resize, source_grid, report)
    elif "pos_embed" in own and "pos_embed" in state and other_family.is_vmamba(own):
        state["pos_embed"] = _fit_map(state["pos_embed"], own["pos_embed"], report)
    _check_shapes(own, state)
    model.load_state_dict(state, strict=False)
    return report


def _fit_pos_embed(
    model: Any,
    given: Tensor,
    own: Tensor,
    resize: str,
    source_grid: tuple[int, int] | None,
    report: LoadReport,
) -> Tensor:
    """Return the given position embedding in the size of the model's own."""
    grid = model.patch_embed.grid_size
    if given.shape[1:] == own.shape[1:] and source_grid in (None, grid):
        return given
    try:
        fitted = resize_pos_embed(
            given, grid, placement=model.class_token_placement, mode=resize, source_grid=source_grid
        )
    except ValueError as error:
        raise CheckpointError(f"the position embedding of the checkpoint does not fit: {error}") from error
    report.resized = (given.shape[1], fitted.shape[1])
    return fitted


def _fit_map(given: Tensor, own: Tensor, report: LoadReport) -> Tensor:
    """Return the position embedding of a VMamba, (1, c, rows, columns), in the size of the model's own."""
    try:
        fitted = other_family.package().weights.resize_pos_embed(given, tuple(own.shape[2:]))
    except ValueError as error:
        raise CheckpointError(f"the position embedding of the checkpoint does not fit: {error}") from error
    if fitted is not given:
        report.resized = (given[0, 0].numel(), fitted[0, 0].numel())
    return fitted


def _check_shapes(own: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    wrong = [key for key in state if key in own and state[key].shape != own[key].shape]
    if not wrong:
        return
    given = {key: tuple(state[key].shape) for key in wrong}
    heads = [key for key in wrong if key in _HEAD and given[key] and given[key][0] != own[key].shape[0]]
    if heads and set(wrong) <= {*_HEAD, *_QUANTIZED_HEAD}:
        key = heads[0]
        raise CheckpointError(
            f"the checkpoint has {given[key][0]} classes but the model has {own[key].shape[0]}: create the model with "
            f"num_classes={given[key][0]}, or leave the checkpoint's head out"
        )
    listed = "; ".join(f"{key} is {given[key]}, the model's is {tuple(own[key].shape)}" for key in wrong[:3])
    raise CheckpointError(
        f"the checkpoint belongs to a model of another size ({listed}{_more(wrong)}): name the model that it "
        "was made with"
    )


def _owner(state: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """Say whose weights these are that are not the model's."""
    known = other_family.package().weights
    kind, needed, variant = known.family(state), known.family(own), known.fitting_variant(state)
    named = f" ({variant})" if variant else ""
    if kind is None or kind == needed:
        return f"another model{named}"
    return f"a {kind}{named}, but this model is {f'a {needed}' if needed else 'of another family'}"


def _names_differ(owner: str, missing: list[str], unexpected: list[str]) -> str:
    parts = []
    for what, keys in (("lacks", missing), ("has besides", unexpected)):
        if keys:
            parts.append(f"it {what} {', '.join(keys[:3])}{_more(keys)}")
    return f"the checkpoint belongs to {owner} ({'; '.join(parts)}): name the model that it was made with"


def _more(keys: list[str]) -> str:
    return f" and {len(keys) - 3} more" if len(keys) > 3 else ""
