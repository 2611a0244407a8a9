"""What the card can do at best: bytes per second of a large copy, exponentials per second."""

from __future__ import annotations

import importlib.util
import subprocess
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.timing import Device, interleave
from benchmarks.runner import Spread

EXPS_PER_CLOCK = 16  # of one multiprocessor, by CUDA's programming guide, from Volta to Blackwell
ROUNDS, REPEATS = 20, 2000


@dataclass(frozen=True)
class Ceilings:
    """Attributes: bytes_per_second, read and written; exps_per_second; measured_how: how the latter is known."""

    bytes_per_second: float
    exps_per_second: float
    measured_how: str

    def floors(self, moved: int, exponentials: int) -> tuple[float, float]:
        """The seconds that so many bytes and so many exponentials take at least."""
        return moved / self.bytes_per_second, exponentials / self.exps_per_second


def measure(device: Device, size: int = 1 << 30, repeats: int = REPEATS) -> Ceilings:
    """Measure both. `size`: bytes to copy."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device.device)
    target = torch.empty_like(source)
    seconds = interleave(device, {"copy": lambda: target.copy_(source)}, ROUNDS)["copy"]
    rate, how = _exps(device, repeats)
    return Ceilings(2 * size / Spread.of(seconds).median, rate, how)


def _exps(device: Device, repeats: int) -> tuple[float, str]:
    if importlib.util.find_spec("triton") is None:
        return _known_rate(device), "reckoned: multiprocessors times 16 per clock times the highest clock"
    from benchmarks.gpu import exp_rate

    units = torch.cuda.get_device_properties(device.device).multi_processor_count if device.is_gpu else 1
    out = exp_rate.output_for(units, device.device)
    seconds = interleave(device, {"exp": partial(exp_rate.run_exponentials, out, repeats)}, ROUNDS)["exp"]
    if not bool(out.isfinite().all()):
        raise RuntimeError("the kernel that computes exponentials left numbers unwritten")
    return out.numel() * repeats / Spread.of(seconds).median, "measured in registers"


def _known_rate(device: Device) -> float:
    if not device.is_gpu:
        raise RuntimeError("without triton and without a GPU there is no rate of exponentials")
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    megahertz = float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    return torch.cuda.get_device_properties(device.device).multi_processor_count * EXPS_PER_CLOCK * megahertz * 1e6
