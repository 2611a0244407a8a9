"""SS2D by its definition, for every forward type; its parameters; what it records; its dtypes."""

import copy

import pytest
import torch
from models import fill, picture
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from mamba_ssm.ops.reference import scan_reference
from tolerances import GOLDEN_LOGITS, RELATIVE, assert_close
from vmamba import SS2D, SS2Dm0, SS2Dv0, SS2Dv2, SS2Dv3, mamba_init
from vmamba.forward_types import parse_forward_type

SAME = ("v01", "v02", "v03", "v04", "v05", "v1", "v2", "v3", "v4")
SIZES = [(3, 5), (1, 1), (4, 4), (1, 7)]


def mixer(**options):
    """A small mixer with distinct, reproducible weights, in fp64 unless it is changed."""
    defaults = {"d_model": 8, "d_state": 3, "ssm_ratio": 1.5, "dt_rank": 2}
    return fill(SS2D(**{**defaults, **options})).double().eval()


def maps(height=3, width=5, channels=8, batch=2):
    generator = torch.Generator("cpu").manual_seed(3)
    random = torch.randn(batch, height, width, channels, generator=generator, dtype=torch.float64, device="cpu")
    return random.to(torch.get_default_device())


def order(height, width, name):
    """For each direction, the number of the pixel (in reading order) that it visits at each step."""
    rows = torch.arange(height * width).view(height, width)
    lines, columns = rows.flatten(), rows.T.flatten()
    return {
        "cross": [lines, columns, lines.flip(0), columns.flip(0)],
        "rows": [lines] * 4,
        "both": [lines, lines, lines.flip(0), lines.flip(0)],
    }[name]


def scan(op, sequence, k):
    """One direction's scan of (b, l, d), with its own projections."""
    rank, state = op.dt_rank, op.d_state
    d = op.d_inner
    projected = sequence @ op.x_proj_weight[k].T
    if hasattr(op, "x_proj_bias"):
        projected = projected + op.x_proj_bias[k]
    steps, B, C = projected.split([rank, state, state], -1)
    own = slice(k * d, (k + 1) * d)
    y, _ = scan_reference(
        sequence.mT,
        (steps @ op.dt_projs_weight[k].T).mT,
        -op.A_logs[own].exp(),
        B.mT,
        C.mT,
        op.Ds[own],
        delta_bias=op.dt_projs_bias[k],
        delta_softplus=True,
    )
    return y.mT


def scans(op, u, directions):
    b, h, w, d = u.shape
    total = torch.zeros_like(u).view(b, h * w, d)
    for k, visited in enumerate(order(h, w, directions)):
        total = total.index_add(1, visited, scan(op, u.flatten(1, 2)[:, visited], k))
    return total.view(u.shape)


def cascade(op, u):
    for first in (0, 2):
        u = F.layer_norm(u, u.shape[-1:])
        lines = [scan(op, line, first) + scan(op, line.flip(1), first + 1) for line in u.unbind(1)]
        u = torch.stack(lines, 1).transpose(1, 2)
    return u


def definition(op, x, forward_type, act=F.silu):
    """The forward pass of (b, h, w, m) as the specification words it; gradients come from autograd."""
    kind = parse_forward_type(forward_type)
    x = F.linear(x, op.in_proj.weight, op.in_proj.bias)
    if kind.gate:
        x, z = x.chunk(2, -1)
        z = act(z) if kind.gate_act else z
    if op.with_dconv:
        weight, size = op.conv2d.weight, op.d_conv
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, op.conv2d.bias, padding=size // 2, groups=op.d_inner)
        x = x.permute(0, 2, 3, 1)
    x = act(x)
    y = cascade(op, x) if kind.directions == "cascade" else scans(op, x, kind.directions)
    norm = op.out_norm
    if kind.out_norm in ("norm", "oncnorm"):
        affine = norm if kind.out_norm == "norm" else norm[0]
        y = F.layer_norm(y, y.shape[-1:], affine.weight, affine.bias)
    if kind.out_norm in ("ondwconv3", "oncnorm"):
        weight = norm[1 if kind.out_norm == "ondwconv3" else 2].weight
        y = F.conv2d(y.permute(0, 3, 1, 2), weight, padding=1, groups=op.d_inner).permute(0, 2, 3, 1)
    if kind.out_norm == "onsoftmax":
        y = y.flatten(1, 2).softmax(1).view(y.shape)
    if kind.out_norm == "onsigmoid":
        y = y.sigmoid()
    if kind.out_act:
        y = F.gelu(y)
    if kind.gate:
        y = y * z
    return F.linear(y, op.out_proj.weight, op.out_proj.bias)


