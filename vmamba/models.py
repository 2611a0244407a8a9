"""From a configuration to its network: built at once, or by a name that timm knows."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, get_type_hints

import torch
from timm.models import is_model, register_model
from torch import nn

from vmamba.config import Config, ConfigError, checked, from_mapping, replaced
from vmamba.factories import VARIANTS
from vmamba.vssm import VSSM

__all__ = ["build_model", "build_vssm_model"]  # a list, to which timm adds what is registered

# Arguments of VSSM and where a configuration has them.
ARGUMENTS = {
    "patch_size": "MODEL.VSSM.PATCH_SIZE",
    "in_chans": "MODEL.VSSM.IN_CHANS",
    "num_classes": "MODEL.NUM_CLASSES",
    "depths": "MODEL.VSSM.DEPTHS",
    "dims": "MODEL.VSSM.EMBED_DIM",
    "ssm_d_state": "MODEL.VSSM.SSM_D_STATE",
    "ssm_ratio": "MODEL.VSSM.SSM_RATIO",
    "ssm_dt_rank": "MODEL.VSSM.SSM_DT_RANK",
    "ssm_act_layer": "MODEL.VSSM.SSM_ACT_LAYER",
    "ssm_conv": "MODEL.VSSM.SSM_CONV",
    "ssm_conv_bias": "MODEL.VSSM.SSM_CONV_BIAS",
    "ssm_drop_rate": "MODEL.VSSM.SSM_DROP_RATE",
    "ssm_init": "MODEL.VSSM.SSM_INIT",
    "forward_type": "MODEL.VSSM.SSM_FORWARDTYPE",
    "mlp_ratio": "MODEL.VSSM.MLP_RATIO",
    "mlp_act_layer": "MODEL.VSSM.MLP_ACT_LAYER",
    "mlp_drop_rate": "MODEL.VSSM.MLP_DROP_RATE",
    "gmlp": "MODEL.VSSM.GMLP",
    "drop_path_rate": "MODEL.DROP_PATH_RATE",
    "patch_norm": "MODEL.VSSM.PATCH_NORM",
    "norm_layer": "MODEL.VSSM.NORM_LAYER",
    "downsample_version": "MODEL.VSSM.DOWNSAMPLE",
    "patchembed_version": "MODEL.VSSM.PATCHEMBED",
    "use_checkpoint": "TRAIN.USE_CHECKPOINT",
    "posembed": "MODEL.VSSM.POSEMBED",
    "imgsize": "DATA.IMG_SIZE",
    "drop_rate": "MODEL.DROP_RATE",
}
# What a network is called by: all but how it is trained, the size of its pictures, the number of its classes.
_NOT_THE_NETWORK = {"num_classes", "drop_path_rate", "use_checkpoint", "imgsize", "drop_rate"}


def build_vssm_model(config: Any) -> VSSM:
    """Build the network that a configuration describes, with random weights.

    Args:
        config: a `Config`, a mapping of its shape, as a `CfgNode` of yacs is one, or anything with such attributes;
            what is missing has its default. A BASE, which names files, is not followed.
    Raises:
        ConfigError: an unknown setting, a value of another kind than it should be, or one for which there is no
            network.
    """
    return _built(vssm_arguments(config))


build_model = build_vssm_model  # upstream has a name for networks of any TYPE, of which there is this one


def vssm_arguments(config: Any) -> dict[str, Any]:
    """Return the arguments of `VSSM` in a configuration; see `build_vssm_model`.

    Raises:
        ConfigError: an unknown setting, a value of another kind than it should be, or another MODEL.TYPE than vssm.
    """
    whole = config if isinstance(config, Config) else from_mapping(_sections(config))
    if whole.MODEL.TYPE != "vssm":
        raise ConfigError(f"MODEL.TYPE must be 'vssm', the only one there is, got {whole.MODEL.TYPE!r}")
    return {argument: checked(key, value_of(whole, key), _kind(key)) for argument, key in ARGUMENTS.items()}


def value_of(config: Config, key: str) -> Any:
    """The value of a setting by its whole name."""
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _sections(config: Any) -> dict[str, Any]:
    """A configuration of another kind as a mapping of settings and sections, without the files that it was made of."""
    if not isinstance(config, Mapping) and not hasattr(config, "MODEL"):
        raise ConfigError(f"a configuration must hold settings by name, got a {type(config).__name__}")
    return {key: value for key, value in _section(config, Config()).items() if key != "BASE"}


def _section(node: Any, default: Any) -> Any:
    """What stands where `default` is a section, as a mapping; what is none, and every other value, as it is."""
    if not is_dataclass(default):
        return node
    found = node if isinstance(node, Mapping) else _attributes(node)
    return {key: _section(value, getattr(default, str(key), None)) for key, value in found.items()} if found else node


def _attributes(node: Any) -> dict[str, Any]:
    """The attributes of an object and of its classes that hold values."""
    places = [place for place in (*reversed(type(node).__mro__), node) if hasattr(place, "__dict__")]
    found = {name: value for place in places for name, value in vars(place).items() if not name.startswith("_")}
    return {name: value for name, value in found.items() if not callable(value) and not hasattr(value, "__get__")}


def _kind(key: str) -> Any:
    kind: Any = Config
    for part in key.split("."):
        kind = get_type_hints(kind)[part]
    return kind


def _built(arguments: Mapping[str, Any]) -> VSSM:
    try:
        return VSSM(**arguments)
    except ValueError as error:
        raise ConfigError(_in_settings(str(error))) from error
    except (RuntimeError, ArithmeticError, MemoryError) as error:  # sizes, each of which may be, that are too large
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(f"the network that MODEL.VSSM describes cannot be made: {reason}") from error


def _in_settings(sentence: str) -> str:
    """A sentence about arguments of VSSM, which it names in backticks, in the names of the settings."""
    return re.sub(r"`(\w+)`", lambda name: ARGUMENTS.get(name[1], name[0]), sentence)


def variant_of(config: Any) -> str | None:
    """Return the name of the published network that a configuration describes, None if it is none of them."""
    own = _identity(vssm_arguments(config))
    return next((name for name, options in VARIANTS.items() if _identity(options) == own), None)


def _identity(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a network from others; `ln` and `ln2d` differ in the layout of maps alone."""
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(VSSM).parameters.items()
        if name in ARGUMENTS and name not in _NOT_THE_NETWORK
    }
    found = {name: arguments.get(name, default) for name, default in defaults.items()}
    found["depths"] = list(found["depths"])
    dims = found["dims"]
    found["dims"] = [dims * 2**i for i in range(len(found["depths"]))] if isinstance(dims, int) else list(dims)
    if "norm_layer" not in arguments or str(found["norm_layer"]).lower() == "ln":
        found["norm_layer"] = "ln2d"
    return {name: value.lower() if isinstance(value, str) else value for name, value in found.items()}


