"""Configurations: reading, checking, overriding, and the networks that come of them."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml

from vmamba import VSSM, config, factories, models

# Keys and defaults of VMamba's own configuration.
DEFAULTS = yaml.safe_load("""
DATA:
  {BATCH_SIZE: 128, DATA_PATH: '', DATASET: imagenet, IMG_SIZE: 224, INTERPOLATION: bicubic, ZIP_MODE: false,
   CACHE_MODE: part, PIN_MEMORY: true, NUM_WORKERS: 8, MASK_PATCH_SIZE: 32, MASK_RATIO: 0.6}
MODEL:
  {TYPE: vssm, NAME: vssm_tiny_224, PRETRAINED: '', RESUME: '', NUM_CLASSES: 1000, DROP_RATE: 0.0, DROP_PATH_RATE: 0.1,
   LABEL_SMOOTHING: 0.1, MMCKPT: false, VSSM: {
     PATCH_SIZE: 4, IN_CHANS: 3, DEPTHS: [2, 2, 9, 2], EMBED_DIM: 96, SSM_D_STATE: 16, SSM_RATIO: 2.0,
     SSM_RANK_RATIO: 2.0, SSM_DT_RANK: auto, SSM_ACT_LAYER: silu, SSM_CONV: 3, SSM_CONV_BIAS: true, SSM_DROP_RATE: 0.0,
     SSM_INIT: v0, SSM_FORWARDTYPE: v2, MLP_RATIO: 4.0, MLP_ACT_LAYER: gelu, MLP_DROP_RATE: 0.0, PATCH_NORM: true,
     NORM_LAYER: ln, DOWNSAMPLE: v2, PATCHEMBED: v2, POSEMBED: false, GMLP: false}}
TRAIN:
  {EPOCHS: 300, WARMUP_EPOCHS: 20, WEIGHT_DECAY: 0.05, BASE_LR: 5.0e-4, WARMUP_LR: 5.0e-7, MIN_LR: 5.0e-6,
   CLIP_GRAD: 5.0, AUTO_RESUME: true, ACCUMULATION_STEPS: 1, USE_CHECKPOINT: false, LAYER_DECAY: 1.0,
   LR_SCHEDULER: {NAME: cosine, DECAY_EPOCHS: 30, DECAY_RATE: 0.1, WARMUP_PREFIX: true, GAMMA: 0.1, MULTISTEPS: []},
   OPTIMIZER: {NAME: adamw, EPS: 1.0e-8, BETAS: [0.9, 0.999], MOMENTUM: 0.9}, MOE: {SAVE_MASTER: false}}
AUG:
  {COLOR_JITTER: 0.4, AUTO_AUGMENT: rand-m9-mstd0.5-inc1, REPROB: 0.25, REMODE: pixel, RECOUNT: 1, MIXUP: 0.8,
   CUTMIX: 1.0, CUTMIX_MINMAX: null, MIXUP_PROB: 1.0, MIXUP_SWITCH_PROB: 0.5, MIXUP_MODE: batch}
