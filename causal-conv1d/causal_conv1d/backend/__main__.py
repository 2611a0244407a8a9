"""`python -m causal_conv1d.backend`: which backend runs what, and why."""

from causal_conv1d.backend import report

print(report())
