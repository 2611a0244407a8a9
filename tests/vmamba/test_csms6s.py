"""The scan by the names of VMamba's code, against the definition in fp64."""

import pytest
import torch
from torch import nn

from causal_conv1d import backend as backends
from mamba_ssm.ops.reference import scan_reference
from tolerances import RELATIVE, assert_close
from vmamba import csms6s
from vmamba.cross_scan import cross_merge_fn, cross_scan_fn

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def arguments(
    groups=4, d=3, states=2, length=21, batch=2, delta_channels=None, dtype=torch.float32, bare=False, softplus=True
):
    """The tensors of a call, sequences in `dtype` and parameters in fp32."""
    channels = groups * d
    own = delta_channels or channels
    t = {
        "u": torch.randn(batch, channels, length, dtype=dtype),
        "delta": (0.5 * torch.randn(batch, own, length) + (not softplus)).to(dtype),
        "A": -torch.rand(channels, states) * 3 - 0.05,
        "B": torch.randn(batch, groups, states, length, dtype=dtype),
        "C": torch.randn(batch, groups, states, length, dtype=dtype),
        "D": torch.randn(channels),
        "delta_bias": torch.rand(own) - 0.5,
    }
    return {name: value for name, value in t.items() if not bare or name not in ("D", "delta_bias")}