TEST: {CROP: true, SEQUENTIAL: false, SHUFFLE: false}
AMP_ENABLE: true
OUTPUT: ''
TAG: ''
SAVE_FREQ: 1
PRINT_FREQ: 10
SEED: 0
EVAL_MODE: false
THROUGHPUT_MODE: false
TRAINCOST_MODE: false
FUSED_LAYERNORM: false
""")

# file: factory, MODEL.NAME, drop path of the file
PUBLISHED = {
    "vmambav2_tiny_224": ("vmamba_tiny_s2l5", "vssm1_tiny_0230", 0.2),
    "vmambav2_small_224": ("vmamba_small_s2l15", "vssm1_small_0229", 0.3),
    "vmambav2_base_224": ("vmamba_base_s2l15", "vssm1_base_0229", 0.6),
    "vmambav2v_tiny_224": ("vmamba_tiny_s1l8", "vssm1_tiny_0230s", 0.2),
    "vmambav2v_small_224": ("vmamba_small_s1l20", "vssm1_small_0229s", 0.3),
    "vmambav2v_base_224": ("vmamba_base_s1l20", "vssm1_base_0229s", 0.5),
    "vmambav0_tiny_224": ("vanilla_vmamba_tiny", "vssm_tiny", 0.2),
    "vmambav0_small_224": ("vanilla_vmamba_small", "vssm_small", 0.3),
    "vmambav0_base_224": ("vanilla_vmamba_base", "vssm_base", 0.5),
}
SMALL = ["MODEL.VSSM.EMBED_DIM", "8", "MODEL.VSSM.DEPTHS", "[1, 1, 1, 1]", "MODEL.VSSM.SSM_D_STATE", "1"]


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def at(value, key):
    for part in key.split("."):
        value = getattr(value, part)
    return value


def test_defaults():
    assert yaml.safe_load(config.as_yaml(config.Config())) == DEFAULTS


# --- the files that come along ----------------------------------------------------------------------------------------


def test_the_folder_holds_the_published_files():
    assert {path.stem for path in config.published()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_found_by_name_and_path(name):
    path = config.FOLDER / f"{name}.yaml"
    assert config.find(name) == config.find(f"{name}.yaml") == config.find(path) == config.find(str(path)) == path


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_the_network_of_its_factory(name):
    factory, called, drop_path = PUBLISHED[name]
    found = config.load(name)
    assert (called, drop_path, "vssm") == (found.MODEL.NAME, found.MODEL.DROP_PATH_RATE, found.MODEL.TYPE)
    assert models.variant_of(found) == models.register(found, name) == factory
    layout = found.MODEL.VSSM.NORM_LAYER == "ln2d"
    assert layout == (not factory.startswith("vanilla"))
    with torch.device("meta"):
        own = models.build_vssm_model(found)
        other = getattr(factories, factory)(channel_first=layout, drop_path_rate=drop_path)
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in other.state_dict().items()}
    assert str(own) == str(other)


@pytest.mark.parametrize("name", ["vmambav2_tiny_224", "vmambav2v_tiny_224", "vmambav0_tiny_224"])
def test_a_published_file_computes_what_its_factory_does(name):
    factory, _, _ = PUBLISHED[name]
    own = models.build_vssm_model(config.load(name, ["MODEL.NUM_CLASSES", "5"])).eval()
    other = getattr(factories, factory)(num_classes=5).eval()
    own.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        torch.testing.assert_close(own(x), other(x), rtol=1e-5, atol=1e-5)


# --- finding and including --------------------------------------------------------------------------------------------


def test_a_missing_file_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.ConfigError, match=r"'vmambav2_tiny'; the nearest .* 'vmambav2_tiny_224'"):
        config.load("vmambav2_tiny")
    with pytest.raises(config.ConfigError, match=r"'configs/vmambav0_base_224.yaml'; the nearest"):
        config.load("configs/vmambav0_base_224.yaml")  # another folder is meant


def test_bases_are_relative_and_later_values_win(tmp_path, monkeypatch):
    write(tmp_path, "a/first.yaml", "{SEED: 1, PRINT_FREQ: 1, MODEL: {NAME: first, VSSM: {SSM_CONV: 5, MLP_RATIO: 2}}}")
    write(tmp_path, "a/second.yaml", "BASE: [first.yaml]\nPRINT_FREQ: 2\nMODEL: {VSSM: {MLP_RATIO: 3}}")
    write(tmp_path, "third.yaml", "{PRINT_FREQ: 3, SAVE_FREQ: 3}")
    path = write(tmp_path, "b/own.yaml", "BASE: [../a/second.yaml, ../third.yaml]\nSAVE_FREQ: 4\nMODEL: {VSSM: }")
    monkeypatch.chdir(tmp_path / "b")
    found = config.load("own.yaml")
    assert found == config.load(path)
    assert (found.SEED, found.PRINT_FREQ, found.SAVE_FREQ) == (1, 3, 4)
    assert (found.MODEL.NAME, found.MODEL.VSSM.SSM_CONV, found.MODEL.VSSM.MLP_RATIO) == ("first", 5, 3.0)
    assert config.changed(found) == {
        *("SEED", "PRINT_FREQ", "SAVE_FREQ", "MODEL.NAME", "MODEL.VSSM.SSM_CONV", "MODEL.VSSM.MLP_RATIO"),
    }


@pytest.mark.parametrize("base", ["", "BASE:", "BASE: ['']", "BASE: []", "BASE: other.yaml"])
def test_ways_to_write_bases(tmp_path, base):
    write(tmp_path, "other.yaml", "")
    path = write(tmp_path, "own.yaml", f"{base}\nSEED: 5")
    assert config.load(path) == dataclasses.replace(config.Config(), SEED=5)


def test_circles_are_refused_and_diamonds_are_not(tmp_path):
    write(tmp_path, "a.yaml", "BASE: [b.yaml]")
    path = write(tmp_path, "b.yaml", "BASE: [a.yaml]")
    with pytest.raises(config.ConfigError, match=r"circle: b.yaml -> a.yaml -> b.yaml"):
        config.load(path)
    with pytest.raises(config.ConfigError, match=r"circle: self.yaml -> self.yaml"):
        config.load(write(tmp_path, "self.yaml", "BASE: [self.yaml]"))
    write(tmp_path, "root.yaml", "SEED: 3")
    write(tmp_path, "left.yaml", "BASE: [root.yaml]")
    write(tmp_path, "right.yaml", "BASE: [root.yaml]")
    assert config.load(write(tmp_path, "both.yaml", "BASE: [left.yaml, right.yaml]")).SEED == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("MODEL: [unfinished", r"own.yaml is not a yaml file that can be read \(line 1\)"),
        ("!!python/object/apply:os.system ['true']", "own.yaml is not a yaml file that can be read"),
        ("MODEL: !!python/name:os.system", "own.yaml is not a yaml file that can be read"),
        ("- 1", r"own.yaml must hold settings by name, got \[1\]"),
        ("MODEL: 3", "MODEL must hold settings by name, got 3"),
        ("MODEL: {VSSM: tiny}", "MODEL.VSSM must hold settings by name, got 'tiny'"),
        ("BASE: [none.yaml]", "there is no file .*none.yaml, which BASE of .*own.yaml names"),
        ("BASE: [3]", r"BASE of .*own.yaml must be a list of files, got \[3\]"),
        ("{1: 2}", "there is no setting 1; the nearest is"),
    ],
)
def test_files_that_are_refused(tmp_path, text, sentence):
    with pytest.raises(config.ConfigError, match=sentence):
        config.load(write(tmp_path, "own.yaml", text))


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(config.ConfigError, match="not a yaml file that can be read"):
        config.load(path)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("MODEL.VSSM.SSM_FOWARDTYPE", "MODEL.VSSM.SSM_FORWARDTYPE"),
        ("MODEL.EMBED_DIM", "MODEL.VSSM.EMBED_DIM"),
        ("EPOCHS", "TRAIN.EPOCHS"),
        ("TRAIN.LR_SCHEDULER.NAMES", "TRAIN.LR_SCHEDULER.NAME"),
        ("MODLE", "MODEL"),
        ("model", "MODEL"),
        ("DATA.IMG_SZIE", "DATA.IMG_SIZE"),
    ],
)
def test_unknown_settings_name_the_nearest(tmp_path, key, nearest):
    with pytest.raises(config.ConfigError, match=f"there is no setting {key}; the nearest is {nearest}$"):
        config.override(config.Config(), [key, "1"])
    value = 1
    for part in reversed(key.split(".")):
        value = {part: value}
    with pytest.raises(config.ConfigError, match=f"there is no setting {key}; the nearest is {nearest}$"):
        config.load(write(tmp_path, "own.yaml", yaml.safe_dump(value)))


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("TRAIN.BASE_LR", "5e-3", 5e-3),  # which yaml takes for a text
        ("TRAIN.BASE_LR", "1", 1.0),
        ("TRAIN.WEIGHT_DECAY", "'0.1'", 0.1),
        ("DATA.CACHE_MODE", "no", "no"),  # which yaml takes for false
        ("DATA.IMG_SIZE", "[64, 96]", (64, 96)),
        ("DATA.IMG_SIZE", "64", 64),
        ("MODEL.VSSM.EMBED_DIM", "[8, 12]", (8, 12)),
        ("MODEL.VSSM.SSM_DT_RANK", "3", 3),
        ("MODEL.VSSM.SSM_CONV_BIAS", "False", False),
        ("AUG.CUTMIX_MINMAX", "[0.1, 1]", (0.1, 1.0)),
        ("AUG.AUTO_AUGMENT", "none", "none"),
        ("TAG", "20240316", "20240316"),
        ("MODEL.NAME", "'it''s: odd'", "it's: odd"),
        ("AMP_ENABLE", "off", False),
        ("ENABLE_AMP", "off", False),
    ],
)
def test_values(key, text, value):
    found = config.override(config.Config(), [key, text])
    key = key.replace("ENABLE_AMP", "AMP_ENABLE")
    assert at(found, key) == value
    assert type(at(found, key)) is type(value)
    assert config.changed(found) == {key}


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("MODEL.VSSM.EMBED_DIM", "wide", "MODEL.VSSM.EMBED_DIM must be a whole number or a list, each a whole number"),
        ("MODEL.VSSM.EMBED_DIM", "[8, wide]", r"got \[8, 'wide'\]"),
        ("MODEL.VSSM.DEPTHS", "2", "MODEL.VSSM.DEPTHS must be a list, each a whole number, got 2"),
        ("MODEL.VSSM.SSM_DT_RANK", "all", "MODEL.VSSM.SSM_DT_RANK must be a whole number or 'auto', got 'all'"),
        ("TRAIN.EPOCHS", "2.5", "TRAIN.EPOCHS must be a whole number, got 2.5"),
        ("TRAIN.EPOCHS", "true", "TRAIN.EPOCHS must be a whole number, got True"),
        ("TRAIN.BASE_LR", "true", "TRAIN.BASE_LR must be a number, got True"),
        ("TRAIN.BASE_LR", ".nan", "TRAIN.BASE_LR must be a number, got nan"),
        ("TRAIN.BASE_LR", "high", "TRAIN.BASE_LR must be a number, got 'high'"),
        ("TRAIN.AUTO_RESUME", "1", "TRAIN.AUTO_RESUME must be true or false, got 1"),
        ("MODEL.NAME", "[a]", r"MODEL.NAME must be a text, got \['a'\]"),
        ("MODEL.NAME", "true", "MODEL.NAME must be a text, got True"),
        ("DATA.CACHE_MODE", "some", "DATA.CACHE_MODE must be 'no', 'full' or 'part', got 'some'"),
        ("DATA.DATASET", "cifar", "DATA.DATASET must be 'imagenet', got 'cifar'"),
        ("AUG.CUTMIX_MINMAX", "x", "AUG.CUTMIX_MINMAX must be a list, each a number or null, got 'x'"),
        ("SEED", "[", r"the value of SEED must be written as in yaml, got '\['"),
        ("SEED.X", "1", r"SEED must be a whole number, got \{'X': 1\}"),
    ],
)
def test_values_that_are_refused(key, text, sentence):
    with pytest.raises(config.ConfigError, match=sentence):
        config.override(config.Config(), [key, text])


def test_overrides_come_in_pairs_and_win_over_files(tmp_path):
    path = write(tmp_path, "own.yaml", "{SEED: 1, PRINT_FREQ: 7}")
    found = config.load(path, ["SEED", "2", "MODEL.VSSM.GMLP", "true", "SEED", "3"])
    assert (found.SEED, found.PRINT_FREQ, found.MODEL.VSSM.GMLP) == (3, 7, True)
    with pytest.raises(config.ConfigError, match=r"KEY VALUE .*, and 'SAVE_FREQ' is left over"):
        config.load(path, ["SEED", "2", "SAVE_FREQ"])


def test_the_old_name_of_mixed_precision(tmp_path):
    old = write(tmp_path, "old.yaml", "ENABLE_AMP: false")
    assert config.load(old).AMP_ENABLE is False
    assert config.load(write(tmp_path, "both.yaml", "{AMP_ENABLE: true, ENABLE_AMP: false}")).AMP_ENABLE is True
    write(tmp_path, "new.yaml", "AMP_ENABLE: true")
    assert config.load(write(tmp_path, "upon.yaml", "{BASE: [new.yaml], ENABLE_AMP: false}")).AMP_ENABLE is False


def test_a_whole_configuration_is_written_and_read_again(tmp_path):
    words = [*SMALL, "AUG.CUTMIX_MINMAX", "[0.1, 0.9]", "MODEL.NAME", "'a: b'", "TAG", "1"]
    found = config.load("vmambav2v_small_224", words)
    assert config.load(write(tmp_path, "config.json", config.as_yaml(found))) == found


# --- networks ---------------------------------------------------------------------------------------------------------

OTHER = {  # another value than the default for each setting of a network
    "MODEL.VSSM.PATCH_SIZE": 2, "MODEL.VSSM.IN_CHANS": 1, "MODEL.NUM_CLASSES": 7, "MODEL.VSSM.DEPTHS": (1, 2),
    "MODEL.VSSM.EMBED_DIM": 8, "MODEL.VSSM.SSM_D_STATE": 2, "MODEL.VSSM.SSM_RATIO": 1.0,
    "MODEL.VSSM.SSM_DT_RANK": 3, "MODEL.VSSM.SSM_ACT_LAYER": "gelu", "MODEL.VSSM.SSM_CONV": -1,
    "MODEL.VSSM.SSM_CONV_BIAS": False, "MODEL.VSSM.SSM_DROP_RATE": 0.1, "MODEL.VSSM.SSM_INIT": "v2",
    "MODEL.VSSM.SSM_FORWARDTYPE": "v05_noz", "MODEL.VSSM.MLP_RATIO": 2.0, "MODEL.VSSM.MLP_ACT_LAYER": "relu",
    "MODEL.VSSM.MLP_DROP_RATE": 0.1, "MODEL.VSSM.GMLP": True, "MODEL.DROP_PATH_RATE": 0.3,
    "MODEL.VSSM.PATCH_NORM": False, "MODEL.VSSM.NORM_LAYER": "bn", "MODEL.VSSM.DOWNSAMPLE": "v1",
    "MODEL.VSSM.PATCHEMBED": "v1", "TRAIN.USE_CHECKPOINT": True, "MODEL.VSSM.POSEMBED": True, "DATA.IMG_SIZE": (32, 64),
    "MODEL.DROP_RATE": 0.1,
}  # fmt: skip


def nested(values, make):
    """The settings by whole name as sections within sections."""
    tree = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        node = tree
        for part in sections:
            node = node.setdefault(part, {})
        node[last] = value
    return _made(tree, make)


def _made(tree, make):
    return make(**{key: _made(value, make) if isinstance(value, dict) else value for key, value in tree.items()})


@pytest.mark.parametrize("key", OTHER)
def test_each_setting_is_one_argument(key):
    before = models.vssm_arguments(config.Config())
    changes = nested({key: OTHER[key]}, dict)
    after = models.vssm_arguments(config.from_mapping(changes))
    argument = next(name for name, setting in models.ARGUMENTS.items() if setting == key)
    assert {name for name in after if after[name] != before[name]} == {argument}
    assert after[argument] == OTHER[key]


def test_every_setting_of_a_network_is_an_argument():
    of_networks = {f"MODEL.VSSM.{field.name}" for field in dataclasses.fields(config.Network)}
    assert set(models.ARGUMENTS.values()) == set(OTHER)
    assert of_networks - set(OTHER) == {"MODEL.VSSM.SSM_RANK_RATIO"}


class Node(dict):
    """A mapping whose entries are attributes as well, as yacs has them."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize("make", [SimpleNamespace, dict, Node])
