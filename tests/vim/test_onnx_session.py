"""Opening and running ONNX files: the numbers, and one sentence for every file that cannot be used."""

from __future__ import annotations

import importlib.machinery
import json
import logging
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no ONNX file is tested")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no ONNX file is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no ONNX file is tested")

import onnx_files  # noqa: E402

import onnx_session  # noqa: E402
from onnx_file import read_header  # noqa: E402
from onnx_session import OnnxError, open_session  # noqa: E402


def refusal(path: Path, **options: str) -> str:
    """The sentence with which a file is refused."""
    with pytest.raises(OnnxError) as error:
        open_session(path, **options)
    text = str(error.value)
    assert text.endswith(".")
    assert "\n" not in text
    assert str(path) in text
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.onnx"


@pytest.fixture
def no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without mamba_ssm, and so without its library of operators."""
    monkeypatch.setattr(onnx_session.importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize("threads", [None, 1, 2])
@pytest.mark.parametrize("pictures", [1, 3])
def test_logits(path: Path, pictures: int, threads: int | None) -> None:
    model = open_session(onnx_files.write(path), threads=threads)
    batch = np.random.default_rng(0).normal(size=(pictures, 3, *onnx_files.SIZE)).astype(np.float32)
    found = model.run(batch)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, onnx_files.logits(batch), rtol=1e-6, atol=1e-6)
    assert model.threads == (threads or onnx_session.usable_cores())
    assert model.session.get_session_options().intra_op_num_threads == model.threads


def test_what_a_file_says(path: Path) -> None:
    model = open_session(str(onnx_files.write(path, needs_custom_ops="no")))
    assert (model.name, model.class_names, model.size) == ("mean_colour", onnx_files.NAMES, onnx_files.SIZE)
    assert model.preprocessing == onnx_files.preprocessing()
    assert model.source == str(path)
    assert model.custom_ops is None
    assert model.said("class_names") == onnx_files.NAMES
    assert model.said("scan") is None
    assert model.said("nothing") is None
    assert not model.has_random_weights
    assert model.dtype == "float32"
    other = open_session(onnx_files.write(path, weights="random", quantization="dynamic"))
    assert other.has_random_weights
    assert other.dtype == "int8"


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((3, 33, 40), np.float32),
        np.zeros((1, 3, 40, 33), np.float32),
        np.zeros((1, 1, 33, 40), np.float32),
        np.zeros((1, 3, 33, 40), np.float64),
    ],
)
def test_batches_of_another_form(path: Path, batch: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"must be fp32 of shape \(b, 3, 33, 40\), got") as error:
        open_session(onnx_files.write(path)).run(batch)
    assert str(batch.shape) in str(error.value)


def test_a_failure_while_running(path: Path) -> None:
    model = onnx_files.small()
    model.graph.node[1].op_type = "Reshape"  # to a shape that only one picture has
    model.graph.node[1].input.append("three")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3]), "three"))
    opened = open_session(onnx_files.write(path, model))
    assert opened.run(np.zeros((1, 3, *onnx_files.SIZE), np.float32)).shape == (1, 3)
    with pytest.raises(OnnxError, match=r"m.onnx cannot run on an input of 2 x 3 x 33 x 40: .*Reshape"):
        opened.run(np.zeros((2, 3, *onnx_files.SIZE), np.float32))


# ---------------------------------------------------------------- files that are none


def test_a_file_cut_anywhere_is_refused(path: Path) -> None:
    whole = onnx_files.write(path).read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(OnnxError):
            open_session(path)
    path.write_bytes(whole)
    open_session(path)


def test_a_file_cut_short_is_told_from_a_file_of_another_format(path: Path) -> None:
    whole = onnx_files.write(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "is damaged or cut off" in refusal(path)
    for other in (
        b"",
        b"PK\x03\x04" + bytes(100),
        b"version https://git-lfs.github.com/spec/v1",
        bytes(99),
        b"\xff" * 99,
    ):
        path.write_bytes(other)
        assert "is not an ONNX file" in refusal(path)


def test_damaged_bytes_raise_nothing_else(path: Path) -> None:
    whole = onnx_files.write(path).read_bytes()
    draw = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for place in draw.integers(0, len(whole), 3):
            damaged[place] = draw.integers(0, 256)
        path.write_bytes(damaged)
        try:
            read_header(path)
        except OnnxError:
            refused += 1
    assert 0 < refused < 300


def test_missing_files_and_folders(path: Path, tmp_path: Path) -> None:
    assert "There is no file" in refusal(path)
    assert "is a folder" in refusal(tmp_path)
    for address in ("https://example.org/m.onnx", "hf-hub:owner/name/m.onnx"):
        with pytest.raises(OnnxError, match=f"not fetched: download {address} first"):
            open_session(address)
    os.mkfifo(path)
    assert "is no regular file" in refusal(path)


def test_home_is_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_files.write(path)
    monkeypatch.setenv("HOME", str(path.parent))
    assert open_session("~/m.onnx").source == "~/m.onnx"
    assert onnx_session.is_onnx("~/m.onnx")


def test_which_files_are_onnx(path: Path) -> None:
    whole = onnx_files.write(path).read_bytes()
    other = path.with_name("weights.bin")
    other.write_bytes(whole)
    assert onnx_session.is_onnx(str(other))
    assert onnx_session.is_onnx("nowhere/M.ONNX")
    assert not onnx_session.is_onnx("")
    assert not onnx_session.is_onnx("owner/name")
    assert not onnx_session.is_onnx(str(path.parent))
    assert not onnx_session.is_onnx(str(onnx_files.DIGITS))
    assert not onnx_session.is_onnx("a\0b")
    torch.save({"model": {}}, other)
    assert not onnx_session.is_onnx(str(other))


def test_weights_in_a_file_beside_it(path: Path) -> None:
    onnx_files.write(path, onnx_files.small(weight=np.resize(onnx_files.WEIGHT, (999, 3))), class_names=None)
    model = onnx.load(path)
    model.metadata_props.add(key="class_names", value=json.dumps([f"class {number}" for number in range(999)]))
    onnx.save(model, path, save_as_external_data=True, location="beside.bin", size_threshold=0)
    assert len(open_session(path).class_names) == 999
    path.with_name("beside.bin").unlink()
    assert "keeps its weights in a file beside it" in refusal(path)


def test_without_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnx_files.write(path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(OnnxError, match=r"ONNX files need onnxruntime: run `.* -m pip install onnxruntime`\."):
        open_session(path)


# ---------------------------------------------------------------- files of something else


@pytest.mark.parametrize("key", ["model_name", "class_names", "preprocessing"])
def test_a_file_of_another_project(path: Path, key: str) -> None:
    assert f"(no {key} in its metadata)" in refusal(onnx_files.write(path, **{key: None}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"class_names": "{"}, "no JSON list of texts"),
        ({"class_names": "[1, 2, 3]"}, "no JSON list of texts"),
        ({"class_names": "[]"}, "no JSON list of texts"),
        ({"class_names": "[" * 100_000}, "no JSON list of texts"),
        ({"class_names": '["red", "green"]'}, "has 2 class names but 3 classes"),
        ({"preprocessing": "none"}, "33 x 40 pixels"),
        ({"preprocessing": "[]"}, "33 x 40 pixels"),
        ({"preprocessing": json.dumps(onnx_files.preprocessing(size=[40, 33]))}, "33 x 40 pixels"),
        ({"preprocessing": json.dumps(onnx_files.preprocessing(crop_ratio=0))}, "33 x 40 pixels"),
        ({"preprocessing": json.dumps(onnx_files.preprocessing(crop_ratio=float("nan")))}, "33 x 40 pixels"),
        ({"preprocessing": json.dumps(onnx_files.preprocessing(crop_ratio=True))}, "33 x 40 pixels"),
    ],
)
def test_metadata_that_does_not_fit(path: Path, changes: dict[str, str], said: str) -> None:
    assert said in refusal(onnx_files.write(path, **changes))


@pytest.mark.parametrize(
    "options",
    [
        {"names": ("pixels", "logits")},
        {"names": ("input", "scores")},
        {"kind": onnx.TensorProto.FLOAT16},
        {"shape": ("batch", 3, "height", "width")},
        {"shape": ("batch", 3, 33, 40, 2)},
        {"shape": ("batch", 1, 33, 40), "weight": np.ones((3, 1), np.float32)},
    ],
)
def test_graphs_of_another_form(path: Path, options: dict[str, object]) -> None:
    text = refusal(onnx_files.write(path, onnx_files.small(**options)))
    assert "an input input of (b, 3, height, width) and an output logits of (b, classes), both fp32: it has" in text
    assert "tensor(" in text


def test_more_ends_than_one(path: Path) -> None:
    model = onnx_files.small()
    model.graph.output.append(onnx.helper.make_tensor_value_info("means", onnx.TensorProto.FLOAT, ("batch", 3)))
    assert "both fp32: it has" in refusal(onnx_files.write(path, model))


def test_a_fixed_batch(path: Path) -> None:
    assert "takes batches of exactly 2 pictures" in refusal(
        onnx_files.write(path, onnx_files.small((2, 3, *onnx_files.SIZE)))
    )


def test_an_operator_that_onnxruntime_lacks(path: Path) -> None:
    model = onnx_files.small()
    model.graph.node[1].op_type = "Flatter"
    text = refusal(onnx_files.write(path, model))
    assert text.startswith("onnxruntime ")
    assert "Flatter" in text
    assert "Error]" not in text.split("Flatter")[0]


# ---------------------------------------------------------------- operators of our own


def test_operators_without_their_library(path: Path, no_package: None) -> None:
    onnx_files.write(path, onnx_files.with_own_operator(defined=False))
    text = refusal(path)
    assert "needs the library of this project's own operators" in text
    assert f"in {onnx_session.PROGRAMS} as kernels.onnxruntime.so" in text
    assert "--custom-ops none leaves it away" in refusal(path, custom_ops="none")


def test_a_library_that_is_none(path: Path, no_package: None) -> None:
    onnx_files.write(path)
    with pytest.raises(OnnxError, match=r"^There is no library of operators missing.so; leave --custom-ops away to"):
        open_session(path, custom_ops="missing.so")
    wrong = path.with_name("wrong.so")
    wrong.write_bytes(b"no library")
    said = (
        r"wrong.so is no library of operators that this onnxruntime can load \(.*\); name another, or leave --custom-"
    )
    with pytest.raises(OnnxError, match=said):
        open_session(path, custom_ops=str(wrong))


def test_a_library_beside_a_model_is_not_run(path: Path, no_package: None) -> None:
    """Who sends a model could send one with it."""
    path.with_name(onnx_session.CUSTOM_OPS).write_bytes(b"no library")
    onnx_files.write(path, onnx_files.with_own_operator(defined=False))
    assert "none is in an installed mamba_ssm or in" in refusal(path)


def test_a_library_that_was_cut_short(path: Path, no_package: None) -> None:
    """The loader would map it, and the process would end with a bus error."""
    onnx_files.write(path)
    whole = next(Path(np.__file__).parent.rglob("*.so")).read_bytes()
    cut = path.with_name("cut.so")
    cut.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OnnxError, match=r"cut.so is no library .*it was cut short: copy it again"):
        open_session(path, custom_ops=str(cut))


def test_a_library_beside_the_programs_is_found_where_it_is_needed(
    path: Path, no_package: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "PROGRAMS", path.parent)
    path.with_name(onnx_session.CUSTOM_OPS).write_bytes(b"no library")
    assert open_session(onnx_files.write(path)).custom_ops is None
    assert not caplog.records
    onnx_files.write(path, onnx_files.with_own_operator(defined=False))
    assert "needs it: build mamba_ssm again" in refusal(path)
    defined = onnx_files.write(path, onnx_files.with_own_operator(defined=True))
    with caplog.at_level(logging.WARNING):
        model = open_session(defined)
    assert "runs without it" in caplog.text
    assert model.custom_ops is None
    batch = np.full((1, 3, *onnx_files.SIZE), 0.5, np.float32)
    np.testing.assert_allclose(model.run(batch), onnx_files.logits(batch), rtol=1e-6)
    said = onnx_files.write(path, onnx_files.with_own_operator(defined=True), needs_custom_ops="yes")
    assert "needs it: build mamba_ssm again" in refusal(said)


def test_the_library_of_the_package_goes_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = path.parent / "mamba_ssm"
    package.mkdir()
    spec = importlib.machinery.ModuleSpec("mamba_ssm", None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setattr(onnx_session.importlib.util, "find_spec", {"mamba_ssm": spec}.get)
    monkeypatch.setattr(onnx_session, "PROGRAMS", path.parent)
    for folder in (package, path.parent):
        (folder / onnx_session.CUSTOM_OPS).write_bytes(b"no library")
    onnx_files.write(path, onnx_files.with_own_operator(defined=False))
    assert str(package / onnx_session.CUSTOM_OPS) in refusal(path)
    (package / onnx_session.CUSTOM_OPS).unlink()
    assert str(path.parent / onnx_session.CUSTOM_OPS) in refusal(path)
    assert open_session(onnx_files.write(path, onnx_files.with_own_operator(defined=True)), custom_ops="none").name


def test_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= onnx_session.usable_cores() <= (os.cpu_count() or 1)
    pairs = {
        f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}\n"
        for cpu in range(4)
    }
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2}, raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: pairs[str(self)])
    assert onnx_session.usable_cores() == 2

    def refuse(self: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert onnx_session.usable_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert onnx_session.usable_cores() == (os.cpu_count() or 1)
