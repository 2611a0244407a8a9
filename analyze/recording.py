"""Record what the scans of a network take, while it looks at pictures.

b batch, d channels, l tokens, n state, m model channels, k direction

Two mixers are known: VMamba's SS2D, with four directions over a map, and `mamba_ssm`'s Mamba, with one or two over a
sequence of patches and class tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analyze.scan_matrix import Scan
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.mamba_inner import decay_rates
from mamba_ssm.ops.reference import ROUTES, take_route

_ROUTE_NAMES = {
    (False, False): "rows",
    (True, False): "columns",
    (False, True): "rows, reversed",
    (True, True): "columns, reversed",
}


@dataclass(frozen=True)
class Direction:
    """One scan of every picture, in the order in which it runs; at least fp32.

    Attributes:
        name: how it runs over the picture, in words.
        u, dt: (b, d, l), its input and its step sizes (after bias and softplus).
        A: (d, n), negative. B, C: (b, n, l). D: (d,), the skip, or None.
        places: (l,) int64, the step of the scan at which each token of the picture's order is read.
        weight: what the mixer multiplies the output with.
    """

    name: str
    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    places: Tensor
    weight: float = 1.0

    def scan(self, image: int = 0) -> Scan:
        """Return the scan of one picture of the batch."""
        return Scan(self.dt[image], self.A, self.B[image], self.C[image])


@dataclass(frozen=True)
class Recording:
    """What one mixer did.

    Attributes:
        directions: its scans.
        grid: height and width of the map, in patches.
        class_rows: the tokens, in the picture's order, that are class tokens; the others are the patches.
    """

    directions: tuple[Direction, ...]
    grid: tuple[int, int]
    class_rows: tuple[int, ...] = ()

    @property
    def batch(self) -> int:
        """Number of pictures."""
        return self.directions[0].dt.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens, class tokens included."""
        return self.directions[0].dt.shape[2]

    @property
    def patch_tokens(self) -> list[int]:
        """The tokens that are patches, row by row of the grid."""
        return [token for token in range(self.length) if token not in self.class_rows]


def read_registers(registers: Mapping[str, Any], directions: str = "cross") -> Recording:
    """Return the recording in `SS2D.__data__`.

    Args:
        registers: A_logs (4 d, n), Bs and Cs (b, 4, n, l), us and dts (b, 4, d, l; dts before bias and softplus),
            delta_bias (4 d), Ds (4 d), H, W.
        directions: the paths of the scans: "cross", "rows" or "both".
    Raises:
        ValueError: something is missing, or `directions` is none of these.
    """
    missing = [name for name in ("A_logs", "Bs", "Cs", "us", "dts", "H", "W") if name not in registers]
    if missing:
        raise ValueError(f"`registers` lack {', '.join(missing)}; SS2D leaves them in __data__ if __DEBUG__ is true")
    if directions not in ROUTES:
        raise ValueError(f"`directions` must be one of {', '.join(ROUTES)}, got {directions!r}")
    height, width = int(registers["H"]), int(registers["W"])
    delta, bias, skips = _wide(registers["dts"]), registers.get("delta_bias"), registers.get("Ds")
    if bias is not None:
        delta = delta + _wide(bias).view(1, *delta.shape[1:3], 1)
    dt = F.softplus(delta)
    A = decay_rates(registers["A_logs"]).unflatten(0, dt.shape[1:3])
    u, B, C = (_wide(registers[name]) for name in ("us", "Bs", "Cs"))
    D = [None] * dt.shape[1] if skips is None else list(_wide(skips).view(dt.shape[1:3]))
    found = [
        Direction(_ROUTE_NAMES[route], u[:, k], dt[:, k], A[k], B[:, k], C[:, k], D[k], _places(route, height, width))
        for k, route in enumerate(ROUTES[directions])
    ]
    return Recording(tuple(found), (height, width))


def _places(route: tuple[bool, bool], height: int, width: int) -> Tensor:
    """The step at which each pixel, row by row, is read."""
    visited = take_route(torch.arange(height * width).view(1, height, width, 1), *route)
    return visited.flatten().argsort()


