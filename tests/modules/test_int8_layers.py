"""Quantised layers and models: what is replaced, what a calibration finds, what a state dict holds, what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mamba_ssm.modules import int8
from mamba_ssm.modules.int8 import Int8Conv2d, Int8Linear, Magnitudes, layers_of, prepare, quantize, replace_layers
from mamba_ssm.modules.mamba_simple import Mamba
from models_mamba import VisionMamba
from small_vim import SMALL, pictures, small_model
from vmamba import VSSM
from vmamba.int8 import REPLACEMENTS, Int8SS2D
from vmamba.layers import Linear2d
from vmamba.ss2d import SS2D

SCHEMES = pytest.mark.parametrize("scheme", int8.SCHEMES)


def relative(found, want):
    """The norm of a difference over that of the spread."""
    return float((found - want).norm() / (want - want.mean()).norm())


def small_vmamba(**options) -> VSSM:
    torch.manual_seed(0)
    names = {"downsample_version": "v3", "patchembed_version": "v2", "norm_layer": "ln2d", "forward_type": "v05_noz"}
    sizes = {"depths": (1, 2, 1), "dims": 16, "num_classes": 5, "ssm_d_state": 2}
    return VSSM(**{**sizes, **names, **options}).eval()


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_near_its_plain_one(bias):
    plain = nn.Linear(50, 20, bias=bias)
    layer, x = Int8Linear(plain), torch.randn(3, 4, 50)
    assert relative(layer(x), plain(x)) < 0.015
    assert layer.weight.dtype is torch.int8
    assert (layer.bias is None) == (not bias)
    assert isinstance(layer, nn.Linear)


@torch.no_grad()
def test_a_linear_layer_over_channels_that_come_first():
    plain = Linear2d(12, 7)
    x = torch.randn(2, 12, 5, 3)
    found = Int8Linear(plain, channels_first=True)(x)
    assert found.shape == (2, 7, 5, 3)
    assert relative(found, plain(x)) < 0.02


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 4, "stride": 4},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (3, 5), "stride": (1, 2), "padding": (0, 2), "bias": False},
        {"kernel_size": 1},
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_is_near_its_plain_one(options, layout):
    plain = nn.Conv2d(6, 9, **options)
    x = torch.randn(2, 6, 13, 11).contiguous(memory_format=layout)
    found = Int8Conv2d(plain)(x)
    assert found.shape == plain(x).shape
    assert relative(found, plain(x)) < 0.02


def test_convolutions_of_groups_and_other_kinds_stay():
    kept = [
        nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.Conv1d(4, 4, 3),
    ]  # fmt: skip
    network = nn.Sequential(*kept, nn.Conv2d(4, 4, 3))
    assert replace_layers(network) == ["5"]


@SCHEMES
@torch.no_grad()
def test_a_vim_is_quantised_but_for_its_steps(scheme):
    torch.manual_seed(0)
    model, x = VisionMamba(**SMALL).eval(), pictures()  # with weights as they are drawn, not the golden ones' extremes
    quantised = quantize(copy.deepcopy(model), scheme, [x] * (scheme == "static"))
    names = set(layers_of(quantised))
    mixer = {f"layers.{i}.mixer.{name}" for i in range(4) for name in ("in_proj", "out_proj", "x_proj", "x_proj_b")}
    assert names == {"patch_embed.proj", "head"} | mixer
    assert 0 < relative(quantised(x), model(x)) < 0.05
    steps = [layer.input_step for layer in layers_of(quantised).values()]
    assert all((step is None) == (scheme == "dynamic") for step in steps)


@SCHEMES
@pytest.mark.parametrize("options", [{}, {"norm_layer": "ln"}, {"forward_type": "v2"}, {"downsample_version": "v1"}])
@torch.no_grad()
def test_a_vmamba_is_quantised_with_its_einsum_weight(scheme, options):
    model, x = small_vmamba(**options), pictures(40, 56)
    want = model(x)
    weights = [module.x_proj_weight for module in model.modules() if isinstance(module, SS2D)]
    quantised = quantize(copy.deepcopy(model), scheme, [x] * (scheme == "static"), replacements=REPLACEMENTS)
    mixers = [module for module in quantised.modules() if isinstance(module, SS2D)]
    assert mixers
    assert all(type(mixer) is Int8SS2D for mixer in mixers)
    assert not any("x_proj_weight" in name for name in quantised.state_dict())
    for mixer, weight in zip(mixers, weights, strict=True):
        assert relative(mixer.x_proj_weight, weight) < 0.01
    assert not any(type(m) in (nn.Linear, Linear2d) for m in quantised.modules())
    assert all(m.groups > 1 for m in quantised.modules() if isinstance(m, nn.Conv2d) and not isinstance(m, Int8Conv2d))
    assert 0 < relative(quantised(x), want) < 0.05


@torch.no_grad()
def test_a_mixer_with_a_bias_of_its_projection_and_a_cascade():
    mixer = SS2D(8, d_state=2).eval()
    mixer.x_proj_bias = nn.Parameter(torch.randn(4, mixer.dt_rank + 4))
    x = torch.randn(1, 5, 4, 8)
    want = mixer(x)
    network = quantize(nn.Sequential(mixer).eval(), replacements=REPLACEMENTS)
    assert relative(network(x), want) < 0.05
    assert not any(module.training for module in network.modules())
    cascade = nn.Sequential(SS2D(8, d_state=2, forward_type="v052dc").eval())
    want = cascade(x)
    assert replace_layers(cascade, REPLACEMENTS) == ["0.in_proj", "0.out_proj"]
    assert type(cascade[0]) is SS2D
    assert 0 < relative(cascade(x), want) < 0.05


@SCHEMES
@torch.no_grad()
def test_a_state_dict_is_loaded_into_a_new_model(scheme):
    x = pictures()
    for make, replacements in ((small_model, int8.REPLACEMENTS), (small_vmamba, REPLACEMENTS)):
        quantised = quantize(make(), scheme, [x] * (scheme == "static"), replacements=replacements)
        state = quantised.state_dict()
        fresh = make()
        prepare(fresh, state, replacements)
        fresh.load_state_dict(state)
        assert torch.equal(fresh(x), quantised(x))
        prepare(fresh, state, replacements)  # which has nothing left to do
        fresh.load_state_dict(state)
        assert int8.is_quantized(state)
        assert not int8.is_quantized(make().state_dict())


def test_a_state_dict_of_another_model_is_refused():
    with pytest.raises(ValueError, match="no layer tail"):
        prepare(small_model(), {"tail.weight_scales": torch.ones(3)})


def test_the_size_of_a_state_dict():
    def size(model):
        return sum(value.numel() * value.element_size() for value in model.state_dict().values())

    model = nn.Linear(400, 300)
    assert size(quantize(nn.Sequential(copy.deepcopy(model)).eval())) < 0.27 * size(model)


def test_scales_stay_in_fp32_whatever_the_model_gets():
    model, x = small_model(), pictures()
    quantised = quantize(model, "static", [x])
    scales = quantised.head.weight_scales.clone()
    quantised.to(torch.bfloat16)
    assert torch.equal(quantised.head.weight_scales, scales)
    assert quantised.head.input_step.dtype is torch.float32
    assert quantised.head.weight.dtype is torch.int8
    assert quantised.head.bias.dtype is torch.bfloat16
    with torch.no_grad():
        assert quantised(x.bfloat16()).dtype is torch.bfloat16


@torch.no_grad()
def test_a_calibration_sees_every_batch_and_is_done_once():
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    seen = []
    batches = (seen.append(i) or torch.randn(3, 6) for i in range(4))
    quantize(model, "static", batches)
    assert seen == [0, 1, 2, 3]
    assert model[0].observe is None


def test_the_best_step_has_the_least_squared_error():
    counts = Magnitudes()
    x = torch.cat([torch.randn(100_000), torch.tensor([60.0])])
    counts(x[:1000])
    counts(x[1000:])
    step = counts.best_step()

    def error(step):
        return float(((x / step).round().clamp(-127, 127) * step - x).square().sum())

    assert error(step) <= 1.1 * min(error(60.0 / 127 * 0.9**i) for i in range(40))
    assert step < 60 / 127


def test_the_best_step_may_be_octaves_below_the_largest_number():
    counts = Magnitudes()
    counts(torch.randn(100_000))
    counts.counts *= 10
    counts(torch.tensor([60.0]))
    assert 4 / 127 < counts.best_step() < 15 / 127


def test_a_step_of_few_numbers_covers_them():
    counts = Magnitudes()
    counts(torch.tensor([0.0, -3.0, 2.0, 1e-20]))
    assert counts.best_step() == pytest.approx(3 / 127, rel=0.05)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: quantize(model, "statik"), "must be one of dynamic, static, got 'statik'"),
        (lambda model: quantize(model, "static"), "`calibration` must give"),
        (lambda model: quantize(quantize(model)), "quantised already"),
        (lambda model: quantize(nn.Sequential(nn.ReLU()).eval()), "no linear layer or convolution"),
        (lambda model: quantize(model, "static", [torch.zeros(1, 3, 32, 32)]), "nothing but zeros"),
        (lambda model: quantize(model, "static", [pictures(), pictures() * float("nan")]), "that are not finite"),
        (lambda model: quantize(model, "static", [pictures() * float("inf")]), "that are not finite"),
        (lambda model: quantize(model, "static", pictures()), r"list of batches, got one tensor: write \[batch\]"),
        (lambda model: quantize(model, "dynamic", [pictures()]), 'for the scheme "static"'),
        (lambda model: quantize(model.train()), "is in training mode"),
        (lambda model: quantize(nn.Sequential(model, nn.Dropout().train())), "is in training mode"),
    ],
)
def test_what_cannot_be_quantised_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call(small_model())


def test_a_failed_calibration_leaves_steps_of_each_row():
    model = small_model()
    with pytest.raises(ValueError, match=r"patch_embed\.proj: the calibration saw numbers that are not finite"):
        quantize(model, "static", [pictures() * float("nan")])
    assert all(layer.input_step is None and layer.observe is None for layer in layers_of(model).values())
    assert torch.equal(model(pictures()), quantize(small_model())(pictures()))


@SCHEMES
def test_gradients_need_not_be_turned_off(scheme):
    x = pictures()
    model = quantize(small_model(), scheme, [x] * (scheme == "static"))
    loaded = small_model()
    prepare(loaded, model.state_dict())
    loaded.load_state_dict(model.state_dict())
    with torch.no_grad():
        want = model(x)
    for network in (model, loaded, copy.deepcopy(model)):
        assert torch.equal(network(x), want)
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_a_quantised_layer_is_exported():
    model = quantize(nn.Sequential(nn.Conv2d(3, 6, 2, 2), nn.Flatten(2), nn.Linear(16, 4)).eval())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.export.export(model, (x,)).module()(x), model(x))


def test_numbers_follow_to_another_device_and_layers_keep_the_mode():
    model = quantize(small_model(), "static", [pictures()])
    assert not any(module.training for module in model.modules())
    model.to("meta")
    for layer in layers_of(model).values():
        assert layer.weight.is_meta
        assert layer.weight_scales.is_meta
        assert layer.input_step.is_meta


DAMAGE = [
    *(("head.weight", lambda v, to=to: v.to(to), "must be int8") for to in (
        torch.float32, torch.int32, torch.uint8, torch.bool, torch.float16)),
    ("head.weight", lambda v: torch.full_like(v, -128), "within -127 to 127, and it holds -128"),
    *((name, lambda v, to=to: v.to(to), "must be fp32") for name in ("head.weight_scales", "head.input_step")
        for to in (torch.float64, torch.bfloat16, torch.int32, torch.complex64)),
    *((name, lambda v, by=by: v * by, "finite numbers") for name in ("head.weight_scales", "head.input_step")
        for by in (float("nan"), float("inf"))),
    ("head.weight_scales", lambda v: -v, "must be 0 or more"),
    ("head.weight_scales", lambda v: v[:-1], "must be fp32 of shape"),
    ("head.weight_scales", lambda v: v[:, None], "must be fp32 of shape"),
    ("head.input_step", lambda v: -v, "must be above 0"),
    ("head.input_step", lambda v: v * 0, "must be above 0"),
    ("head.input_step", lambda v: v * 0 + 1e-42, "inverse in fp32"),
    *(("head.input_step", lambda v, count=count: v.expand(count), r"of shape \(\)") for count in (0, 1, 2)),
    ("head.weight_scales", lambda v: None, "weight is int8, as only a weight"),
    ("head.bias", lambda v: v.to(torch.int8), "bias is int8, as only a weight"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_a_damaged_state_dict_is_refused_and_changes_nothing(name, damage, words):
    state = quantize(small_model(), "static", [pictures()]).state_dict()
    state[name] = damage(state[name])
    fresh = small_model()
    with pytest.raises(ValueError, match=rf"head.*{words}"):
        prepare(fresh, {key: value for key, value in state.items() if value is not None})
    assert not layers_of(fresh)


def test_without_any_scales_a_state_dict_is_still_known_as_quantised():
    state = quantize(small_model()).state_dict()
    assert int8.is_quantized({key: value for key, value in state.items() if not key.endswith("weight_scales")})


def test_a_quantised_model_is_not_trained():
    model = quantize(small_model())
    with pytest.raises(RuntimeError, match="cannot be trained"):
        model(pictures().requires_grad_())


@torch.no_grad()
def test_a_hook_on_a_layer_is_called():
    mixer = quantize(Mamba(16, d_state=4, bimamba_type="v2").eval())
    seen = []
    mixer.in_proj.register_forward_hook(lambda *_: seen.append(1))
    mixer(torch.randn(1, 5, 16))
    assert seen == [1]
