"""The network: its parts by their definition, its names and sizes, layouts, dtypes, and timm's methods."""

import copy
import inspect
import io
import math
import pickle

import numpy as np
import pytest
import timm
import torch
from models import SMALL, fill, pictures, small_model
from test_ss2d import Copies
from timm.data import resolve_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn import functional as F

from tolerances import GOLDEN_LOGITS, RELATIVE, assert_close
from vmamba import SS2D, VSSM, LayerNorm2d, VSSBlock
from vmamba import options as vssm_options
from vmamba.forward_types import nearest
from vmamba.timm_methods import take_indices

EVERY_KIND = [
    {},
    {"norm_layer": "ln"},
    {"norm_layer": "bn"},
    {"downsample_version": "v1", "norm_layer": "ln"},
    {"downsample_version": "v1"},
    {"downsample_version": "v1", "norm_layer": "BN"},
    {"downsample_version": "v2"},
    {"patchembed_version": "v1"},
    {"patchembed_version": "v1", "patch_norm": False},
    {"patch_norm": False, "norm_layer": "ln"},
    {"posembed": True},
    {"posembed": True, "norm_layer": "ln"},
    {"gmlp": True},
    {"mlp_ratio": 0},
    {"ssm_ratio": 0},
    {"forward_type": "v0", "ssm_conv_bias": True},
    {"ssm_conv": -1},
    {"ssm_act_layer": "GELU", "mlp_act_layer": "relu"},
]


def sequence(parts, x):
    for part in parts:
        x = part(x)
    return x


# ------------------------------------------------------------------------------------------------------------ block


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize("post_norm", [False, True])
def test_a_block_is_two_branches(post_norm, channel_first):
    norm = LayerNorm2d if channel_first else nn.LayerNorm
    block = fill(VSSBlock(8, norm_layer=norm, channel_first=channel_first, post_norm=post_norm)).double().eval()
    x = torch.randn(2, 8, 3, 5, dtype=torch.float64) if channel_first else torch.randn(2, 3, 5, 8, dtype=torch.float64)
    y = x + (block.norm(block.op(x)) if post_norm else block.op(block.norm(x)))
    y = y + (block.norm2(block.mlp(y)) if post_norm else block.mlp(block.norm2(y)))
    assert_close(block(x), y)


def test_branches_can_be_left_out():
    assert not any(key.startswith(("norm2", "mlp")) for key in VSSBlock(8, mlp_ratio=0).state_dict())
    keys = VSSBlock(8, ssm_ratio=0).state_dict()
    assert not any(key.startswith(("norm.", "op.")) for key in keys)
    assert len(keys) == 6


def test_a_dropped_block_is_the_identity():
    block = VSSBlock(8, drop_path=1.0)
    x = torch.randn(2, 3, 5, 8)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)


def test_another_mixer():
    class Mine(SS2D):
        pass

    model = VSSM(**{**SMALL, "_SS2D": Mine})
    assert all(type(block.op) is Mine for layer in model.layers for block in layer.blocks)


def test_recomputed_blocks_have_the_same_gradients():
    runs = []
    for enabled in (False, True):
        model = small_model(use_checkpoint=enabled)
        assert all(block.use_checkpoint is enabled for layer in model.layers for block in layer.blocks)
        model.set_grad_checkpointing(not enabled)
        assert all(block.use_checkpoint is not enabled for layer in model.layers for block in layer.blocks)
        calls = []
        model.layers[1].blocks[0].norm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(pictures()).square().sum().backward()
        assert len(calls) == (1 if enabled else 2)
        runs.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


