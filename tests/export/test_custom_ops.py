"""The native kernels as operators of ONNX Runtime: each against its definition in fp64, and whole models with them."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mamba_ssm
import small_vim
from causal_conv1d.reference import conv1d_reference
from mamba_ssm.ops.export import export_onnx
from mamba_ssm.ops.reference import ROUTES, scan_2d_reference, scan_reference

onnx = pytest.importorskip("onnx", reason="onnx is not installed: no operator of ONNX Runtime is tested")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: its operators are not tested")

LIBRARY = Path(mamba_ssm.__file__).parent / "kernels.onnxruntime.so"
STRONG = 50.0  # delta * |A| of one step
NAMES = {
    "BidirectionalInner": ["xz"]
    + [
        f"{name}{end}"
        for end in ("", "_b")
        for name in ("conv_weight", "conv_bias", "x_proj", "dt_proj", "A_log", "D", "dt_bias")
    ],
    "SelectiveScan2D": ["x", "projected", "dt_weight", "A", "D", "dt_bias"],
    "SelectiveScan": ["u", "delta", "A", "B", "C", "D", "delta_bias", "z"],
}
Inputs = Sequence[Tensor | None]


def _why_not_built() -> str:
    try:
        reasons = importlib.import_module("mamba_ssm._build").REASONS
    except ImportError:
        reasons = {}
    return f"mamba_ssm comes without its ONNX Runtime ops: {reasons.get('onnxruntime', 'they were not built')}"


pytestmark = [
    pytest.mark.skipif(not LIBRARY.is_file(), reason=_why_not_built()),
    pytest.mark.filterwarnings("ignore"),  # torch.onnx and onnxscript warn about themselves
]


def options(threads: int = 1, library: bool = True) -> Any:
    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    made.log_severity_level = 4  # what a node refuses is raised
    if library:
        made.register_custom_ops_library(str(LIBRARY))
    return made


def model_of(op: str, inputs: Inputs, outputs: int = 1, functions: Sequence[Any] = (), **attributes: Any) -> bytes:
    """A graph of one node, whose inputs are of any size."""
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    given = [name if value is not None else "" for name, value in zip(NAMES[op], inputs, strict=False)]
    sides = [
        helper.make_tensor_value_info(name, float32, [f"{name}_{axis}" for axis in range(value.dim())])
        for name, value in zip(given, inputs, strict=True)
        if value is not None
    ]
    names = [f"out_{index}" for index in range(outputs)]
    node = helper.make_node(op, given, names, domain="mamba_ssm", **attributes)
    results = [helper.make_tensor_value_info(name, float32, None) for name in names]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mamba_ssm", 1)]
    graph = helper.make_graph([node], "one", sides, results)
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return bytes(made.SerializeToString())


def session_of(op: str, inputs: Inputs, threads: int = 1, **traits: Any) -> Any:
    return onnxruntime.InferenceSession(model_of(op, inputs, **traits), options(threads))


def feed(op: str, inputs: Inputs) -> dict[str, Any]:
    named = zip(NAMES[op], inputs, strict=False)
    return {name: value.numpy() for name, value in named if value is not None}


def run(op: str, inputs: Inputs, threads: int = 1, **traits: Any) -> list[Tensor]:
    found = session_of(op, inputs, threads, **traits).run(None, feed(op, inputs))
    return [torch.from_numpy(value) for value in found]


def assert_near(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype is torch.float32
    if found.numel():
        error = (found - expected).abs().max().item()
        assert error <= 2e-6 * max(1.0, expected.abs().max().item()), error


def wide(inputs: Inputs) -> list[Any]:
    return [None if value is None else value.double() for value in inputs]


def rates(*shape: int) -> Tensor:
    return -torch.rand(*shape) * 4 - 0.1


# --- a block with two directions ------------------------------------------------------------------------------------


def direction(e: int, n: int, r: int, w: int, extras: str) -> list[Tensor | None]:
    """The parameters of one direction; `extras` names those of the optional ones that are there."""
    conv_bias, D, dt_bias = (torch.randn(e) if letter in extras else None for letter in "cDd")
    weights = (torch.randn(e, 1, w), torch.randn(r + 2 * n, e) * 0.3, torch.randn(e, r), torch.randn(e, n))
    return [weights[0], conv_bias, *weights[1:], D, dt_bias]


def inner_inputs(b: int, l: int, e: int, n: int, r: int, w: int, ahead: str = "cDd", back: str = "cDd") -> Inputs:  # noqa: E741
    return [torch.randn(l, b, 2 * e), *direction(e, n, r, w, ahead), *direction(e, n, r, w, back)]


def inner_definition(xz: Tensor, *parameters: Any, scale: float) -> Tensor:
    x, z = xz.permute(1, 2, 0).chunk(2, 1)
    total = torch.zeros_like(x)
    for reverse in (False, True):
        taps, conv_bias, x_proj, dt_proj, A_log, D, dt_bias = parameters[7 * reverse :][:7]
        u = conv1d_reference(x, taps.squeeze(1), conv_bias, silu=True, reverse=reverse)
        projected = torch.einsum("bdl,pd->bpl", u, x_proj)
        r, B, C = projected.split([dt_proj.shape[1], A_log.shape[1], A_log.shape[1]], 1)
        scan = (u, torch.einsum("brl,dr->bdl", r, dt_proj), -A_log.exp(), B, C, D, z, dt_bias)
        total = total + scan_reference(*scan, delta_softplus=True, reverse=reverse)[0]
    return (total * scale).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("b", "l", "e", "n", "r", "w"),
    [(1, 1, 1, 1, 1, 1), (3, 37, 21, 5, 3, 4), (1, 197, 40, 16, 2, 4), (2, 33, 16, 4, 1, 2), (1, 3, 8, 2, 2, 7)],
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_block_of_any_size(b: int, l: int, e: int, n: int, r: int, w: int, scale: float) -> None:  # noqa: E741
    inputs = inner_inputs(b, l, e, n, r, w)
    assert_near(run("BidirectionalInner", inputs, scale=scale)[0], inner_definition(*wide(inputs), scale=scale))


@pytest.mark.parametrize(("ahead", "back"), [("", ""), ("c", "Dd"), ("D", "c"), ("d", ""), ("cDd", ""), ("", "cDd")])
def test_a_block_without_some_of_its_parameters(ahead: str, back: str) -> None:
    inputs = inner_inputs(2, 19, 12, 3, 2, 4, ahead, back)
    assert_near(run("BidirectionalInner", inputs, scale=1.0)[0], inner_definition(*wide(inputs), scale=1.0))


def test_a_block_keeps_its_state_under_a_strong_decay() -> None:
    inputs = list(inner_inputs(1, 300, 9, 4, 1, 4, "", ""))
    for first in (1, 8):
        inputs[first + 4] = torch.logspace(-2, 0, 36).view(9, 4).mul(STRONG).log()
    assert_near(run("BidirectionalInner", inputs, scale=1.0)[0], inner_definition(*wide(inputs), scale=1.0))


@pytest.mark.parametrize(
    ("b", "l", "e", "n", "r"),
    [(0, 7, 4, 2, 1), (2, 0, 4, 2, 1), (2, 7, 0, 2, 1), (2, 7, 4, 0, 1), (2, 7, 4, 2, 0), (2, 7, 4, 0, 0)],
)
def test_a_block_of_size_zero(b: int, l: int, e: int, n: int, r: int) -> None:  # noqa: E741
    inputs = inner_inputs(b, l, e, n, r, 3)
    found = run("BidirectionalInner", inputs, scale=1.0)[0]
    assert found.shape == (l, b, e)
    if found.numel():
        assert_near(found, inner_definition(*wide(inputs), scale=1.0))


# --- a picture in four directions -----------------------------------------------------------------------------------


def picture_inputs(b: int, h: int, w: int, d: int, n: int, r: int, extras: str = "Dd") -> Inputs:
    D, dt_bias = (torch.randn(4, d) if letter in extras else None for letter in "Dd")
    projected = torch.randn(b, h, w, 4, r + 2 * n) * 0.3
    return [torch.randn(b, h, w, d), projected, torch.randn(4, d, r), rates(4, d, n), D, dt_bias]


@pytest.mark.parametrize("directions", ROUTES)
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1, 1), (3, 5, 13, 21, 1, 3), (1, 14, 9, 33, 4, 6), (2, 1, 7, 8, 2, 1)])
@pytest.mark.parametrize("extras", ["Dd", "D", "d", ""])
def test_a_picture_of_any_size(directions: str, size: tuple[int, ...], extras: str) -> None:
    inputs = picture_inputs(*size, extras)
    assert_near(run("SelectiveScan2D", inputs, directions=directions)[0], scan_2d_reference(*wide(inputs), directions))


def test_a_picture_keeps_its_state_under_a_strong_decay() -> None:
    inputs = list(picture_inputs(1, 17, 19, 5, 3, 1, ""))
    inputs[3] = -torch.logspace(-2, 0, 60).view(4, 5, 3) * STRONG
    assert_near(run("SelectiveScan2D", inputs, directions="cross")[0], scan_2d_reference(*wide(inputs), "cross"))


@pytest.mark.parametrize("size", [(0, 5, 3, 4, 2, 1), (2, 0, 3, 4, 2, 1), (2, 5, 3, 0, 2, 1), (2, 5, 3, 4, 0, 1)])
def test_a_picture_of_size_zero(size: tuple[int, ...]) -> None:
    inputs = picture_inputs(*size)
    found = run("SelectiveScan2D", inputs, directions="cross")[0]
    assert found.shape == size[:4]
    if found.numel():
        assert_near(found, scan_2d_reference(*wide(inputs), "cross"))


# --- one sequence ---------------------------------------------------------------------------------------------------


def scan_inputs(b: int, d: int, l: int, n: int, g: int, varying: str = "BC", extras: str = "Ddz") -> Inputs:  # noqa: E741
    """`varying` names those of B and C that are not constant, `extras` the optional inputs that are there."""
    B, C = (torch.randn(b, g, n, l) if name in varying else torch.randn(d, n) for name in "BC")
    D, bias = (torch.randn(d) if name in extras else None for name in "Dd")
    z = torch.randn(b, d, l) if "z" in extras else None
    return [torch.randn(b, d, l), torch.rand(b, d, l), rates(d, n), B, C, D, bias, z]


def scan_definition(inputs: Inputs, softplus: int, reverse: int) -> tuple[Tensor, Tensor]:
    *others, D, bias, z = wide(inputs)
    return scan_reference(*others, D, z, bias, delta_softplus=bool(softplus), reverse=bool(reverse))


def check_scan(inputs: Inputs, softplus: int = 1, reverse: int = 0) -> None:
    switches = {"softplus": softplus, "reverse": reverse}
    found = run("SelectiveScan", inputs, outputs=2, **switches)
    for value, expected in zip(found, scan_definition(inputs, **switches), strict=True):
        assert_near(value, expected)
    (alone,) = run("SelectiveScan", inputs, outputs=1, **switches)
    assert torch.equal(alone, found[0])


@pytest.mark.parametrize("softplus", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize("size", [(1, 1, 1, 1, 1), (3, 6, 37, 5, 2), (2, 40, 65, 16, 1), (1, 21, 33, 2, 3)])
def test_a_scan_of_any_size(softplus: int, reverse: int, size: tuple[int, ...]) -> None:
    extras = "Ddz" if softplus else "Dz"  # steps as they come must not be negative
    check_scan(scan_inputs(*size, extras=extras), softplus, reverse)


@pytest.mark.parametrize("varying", ["BC", "B", "C", ""])
@pytest.mark.parametrize("extras", ["", "D", "d", "z", "dz"])
def test_a_scan_with_every_kind_of_input(varying: str, extras: str) -> None:
    check_scan(scan_inputs(2, 6, 19, 3, 2, varying, extras))


@pytest.mark.parametrize("reverse", [0, 1])
def test_a_scan_keeps_its_state_under_a_strong_decay(reverse: int) -> None:
    inputs = list(scan_inputs(2, 5, 300, 4, 1, extras=""))
    inputs[1] = torch.rand(2, 5, 300) ** 6
    inputs[2] = -torch.logspace(-2, 0, 20).view(5, 4) * STRONG
    check_scan(inputs, softplus=0, reverse=reverse)


@pytest.mark.parametrize("size", [(0, 4, 7, 2, 1), (2, 0, 7, 2, 1), (2, 4, 0, 2, 1), (2, 4, 7, 0, 1)])
def test_a_scan_of_size_zero(size: tuple[int, ...]) -> None:
    b, d, l, n, _ = size  # noqa: E741
    inputs = scan_inputs(*size)
    y, last = run("SelectiveScan", inputs, outputs=2, softplus=1, reverse=0)
    assert (y.shape, last.shape) == ((b, d, l), (b, d, n))
    if y.numel():
        assert_near(y, scan_definition(inputs, 1, 0)[0])
    assert not last.any()


# --- threads --------------------------------------------------------------------------------------------------------

CALLS: dict[str, tuple[Callable[[int], Inputs], dict[str, Any]]] = {
    "BidirectionalInner": (lambda b: inner_inputs(b, 197, 40, 16, 3, 4), {"scale": 0.5}),
    "SelectiveScan2D": (lambda b: picture_inputs(b, 14, 13, 40, 1, 3), {"directions": "cross"}),
    "SelectiveScan": (lambda b: scan_inputs(b, 40, 131, 4, 2), {"softplus": 1, "reverse": 1, "outputs": 2}),
}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_numbers_are_the_same_for_any_number_of_threads(op: str, batch: int) -> None:
    """In every call, also after a node has learnt how many threads its session has."""
    make, traits = CALLS[op]
    inputs = make(batch)
    expected = run(op, inputs, 1, **traits)
    for threads in (1, 2, 5):
        session = session_of(op, inputs, threads, **traits)
        for _ in range(70):
            for value, first in zip(session.run(None, feed(op, inputs)), expected, strict=True):
                assert torch.equal(torch.from_numpy(value), first)


@pytest.mark.parametrize("op", CALLS)
def test_a_session_runs_several_calls_at_once(op: str) -> None:
    make, traits = CALLS[op]
    batches = [make(batch) for batch in (1, 2, 3, 4)]
    session = session_of(op, batches[0], 2, **traits)
    alone = [run(op, inputs, **traits) for inputs in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda inputs: session.run(None, feed(op, inputs)), batches * 10))
    for values, expected in zip(found, alone * 10, strict=True):
        assert all(torch.equal(torch.from_numpy(a), b) for a, b in zip(values, expected, strict=True))


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the threads of a process are counted on Linux")
@pytest.mark.parametrize("op", CALLS)
def test_a_node_works_on_the_threads_of_its_session_and_no_others(op: str, tmp_path: Path) -> None:
    make, traits = CALLS[op]
    inputs = make(24)
    made = {threads: options(threads) for threads in (1, 2)}
    for threads, settings in made.items():
        settings.enable_profiling = True
        settings.profile_file_prefix = str(tmp_path / f"profile_{threads}")
    graph = model_of(op, inputs, **traits)
    sessions = {threads: onnxruntime.InferenceSession(graph, settings) for threads, settings in made.items()}
    before = os.listdir("/proc/self/task")
    seen = {}
    for threads, session in sessions.items():
        for _ in range(100):
            session.run(None, feed(op, inputs))
        events = json.loads(Path(session.end_profiling()).read_text())
        seen[threads] = [event["args"].get("thread_scheduling_stats") for event in events if op in event["name"]]
    assert set(os.listdir("/proc/self/task")) <= set(before)
    assert len(seen[1]) == 100
    assert not any(seen[1])
    if len(os.sched_getaffinity(0)) > 1:
        workers = [worker for stats in seen[2] for worker in stats["sub_threads"].values()]
        assert any(worker["num_run"] > 0 for worker in workers)


# --- what is refused ------------------------------------------------------------------------------------------------

WRONG = [
    ("BidirectionalInner", 0, (19, 24), r"`xz` must have shape \(l, b, 2 e\) = \(any, any, 24\), got \(19, 24\)"),
    ("BidirectionalInner", 0, (19, 2, 23), r"`xz` must have shape \(l, b, 2 e\) = \(any, any, 24\), got \(19, 2, 23\)"),
    ("BidirectionalInner", 0, (), r"`xz` must have shape \(l, b, 2 e\) = \(any, any, 24\), got \(\)"),
    ("BidirectionalInner", 1, (12, 2, 4), r"`conv_weight` must have shape \(e, 1, w\) = \(12, 1, any\), got \(12, 2"),
    ("BidirectionalInner", 1, (12, 1, 0), "`conv_weight` must have a width w of 1 or more"),
    ("BidirectionalInner", 2, (11,), r"`conv_bias` must have shape \(e,\) = \(12,\), got \(11,\)"),
    ("BidirectionalInner", 3, (7, 12), r"`x_proj` must have shape \(r \+ 2 n, e\) = \(8, 12\), got \(7, 12\)"),
    ("BidirectionalInner", 4, (2, 12), r"`dt_proj` must have shape \(e, r\) = \(12, any\), got \(2, 12\)"),
    ("BidirectionalInner", 5, (12,), r"`A_log` must have shape \(e, n\), got \(12,\)"),
    (
        "BidirectionalInner",
        8,
        (12, 1, 3),
        r"`conv_weight_b` must have shape \(e, 1, w\) = \(12, 1, 4\), got \(12, 1, 3",
    ),
    ("BidirectionalInner", 12, (12, 4), r"`A_log_b` must have shape \(e, n\) = \(12, 3\), got \(12, 4\)"),
    ("BidirectionalInner", 14, (1, 1, 1, 1, 1, 1), r"`dt_bias_b` must have shape \(e,\) = \(12,\), got \(1, 1, 1, 1"),
    ("SelectiveScan2D", 0, (5, 13, 6), r"`x` must have shape \(b, h, w, d\), got \(5, 13, 6\)"),
    ("SelectiveScan2D", 0, (2, 13, 5, 6), r"`projected` must have shape .* = \(2, 13, 5, 4, 6\), got \(2, 5, 13, 4, 6"),
    ("SelectiveScan2D", 1, (2, 5, 13, 3, 6), r"`projected` must have shape .* = \(2, 5, 13, 4, 6\)"),
    ("SelectiveScan2D", 2, (4, 6, 0), "`dt_weight` must have a rank r of 1 or more"),
    ("SelectiveScan2D", 2, (3, 6, 2), r"`dt_weight` must have shape \(4, d, r\) = \(4, 6, any\), got \(3, 6, 2\)"),
    ("SelectiveScan2D", 3, (4, 5, 2), r"`A` must have shape \(4, d, n\) = \(4, 6, any\), got \(4, 5, 2\)"),
    ("SelectiveScan2D", 4, (6,), r"`D` must have shape \(4, d\) = \(4, 6\), got \(6,\)"),
    ("SelectiveScan2D", 5, (4, 7), r"`dt_bias` must have shape \(4, d\) = \(4, 6\), got \(4, 7\)"),
    ("SelectiveScan", 0, (2, 6), r"`u` must have shape \(b, d, l\), got \(2, 6\)"),
    ("SelectiveScan", 1, (2, 6, 18), r"`delta` must have shape \(b, d, l\) = \(2, 6, 19\), got \(2, 6, 18\)"),
    ("SelectiveScan", 2, (5, 3), r"`A` must have shape \(d, n\) = \(6, any\), got \(5, 3\)"),
    (
        *("SelectiveScan", 3, (2, 2, 3, 18)),
        r"`B` must have shape .* or \(d, n\) = \(2, any, 3, 19\) or \(6, 3\), got \(2, 2, 3, 18\)",
    ),
    ("SelectiveScan", 3, (2, 3, 19), r"`B` must have shape .* got \(2, 3, 19\)"),
    ("SelectiveScan", 3, (2, 4, 3, 19), r"`C` must have shape .* = \(2, 4, 3, 19\) or \(6, 3\), got \(2, 2, 3, 19\)"),
    ("SelectiveScan", 4, (6, 4), r"`C` must have shape .* = \(2, 2, 3, 19\) or \(6, 3\), got \(6, 4\)"),
    ("SelectiveScan", 5, (6, 1), r"`D` must have shape \(d,\) = \(6,\), got \(6, 1\)"),
    ("SelectiveScan", 6, (5,), r"`delta_bias` must have shape \(d,\) = \(6,\), got \(5,\)"),
    ("SelectiveScan", 7, (2, 6, 20), r"`z` must have shape \(b, d, l\) = \(2, 6, 19\), got \(2, 6, 20\)"),
]
SMALL: dict[str, tuple[Callable[[], Inputs], dict[str, Any]]] = {
    "BidirectionalInner": (lambda: inner_inputs(2, 19, 12, 3, 2, 4), {"scale": 1.0}),
    "SelectiveScan2D": (lambda: picture_inputs(2, 5, 13, 6, 2, 2), {"directions": "cross"}),
    "SelectiveScan": (lambda: scan_inputs(2, 6, 19, 3, 2), {"softplus": 1, "reverse": 0}),
}
REQUIRED = [
    *(("BidirectionalInner", index) for index in (0, 1, 3, 4, 5, 8, 10, 11, 12)),
    *(("SelectiveScan2D", index) for index in range(4)),
    *(("SelectiveScan", index) for index in range(5)),
]


@pytest.mark.parametrize(("op", "index", "shape", "sentence"), WRONG)
def test_a_wrong_shape_is_a_sentence(op: str, index: int, shape: tuple[int, ...], sentence: str) -> None:
    make, traits = SMALL[op]
    inputs = list(make())
    inputs[index] = torch.randn(shape)
    with pytest.raises(Exception, match=rf"while running {op} node.*{sentence}"):
        run(op, inputs, **traits)


def test_groups_that_do_not_divide_the_channels_are_refused() -> None:
    with pytest.raises(Exception, match="its 6 channels are not divisible by 4 groups"):
        run("SelectiveScan", scan_inputs(2, 6, 19, 3, 4), softplus=1, reverse=0)
    with pytest.raises(Exception, match="its 6 channels are not divisible by 0 groups"):
        run("SelectiveScan", scan_inputs(2, 6, 19, 3, 0), softplus=1, reverse=0)


@pytest.mark.parametrize(("op", "index"), REQUIRED)
def test_a_missing_input_is_refused_when_the_session_is_made(op: str, index: int) -> None:
    make, traits = SMALL[op]
    inputs = list(make())
    inputs[index] = None
    with pytest.raises(Exception, match=f"Node.*input {index} is marked single but has an empty string"):
        session_of(op, inputs, **traits)


@pytest.mark.parametrize(
    ("op", "attributes", "sentence"),
    [
        ("BidirectionalInner", {}, "attribute `scale` is missing or of another type"),
        ("BidirectionalInner", {"scale": 1}, "attribute `scale` is missing or of another type"),
        ("SelectiveScan2D", {}, "attribute `directions` is missing or of another type"),
        (
            *("SelectiveScan2D", {"directions": "cros"}),
            'attribute `directions` must be cross, rows or both, got "cros"',
        ),
        ("SelectiveScan", {"reverse": 0}, "attribute `softplus` is missing or of another type"),
        ("SelectiveScan", {"softplus": 1}, "attribute `reverse` is missing or of another type"),
        ("SelectiveScan", {"softplus": 1, "reverse": 2}, "attribute `reverse` must be 0 or 1, got 2"),
    ],
)
def test_a_wrong_attribute_is_a_sentence(op: str, attributes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Exception, match=sentence):
        run(op, SMALL[op][0](), **attributes)


def test_another_dtype_is_refused_when_the_session_is_made() -> None:
    helper = onnx.helper
    model = onnx.load_from_string(model_of("SelectiveScan", SMALL["SelectiveScan"][0](), softplus=1, reverse=0))
    for side in model.graph.input:
        side.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert helper.printable_graph(model.graph)
    with pytest.raises(Exception, match="tensor\\(double\\)"):
        onnxruntime.InferenceSession(model.SerializeToString(), options())


def test_an_older_onnxruntime_is_refused_with_a_sentence() -> None:
    """Here one that has the first version of its interface alone, and of that the first function."""
    said: list[tuple[int, bytes]] = []
    status = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)(lambda *given: said.append(given) or 1)
    table, version = ctypes.cast(status, ctypes.c_void_p), ctypes.create_string_buffer(b"1.16.3")
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)(
        lambda number: ctypes.addressof(table) if number == 1 else None
    )
    get_version = ctypes.CFUNCTYPE(ctypes.c_void_p)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(function, ctypes.c_void_p).value for function in (get_api, get_version)))
    ctypes.CDLL(str(LIBRARY)).RegisterCustomOps(None, base)
    assert said == [(1, b"these ops need onnxruntime 1.17 or later, and this is 1.16.3")]


# --- what is said of the library ------------------------------------------------------------------------------------

REPORT = (
    "import runpy, sys; import mamba_ssm.ops.export as export; sys.argv = ['mamba_ssm'];"
    "export.custom_ops_library = {}; runpy.run_module('mamba_ssm', run_name='__main__')"
)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            "export.custom_ops_library",
            f"ONNX files run on the operators of {LIBRARY.resolve()}, where it is registered",
        ),
        ("lambda: None", "ONNX files run on their own definitions: the operators were not built"),
    ],
)
def test_the_report_says_whether_there_are_operators(found: str, said: str) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", REPORT.format(found)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == said


# --- with definitions in the file -----------------------------------------------------------------------------------


def test_the_kernel_takes_the_place_of_the_definition_in_the_file() -> None:
    """The definition here is a wrong one, to tell which of them ran."""
    helper = onnx.helper
    make, traits = SMALL["SelectiveScan2D"]
    inputs = make()
    zero = helper.make_node("Sub", ["x", "x"], ["y"])
    opsets = [helper.make_opsetid("", 18)]
    function = helper.make_function("mamba_ssm", "SelectiveScan2D", NAMES["SelectiveScan2D"], ["y"], [zero], opsets)
    function.attribute.append("directions")
    graph = model_of("SelectiveScan2D", inputs, functions=[function], **traits)
    fed = feed("SelectiveScan2D", inputs)
    (plain,) = onnxruntime.InferenceSession(graph, options(library=False)).run(None, fed)
    (fast,) = onnxruntime.InferenceSession(graph, options()).run(None, fed)
    assert not plain.any()
    assert_near(torch.from_numpy(fast), scan_2d_reference(*wide(inputs), "cross"))


def small_vmamba(**traits: Any) -> nn.Module:
    from vmamba import VSSM

    sizes = {"depths": (1, 1, 2, 1), "dims": 8, "num_classes": 5, "ssm_d_state": 1}
    names = {"norm_layer": "ln2d", "downsample_version": "v3", "patchembed_version": "v2"}
    return VSSM(**{**sizes, **names, "forward_type": "v05_noz", **traits}).eval()


MODELS = {
    "vim": (lambda: small_vim.small_model(), {"BidirectionalInner"}),
    "vim, v1": (lambda: small_vim.small_model(bimamba_type="v1"), {"SelectiveScan"}),
    "vim, one direction": (lambda: small_vim.small_model(bimamba_type="none", if_rope=True), {"SelectiveScan"}),
    "vmamba": (lambda: small_vmamba(), {"SelectiveScan2D"}),
    "vmamba, the first": (
        lambda: small_vmamba(forward_type="v0", ssm_d_state=2, norm_layer="ln"),
        {"SelectiveScan", "SelectiveScan2D"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_file_gives_the_same_with_and_without_the_library(name: str) -> None:
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: no model is exported")
    make, possible = MODELS[name]
    model = make()
    proto = export_onnx(model, small_vim.pictures(batch=1)).model_proto
    used = {node.op_type.partition("_")[0] for node in proto.graph.node if node.domain == "mamba_ssm"}
    assert used
    assert used <= possible
    graph = proto.SerializeToString()
    plain, fast = (onnxruntime.InferenceSession(graph, options(library=library)) for library in (False, True))
    for batch in (1, 3):
        x = small_vim.pictures(batch=batch)
        a, b = (torch.from_numpy(session.run(None, {"input": x.numpy()})[0]) for session in (plain, fast))
        assert (a - b).abs().max().item() <= 1e-5 * max(1.0, a.abs().max().item())
        with torch.no_grad():
            assert (b - model(x)).abs().max().item() <= 1e-5 * max(1.0, a.abs().max().item())
