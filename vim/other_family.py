"""VMamba, the other family of this checkout: its package is imported only where a model or a checkpoint asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_ROOT = str(Path(__file__).resolve().parent.parent)
if _ROOT not in sys.path:
    sys.path.append(_ROOT)  # at the end, where it hides nobody else's package


def package() -> Any:
    """Import the package `vmamba`, which registers its models with timm, and return it."""
    import vmamba.unpickling
    import vmamba.weights

    return vmamba


def is_vmamba(names: Iterable[Any]) -> bool:
    """Whether the weights of these names are those of a VMamba, of any line."""
    return any(isinstance(name, str) and name.endswith(".A_logs") for name in names)


def registered(name: str) -> str:
    """Return the model's name, of a VMamba's configuration (a .yaml file, or a run's config.json) that of its network.

    Raises:
        UsageError: the file cannot be read, or describes no network.
    """
    if Path(name).suffix not in (".yaml", ".yml", ".json"):
        return name
    from flags import UsageError

    package()
    from vmamba.config import ConfigError, find, load
    from vmamba.models import register

    try:
        return register(load(name, []), find(name).stem)
    except ConfigError as error:
        raise UsageError(f"{error}.") from error