def test_configurations_of_other_kinds(make):
    whole = nested(OTHER | {"MODEL.TYPE": "vssm", "TRAIN.EPOCHS": 3, "BASE": ["others.yaml"]}, make)
    assert models.vssm_arguments(whole) == models.vssm_arguments(config.from_mapping(nested(OTHER, dict)))
    part = nested({"MODEL.VSSM.EMBED_DIM": 8, "MODEL.VSSM.DEPTHS": [1, 1]}, make)
    model = models.build_model(part)
    assert isinstance(model, VSSM)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    with pytest.raises(config.ConfigError, match=r"MODEL.VSSM.EMBED_DIM must be"):
        models.build_vssm_model(nested({"MODEL.VSSM.EMBED_DIM": "wide"}, make))
    with pytest.raises(config.ConfigError, match=r"MODEL.VSSM.EMBED_DIM must be .*, got None"):
        models.build_vssm_model(nested({"MODEL.VSSM.EMBED_DIM": None}, make))
    with pytest.raises(config.ConfigError, match=r"no setting MODEL.NUM_CLASS; the nearest is MODEL.NUM_CLASSES"):
        models.build_vssm_model(nested({"MODEL.NUM_CLASS": 3}, make))
    with pytest.raises(config.ConfigError, match=r"no setting MODEL.VSSM.embed_dim; the nearest is MODEL.VSSM.EMBED_D"):
        models.build_vssm_model(nested({"MODEL.VSSM.embed_dim": 8}, make))