def definition(t, softplus=True):
    """The scan in fp64, channel c with the step sizes of the channel of `delta` that serves it."""
    t = {name: value.double() for name, value in t.items()}
    served = [c * t["delta"].shape[1] // t["u"].shape[1] for c in range(t["u"].shape[1])]
    t["delta"] = t["delta"][:, served]
    if "delta_bias" in t:
        t["delta_bias"] = t["delta_bias"][served]
    return scan_reference(**t, delta_softplus=softplus)[0]


def positional(t):
    return [t.get(name) for name in NAMES]


def test_the_vector_of_the_definition():
    u = torch.tensor([[[1.0, 2, 3, 4]]])
    one = torch.ones(1, 1, 1, 4)
    y = csms6s.selective_scan_fn(u, torch.zeros(1, 1, 4), -torch.ones(1, 1), one, one, torch.ones(1))
    expected = torch.tensor([[[1.6931472, 3.7328680, 5.9458756, 8.2455263]]])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", [None, "oflex", "core", "mamba", "torch"])
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("length", [1, 35])
def test_values_and_gradients(name, softplus, bare, length):
    t = {k: v.requires_grad_() for k, v in arguments(length=length, bare=bare, softplus=softplus).items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    y = csms6s.selective_scan_fn(*positional(t), delta_softplus=softplus, backend=name)
    expected = definition(wide, softplus)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for k, value in t.items():
        assert_close(value.grad, wide[k].grad, limit=2 * RELATIVE[torch.float32])


def test_softplus_is_the_default():
    t = arguments()
    assert_close(csms6s.selective_scan_fn(**t), definition(t))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_sequences(dtype):
    t = arguments(dtype=dtype)
    expected = definition(t)
    wide = csms6s.selective_scan_fn(**t)
    assert wide.dtype is torch.float32
    assert_close(wide, expected)  # computed and returned in fp32: no rounding but that of the inputs
    narrow = csms6s.selective_scan_fn(**t, oflex=False)
    assert narrow.dtype is dtype
    assert_close(narrow, expected, dtype)


def test_fp64_stays_fp64():
    t = {k: v.double() for k, v in arguments().items()}
    y = csms6s.selective_scan_fn(**t)
    assert y.dtype is torch.float64
    assert_close(y, definition(t))


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("own", [1, 2, 4, 6, 12])
def test_step_sizes_that_several_channels_share(own, bare):
    t = {k: v.requires_grad_() for k, v in arguments(delta_channels=own, bare=bare).items()}
    wide = {k: v.detach().double().requires_grad_() for k, v in t.items()}
    y, expected = csms6s.selective_scan_fn(**t), definition(wide)
    assert_close(y, expected)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for k in t:
        assert_close(t[k].grad, wide[k].grad, limit=2 * RELATIVE[torch.float32])


def test_torch_is_forced_and_the_others_are_the_automatic_choice(monkeypatch):
    asked = []
    scan = csms6s.scan

    def noted(*rest):
        asked.append(backends._requested.get())
        return scan(*rest)

    monkeypatch.setattr(csms6s, "scan", noted)
    t = arguments()
    for name in ("torch", None, "oflex", "core", "mamba"):
        csms6s.selective_scan_fn(**t, backend=name)
    assert asked == ["torch", None, None, None, None]


def test_the_names_of_autograd_functions():
    t = arguments()
    half = arguments(dtype=torch.bfloat16)
    for softplus in (True, False):
        expected = definition(t, softplus)
        assert_close(csms6s.SelectiveScanCuda.apply(*positional(t), softplus, True, None), expected)
        assert_close(csms6s.SelectiveScanCuda.apply(*positional(t), softplus, False, "torch"), expected)
        for name in ("SelectiveScanMamba", "SelectiveScanCore", "SelectiveScanOflex"):
            function = getattr(csms6s, name)
            assert_close(function.apply(*positional(t), softplus, 4, 2, True), expected)
            assert_close(function.apply(*positional(t), softplus), expected)
    for function, oflex, dtype in (
        (csms6s.SelectiveScanOflex, True, torch.float32),
        (csms6s.SelectiveScanOflex, False, torch.bfloat16),
        (csms6s.SelectiveScanCore, True, torch.bfloat16),
        (csms6s.SelectiveScanMamba, True, torch.bfloat16),
    ):
        assert function.apply(*positional(half), True, 1, 1, oflex).dtype is dtype
    assert csms6s.SelectiveScanCuda.apply(*positional(half), True, False, None).dtype is torch.bfloat16
    without = definition(t, False)  # the functions, unlike `selective_scan_fn`, have no softplus by default
    assert_close(csms6s.SelectiveScanCuda.apply(*positional(t)), without)
    assert_close(csms6s.SelectiveScanOflex.apply(*positional(t)), without)
    assert_close(csms6s.SelectiveScanCore.apply(*positional(t)), without)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"backend": "offlex"}, "`backend` must be None, 'oflex'.*, got 'offlex'; the nearest is 'oflex'"),
        ({"backend": "cuda"}, "got 'cuda'"),
        ({"delta": torch.zeros(2, 5, 21)}, "`delta` has 5 channels, which do not divide the 12 channels of `u`"),
        ({"delta": torch.zeros(2, 0, 21)}, "`delta` has 0 channels"),
        ({"delta": torch.zeros(2, 4, 21)}, r"`delta_bias` must have shape \(4,\), .*, got \(12,\)"),
        ({"delta": torch.zeros(2, 12, 20)}, "`delta` must have shape"),
        ({"A": torch.zeros(11, 2)}, "`A` must have shape"),
        ({"B": torch.zeros(2, 5, 2, 21)}, "`B` has 5 groups"),
    ],
)
def test_refusals(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        csms6s.selective_scan_fn(**{**arguments(), **change})


# --- cross_selective_scan ---------------------------------------------------------------------------------------------


def mixer(d=5, states=3, rank=2, size=(4, 7), batch=2, dtype=torch.float32):
    """The arguments of `cross_selective_scan` before out_norm."""
    return {
        "x": torch.randn(batch, d, *size, dtype=dtype),
        "x_proj_weight": torch.randn(4, rank + 2 * states, d) / d**0.5,
        "x_proj_bias": 0.3 * torch.randn(4, rank + 2 * states),
        "dt_projs_weight": torch.randn(4, d, rank) / rank**0.5,
        "dt_projs_bias": torch.randn(4, d) - 1,
        "A_logs": 0.5 * torch.randn(4 * d, states),
        "Ds": torch.randn(4 * d),
    }


def steps(t, scans=0):
    """What SS2D is defined to do between its convolution and its out-norm, (b, d, h, w), from the parts."""
    x, A_logs = t["x"], t["A_logs"]
    b, d, h, w = x.shape
    n, r = A_logs.shape[1], t["dt_projs_weight"].shape[2]
    xs = cross_scan_fn(x, scans=scans)
    rows = torch.einsum("bkdl,kcd->bkcl", xs, t["x_proj_weight"])
    if t["x_proj_bias"] is not None:
        rows = rows + t["x_proj_bias"][:, :, None]
    dts, Bs, Cs = rows.split([r, n, n], dim=2)
    dts = torch.einsum("bkrl,kdr->bkdl", dts, t["dt_projs_weight"])
    bias = None if t["dt_projs_bias"] is None else t["dt_projs_bias"].flatten()
    ys, _ = scan_reference(
        xs.flatten(1, 2), dts.flatten(1, 2), -A_logs.exp(), Bs, Cs, t["Ds"], None, bias, delta_softplus=True
    )
    return cross_merge_fn(ys.view(b, 4, d, h, w), scans=scans).view(b, d, h, w)


def widened(t):
    return {k: None if v is None else v.detach().double().requires_grad_() for k, v in t.items()}


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("missing", [(), ("x_proj_bias",), ("dt_projs_bias", "Ds")])
def test_cross_selective_scan_and_its_gradients(scans, missing):
    t = {k: None if k in missing else v.requires_grad_() for k, v in mixer().items()}
    wide = widened(t)
    norm = nn.LayerNorm(5)
    nn.init.normal_(norm.weight)
    y = csms6s.cross_selective_scan(*t.values(), norm, scans=scans)
    own = steps(wide, scans).permute(0, 2, 3, 1)
    expected = nn.functional.layer_norm(own, (5,), norm.weight.double(), norm.bias.double())
    assert_close(y, expected, limit=1e-5)
    dy = torch.randn_like(y)
    y.backward(dy)
    expected.backward(dy.double())
    for k, value in t.items():
        if value is not None:
            assert_close(value.grad, wide[k].grad, limit=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channel_first", [True, False])
def test_layouts(layout, channel_first):
    t = mixer()
    t["x"] = t["x"].to(memory_format=layout)
    y = csms6s.cross_selective_scan(*t.values(), channel_first=channel_first)
    expected = steps(widened(t))
    assert_close(y, expected if channel_first else expected.permute(0, 2, 3, 1), limit=1e-5)
    seen = []
    norm = nn.Identity()
    norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    csms6s.cross_selective_scan(*t.values(), norm, channel_first=channel_first)
    assert seen == [y.shape]


@pytest.mark.parametrize("to_dtype", [True, False])
@pytest.mark.parametrize("force_fp32", [True, False])
def test_narrow_inputs(to_dtype, force_fp32):
    t = mixer(dtype=torch.bfloat16)
    if not force_fp32:
        t = {k: v.bfloat16() if k.startswith("x_") else v for k, v in t.items()}
    y = csms6s.cross_selective_scan(*t.values(), to_dtype=to_dtype, force_fp32=force_fp32)
    assert y.dtype is (torch.bfloat16 if to_dtype else torch.float32)
    limit = 1e-5 if force_fp32 and not to_dtype else 2e-2
    assert_close(y, steps(widened(t)).permute(0, 2, 3, 1), limit=limit)


def test_force_fp32_under_autocast():
    t = mixer()
    expected = steps(widened(t)).permute(0, 2, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(csms6s.cross_selective_scan(*t.values(), force_fp32=True), expected, limit=1e-5)
        rounded = csms6s.cross_selective_scan(*t.values(), nrows=4, backnrows=2)
    assert_close(rounded, expected, limit=3e-2)
    with pytest.raises(AssertionError, match="relative error"):
        assert_close(rounded, expected, limit=1e-4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(2, 5, 28)}, r"`x` must have shape \(b, d, h, w\)"),
        ({"x_proj_weight": torch.zeros(4, 8, 6)}, r"`x_proj_weight` must have shape \(4, r \+ 2 n, d\) with d = 5"),
        ({"x_proj_bias": torch.zeros(32)}, r"`x_proj_bias` must have shape .* = \(4, 8\), got \(32,\)"),
        ({"A_logs": torch.zeros(4, 5, 3)}, r"`A_logs` must have shape \(4 d, n\) with d = 5"),
        ({"Ds": torch.zeros(4, 5)}, r"`Ds` must have shape \(4 d,\) = \(20,\)"),
        ({"dt_projs_weight": torch.zeros(4, 5, 3)}, "`projected` must have shape"),
        ({"dt_projs_bias": torch.zeros(20)}, r"`dt_bias` must have shape \(4, d\)"),
        ({"scans": 3}, "`scans` must be 0 .*, got 3"),
        ({"delta_softplus": False}, "`delta_softplus` must be True, got False"),
    ],
)
def test_refusals_of_cross_selective_scan(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        csms6s.cross_selective_scan(**{**mixer(), **change})


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="cross_selective_scan has no option 'scan'; the nearest is 'scans'"):
        csms6s.cross_selective_scan(**mixer(), scan=1)
    with pytest.raises(TypeError, match="no option 'CrossScan'; the nearest is 'scans'"):
        csms6s.cross_selective_scan(**mixer(), CrossScan=csms6s.SelectiveScanCore)