# ---------------------------------------------------------------------------------------------------------- network


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_the_data_flow(norm_layer):
    model = small_model(norm_layer=norm_layer, posembed=True, imgsize=(36, 20)).double()
    x = pictures(36, 20).double()
    rows_last = norm_layer == "ln"
    y = model.patch_embed(x)
    y = y + (model.pos_embed.permute(0, 2, 3, 1) if rows_last else model.pos_embed)
    for layer in model.layers:
        y = layer.downsample(layer.blocks(y))
    y = model.classifier.norm(y)
    y = y.permute(0, 3, 1, 2) if rows_last else y
    assert_close(model.forward_features(x), y)
    assert y.shape == (2, 64, 2, 1)
    pooled = y.mean((2, 3))
    assert_close(model.forward_head(y, pre_logits=True), pooled)
    logits = F.linear(pooled, model.classifier.head.weight, model.classifier.head.bias)
    assert_close(model(x), logits)
    assert_close(model.classifier(sequence(model.layers, model._embed(x))), logits)


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
@pytest.mark.parametrize(
    ("version", "kernel", "stride", "padding"), [("v1", 4, 4, 0), ("v2", 3, 2, 1)], ids=["one", "two"]
)
def test_patch_embedding(version, kernel, stride, padding, norm_layer):
    embed = small_model(patchembed_version=version, norm_layer=norm_layer).double().patch_embed
    x = y = pictures(20, 28).double()
    for conv, norm in ((0, 2),) if version == "v1" else ((0, 2), (5, 7)):
        if conv == 5:
            y = F.gelu(y)
        y = F.conv2d(y, embed[conv].weight, embed[conv].bias, stride=stride, padding=padding)
        assert embed[conv].kernel_size == (kernel, kernel)
        y = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], embed[norm].weight, embed[norm].bias).permute(0, 3, 1, 2)
    given = embed(x)
    assert_close(given.permute(0, 3, 1, 2) if norm_layer == "ln" else given, y)
    assert y.shape == (2, 8, 5, 7)


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
@pytest.mark.parametrize(("version", "kernel", "size"), [("v2", 2, (2, 3)), ("v3", 3, (3, 4))])
def test_downsampling(version, kernel, size, norm_layer):
    down = small_model(downsample_version=version, norm_layer=norm_layer).double().layers[0].downsample
    x = torch.randn(2, 8, 5, 7, dtype=torch.float64)
    y = F.conv2d(x, down[1].weight, down[1].bias, stride=2, padding=kernel // 2 if kernel == 3 else 0)
    expected = F.layer_norm(y.permute(0, 2, 3, 1), (16,), down[3].weight, down[3].bias)
    given = down(x).permute(0, 2, 3, 1) if norm_layer == "ln2d" else down(x.permute(0, 2, 3, 1))
    assert_close(given, expected)
    assert given.shape == (2, *size, 16)
    assert down[1].weight.shape == (16, 8, kernel, kernel)


@pytest.mark.parametrize("options", EVERY_KIND, ids=str)
def test_every_kind_runs_and_every_parameter_learns(options):
    model = small_model(**options).train()
    model(pictures(68, 76)).square().sum().backward()
    silent = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all() or parameter.grad.abs().max() == 0
    ]
    assert silent == []


@pytest.mark.parametrize("size", [(64, 96), (37, 50), (33, 31), (17, 65), (4, 4)])
@pytest.mark.parametrize("downsample", ["v1", "v3"])
def test_both_layouts_agree_at_any_size(size, downsample, backend):
    first, last = (small_model(norm_layer=norm, downsample_version=downsample) for norm in ("ln2d", "ln"))
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in last.state_dict().items()}
    x = pictures(*size)
    with torch.no_grad():
        given, other = first(x), last(x)
        wide = copy.deepcopy(first).double()(x.double())
    torch.testing.assert_close(given, other, rtol=0, atol=3e-5)
    torch.testing.assert_close(given, wide.float(), rtol=0, atol=GOLDEN_LOGITS)


def test_a_batch_of_none():
    with pytest.raises(ValueError, match="there must be at least one picture, got a batch of none"):
        small_model()(pictures(batch=0))


def test_a_picture_too_small():
    with pytest.raises(ValueError, match=r"the picture is 3 x 64 pixels, but .* at least 4 x 4: enlarge"):
        small_model()(pictures(3, 64))
    model = small_model(downsample_version="v2")
    with pytest.raises(ValueError, match=r"the picture is 40 x 28 pixels, but .* at least 29 x 29"):
        model(pictures(40, 28))
    assert model(pictures(29, 29)).shape == (2, 5)
    model = small_model(downsample_version="v2", patchembed_version="v1")
    assert (model.least_size, small_model(patchembed_version="v1").least_size) == (32, 4)
    assert model(pictures(32, 35)).shape == (2, 5)
    with pytest.raises(ValueError, match="at least 32 x 32"):
        model(pictures(31, 32))
    assert small_model(patchembed_version="v1", downsample_version="v1", patch_size=8).least_size == 8


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 32, 32, 3)])
def test_other_pictures_are_refused(shape):
    with pytest.raises(ValueError, match=r"the pictures must have shape \(b, 3, h, w\), got"):
        small_model()(torch.zeros(shape))
    assert small_model(in_chans=1)(torch.zeros(1, 1, 32, 32)).shape == (1, 5)


