"""Entry points of torch.hub: torch.hub.load(FOLDER, NAME, source="local", num_classes=..., img_size=...).

Every model that models_mamba.py or the package vmamba registers is one, by its registered name. The two packages come
from this checkout where they are not installed.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
dependencies = ["torch", "torchvision", "timm"]

for _folder, _package in (("causal-conv1d", "causal_conv1d"), ("mamba-1p1p1", "mamba_ssm")):
    if importlib.util.find_spec(_package) is None:
        sys.path.append(str(_ROOT / _folder))

sys.path.insert(0, str(_ROOT / "vim"))
import models_mamba  # noqa: E402, F401  (registers the models)
import other_family  # noqa: E402

sys.path.remove(str(_ROOT / "vim"))  # so that our datasets.py hides nobody else's package of that name

import timm  # noqa: E402

_names = [*timm.list_models(module="models_mamba"), *other_family.package().factories.VARIANTS]
globals().update({name: timm.model_entrypoint(name) for name in _names})
