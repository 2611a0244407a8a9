"""One part of the check that needs the device, in a process of its own: what breaks a GPU's context ends with it.

    python -m benchmarks.gpu.measure PART FILE [--quick] [--device cpu]

writes what it found to FILE, as `findings.Findings` in JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, networks, ops, training
from benchmarks.gpu.findings import Findings, join
from benchmarks.gpu.timing import Device

ROUNDS, QUICK_ROUNDS = 30, 5
SMALL = ops.Sizes(batch=2, channels=24, length=70, state=16)  # more than a chunk, and no multiple of one


def measure_ops(device: Device, quick: bool) -> Findings:
    """The ceilings of the card, then each op against them."""
    found = ceilings.measure(device)
    rate, exps = found.bytes_per_second, found.exps_per_second
    first = Findings(measured={"ceilings": vars(found)})
    first.notes.append(
        f"a large copy moves {rate / 1e12:.3f} TB/s, read and written; {exps / 1e12:.3f}e12 exponentials per second, "
        f"{found.measured_how}"
    )
    parts = [first]
    for name in ops.OPS:
        device.free()
        try:
            parts.append(ops.measure_op(name, device, found, ops.Sizes(), QUICK_ROUNDS if quick else ROUNDS))
        except RuntimeError as error:  # of this op; the others may run
            parts.append(Findings(failures=[f"{name}: {error}"]))
    return join(parts)


def run_small(device: Device, quick: bool) -> Findings:
    """Every op once on a small input, for tools that watch each access to memory."""
    for backend in [name for name in ops.backends_for(device) if name == "cuda"]:
        for op in ops.OPS.values():
            with ops.on(backend, op):
                op.run(*op.prepare(*op.draw(SMALL, device)))
    device.wait()
    return Findings()


def _rounds(quick: bool) -> int:
    return QUICK_ROUNDS if quick else ROUNDS


PARTS: dict[str, Callable[[Device, bool], Findings]] = {
    "training": lambda device, quick: training.check_training(device, 20 if quick else 30),
    "ops": measure_ops,
    "step": lambda device, quick: networks.measure_step(device, _rounds(quick)),
    "inference": lambda device, quick: networks.measure_inference(
        device, QUICK_ROUNDS if quick else 10, (6,) if quick else (6, 24, 96)
    ),
    "mixers": lambda device, quick: networks.measure_mixers(device, _rounds(quick)),
    "small": run_small,
}


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu.measure", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args()
    torch.set_float32_matmul_precision("highest")
    try:
        findings = PARTS[args.part](Device(args.device), args.quick)
    except Exception as error:  # told in the report, beside what the other parts found
        traceback.print_exc()
        findings = Findings(failures=[f"{args.part}: {type(error).__name__}: {error}"])
    args.file.write_text(json.dumps(findings.as_json()), encoding="utf-8")
    return 1 if findings.failures else 0


if __name__ == "__main__":
    sys.exit(main())
