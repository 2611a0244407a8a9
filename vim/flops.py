"""Count what one picture costs: multiply-adds of convolutions and linears, and the selective scans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.modules.mamba_simple import Mamba
from model_setup import input_shape

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.LayerNorm, nn.BatchNorm2d)
# What a mixer multiplies every token with; the fused mixers use these weights without calling the modules.
_MIXER_WEIGHTS = ("in_proj", "conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")

SCAN_FLOPS_PER_STATE = 9  # the usual figure for a scan, whatever its exact arithmetic is
OPERATIONS_PER_STATE = 7  # dt*A, exp, dt*u*B, times h, plus, times C, plus
OPERATIONS_PER_CHANNEL = 3  # dt*u, D*u, plus


@dataclass
class FlopCount:
    """What one picture costs.

    Attributes:
        multiply_adds: of convolutions and linears, without biases and without the products of attention.
        state_updates: b * l * d * n summed over all scans; one direction of one mixer is one scan.
        channel_updates: b * l * d summed over all scans.
        bias_additions: additions of biases of convolutions and linears.
        norm_flops: of the norms, by fvcore's rule.
        pooled_values: values that are averaged into one by pooling.
    """

    multiply_adds: int = 0
    state_updates: int = 0
    channel_updates: int = 0
    bias_additions: int = 0
    norm_flops: int = 0
    pooled_values: int = 0

    @property
    def scan_flops(self) -> int:
        """The customary count of the scans: 9 per state and token, 9 * b * l * d * n."""
        return SCAN_FLOPS_PER_STATE * self.state_updates

    @property
    def fvcore_flops(self) -> int:
        """What VMamba's papers count, by fvcore's rules: multiply-adds, norms, pooling, and the scans.

        A scan counts 9 per token, channel and state, and 1 per token and channel for the D skip.
        """
        return self.multiply_adds + self.norm_flops + self.pooled_values + self.scan_flops + self.channel_updates

    @property
    def operations(self) -> int:
        """Literal arithmetic operations: each multiplication, addition and exponential is one.

        A multiply-add of a convolution or linear is 2, a bias 1. A scan does 7 per token, channel and state
        (dt*A; exp; dt*u times B; the state times the exponential; their sum; times C; summed over the states)
        and 3 per token and channel (dt*u; D*u; its addition). Norms, activations (SiLU, softplus), gates and
        the sums of residuals and directions are not counted: together under 3 % of Vim.
        """
        return (
            2 * self.multiply_adds
            + self.bias_additions
            + OPERATIONS_PER_STATE * self.state_updates
            + OPERATIONS_PER_CHANNEL * self.channel_updates
        )


def count_flops(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> FlopCount:
    """Count one forward pass of one picture through `model`, by watching the shapes that pass through it.

    Args:
        model: a `VisionMamba`, a `VSSM`, or any model whose cost lies in convolutions and linears (timm's).
        img_size: pixels, one number or (height, width); None: the model's own.
    """
    count = FlopCount()

    def watch(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, Mamba):
            _add_mixer(count, module, inputs[0])
        elif _is_ss2d(module):
            _add_ss2d(count, module, inputs[0])
        elif isinstance(module, _NORMS):
            count.norm_flops += _norm_flops(module, output.numel())
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            count.pooled_values += inputs[0].numel()
        else:
            _add_layer(count, module, output)

    hooks = [module.register_forward_hook(watch) for module in _counted_modules(model)]
    first = next(model.parameters())
    picture = torch.zeros(1, *input_shape(model, img_size), device=first.device, dtype=first.dtype)
    was_training = model.training
    try:
        with torch.inference_mode():
            model.eval()(picture)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return count


def _counted_modules(model: nn.Module) -> list[nn.Module]:
    """Return the mixers, and the convolutions, linears, norms and pools that are not inside one."""
    mixers = [module for module in model.modules() if isinstance(module, Mamba) or _is_ss2d(module)]
    inside = {id(part) for mixer in mixers for part in mixer.modules()}
    layers = [
        module
        for module in model.modules()
        if isinstance(module, (*_CONVOLUTIONS, nn.Linear, *_NORMS, nn.AdaptiveAvgPool2d)) and id(module) not in inside
    ]
    return mixers + layers


def _add_mixer(count: FlopCount, mixer: Mamba, tokens: Tensor) -> None:
    """Add a mixer that got `tokens` of shape (b, l, c): every weight meets every token once."""
    number = tokens.shape[0] * tokens.shape[1]
    for name in _MIXER_WEIGHTS:
        layer = getattr(mixer, name, None)
        if layer is not None:
            count.multiply_adds += number * layer.weight.numel()
            count.bias_additions += number * (0 if layer.bias is None else layer.bias.numel())
    scans = 2 if mixer.bimamba_type in ("v1", "v2") else 1
    count.channel_updates += scans * number * mixer.d_inner
    count.state_updates += scans * number * mixer.d_inner * mixer.d_state


def _is_ss2d(module: nn.Module) -> bool:
    """Whether this is the mixer of a VMamba, known by its weights: its package is imported only with such a model."""
    return hasattr(module, "x_proj_weight") and hasattr(module, "dt_projs_weight")


def _add_ss2d(count: FlopCount, mixer: Any, x: Tensor) -> None:
    """Add a mixer that got a map `x` of any layout: every weight meets every pixel once, in all four directions."""
    pixels = x.numel() // mixer.d_model
    weights = [mixer.x_proj_weight, mixer.dt_projs_weight]
    for name, part in mixer.named_modules():
        if name != "projection" and isinstance(part, (*_CONVOLUTIONS, nn.Linear)):  # in int8, x_proj_weight is its
            weights.append(part.weight)
            count.bias_additions += pixels * (0 if part.bias is None else part.bias.numel())
        elif isinstance(part, _NORMS):
            count.norm_flops += _norm_flops(part, pixels * mixer.d_inner)
    count.multiply_adds += pixels * sum(weight.numel() for weight in weights)
    count.channel_updates += pixels * mixer.A_logs.shape[0]
    count.state_updates += pixels * mixer.A_logs.numel()


def _norm_flops(norm: nn.Module, values: int) -> int:
    """Return what fvcore counts: for a LayerNorm 4 per value, for a BatchNorm, which only scales and shifts, 1."""
    return values * ((4 if isinstance(norm, nn.LayerNorm) else 1) + (norm.weight is not None))


def _add_layer(count: FlopCount, layer: Any, output: Tensor) -> None:
    """Add a convolution or linear: each value it puts out is a sum over one row of its weight."""
    rows = layer.out_channels if isinstance(layer, _CONVOLUTIONS) else layer.out_features
    count.multiply_adds += output.numel() * (layer.weight.numel() // rows)
    count.bias_additions += 0 if layer.bias is None else output.numel()