def test_a_configuration_with_attributes_of_its_class():
    class Sizes:
        EMBED_DIM = 8
        DEPTHS = (1, 1)

    class Model:
        VSSM = Sizes()

        def describe(self): ...

    whole = SimpleNamespace(MODEL=Model())
    assert models.build_vssm_model(whole).dims == [8, 16]
    whole.MODEL.VSSM.EMBED_DIM = 12  # an instance's own wins
    assert models.build_vssm_model(whole).dims == [12, 24]
    whole.MODEL.VSSM = np.int64(3)
    with pytest.raises(config.ConfigError, match=r"MODEL.VSSM must hold settings by name, got .*3"):
        models.build_vssm_model(whole)


@pytest.mark.parametrize("what", [None, 3, "vmambav2_tiny_224", ["MODEL"], SimpleNamespace(model=3)])
def test_what_is_no_configuration(what):
    with pytest.raises(config.ConfigError, match="a configuration must hold settings by name, got a "):
        models.build_vssm_model(what)


def test_what_is_no_network_is_told_in_the_names_of_the_settings():
    def build(*words):
        return models.build_vssm_model(config.override(config.Config(), [*SMALL, *words]))

    with pytest.raises(config.ConfigError, match=r"SSM_FORWARDTYPE 'v05_nzo'; the nearest is 'v05_noz'"):
        build("MODEL.VSSM.SSM_FORWARDTYPE", "v05_nzo")
    with pytest.raises(config.ConfigError, match=r"MODEL.VSSM.DOWNSAMPLE must be one of .*, got 'v9'"):
        build("MODEL.VSSM.DOWNSAMPLE", "v9")
    with pytest.raises(config.ConfigError, match=r"MODEL.TYPE must be 'vssm'.*, got 'swin'"):
        build("MODEL.TYPE", "swin")
    with pytest.raises(config.ConfigError, match=r"^MODEL.VSSM.SSM_CONV must be an odd whole number, .*, got 4$"):
        build("MODEL.VSSM.SSM_CONV", "4")
    with pytest.raises(config.ConfigError, match=r"MODEL.VSSM.PATCH_SIZE must .* with MODEL.VSSM.PATCHEMBED 'v2', got"):
        build("MODEL.VSSM.PATCH_SIZE", "1", "MODEL.VSSM.PATCHEMBED", "v2")
    with pytest.raises(config.ConfigError, match=r"^MODEL.VSSM.DEPTHS and MODEL.VSSM.EMBED_DIM must be positive"):
        build("MODEL.VSSM.DEPTHS", "[]")
    with torch.device("meta"), pytest.raises(config.ConfigError, match=r"that MODEL.VSSM describes cannot be made"):
        build("MODEL.VSSM.EMBED_DIM", "200000000")


