"""Where Mamba 1.1 has its decoding step; the code is `mamba_ssm.ops.selective_state_update`, no triton."""

from mamba_ssm.ops.selective_state_update import selective_state_update, selective_state_update_ref

__all__ = ["selective_state_update", "selective_state_update_ref"]
