"""The triton kernels compile for the GPUs they are meant for: ahead of time, so that no GPU is needed.

What they compute is tested with the other backends of each op: give pytest `--backend triton`, and set
TRITON_INTERPRET=1 where there is no GPU.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

# Each has `variants() -> list[tuple[kernel, dict[str, Any] (its signature), dict[str, Any] (its constants)]]`.
MODULES = [
    "causal_conv1d.conv1d_triton",
    "mamba_ssm.ops.norm_triton",
    "mamba_ssm.ops.selective_scan_triton",
    "mamba_ssm.ops.selective_state_update_triton",
]
CAPABILITIES = (80, 90)  # Ampere and Hopper

# In a process of its own: where TRITON_INTERPRET is set, this one has the interpreter's kernels, which do not compile.
PROGRAM = """
import importlib, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

module = importlib.import_module(sys.argv[1])
variants = module.variants()
forgotten = {name for name in vars(module) if name.endswith("_kernel")} - {kernel.__name__ for kernel, *_ in variants}
assert variants and not forgotten, f"no variants of {forgotten or 'any kernel'}"
for kernel, signature, constants in variants:
    for capability in sys.argv[2:]:
        target = GPUTarget("cuda", int(capability), 32)
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
        assert compiled.asm["cubin"], (kernel, signature, constants)
"""


@pytest.mark.parametrize("module", [name for name in MODULES if importlib.util.find_spec(name) is not None])
def test_kernels_compile_ahead_of_time(module: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "error", "-c", PROGRAM, module, *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
