"""Files with int8 weights: their arithmetic against fp64, what is in them, and what they cost in accuracy."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export_onnx as script
import onnx_int8
import small_vim
from checkpoint import CheckpointError
from classify import load_classifier
from command_line import UsageError
from mamba_ssm.ops.export import custom_ops_library, export_onnx
from models_mamba import VisionMamba
from onnx_int8 import quantize_onnx, session_settings
from vmamba import VSSM

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no quantization of its files is tested")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no ONNX file can run")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no model can be exported")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves

DIGITS = Path(__file__).resolve().parents[2] / "examples" / "digits"
METADATA = {"model_name": "small", "class_names": '["é", "b"]'}
QUANTIZING = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger"}
FORMS = {  # family, whether scans are nodes, how they are written
    "vim": ("vim", True, "steps"),
    "vim, steps": ("vim", False, "steps"),
    "vim, chunks": ("vim", False, "chunks"),
    "vmamba": ("vmamba", True, "steps"),
    "vmamba, steps": ("vmamba", False, "steps"),
}
NEAR = 0.1  # norm of the difference of logits over that of their spread


def small_vision_mamba() -> VisionMamba:
    torch.manual_seed(0)
    return VisionMamba(**{**small_vim.SMALL, "embed_dim": 64, "depth": 2}).eval()


def small_vmamba() -> VSSM:
    torch.manual_seed(0)
    names: dict[str, Any] = {
        "downsample_version": "v3",
        "patchembed_version": "v2",
        "norm_layer": "ln2d",
        "forward_type": "v05_noz",
    }
    return VSSM(depths=(1, 1), dims=16, num_classes=5, ssm_d_state=2, ssm_conv_bias=False, **names).eval()


def pictures(batch: int) -> np.ndarray:
    return small_vim.pictures(batch=batch).numpy()


def run(path: Path, batch: np.ndarray, library: Path | None = None) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if library is not None:
        options.register_custom_ops_library(str(library))
    for key, value in session_settings({onnx_int8.METADATA_KEY: "any"}).items():
        options.add_session_config_entry(key, value)
    return onnxruntime.InferenceSession(str(path), options).run(None, {"input": batch})[0]


def quantize(source: Path, target: Path, scheme: str, count: int = 16) -> Path:
    calibration = iter(np.split(pictures(count), 2)) if scheme == "static" else None
    quantize_onnx(source, target, scheme=scheme, calibration=calibration)
    return target


def error_of(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected - expected.mean(0)))


def bodies(graph: Any) -> Iterator[Any]:
    """Every graph within a graph."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield attribute.g
                yield from bodies(attribute.g)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file in fp32 of each form."""
    folder = tmp_path_factory.mktemp("fp32")
    found = {}
    with torch.random.fork_rng():
        for number, (form, (family, functions, scheme)) in enumerate(FORMS.items()):
            model = small_vision_mamba() if family == "vim" else small_vmamba()
            program = export_onnx(model, torch.zeros(1, 3, 32, 32), scheme=scheme, functions=functions)
            program.model.metadata_props.update(METADATA)
            found[form] = folder / f"{number}.onnx"
            program.save(found[form])
    return found


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_model_says_nearly_the_same_for_any_batch(
    files: dict[str, Path], tmp_path: Path, form: str, scheme: str
) -> None:
    path = quantize(files[form], tmp_path / "int8.onnx", scheme)
    batch = pictures(16)
    expected = run(files[form], batch)
    assert error_of(run(path, batch[:5]), expected[:5]) <= NEAR
    alone = np.concatenate([run(path, batch[place : place + 1]) for place in range(5)])
    assert error_of(alone, expected[:5]) <= NEAR


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
@pytest.mark.parametrize("form", ["vim", "vmamba"])
def test_the_library_of_operators_computes_the_same(
    files: dict[str, Path], tmp_path: Path, form: str, scheme: str
) -> None:
    library = custom_ops_library()
    if library is None:
        pytest.skip("the library of custom operators is not built")
    path = quantize(files[form], tmp_path / "int8.onnx", scheme)
    # A last bit may round an activation to its neighbour, so that this is no nearer than one step of 255.
    assert error_of(run(path, pictures(5), library), run(path, pictures(5))) <= NEAR


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_int8_and_what_is_not(files: dict[str, Path], tmp_path: Path, form: str, scheme: str) -> None:
    before, after = (onnx.load(path) for path in (files[form], quantize(files[form], tmp_path / "m.onnx", scheme)))
    onnx.checker.check_model(after, full_check=True)
    assert [body.SerializeToString() for body in bodies(after.graph)] == [
        body.SerializeToString() for body in bodies(before.graph)
    ]
    assert [f.SerializeToString() for f in after.functions] == [f.SerializeToString() for f in before.functions]
    assert bool(before.functions) == (", " not in form)
    assert any(bodies(before.graph)) == (form == "vim, steps" or form == "vmamba, steps" or form == "vim, chunks")

    sizes = {tensor.name: list(tensor.dims) for tensor in before.graph.initializer}
    changes, stays = dict[str, str](), set[str]()
    for node in before.graph.node:
        if node.op_type == "BidirectionalInner":
            changes.update({node.input[place]: str(sizes[node.input[place]]) for place in (3, 10)})
            stays.update(node.input[place] for place in (1, 4, 5, 8, 11, 12))
        elif node.op_type in ("MatMul", "Gemm", "Conv") and node.input[1] in sizes:
            weight = sizes[node.input[1]]
            low_rank = node.op_type != "Conv" and weight[-1] >= 16 * weight[-2]
            if low_rank or (node.op_type == "Conv" and weight[1] == 1):
                stays.add(node.input[1])
            else:
                changes[node.input[1]] = str(_plain(weight, node, scheme))
    kept = {tensor.name for tensor in after.graph.initializer} & set(sizes)
    assert stays <= kept
    assert not kept & set(changes)
    int8 = [tensor for tensor in after.graph.initializer if tensor.data_type == onnx.TensorProto.INT8]
    weights = Counter(str(list(tensor.dims)) for tensor in int8 if not tensor.name.endswith("_zeros"))
    assert weights == Counter(changes.values())
    ops = Counter(node.op_type for node in after.graph.node)
    assert bool(ops["MatMulInteger"]) == (scheme == "dynamic")
    assert bool(ops["QuantizeLinear"]) == (scheme == "static")


def _plain(weight: list[int], node: Any, scheme: str) -> list[int]:
    """A Gemm's matrix lies the other way round in an integer product."""
    return weight[::-1] if node.op_type == "Gemm" and scheme == "dynamic" else weight


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_the_file_says_what_it_said_and_how_it_is_quantized(
    files: dict[str, Path], tmp_path: Path, scheme: str
) -> None:
    path = quantize(files["vim"], tmp_path / "int8.onnx", scheme)
    before, after = onnx.load(files["vim"]), onnx.load(path)
    said = {entry.key: entry.value for entry in after.metadata_props}
    assert said == {**METADATA, "quantization": scheme}
    assert list(after.graph.input) == list(before.graph.input)
    assert list(after.graph.output) == list(before.graph.output)
    assert list(after.opset_import) == list(before.opset_import)
    assert [file.name for file in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_a_vim_as_wide_as_vim_tiny_takes_a_third(tmp_path: Path, scheme: str) -> None:
    model = small_vim.small_model(embed_dim=192, d_state=16, depth=2, num_classes=1000)
    export_onnx(model, torch.zeros(1, 3, 32, 32), scheme="steps").save(tmp_path / "fp32.onnx")
    path = quantize(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", scheme)
    assert path.stat().st_size <= 0.35 * (tmp_path / "fp32.onnx").stat().st_size


def test_onnxruntime_multiplies_in_int8(files: dict[str, Path], tmp_path: Path) -> None:
    """No product is left in fp32, none of its weights is made fp32 again, and stored weights cost nothing."""
    for scheme, product in {"dynamic": "DynamicQuantizeMatMul", "static": "MatMulIntegerToFloat"}.items():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        if (library := custom_ops_library()) is None:
            pytest.skip("the library of custom operators is not built, so their definitions have products too")
        options.register_custom_ops_library(str(library))
        path = quantize(files["vim"], tmp_path / f"{scheme}.onnx", scheme)
        onnxruntime.InferenceSession(str(path), options)
        ops = Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)
        assert not ops["MatMul"] + ops["Gemm"] + ops["Cast"] + ops["MatMulInteger"]
        assert ops[product] == (5 if scheme == "dynamic" else 4)
        if scheme == "static":
            assert ops["QGemm"] == ops["QLinearConv"] == 1
            assert ops["DequantizeLinear"] <= 2  # of what the convolution made, which is cut in two


# --- the arithmetic, by a model of two layers -----------------------------------------------------------------------


def two_layers(path: Path, *, transposed: bool, bias: bool) -> tuple[np.ndarray, ...]:
    """Write a convolution and a product, with a channel of zeros and one of tiny weights; return their constants."""
    draw = np.random.default_rng(0)
    taps, matrix = draw.normal(size=(6, 3, 2, 2)), draw.normal(size=(54, 5))
    taps[1] = 0
    taps[2] *= 1e-12
    first, second = draw.normal(size=6) * 3, draw.normal(size=5)
    values = [value.astype(np.float32) for value in (taps, first, matrix, second)]
    names = ["taps", "first", "matrix", "second"]
    written = dict(zip(names, values, strict=True))
    if transposed:
        written["matrix"] = np.ascontiguousarray(written["matrix"].T)
    make = onnx.helper.make_node
    extra = (["first"], ["second"]) if bias else ([], [])
    nodes = [
        make("Conv", ["input", "taps", *extra[0]], ["maps"]),
        make("Flatten", ["maps"], ["flat"]),
        make("Gemm", ["flat", "matrix", *extra[1]], ["logits"], transB=int(transposed)),
    ]
    fp32 = onnx.TensorProto.FLOAT
    ends = [[onnx.helper.make_tensor_value_info(name, fp32, shape)] for name, shape in
            (("input", ["b", 3, 4, 4]), ("logits", ["b", 5]))]  # fmt: skip
    constants = [onnx.numpy_helper.from_array(written[name], name) for name in names if name in str(nodes)]
    graph = onnx.helper.make_graph(nodes, "two", *ends, constants)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), path)
    return tuple(value.astype(np.float64) for value in values)


