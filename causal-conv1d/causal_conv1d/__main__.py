"""`python -m causal_conv1d`: which backend runs what, and why."""

import causal_conv1d.conv1d  # noqa: F401  (its family joins the report)
from causal_conv1d.backend.__main__ import main

main("python -m causal_conv1d")
