"""VMamba, the other family of this checkout: its package is imported only where a model or a checkpoint asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SETTINGS = "model_settings"  # entry of a checkpoint
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


def is_configuration(name: str) -> bool:
    """Whether a model's name is that of a file that describes it; such names are for the command line alone."""
    return Path(name).suffix in (".yaml", ".yml", ".json")


def registered(name: str) -> str:
    """Return the model's name, of a VMamba's configuration (a .yaml file, or a run's config.json) that of its network.

    Raises:
        UsageError: the file cannot be read, or describes no network.
    """
    if not is_configuration(name):
        return name
    from flags import UsageError

    package()
    from vmamba.config import ConfigError, find, load
    from vmamba.models import register

    try:
        return register(load(name, []), find(name).stem)
    except ConfigError as error:
        raise UsageError(f"{error}.") from error


def entries_for(name: str) -> dict[str, Any]:
    """Return the entry of a checkpoint by which `described` finds the network called `name` in another program.

    Empty for a network that every program knows, or that is no VMamba.
    """
    models = sys.modules.get("vmamba.models")  # where none was asked for, none is known
    settings = models.settings_of(name) if models is not None else None
    return {} if settings is None else {SETTINGS: settings}


def described(settings: Any, name: str, weights: Iterable[Any]) -> str:
    """Make the network known whose settings and weights a checkpoint holds; return its name, `name` or a longer one.

    Raises:
        ValueError: they are no settings, or those of another network than the weights'; one sentence.
    """
    package()
    from vmamba.models import register_settings

    depths = settings.get("MODEL.VSSM.DEPTHS") if isinstance(settings, dict) else None
    if not isinstance(depths, list | tuple) or list(depths) != package().weights.blocks_of_stages(weights):
        raise ValueError("it holds the settings of another network than its weights are of")
    return register_settings(settings, name)
