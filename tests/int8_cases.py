"""Products with weights in int8 for the tests of their op and of its compiled kernel."""

from __future__ import annotations

import torch

from mamba_ssm.ops.int8 import Int8Weight, quantize_weight

# rows, inputs, outputs: one, none that a group of four or a vector divides, more than a tile, than few rows, than
# whole numbers that fp32 sums up exactly
SIZES = [
    (0, 5, 3), (1, 1, 1), (3, 3, 2), (2, 4, 16), (13, 5, 17), (7, 63, 33), (25, 64, 32), (197, 100, 44), (1025, 21, 40),
    (5, 1100, 65),
]  # fmt: skip
STEPS = [None, 0.02]


def case(rows: int, inputs: int, outputs: int, step: float | None = None, bias: bool = True, dtype=torch.float32):
    values, scales = quantize_weight(torch.randn(outputs, inputs))
    x = torch.randn(rows, inputs, dtype=dtype) * torch.randn(rows, 1, dtype=dtype).exp()
    weight = Int8Weight(values, scales, None if step is None else torch.tensor(step))
    return x, weight, torch.randn(outputs) if bias else None
