"""Causal depthwise convolution for state-space models, on any device that PyTorch runs on."""

from causal_conv1d.causal_conv1d_interface import causal_conv1d_fn, causal_conv1d_update

__version__ = "1.4.0"

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
