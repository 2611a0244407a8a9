"""VisionMamba: precision, gradients, compilation, initial values, and what is refused."""

import math

import pytest
import torch
from torch import nn

from models_mamba import VisionMamba, create_block
from small_vim import SMALL, pictures, small_model
from tolerances import relative_error

BOTH = {"use_double_cls_token": True}
NONE = {"if_cls_token": False}
ROPE = {"if_rope": True, "if_rope_residual": True, "pt_hw_seq_len": 4}


def test_double_precision_is_kept():
    model = small_model().double()
    exact = model(pictures().double())
    assert exact.dtype == torch.float64
    assert 0 < relative_error(small_model()(pictures()).double(), exact) < 1e-5
    nudge = torch.zeros_like(pictures()).double()
    nudge[0, 0, 0, 0] = 1e-10
    assert not torch.equal(model(pictures().double() + nudge), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_device_and_dtype_reach_every_part(dtype):
    model = VisionMamba(**SMALL, device="cpu", dtype=dtype).eval()
    others = {name for name, value in model.named_parameters() if value.dtype != dtype}
    assert {name.rsplit(".")[-1] for name in others} <= {"A_log", "A_b_log", "D", "D_b"}
    assert model(pictures().to(dtype)).dtype == dtype


def test_mixed_precision():
    model = small_model()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(pictures())
    assert rounded.dtype == torch.bfloat16
    assert 0 < relative_error(rounded.float(), model(pictures())) < 0.1


@pytest.mark.parametrize(
    "options", [{}, {**ROPE, **NONE, "final_pool_type": "mean"}, {"init_layer_scale": 0.5, **BOTH}]
)
def test_every_parameter_has_its_gradient(options):
    model = small_model(**options, depth=2).double()
    x = pictures().double()
    model(x).square().sum().backward()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-5 / direction.norm()
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter += sign * step * direction
                values.append(model(x).square().sum().item())
                parameter -= sign * step * direction
        slope = (values[0] - values[1]) / (2 * step.item())
        given = (parameter.grad * direction).sum().item()
        assert given == pytest.approx(slope, rel=1e-3, abs=1e-5), name
        assert given != 0, name


def test_recomputed_blocks_have_the_same_gradients():
    plain, thrifty = small_model(**ROPE), small_model(**ROPE)
    thrifty.set_grad_checkpointing()
    for model in (plain, thrifty):
        model(pictures()).sum().backward()
    for (name, a), b in zip(plain.named_parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad), name
    calls = []
    hook = thrifty.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    thrifty(pictures()).sum().backward()
    assert len(calls) == 2
    hook.remove()


@pytest.mark.parametrize("options", [{}, {**ROPE, **BOTH}, {"if_bidirectional": True}])
def test_compiles_and_exports_as_one_graph(options):
    model = small_model(depth=2, **options)
    expected = model(pictures())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pictures()), expected)
    exported = torch.export.export(model, (pictures(),))
    torch.testing.assert_close(exported.module()(pictures()), expected)


# ------------------------------------------------------------------------------------------------- initialisation


def test_initial_values_are_drawn_in_the_published_order():
    torch.manual_seed(11)
    model = VisionMamba(**{**SMALL, "depth": 2})
    torch.manual_seed(11)
    from timm.layers import lecun_normal_, trunc_normal_

    projection, head = nn.Conv2d(3, 16, 8), nn.Linear(16, 5)
    blocks = [create_block(16, 4, rms_norm=True, bimamba_type="v2", layer_idx=i) for i in range(2)]
    lecun_normal_(projection.weight)
    trunc_normal_(head.weight, std=0.02)
    expected = {"pos_embed": trunc_normal_(torch.empty(1, 17, 16), std=0.02)}
    expected["cls_token"] = trunc_normal_(torch.empty(1, 1, 16), std=0.02)
    for i, block in enumerate(blocks):
        nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
        block.mixer.out_proj.weight.data /= math.sqrt(2)
        nn.init.zeros_(block.mixer.dt_proj_b.bias)
        expected.update({f"layers.{i}.{key}": value for key, value in block.state_dict().items()})
    expected |= {
        "patch_embed.proj.weight": projection.weight,
        "head.weight": head.weight,
        "norm_f.weight": torch.ones(16),
    }
    expected |= {"patch_embed.proj.bias": torch.zeros(16), "head.bias": torch.zeros(5)}
    state = model.state_dict()
    assert sorted(state) == sorted(expected)
    for key, value in expected.items():
        assert torch.equal(state[key], value), key
    assert state["layers.0.mixer.dt_proj.bias"].min() < -2


