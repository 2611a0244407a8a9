"""The Mamba mixer, in one direction or two, and the residual block around it.

    b batch, l length, m model channels, e inner channels, n state, r dt rank, w conv width

Parameter names, shapes and the order in which they are created (so also what a seed gives) are those of the Vim
edition of `mamba_ssm` 1.1.1; its checkpoints load strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.backend import differentiates_forward
from causal_conv1d.backend.machine import has_fast_bf16
from mamba_ssm.modules.int8 import Int8Linear, weight_of
from mamba_ssm.ops.int8_blocks import run_int8_blocks
from mamba_ssm.ops.mamba_inner import (
    DirectionParameters,
    OuterProjections,
    bidirectional_inner,
    bimamba_inner_fn,
    decay_rates,
    mamba_inner_fn,
    refuse_meta,
    trained_mixer,
)
from mamba_ssm.ops.norm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.selective_scan import FAMILY, selective_scan_fn
from mamba_ssm.ops.selective_state_update import selective_state_update

TRACEABLE = torch.__version__ >= "2.15"  # that of 2.9 cannot follow `run_blocks` into the choice of a backend


class Mamba(nn.Module):
    """A selective state-space mixer: (b, l, m) to (b, l, m). Source: arXiv 2312.00752 and, for v2, 2401.09417.

    Args:
        d_model: m.
        d_state: n.
        d_conv: w.
        expand: e = int(expand * m).
        dt_rank: r; "auto" is ceil(m / 16).
        dt_min, dt_max, dt_init_floor: the range of step sizes at the start.
        dt_init: "random" or "constant" initial projection of the steps, of scale `dt_scale` / sqrt(r).
        conv_bias, bias: whether the convolutions, and the outer projections, have a bias.
        use_fast_path: accepted for compatibility; every path computes the same.
        layer_idx: the key of this layer in an inference cache.
        bimamba_type: "none" (causal), "v1" (a second scan from the last token with its own A) or "v2" (a second
            direction with its own convolution, projections, A and D).
        if_divide_out: halve the sum of the two directions ("v2" only).
        init_layer_scale: the start value of a learned scale per output channel, `gamma`; None for no scale.

    Raises:
        ValueError: an unknown `bimamba_type`, or a size that is not positive.
        NotImplementedError: an unknown `dt_init`.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        bimamba_type: str | None = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.bimamba_type = _known_type(bimamba_type)
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if isinstance(dt_rank, str) else dt_rank
        for name in ("d_model", "d_conv", "dt_rank", "expand"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}")
        self.layer_idx, self.use_fast_path = layer_idx, use_fast_path
        self.if_divide_out, self.init_layer_scale = if_divide_out, init_layer_scale
        self.activation, self.act = "silu", nn.SiLU()
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(init_layer_scale * torch.ones(d_model))

        placed: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, projected = self.d_inner, self.dt_rank + 2 * d_state
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **placed)
        self.conv1d = self._make_conv(conv_bias, placed)
        self.x_proj = nn.Linear(inner, projected, bias=False, **placed)
        self.dt_proj = nn.Linear(self.dt_rank, inner, bias=True, **placed)
        _init_steps(self.dt_proj, dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        self.A_log = _undecayed(torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(inner, 1))
        self.D = _undecayed(torch.ones(inner, device=device, dtype=torch.float32))
        if self.bimamba_type != "none":
            self.A_b_log = _undecayed(self.A_log.detach().clone())
        if self.bimamba_type == "v2":
            self.conv1d_b = self._make_conv(conv_bias, placed)
            self.x_proj_b = nn.Linear(inner, projected, bias=False, **placed)
            self.dt_proj_b = nn.Linear(self.dt_rank, inner, bias=True, **placed)
            self.D_b = _undecayed(torch.ones(inner, device=device, dtype=torch.float32))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **placed)

    def _make_conv(self, bias: bool, placed: dict[str, Any]) -> nn.Conv1d:
        return nn.Conv1d(
            self.d_inner,
            self.d_inner,
            self.d_conv,
            groups=self.d_inner,
            padding=self.d_conv - 1,
            bias=bias,
            **placed,
        )

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        """Mix the tokens of (b, l, m).

        With `inference_params` (see `mamba_ssm.utils.generation.InferenceParams`) the states of this layer are kept
        in its cache: the first call fills it, calls with `seqlen_offset` > 0 take one token each.

        Raises:
            ValueError: `inference_params` given to a bidirectional mixer, which cannot be stepped.
        """
        if inference_params is not None:
            out = self._forward_cached(hidden_states, inference_params)
        elif self.bimamba_type == "none":
            out = mamba_inner_fn(self._inner_input(hidden_states), *self._inner_parameters(), **self._skip())
        elif self.bimamba_type == "v1":
            parameters = (*self._inner_parameters(), decay_rates(self.A_b_log))
            out = bimamba_inner_fn(self._inner_input(hidden_states), *parameters, **self._skip())
        else:
            out = self._mix_both_ways(hidden_states)
        return out if self.init_layer_scale is None else out * self.gamma

    def _mix_both_ways(self, hidden_states: Tensor) -> Tensor:
        first, second = self._direction(""), self._direction("_b")
        whole = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if whole and _is_plain_linear(self.in_proj) and _is_plain_linear(self.out_proj):
            outer = (self.in_proj.weight, self.in_proj.bias, self.out_proj.weight, self.out_proj.bias)
            out = trained_mixer(hidden_states, OuterProjections(*outer), first, second, self._scale)
            if out is not None:
                return out
        y = bidirectional_inner(self._inner_input(hidden_states), first, second, self._scale)
        return self.out_proj(y.transpose(1, 2))

    @property
    def _scale(self) -> float:
        """What the sum of both directions is multiplied with."""
        return 0.5 if self.if_divide_out else 1.0

    def _inner_input(self, hidden_states: Tensor) -> Tensor:
        """(b, l, m) as xz (b, 2 e, l), channels contiguous: no copy."""
        return self.in_proj(hidden_states).transpose(1, 2)

    def _inner_parameters(self) -> tuple[Any, ...]:
        conv, out = self.conv1d, self.out_proj
        projections = (weight_of(self.x_proj), self.dt_proj.weight, weight_of(out), out.bias)
        return conv.weight, conv.bias, *projections, decay_rates(self.A_log)

    def _skip(self) -> dict[str, Any]:
        return {
            "D": _at_least_fp32(self.D),
            "delta_bias": _at_least_fp32(self.dt_proj.bias),
            "delta_softplus": True,
        }

    def _direction(self, suffix: str) -> DirectionParameters:
        """The parameters of the direction from the first token ("") or from the last ("_b")."""
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log, D = (self.A_b_log, self.D_b) if suffix else (self.A_log, self.D)
        return DirectionParameters(
            conv.weight,
            conv.bias,
            weight_of(x_proj),
            dt_proj.weight,
            A_log,
            _at_least_fp32(D),
            _at_least_fp32(dt_proj.bias),
        )

    # --- one token at a time ----------------------------------------------------------------------------------------

    def _require_causal(self, what: str) -> None:
        if self.bimamba_type != "none":
            raise ValueError(
                f"{what} needs bimamba_type='none', got {self.bimamba_type!r}: a bidirectional mixer reads the tokens "
                "to come; run forward() on the whole sequence instead"
            )

    def _forward_cached(self, hidden_states: Tensor, inference_params: Any) -> Tensor:
        self._require_causal("`inference_params`")
        conv_state, ssm_state = self._get_states_from_cache(inference_params, hidden_states.shape[0])
        if inference_params.seqlen_offset > 0:
            return self._advance(hidden_states, conv_state, ssm_state)
        x, z = self._inner_input(hidden_states).chunk(2, dim=1)
        conv_state.copy_(F.pad(x, (self.d_conv - x.shape[-1], 0)))  # a negative pad keeps the last columns
        conv = self.conv1d
        u: Any = causal_conv1d_fn(x, conv.weight.squeeze(1), conv.bias, activation=self.activation)
        delta, B, C = self.x_proj(u.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta = F.linear(delta, self.dt_proj.weight).transpose(1, 2)
        y, last_state = selective_scan_fn(
            u,
            delta,
            decay_rates(self.A_log),
            B.transpose(1, 2),
            C.transpose(1, 2),
            z=z,
            return_last_state=True,
            **self._skip(),
        )
        ssm_state.copy_(last_state)
        return self.out_proj(y.transpose(1, 2))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix one token, (b, 1, m), into the states, which change in place.

        Args:
            conv_state: (b, e, w), the last inputs of the convolution.
            ssm_state: (b, e, n).

        Returns:
            (b, 1, m), equal to what `forward` gives at this position of the whole sequence, and the two states.

        Raises:
            ValueError: more than one token, or a bidirectional mixer.
        """
        self._require_causal("step()")
        out = self._advance(hidden_states, conv_state, ssm_state)
        return (out if self.init_layer_scale is None else out * self.gamma), conv_state, ssm_state

    def _advance(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        if hidden_states.shape[1] != 1:
            raise ValueError(
                f"one token at a time can be stepped: expected (b, 1, m), got {tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.activation)
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        skip = self._skip()
        y = selective_state_update(
            ssm_state,
            x,
            dt,
            decay_rates(self.A_log),
            B,
            C,
            skip["D"],
            z=z,
            dt_bias=skip["delta_bias"],
            dt_softplus=True,
        )
        return self.out_proj(y)[:, None]

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Zero states: (b, e, w) for the convolution and (b, e, n) for the scan."""
        device = self.out_proj.weight.device
        conv = torch.zeros(
            batch_size, self.d_inner, self.d_conv, device=device, dtype=dtype or self.conv1d.weight.dtype
        )
        ssm = torch.zeros(
            batch_size, self.d_inner, self.d_state, device=device, dtype=dtype or self.dt_proj.weight.dtype
        )
        return conv, ssm

    def _get_states_from_cache(
        self, inference_params: Any, batch_size: int, initialize_states: bool = False
    ) -> tuple[Tensor, Tensor]:
        if self.layer_idx is None:
            raise ValueError("an inference cache needs `layer_idx`: give every Mamba layer a number of its own")
        cache = inference_params.key_value_memory_dict
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(batch_size, 0)
        conv_state, ssm_state = cache[self.layer_idx]
        if conv_state.shape[0] != batch_size:
            raise ValueError(
                f"the inference cache holds a batch of {conv_state.shape[0]}, got {batch_size}; reset it first"
            )
        if initialize_states:
            conv_state.zero_()
            ssm_state.zero_()
        return conv_state, ssm_state


def _known_type(bimamba_type: str | None) -> str:
    if bimamba_type not in (None, "none", "v1", "v2"):
        raise ValueError(f"`bimamba_type` must be 'none', 'v1' or 'v2', got {bimamba_type!r}")
    return bimamba_type or "none"


def _at_least_fp32(parameter: Tensor) -> Tensor:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def _undecayed(value: Tensor) -> nn.Parameter:
    """A parameter that optimizers which honour the tag leave out of weight decay."""
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True  # type: ignore[attr-defined]
    return parameter


def _init_steps(dt_proj: nn.Linear, init: str, scale: float, smallest: float, largest: float, floor: float) -> None:
    """Start with steps dt = softplus(bias) spread log-uniformly over [smallest, largest], none below `floor`."""
    bound = scale * dt_proj.in_features**-0.5
    if init == "constant":
        nn.init.constant_(dt_proj.weight, bound)
    elif init == "random":
        nn.init.uniform_(dt_proj.weight, -bound, bound)
    else:
        raise NotImplementedError(f"`dt_init` must be 'random' or 'constant', got {init!r}")
    bias = dt_proj.bias
    position = torch.rand(dt_proj.out_features, device=bias.device, dtype=bias.dtype)
    dt = torch.exp(math.log(smallest) + position * (math.log(largest) - math.log(smallest))).clamp(min=floor)
    with torch.no_grad():
        bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
    bias._no_reinit = True  # type: ignore[attr-defined]


class Block(nn.Module):
    """Add to the residual stream, normalise, mix: the pre-norm block of Mamba and Vim.

    Args:
        dim: m.
        mixer_cls: called with `dim`; makes the mixer.
        norm_cls: called with `dim`; makes the norm.
        fused_add_norm: accepted for compatibility: LayerNorm and RMSNorm always take the one path that adds and
            normalises in at least fp32. Other norms need False.
        residual_in_fp32: keep the residual stream in at least fp32.
        drop_path: the rate at which the previous block's output is dropped, per sample, in training.
    """

    def __init__(
        self,
        dim: int,
        mixer_cls: Callable[[int], nn.Module],
        norm_cls: Callable[[int], nn.Module] = nn.LayerNorm,
        fused_add_norm: bool = False,
        residual_in_fp32: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_idx: int | None = None  # its position in a model; `create_block` sets it
        self.residual_in_fp32 = residual_in_fp32
        self.fused_add_norm = fused_add_norm
        self.mixer = mixer_cls(dim)
        self.norm = norm_cls(dim)
        self.drop_path = _make_drop_path(drop_path)
        if fused_add_norm and not isinstance(self.norm, nn.LayerNorm | RMSNorm):
            raise ValueError(f"`fused_add_norm` needs LayerNorm or RMSNorm, got {type(self.norm).__name__}")

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(b, l, m) and the residual stream before it (None for the first block); returns both after this block."""
        if inference_params is None and _serves_at_once(hidden_states, residual):
            parameters = _plain_parameters(self, hidden_states.dtype)
            if parameters is not None:
                return _run_at_once(_sizes(self), hidden_states, residual, parameters)
        branch = hidden_states if residual is None else self.drop_path(hidden_states)
        normed, residual = add_and_norm(self.norm, branch, residual, self.residual_in_fp32)
        return self.mixer(normed, inference_params=inference_params), residual

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> Any:
        """The mixer's states; see `Mamba.allocate_inference_cache`."""
        mixer: Any = self.mixer
        return mixer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype, **kwargs)


def run_blocks(blocks: Iterable[nn.Module], hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Call blocks one after the other: each run of them that one compiled op can serve in one call.

    That is inference of plain "v2" blocks of the same sizes on a CPU, in fp32, or in bf16 where the CPU has no
    instructions for it: PyTorch's products then take five times as long as in fp32, while the op only reads and writes
    bf16.
    """
    waiting: list[Tensor | None] = []
    sizes: tuple[Any, ...] | None = None  # of the blocks that wait
    serves = _serves_at_once(hidden, residual)
    for block in blocks:
        parameters = _plain_parameters(block, hidden.dtype) if serves else None
        own = None if parameters is None else _sizes(block)
        if sizes is not None and own != sizes:
            hidden, residual = _run_at_once(sizes, hidden, residual, waiting)
            waiting = []
        sizes = own
        if parameters is None:
            hidden, residual = block(hidden, residual)
            serves = _serves_at_once(hidden, residual)
        else:
            waiting += parameters
    return (hidden, residual) if sizes is None else _run_at_once(sizes, hidden, residual, waiting)


def _serves_at_once(x: Tensor, residual: Tensor | None) -> bool:
    """Whether `mamba_ssm::bidirectional_blocks` serves such tokens now."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or x.device.type != "cpu":
        return False
    if differentiates_forward():
        return False
    if torch.compiler.is_compiling() and not TRACEABLE:
        return False
    if x.dtype is not torch.float32 and (x.dtype is not torch.bfloat16 or has_fast_bf16()):
        return False
    if _global_forward_hooks or _global_forward_pre_hooks or torch.jit.is_tracing():
        return False
    narrow = residual is not None and residual.dtype is not torch.float32
    return not narrow and FAMILY.backend_for("bidirectional_blocks", "cpu") == "native"


_LINEARS = ("in_proj", "out_proj", "x_proj", "dt_proj", "x_proj_b", "dt_proj_b")


def _plain_parameters(block: nn.Module, dtype: torch.dtype) -> tuple[Tensor | None, ...] | None:
    """What `bidirectional_blocks` takes of a block for tokens of a dtype; None if it is more than a plain "v2" block.

    Of a quantised block, what `int8_blocks` takes: after these the scales.

    Nobody may have hooked or replaced a module whose call the op leaves out. Read straight from the modules'
    dictionaries: a model has 500 parameters.
    """
    if type(block) is not Block or block.training or _is_altered(block):
        return None
    if dtype is not torch.float32 and not block.residual_in_fp32:
        return None
    mixer, norm = block._modules["mixer"], block._modules["norm"]
    if type(mixer) is not Mamba or mixer.bimamba_type != "v2" or mixer.init_layer_scale is not None:
        return None
    if type(norm) is not RMSNorm and not (type(norm) is nn.LayerNorm and norm.elementwise_affine):
        return None
    parts, own = mixer._modules, mixer._parameters
    linears = [parts[name] for name in _LINEARS]
    convolutions = [parts["conv1d"], parts["conv1d_b"]]
    if not _of_one_kind(linears) or any(type(part) is not nn.Conv1d for part in convolutions):
        return None
    if _is_altered(mixer) or _is_altered(linears[0]) or _is_altered(linears[1]):
        return None
    quantized = type(linears[0]) is Int8Linear
    if quantized and (dtype is not torch.float32 or any(_is_observed(part) for part in linears)):
        return None
    (in_proj, out_proj, x_proj, dt_proj, x_proj_b, dt_proj_b), (conv, conv_b) = (
        [part._parameters for part in group if part is not None] for group in (linears, convolutions)
    )
    outer = norm._parameters
    return (
        outer["weight"], outer["bias"], in_proj["weight"], in_proj["bias"], out_proj["weight"], out_proj["bias"],
        conv["weight"], conv["bias"], x_proj["weight"], dt_proj["weight"], own["A_log"], own["D"], dt_proj["bias"],
        conv_b["weight"], conv_b["bias"], x_proj_b["weight"], dt_proj_b["weight"], own["A_b_log"], own["D_b"],
        dt_proj_b["bias"], *(_scales_of(linears) if quantized else ()),
    )  # fmt: skip


def _is_observed(layer: nn.Module | None) -> bool:
    return isinstance(layer, Int8Linear) and layer.observe is not None


def _scales_of(linears: list[nn.Module | None]) -> list[Tensor | None]:
    """The scales and steps of a quantised block, as `int8_blocks` takes them."""
    buffers = [layer._buffers for layer in linears if isinstance(layer, Int8Linear)]
    return [own[name] for own in buffers for name in ("weight_scales", "input_step")]


def _of_one_kind(linears: list[nn.Module | None]) -> bool:
    """Whether these layers, of the names `_LINEARS`, are plain ones, or those of a quantised block."""
    kinds = [type(part) for part in linears]
    return kinds == [nn.Linear] * len(kinds) or kinds == [
        nn.Linear if "dt" in name else Int8Linear for name in _LINEARS
    ]


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether calling it gives its product and nothing else."""
    if _global_forward_hooks or _global_forward_pre_hooks or _global_backward_hooks or _global_backward_pre_hooks:
        return False
    if type(module) is not nn.Linear:
        return False
    return not (_is_altered(module) or module._backward_hooks or module._backward_pre_hooks)


def _is_altered(module: nn.Module | None) -> bool:
    return module is None or bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _sizes(block: nn.Module) -> tuple[Any, ...]:
    """What blocks must share to be run by one op."""
    mixer, norm = block._modules["mixer"], block._modules["norm"]
    assert isinstance(mixer, Mamba)
    assert isinstance(norm, RMSNorm | nn.LayerNorm)
    sizes = (mixer.d_inner, mixer.d_state, mixer.d_conv, mixer.dt_rank)
    return type(norm), norm.eps, mixer._scale, type(mixer._modules["in_proj"]), *sizes


def _run_at_once(
    sizes: tuple[Any, ...], hidden: Tensor, residual: Tensor | None, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    norm, eps, scale, linear, *_ = sizes
    refuse_meta(hidden, *parameters)
    if linear is Int8Linear:
        return run_int8_blocks(hidden, residual, parameters, eps, norm is RMSNorm, scale)
    out, total = torch.ops.mamba_ssm.bidirectional_blocks(hidden, residual, parameters, eps, norm is RMSNorm, scale)
    return out, total


def add_and_norm(
    norm: nn.Module, branch: Tensor, residual: Tensor | None, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    """The norm of branch + residual, and that sum: the new residual stream."""
    if isinstance(norm, RMSNorm):
        return rms_norm_fn(
            branch, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
    if isinstance(norm, nn.LayerNorm) and norm.elementwise_affine:
        return layer_norm_fn(
            branch, norm.weight, norm.bias, residual=residual, eps=norm.eps, prenorm=True,
            residual_in_fp32=residual_in_fp32,
        )  # fmt: skip
    total = branch if residual is None else branch + residual
    weight = getattr(norm, "weight", None)
    normed = norm(total if weight is None else total.to(weight.dtype))
    return normed, _at_least_fp32(total) if residual_in_fp32 else total


def _make_drop_path(rate: float) -> nn.Module:
    if rate == 0:
        return nn.Identity()
    from timm.layers import DropPath  # timm is needed only by those who drop paths

    return DropPath(rate)
