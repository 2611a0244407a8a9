"""Configurations: yaml files of networks and of their training, with the keys and the defaults of VMamba's own.

    config = load("vmambav2_tiny_224", ["MODEL.DROP_PATH_RATE", "0.1"])
    config.MODEL.VSSM.EMBED_DIM

A file holds what differs from the defaults below; its BASE lists files, relative to it, whose values it changes.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from vmamba.forward_types import nearest

FOLDER = Path(__file__).resolve().parent / "configs"
_RENAMED = {"ENABLE_AMP": "AMP_ENABLE"}  # keys of old files; the new one wins where a file has both


class ConfigError(ValueError):
    """A configuration cannot be found, read or used; the message is one clear sentence."""


@dataclasses.dataclass(frozen=True)
class Data:
    """The pictures. IMG_SIZE in pixels: a side, or height and width."""

    BATCH_SIZE: int = 128
    DATA_PATH: str = ""
    DATASET: Literal["imagenet"] = "imagenet"
    IMG_SIZE: int | tuple[int, ...] = 224
    INTERPOLATION: Literal["bicubic", "bilinear", "random"] = "bicubic"
    ZIP_MODE: bool = False
    CACHE_MODE: Literal["no", "full", "part"] = "part"
    PIN_MEMORY: bool = True
    NUM_WORKERS: int = 8
    MASK_PATCH_SIZE: int = 32
    MASK_RATIO: float = 0.6


@dataclasses.dataclass(frozen=True)
class Network:
    """The arguments of `VSSM`, by upstream's names; SSM_RANK_RATIO has no effect."""

    PATCH_SIZE: int = 4
    IN_CHANS: int = 3
    DEPTHS: tuple[int, ...] = (2, 2, 9, 2)
    EMBED_DIM: int | tuple[int, ...] = 96
    SSM_D_STATE: int = 16
    SSM_RATIO: float = 2.0
    SSM_RANK_RATIO: float = 2.0
    SSM_DT_RANK: int | Literal["auto"] = "auto"
    SSM_ACT_LAYER: str = "silu"
    SSM_CONV: int = 3
    SSM_CONV_BIAS: bool = True
    SSM_DROP_RATE: float = 0.0
    SSM_INIT: str = "v0"
    SSM_FORWARDTYPE: str = "v2"
    MLP_RATIO: float = 4.0
    MLP_ACT_LAYER: str = "gelu"
    MLP_DROP_RATE: float = 0.0
    PATCH_NORM: bool = True
    NORM_LAYER: str = "ln"
    DOWNSAMPLE: str = "v2"
    PATCHEMBED: str = "v2"
    POSEMBED: bool = False
    GMLP: bool = False


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained, and weights to begin with."""

    TYPE: str = "vssm"
    NAME: str = "vssm_tiny_224"
    PRETRAINED: str = ""
    RESUME: str = ""
    NUM_CLASSES: int = 1000
    DROP_RATE: float = 0.0
    DROP_PATH_RATE: float = 0.1
    LABEL_SMOOTHING: float = 0.1
    MMCKPT: bool = False
    VSSM: Network = Network()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the learning rate goes down."""

    NAME: str = "cosine"
    DECAY_EPOCHS: float = 30
    DECAY_RATE: float = 0.1
    WARMUP_PREFIX: bool = True
    GAMMA: float = 0.1
    MULTISTEPS: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """What changes the weights."""

    NAME: str = "adamw"
    EPS: float = 1e-8
    BETAS: tuple[float, ...] = (0.9, 0.999)
    MOMENTUM: float = 0.9


@dataclasses.dataclass(frozen=True)
class Experts:
    """Of networks with a mixture of experts, of which there is none here."""

    SAVE_MASTER: bool = False