def int8(weight: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The values that an int8 weight stands for."""
    scale = np.abs(weight).max(axis=axes, keepdims=True) / 127
    return np.divide(weight, scale, out=np.zeros_like(weight), where=scale > 0).round() * scale


def uint8(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """The values that an activation in uint8 stands for, its range being `low` to `high`."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    return (np.clip((value / scale).round() + zero, 0, 255) - zero) * scale


def convolved(batch: np.ndarray, taps: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(batch, taps.shape[2:], axis=(2, 3))
    return np.einsum("bchwij,ocij->bohw", windows, taps)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_two_layers_compute_what_they_are_defined_to(tmp_path: Path, scheme: str, transposed: bool, bias: bool) -> None:
    taps, first, matrix, second = two_layers(tmp_path / "fp32.onnx", transposed=transposed, bias=bias)
    shown = pictures(1)[0, :, :12, :12].reshape(3, 3, 4, 3, 4).transpose(1, 3, 0, 2, 4).reshape(9, 3, 4, 4)
    shown = np.ascontiguousarray(shown)
    shown[4] *= 2  # in the middle of a batch
    calibration = [shown[:1], shown[1:6], shown[6:]] if scheme == "static" else None
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", scheme=scheme, calibration=calibration)
    batch = 1.25 * shown[:5]  # beyond what was shown, in places
    added = (first[:, None, None], second) if bias else (0, 0)
    taps8, matrix8 = int8(taps, (1, 2, 3)), int8(matrix, (0,))
    if scheme == "static":
        plain = convolved(shown, taps) + added[0]
        maps = convolved(uint8(batch, shown.min(), shown.max()), taps8) + added[0]
        flat = uint8(maps, plain.min(), plain.max()).reshape(5, -1)
    else:
        maps = (convolved(batch, taps8) + added[0]).reshape(5, -1)
        flat = uint8(maps, maps.min(), maps.max())
    expected = flat @ matrix8 + added[1]
    # One activation that rounds the other way at a tie, as fp32 may, is a step of its range times a weight.
    one_step = (flat.max() - flat.min()) / 255 * np.abs(matrix8).max()
    found = run(tmp_path / "int8.onnx", batch)
    assert np.abs(found - expected).max() <= 2 * one_step
    assert np.median(np.abs(found - expected)) <= 1e-5 * np.abs(expected).max()


def test_values_beyond_the_calibration_are_clipped_and_no_others(tmp_path: Path) -> None:
    two_layers(tmp_path / "fp32.onnx", transposed=False, bias=True)
    shown = small_vim.pictures(4, 4, batch=8).numpy()
    quantize_onnx(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", scheme="static", calibration=[shown])
    expected = run(tmp_path / "fp32.onnx", shown)
    assert error_of(run(tmp_path / "int8.onnx", shown), expected) <= NEAR
    assert error_of(run(tmp_path / "int8.onnx", 8 * shown), run(tmp_path / "fp32.onnx", 8 * shown)) > 5 * NEAR


# --- the digits -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray, np.ndarray, np.ndarray]:
    """The trained example in fp32, pictures that it was trained with, and held-out ones with their classes."""
    pytest.importorskip("sklearn", reason="scikit-learn, whose digits these are, is not installed")
    sys.path.insert(0, str(DIGITS))
    import make_dataset

    checkpoint, path = str(DIGITS / "vim_pico_digits.safetensors"), tmp_path_factory.mktemp("digits") / "fp32.onnx"
    assert script.run(["--checkpoint", checkpoint, "--output", str(path), "--scan", "steps"]) == 0
    classifier = load_classifier(None, checkpoint)
    scans, labels = make_dataset.load_scans()
    parts = make_dataset.split_indices(labels)

    def prepared(indices: list[int]) -> np.ndarray:
        return np.stack(
            [classifier.transform(make_dataset.draw(scans[index]).convert("RGB")).numpy() for index in indices]
        )

    names = [make_dataset.CLASS_NAMES[labels[index]] for index in parts["held_out"]]
    classes = np.array([classifier.names.index(name) for name in names])
    return path, prepared(parts["train"][::16]), prepared(parts["held_out"]), classes


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_the_digits_are_told_as_well_as_before(
    digits: tuple[Path, np.ndarray, np.ndarray, np.ndarray], tmp_path: Path, scheme: str
) -> None:
    path, trained, batch, classes = digits
    calibration = np.array_split(trained, 4) if scheme == "static" else None
    quantize_onnx(path, tmp_path / "int8.onnx", scheme=scheme, calibration=calibration)
    said = {entry.key: entry.value for entry in onnx.load(tmp_path / "int8.onnx").metadata_props}
    assert len(json.loads(said["class_names"])) == 10
    library = custom_ops_library()
    before, after = (
        np.concatenate([run(file, part, library) for part in np.array_split(batch, 9)])
        for file in (path, tmp_path / "int8.onnx")
    )
    accuracy = [100 * float((logits.argmax(1) == classes).mean()) for logits in (before, after)]
    assert accuracy[0] == pytest.approx(98.0, abs=0.3)
    assert accuracy[1] >= accuracy[0] - 0.5
    assert (before.argmax(1) != after.argmax(1)).mean() <= 0.01
    assert error_of(after, before) <= NEAR


# --- what is refused ------------------------------------------------------------------------------------------------


def refusal(source: Path, target: Path, **options: Any) -> str:
    target.write_bytes(b"older")
    with pytest.raises(UsageError) as caught:
        quantize_onnx(source, target, **options)
    assert target.read_bytes() == b"older"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_scheme_and_the_pictures_must_fit_together(files: dict[str, Path], tmp_path: Path) -> None:
    source, target = files["vim"], tmp_path / "int8.onnx"
    assert "choose dynamic or static" in refusal(source, target, scheme="int4")
    assert "give some" in refusal(source, target, scheme="static")
    assert "no pictures" in refusal(source, target, scheme="static", calibration=[])
    assert "leave those" in refusal(source, target, scheme="dynamic", calibration=[pictures(1)])
    small = pictures(1)[..., :-1]
    assert "(b, 3, 32, 32), got float32 of (1, 3, 32, 31)" in refusal(
        source, target, scheme="static", calibration=[small]
    )
    assert "got float64" in refusal(source, target, scheme="static", calibration=[pictures(1).astype(np.float64)])
    assert "not finite" in refusal(source, target, scheme="static", calibration=[np.full_like(pictures(1), np.nan)])


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_a_quantized_file_is_refused(files: dict[str, Path], tmp_path: Path, scheme: str) -> None:
    path = quantize(files["vim"], tmp_path / "once.onnx", scheme)
    assert f"quantized already ({scheme})" in refusal(path, tmp_path / "twice.onnx")
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    assert "quantized already, by another program" in refusal(path, tmp_path / "twice.onnx")


def test_damaged_and_other_files_are_refused(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["vim"].read_bytes()
    path, target = tmp_path / "m.onnx", tmp_path / "int8.onnx"
    for damaged in (whole[: len(whole) // 2], whole[:-3], b"", b"not a model at all", whole[:200] + whole[300:]):
        path.write_bytes(damaged)
        assert "m.onnx" in refusal(path, target)
    assert "no file" in refusal(tmp_path / "none.onnx", target)
    assert "folder" in refusal(tmp_path, target)
    model = onnx.load(files["vim"])
    next(node for node in model.graph.node if node.op_type == "MatMul").input.pop()
    onnx.save(model, path)
    assert "m.onnx is damaged" in refusal(path, target)
    model = onnx.load(files["vim"])
    model.graph.output[0].name = "scores"
    model.graph.node[-1].output[0] = "scores"
    onnx.save(model, path)
    assert "not a model of this project" in refusal(path, target)
    onnx.save(onnx.load(files["vim"]), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert "in a file beside it" in refusal(path, target)


def test_a_weight_that_is_not_finite_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["vim"])
    name = next(node.input[1] for node in model.graph.node if node.op_type == "MatMul")
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    value = onnx.numpy_helper.to_array(tensor).copy()
    value[0, 0] = np.inf
    tensor.CopyFrom(onnx.numpy_helper.from_array(value, name))
    onnx.save(model, tmp_path / "m.onnx")
    assert f"{name} are not finite" in refusal(tmp_path / "m.onnx", tmp_path / "int8.onnx")


def test_a_target_that_cannot_be_written_is_an_error(files: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none"):
        quantize_onnx(files["vim"], tmp_path / "none" / "int8.onnx")


def test_without_the_packages_it_says_how_to_install_them(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent, scheme in (("onnx", "dynamic"), ("onnxruntime", "static")):
        with monkeypatch.context() as patch:
            found = onnx_int8.importlib.util.find_spec
            patch.setattr(
                onnx_int8.importlib.util, "find_spec", lambda name, a=absent, f=found: None if name == a else f(name)
            )
            calibration = [pictures(1)] if scheme == "static" else None
            assert f"pip install {absent}`" in refusal(
                files["vim"], tmp_path / "m.onnx", scheme=scheme, calibration=calibration
            )


# --- processors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "flags", "precise"),
    [
        ("x86_64", "flags : fpu avx2 avx512f", True),
        ("x86_64", "flags : fpu avx2 avx_vnni", False),
        ("AMD64", "flags : avx512f avx512_vnni", False),
        ("x86_64", None, True),
        ("aarch64", "Features : fp asimd", False),
        ("arm64", None, False),
    ],
)
def test_only_x86_without_vnni_needs_a_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, flags: str | None, precise: bool
) -> None:
    if flags is not None:
        (tmp_path / "cpuinfo").write_text(flags + "\n")
    monkeypatch.setattr(onnx_int8, "CPU_INFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(onnx_int8.platform, "machine", lambda: machine)
    expected = {"session.x64quantprecision": "1"} if precise else {}
    assert session_settings({"quantization": "static"}) == expected
    assert session_settings({"model_name": "m"}) == {}


@pytest.mark.parametrize("scheme", onnx_int8.SCHEMES)
def test_the_setting_changes_no_result(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """Onnxruntime rewrites the weights for it, which it only manages if their zero points stand in the file."""
    path = quantize(files["vmamba"], tmp_path / "int8.onnx", scheme)
    expected = run(files["vmamba"], pictures(5))
    monkeypatch.setattr(onnx_int8.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(onnx_int8, "CPU_INFO", tmp_path / "none")
    assert session_settings({"quantization": scheme})
    assert error_of(run(path, pictures(5)), expected) <= NEAR