def test_a_position_embedding_is_resized():
    model = small_model(posembed=True, imgsize=32)
    assert model.pos_embed.shape == (1, 8, 8, 8)
    x = pictures(40, 24)
    plain = model.patch_embed(x)
    resized = F.interpolate(model.pos_embed, (10, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model._embed(x), plain + resized)
    assert small_model(posembed=True, img_size=(64, 32)).pos_embed.shape == (1, 8, 16, 8)
    assert small_model(posembed=True, imgsize=(64, 32)).pos_embed.shape == (1, 8, 16, 8)
    assert 0.01 < VSSM(**SMALL, posembed=True).pos_embed.std() < 0.03
    half = small_model(posembed=True, imgsize=32).bfloat16()
    assert half(pictures(40, 24).bfloat16()).dtype is torch.bfloat16


def test_stochastic_depth_grows_over_the_blocks():
    model = VSSM(**{**SMALL, "depths": (1, 2, 1, 1)}, drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for layer in model.layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert VSSM(depths=(1,), dims=8).layers[0].blocks[0].drop_path.drop_prob == 0


def test_dropout():
    for option in ("ssm_drop_rate", "mlp_drop_rate", "drop_rate"):
        model = small_model(**{option: 0.5}, drop_path_rate=0.0)
        assert torch.equal(model(pictures()), model(pictures()))
        model.train()
        assert not torch.equal(model(pictures()), model(pictures()))


def test_initial_values():
    model = VSSM(**{**SMALL, "dims": 32})
    weight = model.layers[3].blocks[0].mlp.fc1.weight
    assert 0.018 < weight.std() < 0.022
    assert model.layers[3].blocks[0].mlp.fc1.bias.abs().max() == 0
    assert model.classifier.head.bias.abs().max() == 0
    assert 0.018 < model.layers[3].blocks[0].op.in_proj.weight.std() < 0.022
    torch.testing.assert_close(model.layers[0].blocks[0].op.Ds, torch.ones(256))
    assert model.classifier.norm.weight.min() == 1


def test_widths():
    assert VSSM(dims=8, depths=(1, 1, 1)).dims == [8, 16, 32]
    assert VSSM(dims=(8, 12), depths=[1, 1]).layers[1].blocks[0].op.d_model == 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_layer": "rms"}, "`norm_layer` must be one of ln, ln2d, bn, got 'rms'; the nearest is"),
        ({"downsample_version": "none"}, "`downsample_version` must be one of v1, v2, v3, got 'none'"),
        ({"patchembed_version": "v3"}, "`patchembed_version` must be one of v1, v2, got 'v3'"),
        ({"ssm_act_layer": "swish"}, "`ssm_act_layer` must be one of silu"),
        ({"mlp_act_layer": "gelu_tanh"}, "the nearest is 'gelu'"),
        ({"dims": (8, 16)}, "`depths` and `dims` must be positive and one for each stage"),
        ({"depths": ()}, "`depths` and `dims`"),
        ({"depths": (1, 0, 1, 1)}, "`depths` and `dims`"),
        ({"patch_size": 1}, "`patch_size` must be at least 2"),
        ({"ssm_init": "v9"}, "`ssm_init` must be one of v0, v1, v2, got 'v9'"),
        ({"forward_type": 5}, "there is no `forward_type` 5"),
        ({"norm_layer": None}, "`norm_layer` must be one of"),
        ({"depths": 4}, "`depths` and `dims` must be positive and one for each stage, got 4 and"),
        ({"depths": "1111"}, "`depths` and `dims`"),
        ({"depths": (1, 1.5, 1, 1)}, "`depths` and `dims`"),
        ({"dims": 0}, "`depths` and `dims`"),
        ({"dims": True}, "`depths` and `dims`"),
        ({"dims": 1}, "`dims` must begin with 2 or more with `patchembed_version` 'v2', got 1"),
        ({"patch_size": 0}, "`patch_size` must be a whole number from 1 to 2147483647, got 0"),
        ({"patch_size": 4.0}, "`patch_size` must be a whole number from 1 to 2147483647, got 4.0"),
        ({"in_chans": 10**30}, "`in_chans` must be a whole number from 1 to 2147483647, got 10000"),
        ({"dims": 2**30}, "`depths` and `dims`"),
        ({"in_chans": -1}, "`in_chans` must be a whole number from 1 to 2147483647, got -1"),
        ({"num_classes": -1}, "`num_classes` must be a whole number from 0 to 2147483647, got -1"),
        ({"num_classes": "ten"}, "`num_classes` must be a whole number from 0 to 2147483647, got 'ten'"),
        ({"ssm_d_state": 0}, "`ssm_d_state` must be"),
        ({"ssm_ratio": math.nan}, "`ssm_ratio` must be a number up to 1000, 0 for no such branch, got nan"),
        ({"ssm_ratio": 0.01}, "`ssm_ratio` must be 0 or leave a channel of 8, those of the narrowest stage, got 0.01"),
        ({"ssm_dt_rank": "full"}, "`ssm_dt_rank` must be a whole number from 1 on, or 'auto', got 'full'"),
        ({"ssm_dt_rank": 0}, "`ssm_dt_rank` must be"),
        ({"ssm_conv": 4}, "`ssm_conv` must be an odd whole number, or less than 2"),
        ({"ssm_conv": 2.5}, "`ssm_conv` must be"),
        ({"ssm_conv_bias": "no"}, "`ssm_conv_bias` must be true or false, got 'no'"),
        ({"ssm_drop_rate": -0.1}, "`ssm_drop_rate` must be a probability below 1, got -0.1"),
        ({"mlp_ratio": math.nan}, "`mlp_ratio` must be a number up to"),
        ({"mlp_ratio": 1e300}, "`mlp_ratio` must be a number up to 1000"),
        ({"mlp_ratio": 0.1}, "`mlp_ratio` must be 0 or leave a channel of 8"),
        ({"mlp_drop_rate": 2}, "`mlp_drop_rate` must be a probability below 1, got 2"),
        ({"gmlp": 1}, "`gmlp` must be true or false, got 1"),
        ({"drop_path_rate": 1.0}, "`drop_path_rate` must be a probability below 1"),
        ({"drop_rate": math.nan}, "`drop_rate` must be a probability below 1, got nan"),
        ({"patch_norm": None}, "`patch_norm` must be true or false"),
        ({"use_checkpoint": 0}, "`use_checkpoint` must be true or false"),
        ({"posembed": "yes"}, "`posembed` must be true or false"),
        ({"imgsize": 0}, "`imgsize` must be one or two whole numbers of pixels from 1 on, got 0"),
        ({"imgsize": (32, 32, 3)}, "`imgsize` must be one or two whole numbers"),
        ({"img_size": "224"}, "`img_size` must be one or two whole numbers of pixels from 1 on, got '224'"),
        ({"posembed": True, "imgsize": (32, 3)}, "`imgsize` must be at least the `patch_size` 4 with `posembed`"),
        ({"posembed": True, "img_size": 3}, "`img_size` must be at least the `patch_size` 4 with `posembed`, got 3"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        VSSM(**{**SMALL, **options})


def test_every_option_is_looked_at():
    named = (
        set(vssm_options._TABLE)
        | set(vssm_options._CHOICES)
        | {"depths", "dims", "forward_type", "_SS2D", "self", "kwargs"}
    )
    assert set(inspect.signature(VSSM.__init__).parameters) == named


@pytest.mark.parametrize("size", [np.int64(32), [32, np.int32(32)], (32, 32)])
def test_numbers_of_numpy_are_numbers(size):
    model = VSSM(**{**SMALL, "img_size": size, "num_classes": np.int64(3), "drop_rate": np.float32(0.5)})
    assert model(pictures()).shape == (2, 3)


@pytest.mark.parametrize(("name", "near"), [("drop_path", "drop_path_rate"), ("ssm_dstate", "ssm_d_state")])
def test_unknown_options_are_refused(name, near):
    with pytest.raises(TypeError, match=f"VSSM has no option '{name}'; the nearest is '{near}'"):
        VSSM(**SMALL, **{name: 1})
    with pytest.raises(TypeError, match="no option 'global_pool'"):
        VSSM(**SMALL, global_pool="avg")
    assert nearest(name, ["a", near]) == near


def test_an_option_of_old_configurations_is_ignored():
    assert VSSM(**SMALL, ssm_rank_ratio=2.0).state_dict().keys() == VSSM(**SMALL).state_dict().keys()


# ------------------------------------------------------------------------------------------ sizes of the ablations

BASE = {"dims": 96, "mlp_ratio": 4, "downsample_version": "v3", "patchembed_version": "v2", "norm_layer": "ln2d"}


@pytest.mark.parametrize(
    ("third", "state", "ratio", "conv", "forward_type", "other", "count", "keys"),
    [
        (2, 16, 2, -1, "v05", {}, 28_991_656, 160),
        (2, 16, 1, -1, "v05", {}, 22_926_376, 160),
        (5, 16, 1, -1, "v05", {}, 28_256_680, 211),
        (5, 16, 1, -1, "v05_noz", {}, 26_247_592, 211),
        (5, 1, 2, -1, "v05_noz", {}, 30_633_256, 211),
        (8, 1, 1, 3, "v051d_noz", {"ssm_conv_bias": True}, 30_254_248, 290),
        (8, 1, 1, -1, "v051d_noz", {}, 30_202_408, 262),
        (8, 1, 1, -1, "v051d_noz", {"posembed": True}, 30_503_464, 263),
        (5, 2, 2, 3, "v05_noz", {}, 30_802_600, 222),
        (5, 4, 2, 3, "v05_noz", {}, 30_996_136, 222),
        (5, 8, 1.5, 3, "v05_noz", {}, 28_640_008, 222),
        (5, 16, 1, 3, "v05_noz", {}, 26_283_880, 222),
        (8, 1, 1.5, 3, "v05_noz", {"mlp_ratio": 3}, 28_485_640, 276),
        (8, 1, 2.5, 3, "v05_noz", {"mlp_ratio": 2}, 29_866_888, 276),
        (8, 1, 1, 3, "v05_onnone_noz", {}, 30_238_696, 248),
        (8, 1, 1, 3, "v05_onsoftmax_noz", {}, 30_238_696, 248),
        (8, 1, 1, 3, "v05_onsigmoid_noz", {}, 30_238_696, 248),
        (8, 1, 1, 3, "v05_ondwconv3_noz", {}, 30_285_352, 262),
        (8, 1, 1, 3, "v05_oncnorm_noz", {}, 30_295_720, 290),
    ],
)
def test_sizes_of_the_ablations(third, state, ratio, conv, forward_type, other, count, keys):
    options = {"ssm_conv_bias": False, **other, "ssm_d_state": state, "ssm_ratio": ratio, "ssm_conv": conv}
    for norm in ("ln2d", "ln"):
        with torch.device("meta"):
            depths = (2, 2, third, 2)
            model = VSSM(**{**BASE, "norm_layer": norm, "forward_type": forward_type, "depths": depths, **options})
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        assert len(model.state_dict()) == keys
        assert list(model.buffers()) == []


# ------------------------------------------------------------------------------------------------ layouts and dtypes


@pytest.mark.parametrize("options", [{}, {"norm_layer": "ln"}, {"norm_layer": "bn"}], ids=str)
@pytest.mark.parametrize("downsample", ["v1", "v2", "v3"])
def test_maps_keep_the_channels_last_in_memory(options, downsample):
    model = small_model(**options, downsample_version=downsample)
    strides = {}

    def look(name):
        def hook(module, given, result):
            maps = result.permute(0, 2, 3, 1) if model.channel_first else result
            strides[name] = maps.is_contiguous()

        return hook

    def look_at_channels_first(name):
        def hook(module, given, result):
            strides[name] = result.is_contiguous(memory_format=torch.channels_last)

        return hook

    for name, module in model.named_modules():
        inner = name.endswith(("out_norm", "downsample.norm"))  # maps (b, h, w, c) and merged pixels
        if name.endswith(("norm", "norm2", "op", "mlp", "mlp.act", "downsample", "patch_embed")) and not inner:
            module.register_forward_hook(look(name))
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(look_at_channels_first(name))
    with torch.no_grad():
        model(pictures(64, 64))
    assert len(strides) > 20
    assert [name for name, kept in strides.items() if not kept] == []


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_no_block_copies_a_map(norm_layer):
    model = small_model(norm_layer=norm_layer)
    with torch.no_grad():
        x = model._embed(pictures(64, 64))
        with Copies() as copies:
            for layer in model.layers:
                x = layer.blocks(x)
                x = layer.downsample(x)
    assert copies.found == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"norm_layer": "ln"}, {"forward_type": "v0"}, {"posembed": True}], ids=str)