def test_initializer_options():
    torch.manual_seed(0)
    plain = VisionMamba(**SMALL, initializer_cfg={"rescale_prenorm_residual": False})
    torch.manual_seed(0)
    scaled = VisionMamba(**SMALL, initializer_cfg={"n_residuals_per_layer": 4})
    assert plain.layers[0].mixer.out_proj.weight.abs().max() > 0.9 / math.sqrt(32)
    assert scaled.layers[0].mixer.out_proj.weight.abs().max() <= 1 / math.sqrt(32 * 16)


def rate(drop_path):
    return getattr(drop_path, "drop_prob", 0.0)


def test_drop_path_rates_stand_one_block_late():
    model = VisionMamba(**SMALL, drop_path_rate=0.3)
    assert [rate(block.drop_path) for block in model.layers] == pytest.approx([0, 0, 0.1, 0.2])
    assert rate(model.drop_path) == pytest.approx(0.3)
    assert rate(VisionMamba(**SMALL).drop_path) == pytest.approx(0.1)


def test_dropout_follows_its_rate():
    model = small_model(drop_rate=0.5).train()
    model.drop_path = nn.Identity()
    assert model.pos_drop.p == model.head_drop.p == 0.5
    ones = torch.ones(400, 16)
    assert sorted(model.forward_head(ones, pre_logits=True).unique().tolist()) == [0.0, 2.0]
    assert torch.equal(model.eval()(pictures()), small_model()(pictures()))


# --------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"depht": 3}, TypeError, "no option 'depht'; the nearest is 'depth'"),
        ({"use_middle_token": True}, TypeError, "the nearest is 'use_middle_cls_token'"),
        ({"final_pool_type": "avg"}, ValueError, "one of none, mean, max, all, got 'avg'"),
        ({"if_rope": True, "embed_dim": 18}, ValueError, "divisible by 4 with if_rope=True, got 18"),
        ({"img_size": (4, 32)}, ValueError, r"at least one patch of 8 x 8 pixels .* got 4 x 32"),
        ({"stride": 0}, ValueError, "at least 1 pixel, got 0"),
        ({"ssm_cfg": {"d_state": 3}}, TypeError, "must not hold d_state"),
    ],
)
def test_impossible_options(options, error, message):
    with pytest.raises(error, match=message):
        VisionMamba(**{**SMALL, **options})


@pytest.mark.parametrize(
    ("size", "text"), [((48, 32), r"48 x 32 .* 32 x 32 .* img_size=\(48, 32\)"), ((16, 16), "16 x 16")]
)
def test_a_picture_of_another_size_is_refused(size, text):
    with pytest.raises(ValueError, match=text):
        small_model()(pictures(*size))


def test_a_picture_with_other_channels_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\), got \(2, 1, 32, 32\)"):
        small_model()(pictures(channels=1))


@pytest.mark.parametrize("bimamba_type", ["v1", "v2"])
def test_bidirectional_blocks_cannot_be_stepped(bimamba_type):
    from mamba_ssm.utils.generation import InferenceParams

    with pytest.raises(ValueError, match=bimamba_type):
        small_model(bimamba_type=bimamba_type)(pictures(), inference_params=InferenceParams(17, 2))


def test_a_unidirectional_network_fills_its_cache():
    from mamba_ssm.utils.generation import InferenceParams

    model = small_model(bimamba_type="none")
    cache = model.allocate_inference_cache(2, 17)
    assert sorted(cache) == [0, 1, 2, 3]
    params = InferenceParams(17, 2, key_value_memory_dict=cache)
    with torch.no_grad():
        torch.testing.assert_close(model(pictures(), inference_params=params), model(pictures()))
    assert all(state.abs().sum() > 0 for states in cache.values() for state in states)
