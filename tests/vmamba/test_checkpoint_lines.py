"""The four lines of checkpoints, in every form of file: what is read, written, refused, and in which words."""

import argparse
import collections
import datetime
import functools
import os
import pickle
import re
import struct
import sys
import types
import zipfile

import numpy as np
import pytest
import torch
from pickles import Call, stream, window
from safetensors.torch import save_file

from vmamba import weights
from vmamba.backbone import Backbone_VSSM
from vmamba.unpickling import Inert, RefusedError, read_without_running
from vmamba.vssm import VSSM

SMALL = {"depths": (1, 2), "dims": 16, "num_classes": 5, "ssm_d_state": 2, "forward_type": "v05"}
V2 = {**SMALL, "norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2"}
VANILLA = {
    **SMALL,
    "forward_type": "v0",
    "mlp_ratio": 0.0,
    "norm_layer": "ln",
    "downsample_version": "v1",
}


def small(seed=0, **options):
    """A small network with distinct weights everywhere."""
    torch.manual_seed(seed)
    model = VSSM(**{**VANILLA, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_loaded(model, expected):
    own = model.state_dict()
    assert list(own) == list(expected)
    for name, value in expected.items():
        assert torch.equal(own[name], value), name


def archive(state):
    """Names of the archive line, as the released files of the first version have them."""
    words = [
        *[("patch_embed.0", "patch_embed.proj"), ("patch_embed.2", "patch_embed.norm")],
        *[("classifier.", ""), (".op.", ".self_attention."), (".norm.", ".ln_1.")],
    ]
    renamed = {}
    for name, value in state.items():
        for word, old in words:
            if not (word == ".norm." and ".blocks." not in name):
                name = name.replace(word, old)
        renamed[name] = value
    return renamed


def single_file(state):
    """Names and shapes of the single-file line, written down independently of the code under test."""
    renamed = {}
    for name, value in state.items():
        if name.endswith(("x_proj_weight", "dt_projs_weight")):
            name, value = name.replace("_weight", ".weight"), value.reshape(-1, value.shape[-1])
        if "downsample.norm." in name:
            name = name.replace("norm", "1")
        renamed[name.replace("downsample.reduction", "downsample.2")] = value
    return renamed


def convolved(state):
    """Linear layers as 1 x 1 convolutions."""
    linear = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight", "head.weight")
    return {name: value[:, :, None, None] if name.endswith(linear) else value for name, value in state.items()}


def detector(state):
    norms = {f"backbone.outnorm{i}.{part}": torch.zeros(16 * 2**i) for i in (0, 1) for part in ("weight", "bias")}
    neck = {"neck.convs.0.weight": torch.zeros(3), "norm.weight": torch.zeros(1)}
    return {**neck, **{f"backbone.{name}": value for name, value in state.items()}, **norms}


LINES = {
    "package": lambda state: state,
    "archive": archive,
    "single file": single_file,
    "convolutions": convolved,
    "data parallel": lambda state: {f"module.{name}": value for name, value in state.items()},
    "data parallel, archive": lambda state: {f"module.{name}": value for name, value in archive(state).items()},
    "detector": detector,
}


# ---------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("options", [VANILLA, V2, {**V2, "downsample_version": "v2"}, {**V2, "posembed": True}])
def test_every_line_loads_bit_for_bit(line, options):
    if options is not VANILLA and "archive" in line:
        options = {**options, "patchembed_version": "v1"}  # the archive had no other
    expected = small(1, **options).state_dict()
    before = {name: value.clone() for name, value in expected.items()}
    model = small(2, **options)
    weights.load_into(model, LINES[line](expected))
    assert_loaded(model, before)
    assert_loaded_equal(expected, before)


def assert_loaded_equal(state, before):
    """Reading changes nothing in what was given."""
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_the_names_of_the_archive():
    given = {
        "patch_embed.proj.weight": 0,
        "patch_embed.norm.bias": 1,
        "norm.weight": 2,
        "head.bias": 3,
        "layers.0.blocks.11.ln_1.weight": 4,
        "layers.3.blocks.0.self_attention.A_logs": 5,
        "layers.0.blocks.0.norm.weight": 6,
        "layers.1.downsample.norm.weight": 7,
        "normal.weight": 8,
        "heads.x": 9,
    }
    assert list(weights.rename({name: torch.tensor(value) for name, value in given.items()})) == [
        *["patch_embed.0.weight", "patch_embed.2.bias", "classifier.norm.weight", "classifier.head.bias"],
        *["layers.0.blocks.11.norm.weight", "layers.3.blocks.0.op.A_logs"],
        *["layers.0.blocks.0.norm.weight", "layers.1.downsample.norm.weight", "normal.weight", "heads.x"],
    ]


def test_directions_keep_their_order():
    rows = torch.arange(4 * 3 * 2).reshape(12, 2)
    renamed = weights.rename({"layers.0.blocks.0.op.x_proj.weight": rows})
    (name,) = renamed
    assert name == "layers.0.blocks.0.op.x_proj_weight"
    assert renamed[name].shape == (4, 3, 2)
    assert torch.equal(renamed[name][2, 1], rows[7])


@pytest.mark.parametrize("options", [VANILLA, V2])
def test_writing_the_single_file_line(options):
    state = small(**options).state_dict()
    exported = weights.export_single_file(archive(state) if options is VANILLA else state)
    expected = single_file(state)
    assert sorted(exported) == sorted(expected)
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    model = small(5, **options)
    weights.load_into(model, exported)
    assert_loaded(model, state)


def test_names_that_meet_are_an_error():
    with pytest.raises(ValueError, match=r"hold classifier\.head\.bias twice, once under the old name head\.bias"):
        weights.rename({"classifier.head.bias": torch.zeros(2), "head.bias": torch.zeros(2)})


@pytest.mark.parametrize("shape", [(5, 2), (8,), (4, 2, 2), (0, 2)])
def test_a_projection_that_cannot_be_cut_is_an_error(shape):
    with pytest.raises(ValueError, match=r"x_proj\.weight must be a matrix whose rows are those of 4 directions, got "):
        weights.rename({"layers.0.blocks.0.op.x_proj.weight": torch.zeros(shape)})


def test_the_family_of_names():
    assert weights.family(archive(small().state_dict())) == weights.family(small().state_dict()) == "VMamba"
    assert weights.family({"layers.0.mixer.A_log": 1, "norm_f.weight": 2}) == "Vim"
    assert weights.family({"conv1.weight": 1, 3: 2}) is None


# ---------------------------------------------------------------------------------------------------- files


class CfgNode(dict):
    """As yacs has it: a dictionary with attributes of its own."""


class Buffer:
    def __init__(self, values):
        self.values = values

    def smallest(self):
        return min(self.values)

    def __reduce__(self):
        return Buffer, (self.values,), {"bound": Buffer.smallest}, iter([1, 2]), iter([("a", 1)])

    def append(self, value): ...

    def __setitem__(self, key, value): ...


@pytest.fixture
def foreign(monkeypatch):
    """Objects of a package that cannot be imported once they are written, because importing it fails loudly."""
    module = types.ModuleType("some_config_package")
    for kind in (CfgNode, Buffer):
        monkeypatch.setattr(kind, "__module__", module.__name__)
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = CfgNode(MODEL=CfgNode(NAME="vssm1_tiny_0230"))
    config.__dict__["__immutable__"] = True
    return {"config": config, "log": Buffer([torch.zeros(3), 2])}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("entry", ["model", "state_dict", "module"])
def test_a_training_checkpoint_with_its_configuration(tmp_path, foreign, monkeypatch, entry, legacy):
    """The layout of upstream's main.py; the package of the configuration is not there when it is read."""
    state, average = small(1).state_dict(), small(2).state_dict()
    contents = {
        entry: state,
        "model_ema": average,
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 292,
        "max_accuracy": 82.1,
        "scaler": {"scale": 65536.0},
        **foreign,
    }
    torch.save(contents, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    monkeypatch.delitem(sys.modules, "some_config_package")
    with pytest.raises(pickle.UnpicklingError):  # else the test would not need a reader of its own
        torch.load(tmp_path / "c.pth", weights_only=True)
    model = small(3)
    weights.load_into(model, tmp_path / "c.pth")
    assert_loaded(model, state)
    weights.load_into(model, str(tmp_path / "c.pth"), key="model_ema")
    assert_loaded(model, average)
    read = read_without_running(tmp_path / "c.pth")
    assert isinstance(read["config"], Inert)
    assert isinstance(read["log"], Inert)
    assert (read["epoch"], read["max_accuracy"]) == (292, 82.1)
    assert read["optimizer"] == {"state": {}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.parametrize("legacy", [False, True])
def test_what_logs_are_made_of_is_read_around(tmp_path, legacy):
    """Arrays, dates, paths, patterns, sets: none is made, and none is an attempt to run code."""
    log = {
        "array": np.arange(3.0),
        "scalar": np.float64(1.5),
        "date": datetime.datetime(2024, 7, 16, tzinfo=datetime.timezone.utc),
        "path": tmp_path,
        "pattern": re.compile("a+"),
        "set": {1, 2},
        "bytes": b"\xff\0",
        "partial": functools.partial(max, 3),
        "namespace": argparse.Namespace(lr=0.1),
        "counter": collections.Counter("aab"),
        "random": np.random.RandomState(0),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }
    state = small(1).state_dict()
    torch.save({"model": state, "message_hub": log}, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    model = small(2)
    weights.load_into(model, tmp_path / "c.pth")
    assert_loaded(model, state)


def test_the_average_must_be_there_if_it_is_asked_for(tmp_path):
    torch.save({"model": small().state_dict(), "epoch": 1}, tmp_path / "c.pth")
    with pytest.raises(ValueError, match="holds no weights under 'model_ema'; its entries are model, epoch"):
        weights.load_into(small(), tmp_path / "c.pth", key="model_ema")


@pytest.mark.parametrize("name", ["c.pth", "c.pt", "c.safetensors"])
def test_bare_weights_in_a_file(tmp_path, name):
    state = small(1).state_dict()
    (save_file if name.endswith("safetensors") else torch.save)(state, tmp_path / name)
    model = small(2)
    assert weights.load_into(model, tmp_path / name) == []
    assert_loaded(model, state)


@pytest.mark.parametrize("legacy", [False, True])
def test_every_kind_of_tensor_is_read(tmp_path, foreign, legacy):
    """Views that share numbers, empty and scalar tensors, parameters, and every dtype, beside an object to skip."""
    base = torch.arange(12.0).reshape(3, 4)
    dtypes = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
    contents = {
        **{name: torch.tensor([0, 1, 1]).to(getattr(torch, name)) for name in dtypes},
        "base": base,
        "transposed": base.T,
        "part": base[1:, ::2],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "parameter": torch.nn.Parameter(base[0]),
        "size": base.shape,
        "foreign": foreign["config"],
    }
    torch.save(contents, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    read = read_without_running(tmp_path / "c.pth")
    for name in set(contents) - {"foreign", "size"}:
        assert read[name].dtype == contents[name].dtype, name
        assert read[name].stride() == contents[name].stride(), name
        assert torch.equal(read[name], contents[name]), name
    assert read["size"] == (3, 4)
    assert read["base"].data_ptr() == read["transposed"].data_ptr()


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes checksums")
def test_a_file_without_checksums_is_read(tmp_path, foreign):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"w": torch.ones(3), **foreign}, tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read_without_running(tmp_path / "c.pth")["w"], torch.ones(3))


def test_a_flipped_bit_is_found(tmp_path, foreign):
    path = tmp_path / "c.pth"
    torch.save({"model": small().state_dict(), **foreign}, path)
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint that can be read"):
        read_without_running(path)
    with pytest.raises(ValueError, match=r"is damaged: the bytes of .* are not those that were written; download it"):
        weights.load_into(small(), path)


def test_a_flipped_bit_is_found_where_torch_reads_the_file(tmp_path):
    path = tmp_path / "c.pth"
    torch.save({"model": small().state_dict()}, path)
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size if "/data/" in entry.filename else 0)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # else the test would not need a check of its own
    with pytest.raises(ValueError, match=r"is damaged: the bytes of .* are not those that were written; download it"):
        weights.load_into(small(), path)


# ---------------------------------------------------------------------------------------------------- hostile files


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["beside", "instead"])
@pytest.mark.parametrize("function", [os.system, os.mkdir, eval, exec, __import__, print])
def test_code_is_not_run(tmp_path, function, place, legacy, monkeypatch):
    target = tmp_path / "made_by_the_checkpoint"
    words = {os.system: f"mkdir {target}", os.mkdir: str(target), print: "here"}
    call = Call(function, words.get(function, f"__import__('os').mkdir({str(target)!r})"))
    contents = {"model": small().state_dict(), "config": call} if place == "beside" else {"model": call}
    torch.save(contents, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        RefusedError, match=rf"holds a Python object \(\w+\.{function.__name__}\).*so it is refused"
    ) as e:
        weights.load_into(small(), tmp_path / "c.pth")
    assert "\n" not in str(e.value)
    assert not target.exists()


def test_nothing_of_another_package_is_imported_or_called(tmp_path, monkeypatch):
    """A class of a package that is there, and whose call would leave a trace."""
    module = types.ModuleType("tempting_package")
    called = []
    module.run = lambda *arguments: called.append(arguments)
    module.run.__module__, module.run.__qualname__, module.run.__name__ = "tempting_package", "run", "run"
    monkeypatch.setitem(sys.modules, "tempting_package", module)
    torch.save({"model": small(1).state_dict(), "x": Call(module.run, 1)}, tmp_path / "c.pth")
    model = small(2)
    weights.load_into(model, tmp_path / "c.pth")
    assert_loaded(model, small(1).state_dict())
    assert not called


def test_weights_must_be_tensors(tmp_path, foreign):
    torch.save({"model": {"w": foreign["log"]}}, tmp_path / "a.pth")
    torch.save({"model": foreign["config"]}, tmp_path / "b.pth")
    torch.save(foreign["config"], tmp_path / "c.pth")
    for name, message in (
        ("a.pth", "holds an object of an unknown class under 'w', not a tensor"),
        ("b.pth", "holds no weights under 'model'; its entries are model"),
        ("c.pth", "holds an object of an unknown class, not the weights"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.read_weights(tmp_path / name)


def test_the_older_format_by_hand(tmp_path):
    numbers = struct.pack("=q3f", 3, 1.0, 2.0, 3.0)
    (tmp_path / "c.pth").write_bytes(stream(window(3, 1, (2,), (1,)), ["0"], numbers))
    assert read_without_running(tmp_path / "c.pth")["w"].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("length", "offset", "size", "numbers"),
    [
        (10**15, 0, (3,), b""),  # more than there is memory for
        (-3, 0, (3,), b""),
        (3, 2, (3,), struct.pack("=q3f", 3, 1.0, 2.0, 3.0)),  # reaches beyond the storage
        (3, 0, (3,), struct.pack("=q3f", 4, 1.0, 2.0, 3.0)),
        (3, 0, (3,), struct.pack("=q2f", 3, 1.0, 2.0)),
        (3, 0, (3,), b"\0"),
    ],
)
def test_a_file_that_lies_about_its_numbers(tmp_path, length, offset, size, numbers):
    (tmp_path / "c.pth").write_bytes(stream(window(length, offset, size, (1,)), ["0"], numbers))
    with pytest.raises(ValueError, match=r"c\.pth is not a checkpoint that can be read"):
        read_without_running(tmp_path / "c.pth")


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_truncated_file_is_one_sentence(tmp_path, foreign, name, legacy, kept):
    path = tmp_path / name
    if name == "c.pth":
        torch.save({"model": small().state_dict(), **foreign}, path, _use_new_zipfile_serialization=not legacy)
    else:
        save_file(small().state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(ValueError, match=r"truncated|not a whole safetensors file") as caught:
        weights.load_into(small(), path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"<!DOCTYPE html>", b"PK\x05\x06" + bytes(18), pickle.dumps({"model": 3}, 2)])
def test_another_format_is_one_sentence(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"it is truncated, damaged, of another format or .*; download it again"):
        weights.read_weights(tmp_path / "c.pth")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="needs a file that may not be read")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "c.pth").touch(mode=0)
    with pytest.raises(ValueError, match=r"c\.pth cannot be read: Permission denied"):
        weights.read_weights(tmp_path / "c.pth")


def test_what_holds_no_weights(tmp_path):
    for name in ("nowhere.pth", "~nobody_of_this_name/c.pth", "x" * 300 + ".pth", "a\0.pth"):
        with pytest.raises(ValueError, match=f"there is no checkpoint file {name}"):
            weights.read_weights(name)
    with pytest.raises(ValueError, match="only https:// addresses are fetched, got http://example"):
        weights.read_weights("http://example.invalid/c.pth")
    for payload, message in (
        ({}, "the given mapping holds no weights under 'model'; its entries are nothing"),
        ({"epoch": 3}, "its entries are epoch"),
        ({"model": {}}, "holds no weights"),
        ({"model": {"w": 3}}, "holds an int under 'w', not a tensor"),
        ({"model": {"w": torch.zeros(2, dtype=torch.complex64)}}, "under 'w' a tensor that is no array of real num"),
    ):
        with pytest.raises(ValueError, match=message):
            weights.read_weights(payload)


# ---------------------------------------------------------------------------------------------------- fitting


def changed(state, **changes):
    """A copy with some tensors put in, or left out where None."""
    return {name: value for name, value in {**state, **changes}.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classifier.norm.bias": None}, r"\(missing: classifier\.norm\.bias\)"),
        ({"extra": torch.zeros(1)}, r"\(unexpected: extra\)"),
        ({"pos_embed": torch.zeros(1, 16, 2, 2)}, r"\(unexpected: pos_embed\)"),
        (
            {"layers.0.blocks.0.op.Ds": torch.zeros(3)},
            r"\(of another shape: layers\.0\.blocks\.0\.op\.Ds \(3,\), the model's is \(128,\)\)",
        ),
        (
            {f"x{i}": torch.zeros(1) for i in range(9)} | {"patch_embed.2.weight": None},
            r"\(missing: patch_embed\.2\.weight, unexpected: x0; x1; x2 and 6 more\)",
        ),
        ({"classifier.head.bias": torch.tensor(1.0)}, r"\(of another shape: classifier\.head\.bias \(\), the model's"),
    ],
)
def test_weights_that_do_not_fit(changes, message):
    model = small(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"not those of this VMamba but another VMamba's {message}"):
        weights.load_into(model, changed(small(2).state_dict(), **changes))
    assert_loaded(model, before)


