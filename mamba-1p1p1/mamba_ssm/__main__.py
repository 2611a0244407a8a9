"""`python -m mamba_ssm`: which backend runs what, and why."""

import mamba_ssm.ops.selective_scan  # noqa: F401  (its family joins the report)
from causal_conv1d.backend.__main__ import main

main("python -m mamba_ssm")