def test_a_network_in_half_precision(options, dtype):
    """With its initial weights: the filled ones turn roundings of 16 bits into other numbers altogether."""
    model = VSSM(**{**SMALL, **options}).eval()
    expected = model(pictures())
    model = model.to(dtype)
    given = model(pictures().to(dtype))
    assert given.dtype is dtype
    assert_close(given, expected, limit=4 * RELATIVE[dtype])
    given.float().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast():
    model = VSSM(**SMALL).eval()
    expected = model(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        given = model(pictures())
    assert given.dtype is torch.bfloat16
    assert_close(given, expected, limit=4 * RELATIVE[torch.bfloat16])
    given.float().sum().backward()
    assert all(parameter.grad.dtype is torch.float32 for parameter in model.parameters())


# ---------------------------------------------------------------------------------------------- copies and compilers


def test_copies_and_files():
    model = small_model()
    twin = copy.deepcopy(model)
    twin.classifier.head.weight.data.zero_()
    assert not torch.equal(twin(pictures()), model(pictures()))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(twin(pictures()), model(pictures()))
    assert all(value.is_contiguous() for value in model.state_dict().values())
    thawed = pickle.loads(pickle.dumps(model))
    assert torch.equal(thawed(pictures()), model(pictures()))


def test_weights_of_one_by_one_convolutions_load():
    model = small_model()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for key in state:
        if key.endswith(("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight")):
            state[key] = state[key][:, :, None, None]
    twin = VSSM(**SMALL).eval()
    twin.load_state_dict(state)
    assert torch.equal(twin(pictures()), model(pictures()))


def test_a_subclass_and_a_patched_class_are_heard(monkeypatch):
    """Wrappers replace `forward` of a class: nothing must be bound to an instance."""
    model = small_model()
    calls = []
    original = SS2D.forward
    monkeypatch.setattr(SS2D, "forward", lambda self, x: calls.append(1) or original(self, x))
    model(pictures())
    assert len(calls) == 5


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_compile(norm_layer):
    model = small_model(norm_layer=norm_layer, depths=(1, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(pictures()), model(pictures()))
    with torch.no_grad():
        sizes = {0: torch.export.Dim("b", max=8), **{i: torch.export.Dim(f"side{i}", min=16, max=256) for i in (2, 3)}}
        exported = torch.export.export(model, (pictures(),), dynamic_shapes=(sizes,)).module()
        for x in (pictures(), pictures(52, 36, batch=3)):
            torch.testing.assert_close(exported(x), model(x))


# ----------------------------------------------------------------------------------------------------- timm's methods


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_intermediates(norm_layer):
    model = small_model(norm_layer=norm_layer)
    x = pictures(64, 96)
    seen = []
    for layer in model.layers:
        layer.blocks.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        expected = [y.permute(0, 3, 1, 2) if norm_layer == "ln" else y for y in seen[:4]]
        assert [tuple(y.shape) for y in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
        assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(maps, expected, strict=True))
        assert torch.equal(final, model.forward_features(x))
        swapped = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
        assert all(
            torch.equal(a, b.permute(0, 2, 3, 1)) and a.is_contiguous() for a, b in zip(swapped, maps, strict=True)
        )
        normed = model.forward_intermediates(x, norm=True, intermediates_only=True)
        assert torch.equal(normed[3], final)
        assert torch.equal(normed[2], maps[2])
        for indices, chosen in ((2, [2, 3]), ([0, -1], [0, 3]), ([3, 1], [3, 1])):
            given = model.forward_intermediates(x, indices, intermediates_only=True)
            assert all(torch.equal(a, maps[i]) for a, i in zip(given, chosen, strict=True))


def test_intermediates_that_stop_early():
    model = small_model()
    calls = []
    for i, layer in enumerate(model.layers):
        layer.blocks.register_forward_hook(lambda *_, i=i: calls.append(i))
    with torch.no_grad():
        final, maps = model.forward_intermediates(pictures(), [1], stop_early=True)
        assert calls == [0, 1]
        assert torch.equal(final, maps[0])
        full, _ = model.forward_intermediates(pictures(), [3], stop_early=True)
        assert torch.equal(full, model.forward_features(pictures()))
    with pytest.raises(ValueError, match="NCHW or NHWC, got 'NLC'"):
        model.forward_intermediates(pictures(), output_fmt="NLC")


@pytest.mark.parametrize(
    ("indices", "message"), [(0, "last 1 to 4"), (5, "last 1 to 4"), ([4], "-4 and 3, got 4"), ([-5], "got -5")]
)
def test_indices_out_of_range(indices, message):
    with pytest.raises(ValueError, match=message):
        take_indices(4, indices)


@pytest.mark.parametrize("prune_norm", [False, True])
def test_what_is_not_needed_is_pruned(prune_norm):
    model = small_model()
    with torch.no_grad():
        expected = model.forward_intermediates(pictures(), [0, 2], intermediates_only=True)
        assert model.prune_intermediate_layers([0, -2], prune_norm=prune_norm) == [0, 2]
        given = model.forward_intermediates(pictures(), [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert not any(key.startswith(("layers.3", "layers.2.downsample", "classifier.head")) for key in model.state_dict())
    assert ("classifier.norm.weight" in model.state_dict()) is not prune_norm


def test_the_classifier_is_replaced():
    model = small_model()
    assert model.get_classifier() is model.classifier.head
    model.double().reset_classifier(7)
    head = model.classifier.head
    assert (model.num_classes, head.weight.shape, head.weight.dtype) == (7, (7, 64), torch.float64)
    assert head.bias.abs().max() == 0
    assert model(pictures().double()).shape == (2, 7)
    model.reset_classifier(0, "avg")
    assert isinstance(model.classifier.head, nn.Identity)
    assert torch.equal(model(pictures().double()), model.forward_features(pictures().double()).mean((2, 3)))
    for faulty in (-1, 2.5, "ten", True):
        with pytest.raises(ValueError, match="`num_classes` must be a whole number from 0 on, got"):
            model.reset_classifier(faulty)
    with pytest.raises(ValueError, match="`global_pool` must be 'avg', got 'max'"):
        model.reset_classifier(3, "max")


def test_a_network_without_head():
    model = small_model(num_classes=0)
    assert model(pictures()).shape == (2, 64)
    assert not any("head" in key for key in model.state_dict())


def test_what_is_decayed():
    model = small_model(posembed=True)
    assert model.no_weight_decay() == {"pos_embed"}
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    op = "layers.0.blocks.0.op"
    assert {f"{op}.A_logs", f"{op}.dt_projs_bias", f"{op}.x_proj_weight", "classifier.head.weight"} <= decayed
    assert not decayed & {"pos_embed", f"{op}.Ds", f"{op}.out_norm.weight", "classifier.head.bias"}


def test_layers_are_grouped():
    model = small_model(posembed=True)
    groups = group_parameters(model, model.group_matcher())
    stem, *blocks, head = (groups[i] for i in sorted(groups))
    assert "pos_embed" in stem
    assert len(stem) == 9
    assert [len(names) for names in blocks] == [22, 18, 22, 22, 20]
    assert {name.split(".")[2] for name in blocks[2]} == {"blocks", "downsample"}
    assert {"classifier.norm.bias", "classifier.norm.weight"} < set(blocks[4])
    assert sorted(head) == ["classifier.head.bias", "classifier.head.weight"]
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    assert [len(coarse[i]) for i in sorted(coarse)] == [9, 22, 40, 22, 18, 4]


def test_data_configuration():
    config = resolve_data_config(model=small_model(in_chans=1, img_size=(64, 96)))
    assert config["input_size"] == (1, 64, 96)
    assert (config["crop_pct"], config["interpolation"], config["mean"][0]) == (0.875, "bicubic", 0.485)
    assert timm.data.create_transform(**resolve_data_config(model=small_model()))


def test_what_timm_knows_of_the_stages():
    info = small_model().feature_info
    assert [entry["num_chs"] for entry in info] == [8, 16, 32, 64]
    assert [entry["reduction"] for entry in info] == [4, 8, 16, 32]
    assert small_model(patch_size=8, patchembed_version="v1").feature_info[0]["reduction"] == 8