def check(op, forward_type, x, act=F.silu):
    """Value and every gradient equal those of the definition; the mixer may be in either layout."""
    x = x.clone().requires_grad_()
    expected = definition(op, x, forward_type, act)
    weight = torch.linspace(-1, 2, expected.numel(), dtype=expected.dtype).view(expected.shape)
    parameters = dict(op.named_parameters())
    wanted = torch.autograd.grad((expected * weight).sum(), [x, *parameters.values()])
    given = op(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if op.channel_first else op(x)
    assert_close(given, expected, limit=1e-11)
    found = torch.autograd.grad((given * weight).sum(), [x, *parameters.values()])
    for name, a, b in zip(["x", *parameters], found, wanted, strict=True):
        assert b.abs().max() > 0, f"nothing reaches {name}"
        assert_close(a, b, limit=1e-9)


# ------------------------------------------------------------------------------------------------- forward types


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("forward_type", ["v05", "v05_noz", "v051d_noz", "v052d", "v052dc", "v0"])
def test_definition_in_every_pattern_and_size(forward_type, height, width, channel_first):
    op = mixer(forward_type=forward_type, channel_first=channel_first)
    if (height, width) == (1, 1):  # a single step knows no decay, and only its own pixel's weight of a convolution
        x = maps(height, width)
        given = op(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if channel_first else op(x)
        assert_close(given, definition(op, x, forward_type), limit=1e-11)
    else:
        check(op, forward_type, maps(height, width))


@pytest.mark.parametrize("tags", ["onnone", "ondwconv3", "oncnorm", "onsoftmax", "onsigmoid", "nozact", "oact", "no32"])
@pytest.mark.parametrize("ending", ["", "_noz"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_definition_with_every_postfix(tags, ending, channel_first):
    name = f"v05{ending}_{tags}" if tags in ("oact", "no32") else f"v05_{tags}{ending}"
    check(mixer(forward_type=name, channel_first=channel_first), name, maps())


@pytest.mark.parametrize(
    ("options", "act"),
    [
        ({"d_conv": -1}, F.silu),
        ({"d_conv": 1}, F.silu),
        ({"d_conv": 5}, F.silu),
        ({"conv_bias": False}, F.silu),
        ({"bias": True}, F.silu),
        ({"act_layer": nn.GELU}, F.gelu),
        ({"d_state": 1, "dt_rank": "auto", "ssm_ratio": 2}, F.silu),
    ],
)
def test_definition_with_every_option(options, act):
    check(mixer(forward_type="v05", **options), "v05", maps(4, 3), act)


@pytest.mark.parametrize("name", ["v05", "v052dc"])
def test_a_bias_of_the_projection_is_honoured(name):
    op = mixer(forward_type=name)
    without = op(maps())
    op.x_proj_bias = nn.Parameter(torch.linspace(-1, 1, 4 * 8, dtype=torch.float64).view(4, 8))
    assert (op(maps()) - without).abs().max() > 1e-2
    check(op, name, maps())


@pytest.mark.parametrize("name", [*SAME[1:], "v0", "v0seq", "v05_no32"])
def test_names_of_one_function_give_equal_numbers(name):
    first = mixer(forward_type=SAME[0])
    other = mixer(forward_type=name)
    assert list(other.state_dict()) == list(first.state_dict())
    assert torch.equal(other(maps()), first(maps()))


@pytest.mark.parametrize(("old", "new"), [("v31d", "v051d"), ("v32d", "v052d"), ("v32dc", "v052dc")])
def test_old_names(old, new):
    assert torch.equal(mixer(forward_type=old)(maps()), mixer(forward_type=new)(maps()))
    assert not torch.allclose(mixer(forward_type=new)(maps()), mixer(forward_type="v05")(maps()))


def test_the_default_works():
    assert SS2D(8)(maps().float()).shape == (2, 3, 5, 8)


def test_v0_forces_what_it_forces():
    options = {"d_conv": -1, "conv_bias": False, "act_layer": nn.GELU, "initialize": "v2", "forward_type": "v0"}
    op = SS2D(8, **options)
    assert op.conv2d.weight.shape == (16, 1, 3, 3)
    assert op.conv2d.bias is not None
    assert op.in_proj.weight.shape == (32, 8)
    assert isinstance(op.act, nn.SiLU)
    assert isinstance(op.out_norm, nn.LayerNorm)
    assert torch.equal(op.A_logs[0], torch.arange(1, 17).log())


def test_dropout():
    op = fill(SS2D(8, dropout=0.5))
    assert (op(maps().float()) == 0).any()
    assert not (op.eval()(maps().float()) == 0).any()
    assert (fill(SS2D(8))(maps().float()) != 0).all()


@pytest.mark.parametrize(
    ("options", "first", "total"),
    [
        (
            ("v05_noz", 1, 2, False),
            [-0.24, -0.31671, -0.37607, -0.13552, 0.48272, 0.31854, -0.81696, 0.55507],
            -9.12465,
        ),
        (
            ("v05_noz", 4, 1, False),
            [-0.2012, -0.247, -0.26668, -0.22878, -0.10036, 0.13288, 0.43171, 0.67087],
            -9.37499,
        ),
        (("v05", 2, 2, True), [-0.23378, -0.09065, 0.18485, 0.37876, 0.03848, -0.41757, 0.21534, 0.13147], 1.31236),
    ],
)
@pytest.mark.parametrize("channel_first", [False, True])
def test_golden_numbers(options, first, total, channel_first, backend):
    forward_type, state, ratio, bias = options
    op = SS2D(8, state, ratio, conv_bias=bias, forward_type=forward_type, channel_first=channel_first)
    op = fill(op)
    x = picture(8, 3, 5)
    with torch.no_grad():
        y = op(x) if channel_first else op(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(y[0, :, 0, 0], torch.tensor(first), rtol=0, atol=GOLDEN_LOGITS)
    torch.testing.assert_close(y.sum(), torch.tensor(total), rtol=0, atol=GOLDEN_LOGITS)


@pytest.mark.parametrize("forward_type", ["v05", "v051d_noz", "v052d", "v052dc"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_every_backend_in_single_precision(forward_type, channel_first, backend):
    op = mixer(forward_type=forward_type, channel_first=channel_first, d_model=24)
    x = maps(7, 6, 24)
    expected = definition(op, x, forward_type)
    x = x.float().permute(0, 3, 1, 2) if channel_first else x.float()
    given = op.float()(x)
    assert_close(given.permute(0, 2, 3, 1) if channel_first else given, expected, limit=2e-6)


# ---------------------------------------------------------------------------------------------------- parameters


def shapes(op):
    return {name: tuple(value.shape) for name, value in op.state_dict().items()}


def test_names_and_shapes():
    expected = {
        "x_proj_weight": (4, 6 + 2 * 3, 192),
        "A_logs": (768, 3),
        "Ds": (768,),
        "dt_projs_weight": (4, 192, 6),
        "dt_projs_bias": (4, 192),
        "out_norm.weight": (192,),
        "out_norm.bias": (192,),
        "in_proj.weight": (192, 96),
        "conv2d.weight": (192, 1, 3, 3),
        "out_proj.weight": (96, 192),
    }
    op = SS2D(96, 3, conv_bias=False, forward_type="v05_noz")
    assert list(shapes(op).items()) == list(expected.items())
    assert shapes(SS2D(96, 3, conv_bias=False, forward_type="v05_noz", channel_first=True)) == expected
    gated = shapes(SS2D(96, 3, bias=True))
    assert gated["in_proj.weight"] == (384, 96)
    assert gated.keys() - expected.keys() == {"conv2d.bias", "in_proj.bias", "out_proj.bias"}
    assert "conv2d.weight" not in shapes(SS2D(96, d_conv=-1))


@pytest.mark.parametrize(
    ("tag", "keys"),
    [
        ("onnone", {}),
        ("onsoftmax", {}),
        ("onsigmoid", {}),
        ("ondwconv3", {"out_norm.1.weight": (16, 1, 3, 3)}),
        ("oncnorm", {"out_norm.0.weight": (16,), "out_norm.0.bias": (16,), "out_norm.2.weight": (16, 1, 3, 3)}),
    ],
)
def test_names_of_the_out_norms(tag, keys):
    own = shapes(SS2D(8, forward_type=f"v05_{tag}"))
    assert {key: shape for key, shape in own.items() if key.startswith("out_norm")} == keys


@pytest.mark.parametrize(
    ("width", "rank", "expected"),
    [
        (96, "auto", 6),
        (192, "auto", 12),
        (768, "auto", 48),
        (128, "auto", 8),
        (8, "auto", 1),
        (17, "auto", 2),
        (8, 5, 5),
    ],
)
def test_rank(width, rank, expected):
    assert SS2D(width, dt_rank=rank).dt_rank == expected


def test_initial_values():
    op = SS2D(16, 4, dt_rank=4)
    assert torch.equal(op.A_logs, torch.arange(1, 5).float().log().expand(128, 4))
    assert torch.equal(op.Ds, torch.ones(128))
    steps = F.softplus(op.dt_projs_bias.detach())
    assert steps.min() >= 0.001 * 0.999
    assert steps.max() <= 0.1 * 1.001
    assert steps.log().std() > 1  # log-uniform over two decades
    assert 0.4 < op.dt_projs_weight.abs().max() <= 4**-0.5
    assert op.dt_projs_weight.min() < 0
    bound = 32**-0.5
    assert 0.9 * bound < op.x_proj_weight.abs().max() <= bound
    assert op.x_proj_weight.min() < 0
    assert not torch.equal(op.dt_projs_weight[0], op.dt_projs_weight[1])
    assert not torch.equal(op.x_proj_weight[0], op.x_proj_weight[1])
    assert torch.equal(SS2D(16, 1).A_logs, torch.zeros(128, 1))


def test_options_of_the_steps():
    op = SS2D(16, dt_init="constant", dt_scale=3.0, dt_rank=4, dt_min=0.2, dt_max=0.3)
    assert torch.equal(op.dt_projs_weight, torch.full((4, 32, 4), 1.5))
    steps = F.softplus(op.dt_projs_bias.detach())
    assert 0.199 < steps.min() < 0.21
    assert 0.29 < steps.max() < 0.301
    floored = SS2D(16, dt_min=1e-6, dt_max=1e-5, dt_init_floor=0.05)
    torch.testing.assert_close(F.softplus(floored.dt_projs_bias.detach()), torch.full((4, 32), 0.05))


def test_other_initial_values():
    op = SS2D(16, initialize="v1")
    assert torch.equal(op.Ds, torch.ones(128))
    assert abs(op.A_logs.std() - 1) < 0.1
    for value in (op.dt_projs_weight, op.dt_projs_bias):
        assert abs(value.std() - 0.1) < 0.02
        assert value.min() < 0
    op = SS2D(16, initialize="v2")
    assert torch.equal(op.Ds, torch.ones(128))
    assert torch.equal(op.A_logs, torch.zeros(128, 16))
    for value in (op.dt_projs_weight, op.dt_projs_bias):
        assert 0 <= value.min() < 0.01
        assert 0.09 < value.max() < 0.1


def test_initial_values_by_function():
    assert mamba_init.A_log_init(3, 2).shape == (2, 3)
    assert mamba_init.A_log_init(3, 2, copies=4).shape == (8, 3)
    assert mamba_init.A_log_init(3, 2, copies=4, merge=False).shape == (4, 2, 3)
    assert mamba_init.D_init(2).shape == (2,)
    assert mamba_init.D_init(2, copies=4).shape == (8,)
    assert mamba_init.D_init(2, copies=4, merge=False).shape == (4, 2)
    assert mamba_init.A_log_init(3, 2, device="meta").is_meta
    step = mamba_init.dt_init(2, 6)
    assert (step.weight.shape, step.bias.shape) == ((6, 2), (6,))
    made = mamba_init.init_dt_A_D(3, 2, 6, 1.0, "random", 0.001, 0.1, 1e-4, k_group=2)
    assert [tuple(value.shape) for value in made] == [(12, 3), (12,), (2, 6, 2), (2, 6)]
    with pytest.raises(ValueError, match="`dt_init` must be one of random, constant, got 'uniform'"):
        mamba_init.dt_init(2, 6, dt_init="uniform")


def test_marks_for_optimizers():
    marked = {name for name, value in SS2D(8).named_parameters() if getattr(value, "_no_weight_decay", False)}
    assert marked == {"A_logs", "Ds"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initialize": "v3"}, "`initialize` must be one of v0, v1, v2, got 'v3'"),
        ({"dt_init": "randn"}, "the nearest is 'random'"),
        ({"d_conv": 4}, "`d_conv` must be odd"),
        ({"d_state": 0}, "`d_state` must be at least 1, got 0"),
        ({"ssm_ratio": 0.01}, "`d_inner` must be at least 1, got 0"),
        ({"dt_rank": 0}, "`dt_rank` must be at least 1"),
        ({"dt_rank": "full"}, "`dt_rank` must be a number or 'auto', got 'full'"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        SS2D(8, **options)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="ssm_rank_ratio"):
        SS2D(8, ssm_rank_ratio=2.0)


@pytest.mark.parametrize(
    ("channel_first", "shape"), [(False, (1, 8, 4, 4)), (True, (1, 4, 4, 8)), (False, (4, 4, 8)), (True, (1, 8, 4))]
)
def test_other_shapes_are_refused(channel_first, shape):
    with pytest.raises(ValueError, match="`x` must have shape"):
        SS2D(8, channel_first=channel_first)(torch.zeros(shape))


def test_aliases():
    assert SS2Dv0 is SS2D
    assert SS2Dv2 is SS2D
    for kind in (SS2Dv3, SS2Dm0):
        with pytest.raises(ValueError, match=rf"{kind.__name__} is not offered.*use SS2D"):
            kind(d_model=8)


# ------------------------------------------------------------------------------------------------- dtypes, layouts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["v05", "v05_noz", "v05_oncnorm", "v05_onsoftmax", "v05_onnone_noz_oact", "v052dc", "v0"]
)
def test_a_mixer_in_half_precision(name, dtype):
    op = mixer(forward_type=name)
    expected = op(maps())
    given = op.to(dtype)(maps().to(dtype))
    assert given.dtype is dtype
    assert_close(given, expected, limit=8 * RELATIVE[dtype])
    given.float().sum().backward()
    assert all(p.grad.dtype is dtype and p.grad.isfinite().all() for p in op.parameters())


@pytest.mark.parametrize("name", ["v05", "v05_noz", "v05_oncnorm", "v05_onsigmoid", "v052dc"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_a_mixer_under_autocast(name, channel_first):
    op = mixer(forward_type=name, channel_first=channel_first)
    x = maps().permute(0, 3, 1, 2) if channel_first else maps()
    expected = op(x)
    op.float()
    with torch.autocast("cpu", torch.bfloat16):
        given = op(x.float())
    assert given.dtype is torch.bfloat16
    assert_close(given, expected, limit=8 * RELATIVE[torch.bfloat16])
    given.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in op.parameters())


def test_the_state_of_a_half_precision_scan_is_not_half():
    """A long constant sum: in bf16 it would stop growing after a few hundred steps."""
    op = fill(SS2D(8, 1, forward_type="v05_onnone_noz", d_conv=-1)).bfloat16()
    with torch.no_grad():
        op.A_logs.fill_(-20)  # no decay
        x = torch.ones(1, 1, 4096, 8, dtype=torch.bfloat16)
        given = op._scan(op._convolve(op.in_proj(x)))
        expected = scans(op.double(), F.silu(op.in_proj(x.double())), "cross")
    assert given.dtype is torch.float32
    assert_close(given, expected, limit=3 * RELATIVE[torch.bfloat16])


class Copies(TorchDispatchMode):
    """Counts the operations that do nothing but lay a tensor out anew."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default):
            self.found.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("channel_first", [False, True])
def test_nothing_is_copied_only_to_change_its_layout(channel_first):
    op = mixer(forward_type="v05_noz", channel_first=channel_first).float()
    x = maps().float()
    with torch.no_grad(), Copies() as copies:
        y = op(x.permute(0, 3, 1, 2) if channel_first else x)
    assert copies.found == []
    assert (y.permute(0, 2, 3, 1) if channel_first else y).is_contiguous()


@pytest.mark.parametrize("channel_first", [False, True])
def test_inputs_of_any_strides(channel_first):
    op = mixer(channel_first=channel_first)
    x = maps(6, 10)[:, ::2, ::2]
    x = x.permute(0, 3, 1, 2) if channel_first else x
    assert_close(op(x), op(x.contiguous()))


def test_copies_are_independent():
    op = mixer()
    twin = copy.deepcopy(op)
    twin.out_proj.weight.data.zero_()
    assert twin(maps()).abs().max() == 0
    assert op(maps()).abs().max() > 0


# ------------------------------------------------------------------------------------------------------- recording


@pytest.mark.parametrize("forward_type", ["v05", "v051d", "v052d_noz"])
@pytest.mark.parametrize("channel_first", [False, True])
def test_what_is_recorded(forward_type, channel_first):
    op = mixer(forward_type=forward_type, channel_first=channel_first)
    x = maps().permute(0, 3, 1, 2) if channel_first else maps()
    expected = op(x)
    assert not hasattr(op, "__data__")
    op.__DEBUG__ = True
    assert torch.equal(op(x), expected)
    data = op.__data__
    op.__DEBUG__ = False

    u = op.in_proj(x).permute(0, 2, 3, 1) if channel_first else op.in_proj(x)
    u = F.silu(op.conv2d((u.chunk(2, -1)[0] if op.variant.gate else u).permute(0, 3, 1, 2))).flatten(2)
    visited = order(3, 5, op.variant.directions)
    us = torch.stack([u[..., v] for v in visited], 1)
    assert_close(data["us"], us)
    rows = torch.einsum("bkdl,kcd->bkcl", us, op.x_proj_weight)
    assert_close(data["dts"], torch.einsum("bkrl,kdr->bkdl", rows[:, :, :2], op.dt_projs_weight))
    assert_close(data["Bs"], rows[:, :, 2:5])
    assert_close(data["Cs"], rows[:, :, 5:])
    ys = torch.stack([scan(op, sequence.mT, k).mT for k, sequence in enumerate(us.unbind(1))], 1)
    assert_close(data["ys"], ys.unflatten(-1, (3, 5)), limit=1e-11)
    total = sum(torch.zeros_like(y).index_copy(-1, v, y) for v, y in zip(visited, ys.unbind(1), strict=True))
    assert_close(data["y"], total, limit=1e-11)
    assert torch.equal(data["A_logs"], op.A_logs)
    assert torch.equal(data["Ds"], op.Ds)
    assert torch.equal(data["delta_bias"], op.dt_projs_bias.flatten())
    assert (data["H"], data["W"]) == (3, 5)
    assert not any(value.requires_grad for value in data.values() if isinstance(value, torch.Tensor))
    copy.deepcopy(op)


def test_recording_in_half_precision_and_of_a_cascade():
    op = mixer().bfloat16()
    op.__DEBUG__ = True
    op(maps().bfloat16())
    assert {key: op.__data__[key].dtype for key in ("us", "dts", "ys")} == dict.fromkeys(
        ("us", "dts", "ys"), torch.float32
    )
    op = mixer(forward_type="v052dc")
    op.__DEBUG__ = True
    with pytest.raises(ValueError, match="a cascade scans no picture in four directions"):
        op(maps())
