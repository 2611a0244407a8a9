"""A short training run of Vim-Tiny on random pictures: the loss must fall, and in fp32 be the CPU's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from benchmarks.gpu.findings import Findings
from benchmarks.gpu.networks import contexts, make_vim, training_step
from benchmarks.gpu.timing import Device

CLASSES = 10
FALL = 0.8  # the last losses over the first, at most
# Of the loss, relative. Adam divides gradients by their size, so that the rounding of small ones grows with the steps.
SAME_LOSS = 1e-4
SHARE_STEPS, SHARE_BATCH = 4, 4


@contextmanager
def exact_products() -> Iterator[None]:
    """Without tf32, whose rounding is that of a 16-bit dtype."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def losses(
    device: Device, steps: int, batch: int, autocast: bool, make: Callable[..., nn.Module], pixels: int, rate: float
) -> list[float]:
    """The loss of each step on the same random pictures; equal weights and pictures at every call."""
    torch.manual_seed(0)
    model = make(pixels).to(device.device).train()
    pictures = torch.randn(batch, 3, pixels, pixels).to(device.device)
    labels = torch.randint(CLASSES, (batch,)).to(device.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    return [training_step(model, pictures, labels, optimizer, autocast).item() for _ in range(steps)]


def check_training(
    device: Device, steps: int = 30, batch: int = 32, pixels: int = 224, make: Callable[..., nn.Module] = make_vim
) -> Findings:
    """Train on every backend of the device, in bf16 autocast and for a few steps in fp32."""
    findings = Findings(
        tables={"Training run": [["backend", "dtype", "first loss", "last loss", "furthest from the CPU's"]]}
    )
    with exact_products():
        same = (SHARE_STEPS, SHARE_BATCH, False, make, pixels, 1e-4)
        expected = losses(Device("cpu"), *same)
        for backend, context in contexts(device).items():
            with context():
                falling = losses(device, steps, batch, True, make, pixels, 1e-3)
                shared = losses(device, *same)
            _judge(findings, backend, falling, shared, expected)
    return findings


def _judge(findings: Findings, backend: str, falling: list[float], shared: list[float], expected: list[float]) -> None:
    last = sum(falling[-3:]) / len(falling[-3:])
    if not all(map(math.isfinite, falling)) or not last <= FALL * falling[0]:
        findings.failures.append(f"{backend}: the loss in bf16 did not fall from {falling[0]:.3f}: {falling}.")
    far = max(abs(mine - its) / its for mine, its in zip(shared, expected, strict=True))
    if not far <= SAME_LOSS:
        findings.failures.append(
            f"{backend}: the losses in fp32 must be within {SAME_LOSS:g} of the CPU's {expected}, got {shared}."
        )
    findings.tables["Training run"] += [
        [backend, "bf16 autocast", f"{falling[0]:.4f}", f"{falling[-1]:.4f}", ""],
        [backend, "fp32", f"{shared[0]:.4f}", f"{shared[-1]:.4f}", f"{far:.1e} (at most {SAME_LOSS:g})"],
    ]
    findings.measured[backend] = {"bf16": falling, "fp32": shared, "cpu_fp32": expected}
