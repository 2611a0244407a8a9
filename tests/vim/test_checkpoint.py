"""Reading and writing checkpoints; what is refused, and in which words."""

import argparse
import os
import pickle
import warnings
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

import checkpoint_sources
from checkpoint import CheckpointError, read_checkpoint, save_checkpoint
from checkpoint_sources import choose_weights_file
from small_vim import assert_equal_weights, small_model


@pytest.fixture
def weights():
    return small_model().state_dict()


# ---------------------------------------------------------------------------------------------------- reading


def test_the_training_layout(tmp_path, weights):
    args = argparse.Namespace(model="vim_pico_patch4_32", input_size=48, lr=0.1)
    contents = {
        "model": weights,
        "model_ema": weights,
        "epoch": 7,
        "args": args,
        "optimizer": {"state": {}},
        "scaler": "none",
    }
    torch.save(contents, tmp_path / "c.pth")
    read = read_checkpoint(str(tmp_path / "c.pth"))
    assert_equal_weights(read.model, weights)
    assert_equal_weights(read.ema, weights)
    assert (read.epoch, read.args.lr, read.model_name, read.img_size) == (7, 0.1, "vim_pico_patch4_32", 48)
    assert (read.num_classes, read.class_names, read.source) == (5, None, str(tmp_path / "c.pth"))
    assert sorted(read.extra) == ["optimizer", "scaler"]


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"state_dict": w}, lambda w: {"module": w, "model_ema": None}])
def test_other_layouts(tmp_path, weights, wrap):
    torch.save(wrap(weights), tmp_path / "c.bin")
    read = read_checkpoint(str(tmp_path / "c.bin"))
    assert_equal_weights(read.model, weights)
    assert read.ema is None
    assert read.args is None
    assert read.model_name is None


def test_the_data_parallel_prefix_is_taken_off(tmp_path, weights):
    torch.save({"model": {f"module.{key}": value for key, value in weights.items()}}, tmp_path / "c.pth")
    assert_equal_weights(read_checkpoint(str(tmp_path / "c.pth")).model, weights)


def test_entries_of_the_file_win_over_its_command_line(tmp_path, weights):
    args = argparse.Namespace(model="of_args", input_size=48)
    contents = {
        "model": weights,
        "args": args,
        "model_name": "of_file",
        "img_size": [32, 48],
        "class_names": list("abcde"),
    }
    torch.save(contents, tmp_path / "c.pth")
    read = read_checkpoint(str(tmp_path / "c.pth"))
    assert (read.model_name, read.img_size, read.class_names) == ("of_file", (32, 48), list("abcde"))


def test_weights_without_head_have_no_classes(tmp_path):
    torch.save(small_model(num_classes=0).state_dict(), tmp_path / "c.pth")
    assert read_checkpoint(str(tmp_path / "c.pth")).num_classes == 0


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, weights, legacy):
    target = tmp_path / "made_by_the_checkpoint"
    torch.save({"model": weights, "x": Bomb(target)}, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"holds a Python object \(\w+\.mkdir\).*refused") as caught:
        read_checkpoint(str(tmp_path / "c.pth"))
    assert "\n" not in str(caught.value)
    assert not target.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_objects_beside_the_weights_are_left_out_and_not_made(tmp_path, weights, legacy):
    """Paths and settings of other projects: read around, as their classes may not be there."""
    contents = {"model": weights, "where": tmp_path, "epoch": 4}
    torch.save(contents, tmp_path / "c.pth", _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(str(tmp_path / "c.pth"))
    assert_equal_weights(read.model, weights)
    assert read.epoch == 4
    assert type(read.extra["where"]).__name__ == "Inert"


def test_a_plain_pickle_with_code_is_refused_and_not_run(tmp_path):
    target = tmp_path / "made_by_the_checkpoint"
    (tmp_path / "c.pth").write_bytes(pickle.dumps({"model": Bomb(target)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"refused|not a checkpoint that can be read"):
        read_checkpoint(str(tmp_path / "c.pth"))
    assert not target.exists()


@pytest.mark.parametrize("kept", [0, 1, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_truncated_file_is_one_sentence(tmp_path, weights, name, kept):
    path = tmp_path / name
    save_checkpoint(path, {"model": weights})
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"truncated|not a whole safetensors file") as caught:
        read_checkpoint(str(path))
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_is_found(tmp_path, weights):
    path = tmp_path / "c.pth"
    torch.save({"model": weights}, path)
    with zipfile.ZipFile(path) as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"c\.pth is damaged: the bytes of .* are not those that were written; dow"
    ):
        read_checkpoint(str(path))


@pytest.mark.skipif(not hasattr(torch.serialization, "set_crc32_options"), reason="this torch always writes checksums")
def test_a_file_without_checksums_is_read(tmp_path, weights):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": weights}, tmp_path / "c.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(str(tmp_path / "c.pth")).model.keys() == weights.keys()


def test_a_truncated_file_of_the_old_format(tmp_path, weights):
    path = tmp_path / "c.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(CheckpointError, match="truncated"):
        read_checkpoint(str(path))


@pytest.mark.parametrize(
    "content", [b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"<!DOCTYPE html>", b"\x89PNG\r\n"]
)
@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_another_format_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a"):
        read_checkpoint(str(tmp_path / name))


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([1, 2], "holds a list, not the weights"),
        ({}, "holds no weights: its entries are nothing"),
        ({"epoch": 3, "lr": 0.1}, "holds no weights: its entries are epoch, lr"),
        ({"model": {}}, "holds no weights"),
        ({"model": {"head.weight": 3}}, "holds an int under 'head.weight', not a tensor"),
        ({"model": {"w": torch.zeros(1)}, "class_names": 3}, "class_names that are no list"),
    ],
)
def test_a_file_without_weights(tmp_path, payload, message):
    torch.save(payload, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(tmp_path / "c.pth"))


def test_quantized_weights_are_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to drop them
        torch.save({"w": torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)}, tmp_path / "c.pth")
        with pytest.raises(CheckpointError, match="under 'w' a tensor that is no array of real numbers"):
            read_checkpoint(str(tmp_path / "c.pth"))