@dataclasses.dataclass(frozen=True)
class Train:
    """A training run. The learning rates are for 512 pictures in a step."""

    EPOCHS: int = 300
    WARMUP_EPOCHS: int = 20
    WEIGHT_DECAY: float = 0.05
    BASE_LR: float = 5e-4
    WARMUP_LR: float = 5e-7
    MIN_LR: float = 5e-6
    CLIP_GRAD: float = 5.0
    AUTO_RESUME: bool = True
    ACCUMULATION_STEPS: int = 1
    USE_CHECKPOINT: bool = False
    LAYER_DECAY: float = 1.0
    LR_SCHEDULER: Schedule = Schedule()
    OPTIMIZER: Optimizer = Optimizer()
    MOE: Experts = Experts()


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is done to the pictures in training."""

    COLOR_JITTER: float = 0.4
    AUTO_AUGMENT: str = "rand-m9-mstd0.5-inc1"
    REPROB: float = 0.25
    REMODE: str = "pixel"
    RECOUNT: int = 1
    MIXUP: float = 0.8
    CUTMIX: float = 1.0
    CUTMIX_MINMAX: tuple[float, ...] | None = None
    MIXUP_PROB: float = 1.0
    MIXUP_SWITCH_PROB: float = 0.5
    MIXUP_MODE: Literal["batch", "pair", "elem"] = "batch"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How the pictures for evaluation are cut (CROP: the middle of a larger one) and dealt out."""

    CROP: bool = True
    SEQUENTIAL: bool = False
    SHUFFLE: bool = False


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole configuration; its attributes are the keys of a file."""

    DATA: Data = Data()
    MODEL: Model = Model()
    TRAIN: Train = Train()
    AUG: Augmentation = Augmentation()
    TEST: Evaluation = Evaluation()
    AMP_ENABLE: bool = True
    OUTPUT: str = ""
    TAG: str = ""
    SAVE_FREQ: int = 1
    PRINT_FREQ: int = 10
    SEED: int = 0
    EVAL_MODE: bool = False
    THROUGHPUT_MODE: bool = False
    TRAINCOST_MODE: bool = False
    FUSED_LAYERNORM: bool = False


# --- reading ----------------------------------------------------------------------------------------------------------


def load(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Args:
        name: as for `find`.
        overrides: KEY VALUE KEY VALUE ..., the values written as in yaml, which win over the file's.
    Raises:
        ConfigError: there is no such file, it is no configuration, or a key or a value is none; says what is near.
    """
    return override(from_mapping(_with_bases(find(name), ())), overrides)


def find(name: str | Path) -> Path:
    """Return the file that is meant: a path, or the name of one of those in `configs/`, with or without its ending.

    Raises:
        ConfigError: there is none; names the nearest of `configs/`.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):  # unlike that of Path, without an error for a name that none can have
        return path
    own = FOLDER / f"{str(name).removesuffix('.yaml')}.yaml"
    if path.name == str(name) and os.path.isfile(own):
        return own
    near = nearest(path.stem, [file.stem for file in published()])
    raise ConfigError(
        f"there is no configuration {_shown(str(name))}; the nearest of those that come along is {near!r}"
    )


def published() -> list[Path]:
    """The configurations that come along."""
    return sorted(FOLDER.glob("*.yaml"))


def _with_bases(path: Path, including: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file over those of its bases, each over those before it."""
    path = path.resolve()
    if path in including:
        circle = " -> ".join(file.name for file in (*including[including.index(path) :], path))
        raise ConfigError(f"the configurations include each other in a circle: {circle}")
    own = _read(path)
    bases = own.pop("BASE", None) or []
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"BASE of {path} must be a list of files, got {bases!r}")
    settings: dict[str, Any] = {}
    for base in filter(None, bases):
        file = path.parent / base
        if not os.path.isfile(file):
            raise ConfigError(f"there is no file {file}, which BASE of {path} names")
        settings = _merged(settings, _with_bases(file, (*including, path)))
    return _merged(settings, own)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:  # ValueError: no text, or no such date
        place = getattr(error, "problem_mark", None)
        where = f" (line {place.line + 1})" if place is not None else ""
        raise ConfigError(f"{path} is not a yaml file that can be read{where}") from error
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold settings by name, got {_shown(found)}")
    return _up_to_date(found)


def _up_to_date(settings: dict[Any, Any]) -> dict[Any, Any]:
    """With keys of old files under their present names."""
    renamed = {_RENAMED[key]: value for key, value in settings.items() if key in _RENAMED}
    return renamed | {key: value for key, value in settings.items() if key not in _RENAMED}


def _merged(base: Mapping[Any, Any], over: Mapping[Any, Any]) -> dict[Any, Any]:
    """`over` upon `base`, section by section."""
    both = dict(base)
    for key, value in over.items():
        under = both.get(key)
        if not isinstance(under, Mapping):
            both[key] = value
        elif value is not None:  # a section with nothing in it
            both[key] = _merged(under, value) if isinstance(value, Mapping) else value
    return both


def from_mapping(settings: Mapping[str, Any]) -> Config:
    """Return the configuration with these settings, by name and section by section, over the defaults.

    Raises:
        ConfigError: an unknown key, for which it names the nearest, or a value of another kind than the default.
    """
    config: Config = _over(Config(), _up_to_date(dict(settings)), "")
    return config