def register(config: Config, name: str) -> str:
    """Make the network of a configuration known to timm, and return the name by which `timm.create_model` builds it.

    That is the published name of a published network; else `name`, made fit for it, and longer where another network
    has that.

    Raises:
        ConfigError: there is no such network.
    """
    arguments = vssm_arguments(config)
    published = variant_of(config)
    if published is not None:
        return published
    own = re.sub(r"\W+", "_", name).strip("_").lower()
    own = own if own[:1].isalpha() else f"vssm_{own}"
    if is_model(own) and _REGISTERED.get(own) != arguments:
        digest = hashlib.sha256(json.dumps(arguments, sort_keys=True).encode()).hexdigest()
        own = f"{own}_{digest[:8]}"
    if own not in _REGISTERED:
        with torch.device("meta"):  # a fault is told here, of the configuration
            _built(arguments | {"depths": (1,) * len(arguments["depths"])})
        _REGISTERED[own] = arguments
        written_here = list(__all__)
        register_model(_entry_point(own, arguments))
        __all__[:] = written_here  # timm adds a name that no import finds
    return own


_REGISTERED: dict[str, dict[str, Any]] = {}  # what `register` made known, by name


def settings_of(name: str) -> dict[str, Any] | None:
    """Return the settings by their whole names of a network that `register` made known, for `register_settings`.

    They are numbers, texts, and tuples of numbers. None for a published network, or one that is not known.
    """
    found = _REGISTERED.get(name)
    return None if found is None else {ARGUMENTS[argument]: value for argument, value in found.items()}


def register_settings(settings: Any, name: str) -> str:
    """`register` the network of settings that `settings_of` gave, perhaps to another program.

    Raises:
        ConfigError: they are none, or there is no such network.
    """
    if not isinstance(settings, Mapping) or not set(settings) <= set(ARGUMENTS.values()):
        raise ConfigError("the settings of a network must be given by their whole names")
    return register(replaced(Config(), settings), name)


def _entry_point(name: str, arguments: Mapping[str, Any]) -> Callable[..., nn.Module]:
    def build(
        pretrained: bool = False,
        *,
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Any = None,
        cache_dir: str | None = None,
        **options: Any,
    ) -> nn.Module:
        del pretrained_cfg, pretrained_cfg_overlay, cache_dir  # timm's, about published weights
        if pretrained:
            raise ValueError(f"there are no published weights for {name}: create it with pretrained=False")
        model: Any = VSSM(**{**arguments, **options})
        model.pretrained_cfg = model.default_cfg = {**model.default_cfg, "architecture": name}
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"Build the network of the configuration {name}; the options are those of `VSSM`."
    return build
