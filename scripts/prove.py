"""Prove an installation by using it: python prove.py pair | python prove.py packages CHECKOUT

Run by setup_cpu_env.py with the environment's own Python from another folder, as a user's program would be.
`pair` prints the versions as JSON, `packages` what runs on which backend; what does not work raises.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def pair() -> None:
    """torch computes and the compiled operators of torchvision were built for it."""
    import torchvision

    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 2.1], [5.0, 5.0, 6.0, 6.0]])
    kept = torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist()
    if kept != [0, 2]:
        raise RuntimeError(f"torchvision.ops.nms kept the boxes {kept} instead of [0, 2]")
    if not (torch.ones(64, 64) @ torch.ones(64, 64)).eq(64).all():
        raise RuntimeError("torch's matrix product of ones is wrong")
    print(json.dumps({"torch": torch.__version__, "torchvision": torchvision.__version__}))


def packages(checkout: Path) -> None:
    """Both packages come from `checkout`, what vim/ needs imports, and a scan agrees with its definition."""
    import huggingface_hub  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import timm  # noqa: F401
    import tqdm  # noqa: F401

    import causal_conv1d
    import mamba_ssm
    from causal_conv1d.backend import report
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref

    for package in (causal_conv1d, mamba_ssm):
        origin = Path(package.__file__ or "").resolve()
        if checkout not in origin.parents:
            raise RuntimeError(f"{package.__name__} is imported from {origin.parent} and not from {checkout}")
    torch.manual_seed(0)
    u, delta, z = torch.randn(3, 2, 8, 33).unbind()  # batch 2, 8 channels, 33 steps, state 4
    A, B, C, D = -torch.rand(8, 4), torch.randn(2, 4, 33), torch.randn(2, 4, 33), torch.randn(8)
    got, definition = (
        torch.as_tensor(scan(u, delta, A, B, C, D, z, delta_softplus=True))
        for scan in (selective_scan_fn, selective_scan_ref)
    )
    error = ((got - definition).abs().max() / definition.abs().max()).item()
    if not error < 1e-5:
        raise RuntimeError(f"the selective scan is {error:.1e} away from its definition")
    print(f"the selective scan agrees with its definition to {error:.1e}")
    print(report())


if __name__ == "__main__":
    if sys.argv[1] == "pair":
        pair()
    else:
        packages(Path(sys.argv[2]))