def override(config: Config, words: Sequence[str]) -> Config:
    """Return `config` with the values of KEY VALUE KEY VALUE ..., as in `MODEL.VSSM.SSM_CONV 3`.

    Raises:
        ConfigError: a key without a value, no such key, or a value of another kind than the default.
    """
    if len(words) % 2:
        raise ConfigError(f"settings come as KEY VALUE KEY VALUE ..., and {words[-1]!r} is left over")
    for key, text in zip(words[::2], words[1::2], strict=True):
        try:
            value = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise ConfigError(f"the value of {key} must be written as in yaml, got {_shown(text)}") from error
        config = replaced(config, {key: value})
    return config


def replaced(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return `config` with these values of settings by their whole names, as "MODEL.VSSM.SSM_CONV".

    Raises:
        ConfigError: no such key, or a value of another kind than the default.
    """
    for key, value in settings.items():
        for part in reversed(_RENAMED.get(key, key).split(".")):
            value = {part: value}
        config = _over(config, value, "")
    return config


def _over(section: Any, settings: Mapping[Any, Any], prefix: str) -> Any:
    kinds = get_type_hints(type(section))
    changes = {}
    for key, value in settings.items():
        if key not in kinds:
            raise ConfigError(f"there is no setting {prefix}{key}; the nearest is {_nearest(f'{prefix}{key}')}")
        own = getattr(section, key)
        if not dataclasses.is_dataclass(own):
            changes[key] = checked(f"{prefix}{key}", value, kinds[key])
        elif isinstance(value, Mapping):
            changes[key] = _over(own, value, f"{prefix}{key}.")
        elif value is not None:
            raise ConfigError(f"{prefix}{key} must hold settings by name, got {_shown(value)}")
    return dataclasses.replace(section, **changes)


def _nearest(key: str) -> str:
    """The whole name of the setting or section that reads most like `key`, its last part first."""
    names = [key for key, _ in _flat(Config())]
    names += {name.rpartition(".")[0] for name in names} - {""}
    ends = {name.rpartition(".")[2] for name in names}
    end = difflib.get_close_matches(key.rpartition(".")[2].upper(), sorted(ends), n=1, cutoff=0.0)[0]
    alike = sorted(name for name in names if name.rpartition(".")[2] == end)
    return difflib.get_close_matches(key, alike, n=1, cutoff=0.0)[0]


def _flat(section: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Each setting with its whole name."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _flat(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


# --- kinds of values --------------------------------------------------------------------------------------------------


def checked(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as the type `kind` has it.

    yaml calls 5e-4 a text and `no` false; both are taken for what is meant.

    Raises:
        ConfigError: it is of another type; names the setting `key`.
    """
    for single in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        converted = _converted(value, single)
        if converted is not _UNFIT:
            return converted
    raise ConfigError(f"{key} must be {_in_words(kind)}, got {_shown(value)}")


_UNFIT = object()
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text", type(None): "null"}


def _converted(value: Any, kind: Any) -> Any:
    """`value` as this type, or _UNFIT."""
    if get_origin(kind) is Literal:
        value = "no" if value is False else value
        return value if isinstance(value, str) and value in get_args(kind) else _UNFIT
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            return _UNFIT
        items = tuple(_converted(item, get_args(kind)[0]) for item in value)
        return _UNFIT if any(item is _UNFIT for item in items) else items
    if kind is float:
        return _number(value)
    if kind is str and isinstance(value, int) and not isinstance(value, bool):
        return str(value)  # a tag such as 20240316
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    return value if fits else _UNFIT


def _number(value: Any) -> Any:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return _UNFIT
    return number if math.isfinite(number) else _UNFIT


_SHORT = reprlib.Repr()  # never writes out a whole value, which may be one of many that refer to each other
_SHORT.maxstring = _SHORT.maxother = 200


def _in_words(kind: Any) -> str:
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_in_words, get_args(kind)))
    if get_origin(kind) is Literal:
        *first, last = map(repr, get_args(kind))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(kind) is tuple:
        return f"a list, each {_in_words(get_args(kind)[0])}"
    return _WORDS[kind]


def _shown(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- writing and comparing --------------------------------------------------------------------------------------------


def as_yaml(config: Config) -> str:
    """Return a whole configuration, defaults included, as a file that `load` reads."""
    return yaml.safe_dump(_plain(config), sort_keys=False)


def _plain(section: Any) -> dict[str, Any]:
    plain = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        plain[field.name] = (
            _plain(value) if dataclasses.is_dataclass(value) else list(value) if isinstance(value, tuple) else value
        )
    return plain


def changed(config: Config) -> set[str]:
    """The whole names of the settings that are not at their defaults."""
    return {key for (key, value), (_, own) in zip(_flat(config), _flat(Config()), strict=True) if value != own}