def test_weights_of_another_family_and_of_another_variant():
    vim = {"layers.0.mixer.A_log": torch.zeros(2), "cls_token": torch.zeros(1), "head.weight": torch.zeros(5, 2)}
    with pytest.raises(ValueError, match=r"not those of this VMamba but a Vim's \(missing: patch_embed\.0\.weight; .*"):
        weights.load_into(small(), vim)
    with pytest.raises(ValueError, match="but another model's"):
        weights.load_into(small(), {"conv1.weight": torch.zeros(2)})
    with torch.device("meta"):
        from vmamba.factories import VARIANTS

        states = {name: VSSM(**{"norm_layer": "ln2d", **options}).state_dict() for name, options in VARIANTS.items()}
    for name, state in states.items():
        assert weights.fitting_variant(state) == name
    assert weights.fitting_variant(small().state_dict()) is None
    tiny = {name: torch.empty(0).expand(value.shape) if 0 in value.shape else torch.zeros(1).expand(value.shape)
            for name, value in states["vmamba_tiny_s1l8"].items()}  # fmt: skip
    with pytest.raises(ValueError, match=r"not those of this VMamba but fit vmamba_tiny_s1l8 \("):
        weights.load_into(small(), tiny)
    with torch.device("meta"):
        same = VSSM(**{"norm_layer": "ln2d", **VARIANTS["vmamba_tiny_s1l8"]})
    message = r"those of vmamba_tiny_s1l8, as the model is, but not whole \(unexpected: x\)"
    with pytest.raises(ValueError, match=message):
        weights.load_into(same, {**tiny, "x": torch.zeros(1)})


