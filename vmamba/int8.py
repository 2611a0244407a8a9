"""VMamba's layers with weights in int8; see `mamba_ssm.modules.int8`.

b batch, h height, w width, c channels, d inner channels, n state, r dt rank
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from mamba_ssm.modules import int8
from vmamba.layers import DownsamplingConv2d, Linear2d
from vmamba.ss2d import DIRECTIONS, SS2D


class Int8SS2D(SS2D):
    """`SS2D` whose projection of the scans' inputs is a quantised layer, `projection`, and no `x_proj_weight`.

    A mixer becomes one by `of`; it cannot be constructed.
    """

    projection: int8.Int8Linear

    @staticmethod
    def of(mixer: SS2D) -> SS2D | None:
        """Quantise the projection of a mixer, in place; None for a cascade, which stays as it is."""
        if mixer.variant.directions == "cascade":
            return None
        weight = mixer.x_proj_weight.detach().flatten(0, 1)
        bias = getattr(mixer, "x_proj_bias", None)
        plain = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        plain.weight = nn.Parameter(weight)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach().flatten())
            del mixer.x_proj_bias
        del mixer.x_proj_weight
        mixer.projection = int8.Int8Linear(plain).train(mixer.training)
        mixer.__class__ = Int8SS2D
        return mixer

    @property
    def x_proj_weight(self) -> Tensor:  # type: ignore[override]
        """(4, r + 2 n, d), fp32: the weight as it is multiplied."""
        weight = self.projection.weight * self.projection.weight_scales[:, None]
        return weight.unflatten(0, (DIRECTIONS, -1))

    def _project(self, u: Tensor) -> Tensor:
        return self.projection(u).unflatten(-1, (DIRECTIONS, -1))


REPLACEMENTS: Mapping[type[nn.Module], int8.Replacement] = {
    **int8.REPLACEMENTS,
    SS2D: Int8SS2D.of,
    Linear2d: partial(int8.Int8Linear, channels_first=True),
    DownsamplingConv2d: int8.REPLACEMENTS[nn.Conv2d],
}