@pytest.mark.parametrize("key", sorted(set(OTHER) - {"MODEL.VSSM.SSM_RANK_RATIO"}))
def test_a_changed_network_is_no_published_one(key):
    found = config.load("vmambav0_tiny_224", [key, yaml.safe_dump(_listed(OTHER[key]), default_flow_style=True)])
    training = ("MODEL.NUM_CLASSES", "MODEL.DROP_PATH_RATE", "TRAIN.USE_CHECKPOINT", "DATA.IMG_SIZE", "MODEL.DROP_RATE")
    unchanged = key in training or at(found, key) == at(config.load("vmambav0_tiny_224"), key)
    assert models.variant_of(found) == ("vanilla_vmamba_tiny" if unchanged else None)


def _listed(value):
    return list(value) if isinstance(value, tuple) else value


def test_registered_networks():
    own = config.override(config.Config(), SMALL)
    other = config.override(own, ["MODEL.VSSM.SSM_FORWARDTYPE", "v05_noz"])
    name = models.register(own, "My tiny-1")
    assert name == models.register(own, "My tiny-1") == "my_tiny_1"
    longer = models.register(other, "my_tiny_1")
    assert longer.startswith("my_tiny_1_")
    assert longer == models.register(other, "my_tiny_1")
    assert models.register(own, "resnet50").startswith("resnet50_")  # a name of timm's stays timm's
    assert models.register(own, "224").startswith("vssm_224")
    for called, configured in ((name, own), (longer, other)):
        model = timm.create_model(called, num_classes=3, drop_path_rate=0.5, img_size=32)
        direct = models.build_vssm_model(config.override(configured, ["MODEL.NUM_CLASSES", "3"]))
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in direct.state_dict().items()
        }
        assert model.default_cfg["architecture"] == called
        assert model.default_cfg["input_size"] == (3, 32, 32)
        assert model.layers[3].blocks[0].drop_path.drop_prob == 0.5
    with pytest.raises(ValueError, match="no published weights for my_tiny_1"):
        timm.create_model(name, pretrained=True)
    with pytest.raises(config.ConfigError, match="the nearest is"):
        models.register(config.override(own, ["MODEL.VSSM.SSM_FORWARDTYPE", "v99"]), "faulty")
    assert not timm.is_model("faulty")


