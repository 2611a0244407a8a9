"""Selective state-space models (Mamba, and the mixers of Vision Mamba) on any device that PyTorch runs on."""

__version__ = "1.1.1"

try:
    import causal_conv1d.backend  # noqa: F401  (the package of this repository has it, others of its name do not)
except ImportError as error:
    raise ImportError(
        "mamba_ssm needs the causal_conv1d package of the same repository; install it with: pip install ./causal-conv1d"
    ) from error

from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn, selective_scan_fn

__all__ = ["Mamba", "MambaLMHeadModel", "mamba_inner_fn", "selective_scan_fn"]
