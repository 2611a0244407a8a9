"""`python -m mamba_ssm`: which backend runs what, and why."""

import mamba_ssm.ops.selective_scan  # noqa: F401  (its family joins the report)
from causal_conv1d.backend import report

print(report())
