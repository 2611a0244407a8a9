"""Whether triton can compile kernels here."""

from __future__ import annotations

import importlib.metadata
import os
import re
from functools import cached_property

import torch

OLDEST = (3, 3)  # the first triton whose kernels take tuples


class Triton:
    """The engine of the `triton` backend. It imports nothing: the kernels' modules do, when one is called."""

    @cached_property
    def missing(self) -> str | None:
        """Why no kernel can run. With TRITON_INTERPRET=1, which is for tests, triton interprets them on a CPU."""
        if not self.detail:
            return "triton is not installed"
        if tuple(map(int, re.findall(r"\d+", self.detail)[:2])) < OLDEST:
            return f"triton {self.detail} is older than {'.'.join(map(str, OLDEST))}, which a newer torch brings"
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted or torch.cuda.is_available() else "torch finds no GPU"

    @cached_property
    def detail(self) -> str:
        """triton's version; "" without it."""
        try:
            return importlib.metadata.version("triton")
        except importlib.metadata.PackageNotFoundError:
            return ""


TRITON = Triton()
