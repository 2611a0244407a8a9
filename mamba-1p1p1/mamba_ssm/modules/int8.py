"""Layers whose weights are int8, and the replacement of a model's layers by them.

    i inputs, o outputs

A quantised layer has the names of its plain one in a state dict, `weight` as int8 of the same shape, and besides them
`weight_scales`, fp32 (o,), and, if its inputs have one step for all pictures, `input_step`, fp32 ().
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mamba_ssm.ops.int8 import LEVELS, Int8Weight, int8_linear, quantize_weight

SCHEMES = ("dynamic", "static")
_PLAIN = ("dt_proj", "dt_proj_b")  # of a mixer: of few inputs, whose rounding the exponential of the scan would enlarge


class _Int8Layer(nn.Module):
    """What the quantised layers share: the weight (o, ...) in int8, its scales and the step of the inputs."""

    weight: Tensor
    weight_scales: Tensor
    input_step: Tensor | None
    observe: Callable[[Tensor], None] | None

    def _take(self, weight: Tensor) -> None:
        """Quantise a weight of the plain layer."""
        values, scales = quantize_weight(weight.detach().flatten(1))
        self.weight = nn.Parameter(values.view(weight.shape), requires_grad=False)
        self.register_buffer("weight_scales", scales)
        self.register_buffer("input_step", None)
        self.observe = None

    @property
    def quantized(self) -> Int8Weight:
        """What `int8_linear` takes."""
        return Int8Weight(self.weight.flatten(1), self.weight_scales, self.input_step, self.observe)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move it to a device; its numbers stay in fp32, whatever dtype the model gets."""
        kept = {name: value for name, value in self._buffers.items() if value is not None}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = value.to(moved.device) if moved.dtype is not value.dtype else moved
        return self


class Int8Linear(_Int8Layer, nn.Linear):
    """`nn.Linear` with a weight in int8; for inference.

    Args:
        layer: what it stands for; its weight is quantised, its bias shared.
        channels_first: map (b, i, h, w) to (b, o, h, w) instead of (..., i) to (..., o).
    """

    def __init__(self, layer: nn.Linear, channels_first: bool = False) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.bias = layer.bias
        self.channels_first = channels_first
        self._take(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer."""
        if not self.channels_first:
            return int8_linear(x, self.quantized, self.bias)
        return int8_linear(x.permute(0, 2, 3, 1), self.quantized, self.bias).permute(0, 3, 1, 2)


class Int8Conv2d(_Int8Layer, nn.Conv2d):
    """`nn.Conv2d` of one group with a weight in int8: a product with the patches of its input; for inference."""

    def __init__(self, layer: nn.Conv2d) -> None:
        sizes: dict[str, Any] = {name: getattr(layer, name) for name in ("stride", "padding", "dilation")}
        kernel: Any = layer.kernel_size
        super().__init__(layer.in_channels, layer.out_channels, kernel, **sizes, bias=False, device="meta")
        self.bias = layer.bias
        self._take(layer.weight)

    @staticmethod
    def can_replace(layer: nn.Conv2d) -> bool:
        """Whether it is a convolution of one group, padded with zeros, that takes neighbouring pixels."""
        plain = layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and tuple(layer.dilation) == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (b, i, h, w) to (b, o, h', w'); a view with the channels last."""
        rows, columns = (int(side) for side in self.padding)
        if rows or columns:
            x = nn.functional.pad(x, (columns, columns, rows, rows))
        patches = x.unfold(2, self.kernel_size[0], self.stride[0]).unfold(3, self.kernel_size[1], self.stride[1])
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3)
        return int8_linear(patches, self.quantized, self.bias).permute(0, 3, 1, 2)


def weight_of(layer: nn.Linear) -> Tensor | Int8Weight:
    """A linear layer's weight, as `mamba_ssm.ops.int8.linear` takes it."""
    return layer.quantized if isinstance(layer, Int8Linear) else layer.weight