def read_mixer(
    mixer: Mamba, tokens: Tensor, grid: tuple[int, int], class_rows: Sequence[int] = (), *, flipped: bool = False
) -> Recording:
    """Compute what the scans of a Mamba mixer take, from the tokens that it mixes.

    Args:
        tokens: (b, l, m), the mixer's input.
        grid: height and width of the patch grid.
        class_rows: the rows of the class tokens, in the picture's order.
        flipped: the tokens come in the reverse of the picture's order.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    inner = F.linear(tokens.to(dtype), mixer.in_proj.weight.to(dtype), _to(mixer.in_proj.bias, dtype))
    x = inner.transpose(1, 2).chunk(2, dim=1)[0]
    length = tokens.shape[1]
    own = mixer.bimamba_type == "v2"
    scale = 0.5 if own and mixer.if_divide_out else 1.0
    directions = []
    for back in (False, True)[: 1 if mixer.bimamba_type == "none" else 2]:
        suffix = "_b" if back and own else ""
        u = _convolve(x.flip(2), mixer, suffix) if suffix else _convolve(x, mixer, "")
        if back and not own:
            u = u.flip(2)  # "v1" scans from the end what the one convolution has put out
        dt, B, C = _project(u, mixer, suffix)
        A = decay_rates(mixer.A_b_log if back else mixer.A_log).to(dtype)
        D = getattr(mixer, "D" + suffix).to(dtype)
        places = torch.arange(length)
        name = "backward" if back else "forward"
        directions.append(Direction(name, u, dt, A, B, C, D, places.flip(0) if back != flipped else places, scale))
    return Recording(tuple(directions), grid, tuple(class_rows))


def _convolve(x: Tensor, mixer: Mamba, suffix: str) -> Tensor:
    conv = getattr(mixer, "conv1d" + suffix)
    weight, bias = conv.weight.to(x.dtype), _to(conv.bias, x.dtype)
    return F.silu(F.conv1d(x, weight, bias, padding=mixer.d_conv - 1, groups=mixer.d_inner)[..., : x.shape[2]])


def _project(u: Tensor, mixer: Mamba, suffix: str) -> tuple[Tensor, Tensor, Tensor]:
    """dt (b, d, l), B and C (b, n, l) of the convolved u (b, d, l)."""
    x_proj, dt_proj = getattr(mixer, "x_proj" + suffix), getattr(mixer, "dt_proj" + suffix)
    columns = F.linear(u.transpose(1, 2), x_proj.weight.to(u.dtype))
    steps, B, C = columns.split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    dt = F.softplus(F.linear(steps, dt_proj.weight.to(u.dtype), dt_proj.bias.to(u.dtype)))
    return dt.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2)


def _to(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else value.to(dtype)


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))


# --- networks -------------------------------------------------------------------------------------------------------


def is_mixer(module: nn.Module) -> bool:
    """Whether the scans of this module can be recorded."""
    return isinstance(module, Mamba) or _records_itself(module)


def _records_itself(module: nn.Module) -> bool:
    return hasattr(module, "__DEBUG__") and hasattr(module, "A_logs")


def mixers_by_stage(model: nn.Module) -> list[list[nn.Module]]:
    """Return the mixers of a network, stage by stage: those whose blocks stand in one list are a stage.

    Vim has one stage, VMamba four; a network without selective scans none.
    """
    stages: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if is_mixer(module):
            stages.setdefault(name.rpartition(".")[0].rpartition(".")[0], []).append(module)
    return list(stages.values())


@torch.no_grad()
def record(model: Any, pictures: Tensor, mixers: Sequence[nn.Module]) -> list[Recording]:
    """Run `model` on pictures (b, channels, height, width) and return what each of its `mixers` did.

    A `VisionMamba` that flips the sequence at random does not do so here. Hooks, and an SS2D's `__DEBUG__` and
    `__data__`, are taken away again.

    Raises:
        ValueError: a mixer scans no map in its directions (forward type "cascade").
    """
    with ExitStack() as stack:
        stack.enter_context(_unflipped(model))
        inputs = stack.enter_context(_inputs_of([mixer for mixer in mixers if isinstance(mixer, Mamba)]))
        own = stack.enter_context(_registers_of([mixer for mixer in mixers if not isinstance(mixer, Mamba)]))
        model(pictures)
    return [_read_in_place(model, mixer, inputs[mixer]) if isinstance(mixer, Mamba) else own[mixer] for mixer in mixers]


def _read_in_place(model: Any, mixer: Mamba, tokens: Tensor) -> Recording:
    from tokens import class_token_rows

    grid = model.patch_embed.grid_size
    rows = class_token_rows(model.class_token_placement, grid[0] * grid[1])
    mixers: list[Any] = [layer.mixer for layer in model.layers]
    # In pairs of blocks the second one is given the reversed sequence.
    flipped = model.if_bidirectional and next(i for i, other in enumerate(mixers) if other is mixer) % 2 == 1
    return read_mixer(mixer, tokens, tuple(grid), rows, flipped=flipped)


@contextmanager
def _unflipped(model: Any) -> Iterator[None]:
    ratio = getattr(model, "flip_img_sequences_ratio", None)
    if ratio is not None:
        model.flip_img_sequences_ratio = -1.0
    try:
        yield
    finally:
        if ratio is not None:
            model.flip_img_sequences_ratio = ratio


@contextmanager
def _inputs_of(mixers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
    """Keep what the mixers are given while the model runs."""
    kept: dict[nn.Module, Tensor] = {}

    def keep(mixer: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        kept[mixer] = arguments[0].detach()

    hooks = [mixer.register_forward_hook(keep) for mixer in mixers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _registers_of(mixers: Sequence[Any]) -> Iterator[dict[nn.Module, Recording]]:
    """Let SS2D mixers record, and read what they have recorded once the model has run."""
    found: dict[nn.Module, Recording] = {}
    try:
        for mixer in mixers:
            mixer.__DEBUG__ = True
        yield found
        found.update({mixer: read_registers(mixer.__data__, paths_of(mixer)) for mixer in mixers})
    finally:
        for mixer in mixers:
            vars(mixer).pop("__DEBUG__", None)
            vars(mixer).pop("__data__", None)


def paths_of(mixer: Any) -> str:
    """Return the paths of an SS2D's scans, "cross" for a class that does not say."""
    return str(getattr(getattr(mixer, "variant", None), "directions", "cross"))
