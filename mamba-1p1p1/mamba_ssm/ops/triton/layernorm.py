"""An older path of the normalisation; the code is `mamba_ssm.ops.norm` and needs no triton."""

from mamba_ssm.ops.norm import *  # noqa: F403
from mamba_ssm.ops.norm import __all__ as __all__