class Magnitudes:
    """How often inputs of each magnitude came, in sixteenths of an octave, and the step that suits them best."""

    PER_OCTAVE, LEAST, MOST = 16, -40, 40

    def __init__(self) -> None:
        self.counts = torch.zeros((self.MOST - self.LEAST) * self.PER_OCTAVE, dtype=torch.float64)
        self.finite = True

    def __call__(self, x: Tensor) -> None:
        """Count the numbers of `x`."""
        self.finite = self.finite and bool(x.isfinite().all())
        place = (x.detach().float().abs().log2() - self.LEAST).mul(self.PER_OCTAVE).floor()
        found = place.clamp(0, self.counts.numel() - 1).nan_to_num(0).to(torch.int64).flatten()
        self.counts += torch.bincount(found.cpu(), minlength=self.counts.numel())

    def best_step(self) -> float:
        """The step whose rounding and saturation together have the least squared error.

        Raises:
            ValueError: nothing but zeros was counted, or a NaN or an infinity.
        """
        if not self.finite:
            raise ValueError(
                "the calibration saw numbers that are not finite; calibrate with pictures, and a model, without them"
            )
        if not bool(self.counts[1:].any()):
            raise ValueError(
                "the calibration saw nothing but zeros; calibrate with pictures as the model will get them"
            )
        edges = torch.arange(self.counts.numel() + 1, dtype=torch.float64) / self.PER_OCTAVE + self.LEAST
        middles = (0.5 * (edges[1:] + edges[:-1])).exp2()
        last = int(self.counts.nonzero()[-1])
        first = max(last - 8 * self.PER_OCTAVE, 0)
        limits = edges[first + 1 : last + 2].exp2()[:, None]
        rounding = torch.minimum((limits / LEVELS) ** 2 / 12, middles**2)
        error = torch.where(middles <= limits, rounding, (middles - limits) ** 2)
        best = (error * self.counts).sum(1).argmin()
        return float(limits[best, 0]) / LEVELS


PROJECTION = "projection"  # the quantised layer of a module that is quantised in place and is no layer itself
Replacement = Callable[[Any], nn.Module | None]
REPLACEMENTS: Mapping[type[nn.Module], Replacement] = {
    nn.Linear: Int8Linear,
    nn.Conv2d: lambda layer: Int8Conv2d(layer) if Int8Conv2d.can_replace(layer) else None,
}


def replace_layers(
    model: nn.Module,
    replacements: Mapping[type[nn.Module], Replacement] = REPLACEMENTS,
    only: Iterable[str] | None = None,
) -> list[str]:
    """Put quantised layers in the place of a model's linear layers and convolutions, and return their names.

    Depth-wise convolutions and the step projections of mixers stay as they are.

    Args:
        replacements: what makes a quantised layer of a module of this very type, or gives the module, changed, a layer
            `PROJECTION`; or returns None to keep it.
        only: names of the quantised layers to make; all if None.
    """
    chosen = None if only is None else set(only)
    found = []
    for name, layer in list(model.named_modules()):
        parent, _, own = name.rpartition(".")
        make = replacements.get(type(layer))
        inner = f"{name}.{PROJECTION}".lstrip(".")
        if make is None or own in _PLAIN or (chosen is not None and not {name, inner} & chosen):
            continue
        replacement = make(layer)
        if replacement is layer:
            found.append(inner)
        elif replacement is not None and name:
            setattr(model.get_submodule(parent), own, replacement.train(layer.training))
            found.append(name)
    return found


def layers_of(model: nn.Module) -> dict[str, _Int8Layer]:
    """The quantised layers of a model by name."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, _Int8Layer)}


def quantize(
    model: nn.Module,
    scheme: str = "dynamic",
    calibration: Iterable[Tensor] = (),
    *,
    replacements: Mapping[type[nn.Module], Replacement] = REPLACEMENTS,
) -> nn.Module:
    """Quantise a model for inference, in place: the weights of its projections and convolutions become int8.

    Inputs of these layers are rounded to int8 too: with "dynamic" each row (a token, a patch) by its own largest
    magnitude, with "static" all by a step that the calibration finds, the one of the least squared error. Convolutions
    over time, depth-wise ones, norms, scans and their states stay in fp32. A layer gives the same bits on every
    backend; a whole model does where its layers get the same bits, as another last bit may round to the next level.

    Args:
        model: a Vim, a VMamba or another network of such layers, in fp32 and in evaluation mode. It cannot be trained
            afterwards: none of its parameters asks for a gradient.
        scheme: "dynamic" or "static".
        calibration: a list or an iterator of inputs of the model, batches as it takes them, which "static" runs it on;
            none for "dynamic".
        replacements: see `replace_layers`.
    Returns:
        `model`.
    Raises:
        ValueError: an unknown scheme; a static one without calibration, or a dynamic one with it; a model that has no
            layer to quantise, has been quantised or is in training mode. These leave the model as it was. A layer that
            the calibration did not reach, or whose inputs were all zero or not finite: the model is quantised then,
            with a step of each row, as is one that fails on a batch.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"`scheme` must be one of {', '.join(SCHEMES)}, got {scheme!r}")
    if layers_of(model):
        raise ValueError("the model is quantised already")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode: call its eval() first, as a quantised one is for inference")
    if isinstance(calibration, Tensor):
        raise ValueError("`calibration` takes a list of batches, got one tensor: write [batch]")
    batches = iter(calibration)
    first = next(batches, None)
    if scheme == "dynamic" and first is not None:
        raise ValueError('`calibration` is for the scheme "static": a dynamic one takes its steps from each row')
    if scheme == "static" and first is None:
        raise ValueError("`calibration` must give inputs to a static scheme, as it takes its steps from them")
    if not replace_layers(model, replacements):
        raise ValueError(f"{type(model).__name__} has no linear layer or convolution to quantise")
    model.requires_grad_(False)
    if scheme == "static":
        _calibrate(model, [first], batches)
    return model


