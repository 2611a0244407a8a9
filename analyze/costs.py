"""What one picture costs by the rule of the published tables, and where those tables differ from the rule.

b batch, d channels, l tokens, n state

The rule is fvcore's: multiply-adds of convolutions, linears and other products of matrices count 1, without biases; a
LayerNorm 5 per value, a BatchNorm 2, adaptive pooling 1 per value it reads; a scan 9 * b * l * d * n and, for the skip
D, b * l * d. Nothing else counts: no activation, no gate, no sum, no RMSNorm.

`flops.count_flops` counts layers, mixers, norms and pools; what is added here are the products that no layer makes,
such as those of attention, by watching PyTorch's functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from analyze.recording import is_mixer
from flops import FlopCount, count_flops
from mamba_ssm.modules.mamba_simple import Mamba
from model_setup import input_shape

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)  # what `count_flops` counts
_INSIDE_FUSED = ("conv1d", "conv1d_b", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b")
FUSED = (
    "without the convolutions, x_proj and dt_proj, which run inside upstream's fused op, where fvcore does not look, "
    "and with the gates of the scans, b * l * d each"
)
ROUNDED = "with the projections of the scans rounded to four digits, as fvcore reads them from a printed text"


@dataclass
class Cost:
    """What one picture costs.

    Attributes:
        parameters: numbers in the weights.
        counted: what layers, mixers, norms and pools cost.
        products: multiply-adds of other products of matrices.
        differences: by how much upstream's table differs from the rule, under the reason.
    """

    parameters: int
    counted: FlopCount
    products: int = 0
    differences: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The FLOPs by the rule."""
        return sum(self.parts().values())

    @property
    def published(self) -> int:
        """The FLOPs that stand in upstream's table: `total`, and the differences."""
        return self.total + sum(self.differences.values())

    def parts(self) -> dict[str, int]:
        """Return the summands of `total`."""
        return {
            "convolutions and linears": self.counted.multiply_adds,
            "other products of matrices": self.products,
            "scans, 9 * b * l * d * n": self.counted.scan_flops,
            "skips, b * l * d": self.counted.channel_updates,
            "norms": self.counted.norm_flops,
            "pooling": self.counted.pooled_values,
        }


def count_cost(model: nn.Module, img_size: int | tuple[int, int] | None = None) -> Cost:
    """Count one forward pass of one picture.

    Args:
        model: a Vim, a VMamba, or a model of timm.
        img_size: pixels, one number or (height, width); None: the model's own.
    """
    cost = Cost(sum(weight.numel() for weight in model.parameters()), count_flops(model, img_size))
    first = next(model.parameters())
    picture = torch.zeros(1, *input_shape(model, img_size), device=first.device, dtype=first.dtype)
    was_training = model.training
    watch = _Watch(cost)
    try:
        with torch.no_grad(), watch.the_modules_of(model), watch:
            model.eval()(picture)
    finally:
        model.train(was_training)
    return cost


class _Watch(TorchFunctionMode):
    """Adds to a cost the products that PyTorch's functions make outside of layers and mixers while it is entered."""

    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self._cost = cost
        self._depth = 0  # of modules whose products `count_flops` counts

    @contextmanager
    def the_modules_of(self, model: nn.Module) -> Iterator[None]:
        """Know when the model is inside a layer or a mixer, and see what its mixers are given."""
        with ExitStack() as stack:
            for module in model.modules():
                if isinstance(module, _LAYERS) or is_mixer(module):
                    stack.callback(module.register_forward_pre_hook(self._enter).remove)
                    stack.callback(module.register_forward_hook(self._leave).remove)
            yield

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self._depth -= 1
        for reason, amount in _differences(module, inputs).items():
            self._cost.differences[reason] = self._cost.differences.get(reason, 0) + amount

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        count = _PRODUCTS.get(getattr(func, "__name__", ""))
        if count is not None and not self._depth:
            self._cost.products += count(output, *args, **(kwargs or {}))
        return output


def _differences(module: Any, inputs: tuple[Any, ...]) -> dict[str, int]:
    """By how much upstream's figure for a mixer that was given `inputs` differs from the rule."""
    if isinstance(module, Mamba):
        tokens = inputs[0].shape[0] * inputs[0].shape[1]
        parts = (getattr(module, name, None) for name in _INSIDE_FUSED)
        gates = module.d_inner * (2 if module.bimamba_type in ("v1", "v2") else 1)
        return {FUSED: tokens * (gates - sum(part.weight.numel() for part in parts if part is not None))}
    if getattr(getattr(module, "variant", None), "vanilla", False):
        pixels = inputs[0].numel() // module.d_model
        exact = [pixels * weight.numel() for weight in (module.x_proj_weight, module.dt_projs_weight)]
        return {ROUNDED: sum(_as_printed(number) - number for number in exact)}
    return {}


def _as_printed(multiply_adds: int) -> int:
    """The multiply-adds of an einsum as fvcore gets them: half of numpy's count of operations, printed as 1.234e+05."""
    return math.floor(float(f"{2 * multiply_adds:.3e}") / 2)


def _of_matrices(output: Tensor, first: Tensor, second: Tensor, *rest: Any, **options: Any) -> int:
    """Each value is a sum over the last axis of `first`."""
    return output.numel() * first.shape[-1]


def _of_sum(output: Tensor, added: Tensor, first: Tensor, *rest: Any, **options: Any) -> int:
    """The same, added to something."""
    return output.numel() * first.shape[-1]


def _of_weight(output: Tensor, given: Tensor, weight: Tensor, *rest: Any, **options: Any) -> int:
    """A linear or convolution without a layer: each value is a sum over one row of the weight."""
    return output.numel() * (weight.numel() // weight.shape[0])


def _of_attention(output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> int:
    """Queries with keys, and what comes of it with values."""
    pairs = math.prod(query.shape[:-1]) * key.shape[-2]
    return pairs * (query.shape[-1] + value.shape[-1])


def _of_einsum(output: Tensor, equation: str, *operands: Any, **options: Any) -> int:
    """Each value is a sum over the letters that the output lacks; without "->" over those that come twice."""
    tensors = list(operands[0]) if operands and isinstance(operands[0], list | tuple) else list(operands)
    inputs, _, outputs = equation.replace(" ", "").partition("->")
    sizes: dict[str, int] = {}
    for names, tensor in zip(inputs.split(","), tensors, strict=True):
        before, _, after = names.partition("...")
        sizes.update(zip(before, tensor.shape, strict=False))
        sizes.update(zip(reversed(after), reversed(tensor.shape), strict=False))
    if "->" not in equation:
        outputs = "".join(name for name in sizes if inputs.count(name) == 1)
    return output.numel() * math.prod(size for name, size in sizes.items() if name not in outputs)


_PRODUCTS: dict[str, Callable[..., int]] = {
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _of_matrices),
    **dict.fromkeys(("addmm", "baddbmm"), _of_sum),
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d"), _of_weight),
    "scaled_dot_product_attention": _of_attention,
    "einsum": _of_einsum,
}
