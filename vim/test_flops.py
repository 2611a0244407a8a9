#!/usr/bin/env python3
"""Print what a model costs: parameters, FLOPs, latency, throughput and peak memory.

python vim/test_flops.py --model vim_tiny_patch16_224 --img-size 224

Two counts of FLOPs, of one picture: the usual one, multiply-adds of convolutions and linears with
9 * b * l * d * n for the scans beside it; and literal operations, 2 per multiply-add, scans included
(`flops.FlopCount.operations` says what is counted as one). For a VMamba also the count of its papers, by fvcore's
rules, in which norms are counted too.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from command_line import DEFAULT_MODEL, add_run_flags, positive, run_script

if TYPE_CHECKING:
    from torch import nn


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(description="Print parameters, FLOPs, latency, throughput and peak memory.")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="registered name (default: %(default)s)")
    add("--num_classes", "--num-classes", type=positive, default=1000, metavar="N", help="default: 1000")
    add("--repeat", type=positive, default=10, metavar="N", help="timed forward passes (default: 10)")
    add("--json", action="store_true", help="print one JSON object")
    add_run_flags(parser)
    return parser


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Build the model, count and time it; sizes in bytes, times in milliseconds, rates per second.

    Raises:
        UsageError: it cannot be done; one sentence says why.
    """
    import torch

    from flops import count_flops
    from model_setup import (
        backend_that_runs,
        blank_batch,
        build_model,
        chosen_backend,
        input_shape,
        pick_device,
        place,
        refuse_failures,
    )
    from other_family import is_vmamba
    from timing import peak_memory, time_repeatedly

    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    model = place(build_model(args.model, args.num_classes, args.img_size), device, args.dtype)
    batch = blank_batch(args.batch_size, input_shape(model, args.img_size), device, args.dtype)
    with chosen_backend(args.backend), refuse_failures(batch), torch.inference_mode():
        count = count_flops(model, args.img_size)
        timing = time_repeatedly(lambda: model(batch), args.repeat)
    return {
        "model": args.model,
        "input": list(batch.shape),
        "device": str(device),
        "dtype": args.dtype,
        "threads": torch.get_num_threads(),
        "backend": backend_that_runs(args.backend, device),
        **_weights(model),
        "multiply_adds": count.multiply_adds,
        "scan_flops": count.scan_flops,
        "operations": count.operations,
        **({"fvcore_flops": count.fvcore_flops} if is_vmamba(model.state_dict()) else {}),
        "latency": timing.as_json(),
        "pictures_per_second": round(args.batch_size / timing.median, 3),
        "peak_memory_bytes": peak_memory(device),
    }


def _weights(model: nn.Module) -> dict[str, int]:
    parameters = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in parameters),
        "parameter_bytes": sum(weight.numel() * weight.element_size() for weight in parameters),
    }


def print_text(found: dict[str, Any]) -> None:
    """Print the measurements for people."""
    latency, peak = found["latency"], found["peak_memory_bytes"]
    shape = " x ".join(str(side) for side in found["input"])
    memory = "unknown on this system" if peak is None else f"{peak / 2**20:.0f} MiB"
    where = "of the GPU's memory" if found["device"].startswith("cuda") else "of the whole process"
    lines = {
        "Model": found["model"],
        "Input": f"{shape}, {found['device']}, {found['threads']} threads, backend {found['backend']}",
        "Parameters": f"{found['parameters']:,} ({found['parameter_bytes'] / 1e6:.1f} MB)",
        "Multiply-adds": f"{found['multiply_adds'] / 1e9:.3f} G per picture, of convolutions and linears",
        "Scans": f"{found['scan_flops'] / 1e9:.3f} G per picture, 9 * b * l * d * n",
        "Operations": f"{found['operations'] / 1e9:.3f} G per picture: 2 per multiply-add, scans included",
        "Latency": f"median {latency['median_ms']:.1f} ms, middle half {latency['first_quartile_ms']:.1f} to "
        f"{latency['third_quartile_ms']:.1f} ms, least {latency['least_ms']:.1f} ms, {latency['runs']} runs",
        "Throughput": f"{found['pictures_per_second']:.2f} pictures per second",
        "Peak memory": f"{memory} {where}" if peak is not None else memory,
    }
    if "fvcore_flops" in found:
        lines["FLOPs"] = f"{found['fvcore_flops'] / 1e9:.3f} G per picture, as VMamba's papers count: by fvcore's rules"
    for name, value in lines.items():
        print(f"{name + ':':<15}{value}")


def measure_and_print(args: argparse.Namespace) -> int:
    """Do what the command line says and return the exit code."""
    found = measure(args)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print_text(found)
    return 0


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    return run_script(build_parser(), measure_and_print, arguments)


if __name__ == "__main__":
    sys.exit(run())