@torch.no_grad()
def _calibrate(model: nn.Module, *parts: Iterable[Any]) -> None:
    layers = layers_of(model)
    seen = {name: Magnitudes() for name in layers}
    for name, layer in layers.items():
        layer.observe = seen[name]
    try:
        for batches in parts:
            for batch in batches:
                model(batch)
    finally:
        for layer in layers.values():
            layer.observe = None
    steps = {}
    for name in layers:
        try:
            steps[name] = seen[name].best_step()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, layer in layers.items():
        layer.input_step = layer.weight_scales.new_tensor(steps[name])


def is_quantized(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of a quantised model, be it damaged."""
    return any(name.endswith("weight_scales") or value.dtype is torch.int8 for name, value in state.items())


def _check_state(state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a number of a quantised layer is not what `quantize` makes: loading would convert it."""
    for name, value in state.items():
        prefix, own = name[: name.rfind(".") + 1], name.rpartition(".")[2]
        if own == "weight_scales":
            weight = state.get(f"{prefix}weight")
            _check_numbers(name, value, value.shape[:1] if weight is None else weight.shape[:1])
            if bool((value < 0).any()):
                raise ValueError(f"{name} must be 0 or more, got {float(value.min())}")
            if weight is not None:
                _check_levels(f"{prefix}weight", weight)
        elif own == "input_step":
            _check_numbers(name, value, torch.Size())
            if not 0 < float(1 / value) < float("inf"):
                raise ValueError(f"{name} must be above 0 and have an inverse in fp32, got {float(value)}")
        elif value.dtype is torch.int8 and (own != "weight" or f"{prefix}weight_scales" not in state):
            raise ValueError(f"{name} is int8, as only a weight beside its weight_scales may be")


def _check_numbers(name: str, value: Tensor, shape: torch.Size) -> None:
    if value.dtype is not torch.float32 or value.shape != shape:
        raise ValueError(f"{name} must be fp32 of shape {tuple(shape)}, got {value.dtype} of {tuple(value.shape)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must hold finite numbers, and it holds a NaN or an infinity")


def _check_levels(name: str, weight: Tensor) -> None:
    if weight.dtype is not torch.int8:
        raise ValueError(f"{name} must be int8, as it has scales, got {weight.dtype}")
    if bool((weight < -LEVELS).any()):
        raise ValueError(f"{name} must be within {-LEVELS} to {LEVELS}, and it holds {-LEVELS - 1}")


def prepare(
    model: nn.Module, state: Mapping[str, Tensor], replacements: Mapping[type[nn.Module], Replacement] = REPLACEMENTS
) -> None:
    """Give a plain model the quantised layers that a state dict has values for; loading it is left to the caller.

    No parameter of the model asks for a gradient then.

    Raises:
        ValueError: the model has no such layer; names it. Or the state dict is damaged: a weight that is not int8 from
            -127 to 127 or has no scales, scales or a step of another shape or dtype than `quantize` makes, or that no
            rounding can have; names the value, and the model stays as it was.
    """
    _check_state(state)
    names = {name.removesuffix(".weight_scales") for name in state if name.endswith(".weight_scales")}
    names -= layers_of(model).keys()
    left = names - set(replace_layers(model, replacements, names))
    if left:
        raise ValueError(f"the model has no layer {min(left)} that could be quantised")
    for name, layer in layers_of(model).items():
        if f"{name}.input_step" in state:
            layer.input_step = layer.weight_scales.new_zeros(())
    model.requires_grad_(False)
