"""Mamba in pure PyTorch as other packages offer it. Each is imported only when a case builds it.

b batch, d channels, l length
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

OURS = ("mamba_ssm", "causal_conv1d")


@contextmanager
def _importing(package: str) -> Iterator[None]:
    """Import a package of others as if there were no mamba_ssm here: it would run the kernels that it finds there.

    Raises:
        RuntimeError: it cannot be imported, or has no such name.
    """
    hidden = {name: sys.modules[name] for name in OURS}
    sys.modules.update(dict.fromkeys(OURS))  # type: ignore[arg-type]  # None means that there is none
    try:
        yield
    except ImportError as error:
        raise RuntimeError(
            f"{package} cannot be used ({error}); `pip install -r requirements/peers.txt` installs one that can"
        ) from error
    finally:
        sys.modules.update(hidden)


def _mambapy_block(features: int) -> Any:
    with _importing("mambapy"):
        from mambapy.mamba import MambaBlock, MambaConfig
    return MambaBlock(MambaConfig(d_model=features, n_layers=1))


def mambapy_scan(features: int, parallel: bool = True) -> Callable[..., Tensor]:
    """The scan of `mambapy.mamba.MambaBlock`, parallel or one step at a time, softplus and gate as it has them.

    The function takes u, delta, A, B, C, D, z, delta_bias as `selective_scan_fn` does and returns (b, d, l).
    """
    block = _mambapy_block(features)
    scan = block.selective_scan if parallel else block.selective_scan_seq

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        u, delta, B, C, z = (value.transpose(1, 2) for value in (u, delta, B, C, z))
        out: Tensor = scan(u, F.softplus(delta + bias), A, B, C, D) * F.silu(z)
        return out.transpose(1, 2)

    return run


def mambapy_mixer(own: Any) -> nn.Module:
    """`mambapy.mamba.MambaBlock` with the parameters of our mixer of one direction, which have the same names."""
    block: nn.Module = _mambapy_block(own.d_model)
    block.load_state_dict(own.state_dict())
    return block


def transformers_mixer(own: Any) -> nn.Module:
    """`MambaMixer` of transformers on its slow path, with the parameters of our mixer of one direction."""
    with _importing("transformers"):
        from transformers import MambaConfig, logging
        from transformers.models.mamba.modeling_mamba import MambaMixer
    logging.set_verbosity_error()  # it warns that it found no mamba_ssm
    mixer: nn.Module = MambaMixer(MambaConfig(hidden_size=own.d_model, num_hidden_layers=1), layer_idx=0)
    mixer.load_state_dict(own.state_dict())
    return mixer