@pytest.mark.parametrize("name", ["re", "VSSM", "build_model", "torch"])
def test_a_network_takes_no_name_of_the_module(name):
    """However its file is called: re.yaml."""
    before, exported = dict(vars(models)), list(models.__all__)
    called = models.register(config.override(config.Config(), SMALL), name)
    assert timm.create_model(called, num_classes=3).num_classes == 3
    assert vars(models) == before
    assert models.__all__ == exported


def test_a_network_travels_as_its_settings():
    own = config.override(config.Config(), [*SMALL, "MODEL.VSSM.SSM_CONV", "5", "DATA.IMG_SIZE", "[32, 64]"])
    settings = models.settings_of(models.register(own, "travelling"))
    assert settings["MODEL.VSSM.SSM_CONV"] == 5
    arguments = dict(models._REGISTERED["travelling"])
    del models._REGISTERED["travelling"]  # another program, where somebody has the name
    there = models.register_settings(settings, "travelling")
    assert there.startswith("travelling_")
    assert models._REGISTERED[there] == arguments
    assert models.settings_of("vmamba_tiny_s2l5") is None
    for faulty in (
        None,
        3,
        [],
        {"MODEL.VSSM.SSM_CONVV": 3},
        {"MODEL.VSSM.SSM_CONV": 4},
        {"MODEL.VSSM.SSM_CONV": "x"},
        {"MODEL.VSSM.SSM_DT_RANK": torch.ones(2)},
        {"TRAIN.EPOCHS": 3},
        {3: 4},
    ):
        with pytest.raises(config.ConfigError):
            models.register_settings(faulty, "travelling")


