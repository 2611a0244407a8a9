"""The script that writes ONNX files, as its user sees it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import export_onnx
from checkpoint import save_checkpoint
from mamba_ssm.ops import export
from model_setup import build_model

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no export is tested")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: no export is tested")
pytest.importorskip("onnxscript", reason="onnxscript is not installed: no export is tested")
pytestmark = pytest.mark.filterwarnings("ignore")  # torch.onnx and onnxscript warn about themselves

MODEL = "vim_pico_patch4_32"
NAMES = ["zero", "one", "two", "three"]
Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run the script in a folder of its own: exit code, standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = export_onnx.run(words)
        except SystemExit as error:
            code = int(error.code or 0)
        return code, *capsys.readouterr()

    return run


def write_checkpoint(name: str = "w.safetensors") -> None:
    weights = build_model(MODEL, len(NAMES), None).state_dict()
    save_checkpoint(name, {"model": weights, "class_names": NAMES, "model_name": MODEL, "img_size": 32})


def test_a_runtime_that_cannot_run_the_file_is_told(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_session

    def refuse(path: Path, **_: object) -> None:
        raise onnx_session.OnnxError(f"onnxruntime 1.2.3 cannot open {path}: opset 28 is too new.")

    monkeypatch.setattr(onnx_session, "open_session", refuse)
    code, _, err = call("--model", MODEL, "--output", "m.onnx")
    assert code == 2
    assert err.splitlines()[-1] == "error: onnxruntime 1.2.3 cannot open m.onnx: opset 28 is too new."


def test_schemes_are_those_of_the_export() -> None:
    assert export_onnx.SCHEMES == export.SCHEMES


@pytest.mark.parametrize("scheme", export.SCHEMES)
def test_a_checkpoint_becomes_a_file_that_says_what_it_is(call: Call, scheme: str) -> None:
    write_checkpoint()
    sample = Path(__file__).parents[2] / "examples" / "digits" / "samples" / "one.png"
    arguments = ("--checkpoint", "w.safetensors", "--output", "m.onnx", "--scan", scheme, "--image", str(sample))
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "[1/4]" in err
    assert "[4/4]" in err
    assert out.count("largest difference") == 1 + 3 * (1 if export.custom_ops_library() is None else 2)
    assert "one.png" in out
    assert "within the tolerance of 0.0001" in out
    graph = onnx.load("m.onnx")
    onnx.checker.check_model(graph, full_check=True)
    said = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(said["class_names"]) == NAMES
    assert said["model_name"] == MODEL
    assert said["scan"] == scheme
    assert json.loads(said["preprocessing"])["size"] == [32, 32]
    assert [path.name for path in Path().iterdir() if path.suffix in (".onnx", ".tmp")] == ["m.onnx"]


def test_the_weights_may_lie_beside_the_file(call: Call) -> None:
    write_checkpoint()
    for name in ("m.onnx", "m.onnx.data"):
        Path(name).write_bytes(b"older")
    code, out, err = call("--checkpoint", "w.safetensors", "--output", "m.onnx", "--weights", "beside")
    assert code == 0, err
    assert "within the tolerance" in out
    assert Path("m.onnx").stat().st_size < Path("m.onnx.data").stat().st_size
    assert sorted(path.name for path in Path().iterdir()) == ["m.onnx", "m.onnx.data", "w.safetensors"]


def test_a_file_without_functions(call: Call) -> None:
    write_checkpoint()
    code, out, err = call("--checkpoint", "w.safetensors", "--output", "m.onnx", "--inline", "--scan", "steps")
    assert code == 0, err
    assert out.count("largest difference") == 3
    graph = onnx.load("m.onnx")
    assert not graph.functions
    assert {node.domain for node in graph.graph.node} == {""}


def test_an_archive_of_torch_export(call: Call) -> None:
    write_checkpoint()
    code, out, err = call("--checkpoint", "w.safetensors", "--output", "m.pt2")
    assert code == 0, err
    assert "the archive, random, batch 3: largest difference" in out
    files = {export_onnx.METADATA: ""}
    program = torch.export.load("m.pt2", extra_files=files)
    assert json.loads(json.loads(files[export_onnx.METADATA])["class_names"]) == NAMES
    for batch in (1, 16):
        assert program.module()(torch.randn(batch, 3, 32, 32)).shape == (batch, len(NAMES))


@pytest.mark.parametrize("words", [("--inline",), ("--weights", "beside"), ("--scan", "steps"), ("--opset", "18")])
def test_flags_of_onnx_files_are_refused_for_an_archive(call: Call, words: tuple[str, ...]) -> None:
    code, _, err = call("--model", MODEL, "--output", "m.pt2", *words)
    assert code == 2
    assert f"{words[0]} is of ONNX files alone, and --output m.pt2 is an archive" in err
    assert not Path("m.pt2").exists()


def test_a_checkpoint_in_int8_is_refused(call: Call) -> None:
    from int8 import quantize_model, stored

    model = quantize_model(build_model(MODEL, len(NAMES), None).eval(), "dynamic")
    save_checkpoint("q.safetensors", {"model": stored(model), "model_name": MODEL, "img_size": 32})
    code, _, err = call("--checkpoint", "q.safetensors", "--output", "m.onnx")
    assert code == 2
    assert "q.safetensors is in int8 already: export the checkpoint that it was made from" in err


def test_a_difference_above_the_tolerance_is_an_error(call: Call) -> None:
    write_checkpoint()
    code, out, _ = call("--checkpoint", "w.safetensors", "--output", "m.onnx", "--tolerance", "0")
    assert code == 1
    assert "OUT OF the tolerance of 0" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--output", "m.pb"), "must end in .onnx or .pt2"),
        (("--output", "there/m.onnx"), "no folder there"),
        (("--output", "m.onnx", "--model", "vim_pico_patch4_23"), "vim_pico_patch4_32"),
        (("--output", "m.onnx", "--checkpoint", "none.pth"), "none.pth"),
        (("--output", "m.onnx", "--model", MODEL, "--image", "none.png"), "none.png"),
        (("--output", "m.onnx", "--model", MODEL, "--opset", "9"), "--opset must be from 18 to"),
        (("--output", "m.onnx", "--model", MODEL, "--opset", "999"), "--opset must be from 18 to"),
        (("--output", "m.onnx", "--checkpoint", "other.onnx"), "other.onnx is an ONNX file already"),
        (("--output", "m.onnx", "--scan", "cumsum"), "invalid choice"),
        (("--output", "m.onnx", "--tolerance", "-1"), "a number from 0 on"),
    ],
)
def test_bad_input_is_one_sentence(call: Call, words: tuple[str, ...], said: str) -> None:
    code, _, err = call(*words)
    assert code == 2
    assert said in [line for line in err.splitlines() if "error: " in line][-1]
    assert "Traceback" not in err
    assert not Path("m.onnx").exists()


def test_without_the_packages_it_says_how_to_install_them(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else found(name))
    code, _, err = call("--output", "m.onnx", "--model", MODEL)
    assert code == 2
    assert "the export needs onnxscript" in err
    assert "pip install onnxscript" in err
    with pytest.raises(ImportError, match="needs onnxscript"):
        export.onnx_translations()


def test_a_failed_export_keeps_the_older_file(call: Call) -> None:
    Path("m.onnx").write_bytes(b"older")
    code, _, _ = call("--output", "m.onnx", "--model", MODEL, "--opset", "9")
    assert code == 2
    assert Path("m.onnx").read_bytes() == b"older"


def test_help_names_the_schemes(call: Call) -> None:
    code, out, _ = call("-h")
    assert code == 0
    assert "{chunks,steps}" in out