STATE = {"processes": [], "epoch": -1, "step": 2, "steps_per_epoch": 3, "max_accuracy": 0.0, "img_size": 32}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epoch", -50), ("epoch", "q"), ("step", -3), ("step", "q"), ("step", 99), ("steps_per_epoch", 0)),
        *(("max_accuracy", "q"), ("img_size", -4), ("args.seed", "x"), ("args.seed", 2**70), ("args.val_split", 7)),
    ],
)
def test_a_damaged_state_of_a_run_is_one_sentence(tmp_path, weights, key, value):
    args = argparse.Namespace(seed=1, val_split=0.1)
    torch.save({"model": weights, "args": args, **STATE}, tmp_path / "c.pth")
    assert read_checkpoint(str(tmp_path / "c.pth")).epoch == -1
    if key.startswith("args."):
        setattr(args, key[5:], value)
    torch.save({"model": weights, "args": args, **STATE, key: value}, tmp_path / "c.pth")
    with pytest.raises(
        CheckpointError, match=rf"c\.pth is damaged: it.*{key.removeprefix('args.')}.* {str(value)[:9]}"
    ):
        read_checkpoint(str(tmp_path / "c.pth"))
    torch.save({"model": weights, "args": argparse.Namespace(seed=None, val_split="validation")}, tmp_path / "c.pth")
    read_checkpoint(str(tmp_path / "c.pth"))  # of another project


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", "there is no checkpoint file nowhere.pth"),
        ("runs/one/checkpoint.pth", "there is no checkpoint file"),
        ("folder/checkpoint.safetensors", "there is no checkpoint file"),
        ("http://example.invalid/c.pth", "only https:// addresses"),
        ("file:///etc/hostname", "only https:// addresses"),
        ("hf-hub:just-a-name", "no Hugging Face repository: write hf-hub:OWNER/NAME"),
        (".", "is a folder: name the checkpoint file"),
        ("~nobody_of_this_name/c.pth", "there is no checkpoint file ~nobody_of_this_name/c.pth"),
        ("a\0.pth", "there is no checkpoint file"),
        ("x" * 5000, r"there is no checkpoint file x{300} \.\.\.$"),
        ("x" * 5000 + ".pth", r"there is no checkpoint file x{300} \.\.\.$"),
    ],
)
def test_a_source_that_leads_nowhere(source, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(source)


# ---------------------------------------------------------------------------------------------------- downloads


def test_an_https_address_is_fetched_once(tmp_path, monkeypatch, weights):
    save_file(weights, tmp_path / "remote.safetensors")
    fetched = []

    def fetch(url, target, hash_prefix=None, progress=True):
        fetched.append((url, hash_prefix))
        with open(target, "wb") as file:
            file.write((tmp_path / "remote.safetensors").read_bytes())

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    url = "https://example.invalid/some/model-0123456789ab.safetensors?download=1"
    for _ in range(2):
        assert_equal_weights(
            read_checkpoint(url, cache_dir=str(tmp_path / "cache")).model, {k: weights[k] for k in sorted(weights)}
        )
    assert fetched == [(url, "0123456789ab")]
    other = "https://example.invalid/other/model-0123456789ab.safetensors"
    read_checkpoint(other, cache_dir=str(tmp_path / "cache"))
    assert len(fetched) == 2


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    def fail(*_args, **_options):
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(CheckpointError, match=r"cannot fetch https://example.invalid/c.pth: no route to host"):
        read_checkpoint("https://example.invalid/c.pth", cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("files", "finetuned", "expected"),
    [
        (["README.md", "b.pth", "model.safetensors", "pytorch_model.bin"], False, "model.safetensors"),
        (["vim_t_midclstok_ft_78p3acc.pth", "vim_t_midclstok_76p1acc.pth"], False, "vim_t_midclstok_76p1acc.pth"),
        (["vim_t_midclstok_ft_78p3acc.pth", "vim_t_midclstok_76p1acc.pth"], True, "vim_t_midclstok_ft_78p3acc.pth"),
        (["config.json", "pytorch_model.bin"], False, "pytorch_model.bin"),
    ],
)
def test_choice_among_the_files_of_a_repository(files, finetuned, expected):
    assert choose_weights_file("o/n", files, finetuned) == expected


@pytest.mark.parametrize(("files", "finetuned"), [(["README.md"], False), (["model.safetensors"], True), ([], False)])
def test_a_repository_without_weights(files, finetuned):
    with pytest.raises(CheckpointError, match="holds no"):
        choose_weights_file("o/n", files, finetuned)


class Hub:
    """Stands in for huggingface_hub with a repository of two files, or for the hub that cannot be reached."""

    def __init__(self, folder, online):
        self.folder = folder
        self.online = online

    def HfApi(self):  # noqa: N802
        return self

    def model_info(self, repository, timeout=None):
        if not self.online:
            raise ConnectionError("the hub is away")
        files = [SimpleNamespace(rfilename=name) for name in sorted(os.listdir(self.folder))]
        return SimpleNamespace(siblings=files)

    def hf_hub_download(self, repository, name, cache_dir=None):
        if not self.online:
            raise ConnectionError("the hub is away")
        return str(self.folder / name)

    def snapshot_download(self, repository, cache_dir=None, local_files_only=False):
        assert local_files_only
        if self.folder is None:
            raise OSError("nothing cached")
        return str(self.folder)


@pytest.fixture
def repository(tmp_path, weights):
    folder = tmp_path / "repository"
    folder.mkdir()
    torch.save({"model": weights, "epoch": 1}, folder / "vim_76p1acc.pth")
    torch.save({"model": weights, "epoch": 2}, folder / "vim_ft_78p3acc.pth")
    return folder


@pytest.mark.parametrize("online", [True, False])
def test_a_hub_repository(monkeypatch, repository, online):
    monkeypatch.setitem(checkpoint_sources.sys.modules, "huggingface_hub", Hub(repository, online))
    plain = read_checkpoint("hustvl/Vim-tiny-midclstok")
    assert (plain.epoch, plain.source) == (1, "hustvl/Vim-tiny-midclstok/vim_76p1acc.pth")
    assert read_checkpoint("hf-hub:hustvl/Vim-tiny-midclstok", finetuned=True).epoch == 2
    assert read_checkpoint("hf-hub:hustvl/Vim-tiny-midclstok/vim_ft_78p3acc.pth").epoch == 2


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    monkeypatch.setitem(checkpoint_sources.sys.modules, "huggingface_hub", Hub(None, online=False))
    with pytest.raises(CheckpointError, match=r"the hub is away.*check the name and the network") as caught:
        read_checkpoint("hustvl/Vim-tiny-midclstok")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- writing


def test_safetensors_round_trip(tmp_path, weights):
    path = tmp_path / "c.safetensors"
    contents = {
        "model": weights,
        "class_names": list("vwxyz"),
        "model_name": "vim_pico_patch4_32",
        "img_size": (32, 48),
        "epoch": 3,
    }
    save_checkpoint(path, contents)
    read = read_checkpoint(str(path))
    assert_equal_weights({key: read.model[key] for key in weights}, weights)
    assert (read.class_names, read.model_name, read.img_size, read.epoch) == (
        list("vwxyz"),
        "vim_pico_patch4_32",
        (32, 48),
        3,
    )
    assert os.listdir(tmp_path) == ["c.safetensors"]


def test_safetensors_takes_weights_alone(tmp_path, weights):
    with pytest.raises(CheckpointError, match=r"not optimizer: call c\.safetensors \.pth instead"):
        save_checkpoint(tmp_path / "c.safetensors", {"model": weights, "optimizer": {}})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, weights, name):
    path = tmp_path / name
    save_checkpoint(path, {"model": weights})
    before = path.read_bytes()

    def fail(_number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        save_checkpoint(path, {"model": {key: value + 1 for key, value in weights.items()}})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("name", ["c.pth", "c.safetensors"])
def test_an_unwritable_folder_is_one_sentence(tmp_path, weights, name):
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "missing" / name, {"model": weights})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
@pytest.mark.parametrize("name", ["a.pth", "a.safetensors"])
def test_a_saved_file_is_readable_as_the_umask_says(tmp_path: Path, name: str) -> None:
    before = os.umask(0o022)
    try:
        save_checkpoint(tmp_path / name, {"model": {"w": torch.zeros(1)}})
    finally:
        os.umask(before)
    assert (tmp_path / name).stat().st_mode & 0o777 == 0o644