@pytest.mark.parametrize("name", ["~nobody_of_this_name/x.yaml", "x" * 300, "x" * 300 + ".yaml", "a/" * 3000])
def test_names_that_no_file_can_have(name):
    with pytest.raises(config.ConfigError, match="there is no configuration"):
        config.load(name)


@pytest.mark.parametrize("text", ["2024-13-45", "[" * 5000, "9" * 5000])
def test_values_that_yaml_chokes_on(text, tmp_path):
    with pytest.raises(config.ConfigError, match=r"value of MODEL.NAME must be written as in yaml, got .{1,70}$"):
        config.load("vmambav2_tiny_224", ["MODEL.NAME", text])
    (tmp_path / "c.yaml").write_text(f"MODEL:\n  NAME: {text}\n")
    with pytest.raises(config.ConfigError, match="is not a yaml file that can be read"):
        config.load(tmp_path / "c.yaml")


def test_a_value_of_values_of_values_is_shown_in_short(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 30)]
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\nSEED: *a29\n")
    with pytest.raises(config.ConfigError, match="no setting a0"):
        config.load(tmp_path / "c.yaml")
    nested_lists = ["x"]
    for _ in range(30):
        nested_lists = [nested_lists] * 8
    with pytest.raises(config.ConfigError, match=r"SEED must be a whole number, got \[.{1,60}$"):
        config.from_mapping({"SEED": nested_lists})