def test_a_head_for_other_classes(caplog):
    state, model = small(1, num_classes=7).state_dict(), small(2)
    own_head = model.classifier.head.weight.clone()
    with pytest.raises(
        ValueError, match=r"for 7 classes but the model has 5: build it with num_classes=7, or load wit"
    ):
        weights.load_into(model, state)
    with caplog.at_level("INFO", "vmamba.weights"):
        kept = weights.load_into(model, state, new_head=True)
    assert kept == ["classifier.head.weight", "classifier.head.bias"]
    assert "stay as they were: classifier.head.weight, classifier.head.bias" in caplog.text
    assert_loaded(model, {**state, **{name: model.state_dict()[name] for name in kept}})
    assert torch.equal(model.classifier.head.weight, own_head)
    assert weights.load_into(model, small(3).state_dict(), new_head=True) == []  # of as many classes: taken
    assert torch.equal(model.classifier.head.weight, small(3).classifier.head.weight)
    headless = small(4, num_classes=0)
    assert weights.load_into(headless, state) == []
    assert torch.equal(headless.classifier.norm.weight, state["classifier.norm.weight"])


@pytest.mark.parametrize("indices", [(0, 1), (1,)])
def test_a_backbone(indices, caplog):
    options = {name: value for name, value in VANILLA.items() if name != "num_classes"}
    backbone = Backbone_VSSM(out_indices=indices, **options)
    norms = [f"outnorm{i}.{part}" for i in indices for part in ("weight", "bias")]
    state = small(1).state_dict()
    with caplog.at_level("INFO", "vmamba.weights"):
        assert weights.load_into(backbone, state) == norms
    assert norms[0] in caplog.text
    for name, value in backbone.state_dict().items():
        assert name in norms or torch.equal(value, state[name])
    of_detector = {name: value for name, value in detector(state).items() if "classifier" not in name}
    assert weights.load_into(backbone, {"state_dict": of_detector}) == []
    assert not backbone.state_dict()[norms[0]].any()
    with pytest.raises(ValueError, match=r"missing: patch_embed\.0\.weight\)"):
        weights.load_into(backbone, changed(state, **{"patch_embed.0.weight": None}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_position_embedding_of_another_grid(dtype):
    given, model = small(1, posembed=True, imgsize=32), small(2, posembed=True, imgsize=(24, 40))
    state = {**given.state_dict(), "pos_embed": given.pos_embed.detach().to(dtype)}
    weights.load_into(model, state)
    wide = state["pos_embed"].double()
    expected = torch.nn.functional.interpolate(wide, (6, 10), mode="bicubic", align_corners=False)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 0.05}[dtype]
    assert model.pos_embed.shape == (1, 16, 6, 10)
    assert (model.pos_embed - expected).abs().max() < tolerance
    with pytest.raises(
        ValueError, match=r"`pos_embed` must have shape \(1, c, rows, columns\) without .*, got \(1, 16\)"
    ):
        weights.load_into(model, {**state, "pos_embed": torch.zeros(1, 16)})
    for shape in ((1, 16, 0, 8), (1, 16, 8, 0), (1, 0, 8, 8), (0, 16, 8, 8), (2, 16, 8, 8)):
        with pytest.raises(ValueError, match=r"`pos_embed` must have shape \(1, c, rows, columns\) without empty axes"):
            weights.load_into(model, {**state, "pos_embed": torch.zeros(shape)})


# ---------------------------------------------------------------------------------------------------- published files


@pytest.fixture
def release(tmp_path, monkeypatch):
    """Stands in for the network: a release whose file is the weights of a small network."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    fetched = []

    def fetch(url, target, progress=True):
        fetched.append(url)
        torch.save({"model": archive(small(1, num_classes=1000).state_dict())}, target)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    return fetched


def test_published_weights_are_fetched_once(release, tmp_path):
    model = small(2, num_classes=1000)
    weights.load_published(model, "vanilla_vmamba_tiny")
    weights.load_published(model, "vanilla_vmamba_tiny")
    assert release == [
        "https://github.com/MzeroMiko/VMamba/releases/download/%23v0cls/vssmtiny_dp01_ckpt_epoch_292.pth"
    ]
    assert os.listdir(tmp_path / "hub" / "checkpoints") == ["vssmtiny_dp01_ckpt_epoch_292.pth"]
    assert_loaded(model, small(1, num_classes=1000).state_dict())


def test_other_addresses_are_kept_apart(release, tmp_path):
    for site in ("a", "b"):
        weights.load_into(small(2, num_classes=1000), f"https://{site}.invalid/checkpoint.pth?download=1")
    names = os.listdir(tmp_path / "hub" / "checkpoints")
    assert len(names) == len(release) == 2
    assert all(name.endswith("-checkpoint.pth") for name in names)


def test_published_weights_for_other_classes_and_channels(release, caplog):
    model = small(2, in_chans=1)
    head = model.classifier.head.weight.clone()
    with caplog.at_level("INFO", "vmamba.weights"):
        weights.load_published(model, "vanilla_vmamba_tiny")
    assert "stay as they were: classifier.head.weight" in caplog.text
    stem = small(1, num_classes=1000).patch_embed[0].weight
    torch.testing.assert_close(model.patch_embed[0].weight, stem.sum(1, keepdim=True))
    assert torch.equal(model.classifier.head.weight, head)


def test_without_the_network(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(RuntimeError) as caught:
        weights.load_published(small(), "vmamba_tiny_s2l5")
    file = "vssm_tiny_0230_ckpt_epoch_262.pth"
    assert str(caught.value) == (
        f"cannot fetch https://github.com/MzeroMiko/VMamba/releases/download/%23v2cls/{file} (no route to host): "
        f"download it elsewhere and put it at {tmp_path / 'checkpoints' / file}"
    )


def test_there_are_no_other_published_weights():
    with pytest.raises(ValueError, match="there are no published weights for vmamba_tiny_m2: they are for vanilla_vm"):
        weights.published_url("vmamba_tiny_m2")
