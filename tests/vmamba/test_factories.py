"""The published variants: their sizes, names and options, timm's registry, and what is refused."""

import copy
import re

import pytest
import timm
import torch
from models import SMALL, fill, pictures, small_model
from torch import nn

import vmamba
from vmamba import factories
from vmamba.factories import VARIANTS

SIZES = {
    "vanilla_vmamba_tiny": (22_893_448, 212),
    "vanilla_vmamba_small": (44_417_416, 446),
    "vanilla_vmamba_base": (76_254_056, 446),
    "vmamba_tiny_s2l5": (30_705_832, 222),
    "vmamba_small_s2l15": (50_147_752, 402),
    "vmamba_base_s2l15": (88_557_800, 402),
    "vmamba_tiny_s1l8": (30_249_064, 276),
    "vmamba_small_s1l20": (49_012_840, 492),
    "vmamba_base_s1l20": (86_614_504, 492),
}
BLOCKS = {
    "vmamba_tiny_s2l5": (126_624, 492_864, 1_944_192, 7_722_240),
    "vmamba_tiny_s1l8": (100_608, 394_752, 1_563_648, 6_223_872),
    "vanilla_vmamba_tiny": (105_408, 339_840, 1_195_776, 4_455_936),
}
DROP_PATHS = dict(zip(SIZES, (0.2, 0.3, 0.6, 0.2, 0.3, 0.6, 0.2, 0.3, 0.5), strict=True))
SHRUNK = {"dims": 8, "depths": (1, 1, 1, 1)}


def build(name, **options):
    with torch.device("meta"):
        return getattr(vmamba, name)(**options)


def block_template(width, ratio, vanilla):
    """Names and shapes of one block's tensors, in their order."""
    inner, rank, state = ratio * width, -(-width // 16), 16 if vanilla else 1
    mixer = {
        "x_proj_weight": (4, rank + 2 * state, inner),
        "A_logs": (4 * inner, state),
        "Ds": (4 * inner,),
        "dt_projs_weight": (4, inner, rank),
        "dt_projs_bias": (4, inner),
        "out_norm.weight": (inner,),
        "out_norm.bias": (inner,),
        "in_proj.weight": (2 * inner if vanilla else inner, width),
        "conv2d.weight": (inner, 1, 3, 3),
        **({"conv2d.bias": (inner,)} if vanilla else {}),
        "out_proj.weight": (width, inner),
    }
    block = {"norm.weight": (width,), "norm.bias": (width,)} | {f"op.{key}": shape for key, shape in mixer.items()}
    if vanilla:
        return block
    return block | {
        "norm2.weight": (width,),
        "norm2.bias": (width,),
        "mlp.fc1.weight": (4 * width, width),
        "mlp.fc1.bias": (4 * width,),
        "mlp.fc2.weight": (width, 4 * width),
        "mlp.fc2.bias": (width,),
    }


def template(width, third, ratio, vanilla):
    """Names and shapes of a whole network's tensors, in their order."""
    names = {"patch_embed.0.weight": (width, 3, 4, 4), "patch_embed.0.bias": (width,)}
    names |= {f"patch_embed.2.{kind}": (width,) for kind in ("weight", "bias")}
    if not vanilla:
        half = width // 2
        names = {"patch_embed.0.weight": (half, 3, 3, 3), "patch_embed.0.bias": (half,)}
        names |= {f"patch_embed.2.{kind}": (half,) for kind in ("weight", "bias")}
        names |= {"patch_embed.5.weight": (width, half, 3, 3), "patch_embed.5.bias": (width,)}
        names |= {f"patch_embed.7.{kind}": (width,) for kind in ("weight", "bias")}
    for i, depth in enumerate((2, 2, third, 2)):
        d = width * 2**i
        for j in range(depth):
            names |= {f"layers.{i}.blocks.{j}.{key}": shape for key, shape in block_template(d, ratio, vanilla).items()}
        down = f"layers.{i}.downsample."
        if i < 3 and vanilla:
            merged = {"reduction.weight": (2 * d, 4 * d), "norm.weight": (4 * d,), "norm.bias": (4 * d,)}
            names |= {down + key: shape for key, shape in merged.items()}
        elif i < 3:
            conv = {"1.weight": (2 * d, d, 3, 3), "1.bias": (2 * d,), "3.weight": (2 * d,), "3.bias": (2 * d,)}
            names |= {down + key: shape for key, shape in conv.items()}
    last = 8 * width
    return names | {
        "classifier.norm.weight": (last,),
        "classifier.norm.bias": (last,),
        "classifier.head.weight": (1000, last),
        "classifier.head.bias": (1000,),
    }


@pytest.mark.parametrize("channel_first", [True, False])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_names_and_shapes(name, channel_first):
    model = build(name, channel_first=channel_first)
    count, keys = SIZES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert list(model.buffers()) == []
    third = int(re.search(r"l(\d+)$", name)[1]) if "l" in name.rsplit("_", 1)[1] and "vanilla" not in name else 0
    third = third or (9 if "tiny" in name else 27)
    ratio = 1 if "_s1l" in name else 2
    expected = template(128 if "base" in name else 96, third, ratio, "vanilla" in name)
    assert len(expected) == keys
    assert [(key, tuple(value.shape)) for key, value in model.state_dict().items()] == list(expected.items())
    assert model.channel_first is channel_first


@pytest.mark.parametrize("name", BLOCKS)
def test_sizes_of_the_blocks(name):
    blocks = [layer.blocks[0] for layer in build(name).layers]
    assert tuple(sum(parameter.numel() for parameter in block.parameters()) for block in blocks) == BLOCKS[name]


@pytest.mark.parametrize(("name", "rate"), DROP_PATHS.items())
def test_options_that_make_no_parameters(name, rate):
    model = build(name)
    assert model.layers[3].blocks[1].drop_path.drop_prob == rate
    op = model.layers[0].blocks[0].op
    vanilla = "vanilla" in name
    assert (op.variant.vanilla, op.variant.gate, op.variant.directions) == (vanilla, vanilla, "cross")
    assert isinstance(op.act, nn.SiLU)
    if not vanilla:
        assert isinstance(model.layers[0].blocks[0].mlp.act, nn.GELU)


@pytest.mark.parametrize("name", SIZES)
def test_every_name_is_in_timm_and_runs(name):
    assert timm.is_model(name)
    model = timm.create_model(name, **SHRUNK, num_classes=10).eval()
    with torch.no_grad():
        assert model(pictures(64, 64)).shape == (2, 10)
    assert model.pretrained_cfg["architecture"] == name
    assert model.default_cfg is model.pretrained_cfg


def test_options_are_honoured():
    model = vmamba.vmamba_tiny_s1l8(
        False, False, **SHRUNK, num_classes=10, forward_type="v051d", in_chans=1, img_size=64, drop_path_rate=0.4,
        posembed=True, drop_rate=0.1,
    )  # fmt: skip
    assert model.classifier.head.weight.shape == (10, 64)
    assert not model.channel_first
    assert model.layers[0].blocks[0].op.variant.directions == "rows"
    assert (model.patch_embed[0].in_channels, model.drop_rate, model.pos_embed.shape[2:]) == (1, 0.1, (16, 16))
    assert model.layers[3].blocks[0].drop_path.drop_prob == 0.4
    assert isinstance(vmamba.vmamba_tiny_s1l8(**SHRUNK, norm_layer="bn").classifier.norm, nn.BatchNorm2d)
    with pytest.raises(TypeError, match="no option 'num_class'; the nearest is 'num_classes'"):
        vmamba.vmamba_tiny_s1l8(num_class=10)
    with pytest.raises(TypeError, match="no option 'global_pool'"):
        timm.create_model("vmamba_tiny_s1l8", global_pool="avg")


def test_a_network_of_arguments_alone():
    assert isinstance(vmamba.vmamba(**SMALL), vmamba.VSSM)


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_unpublished_variants_are_refused(size):
    name = f"vmamba_{size}_m2"
    with pytest.raises(ValueError, match=rf"{name} is not offered.*never published.*vmamba_{size}_s1l"):
        getattr(vmamba, name)()
    with pytest.raises(ValueError, match="not offered"):
        getattr(vmamba, name)(pretrained=True, num_classes=3)
    assert not timm.is_model(name)


def test_layouts_share_weights():
    first = vmamba.vmamba_tiny_s1l8(**SHRUNK).eval()
    fill(first)
    last = vmamba.vmamba_tiny_s1l8(channel_first=False, **SHRUNK).eval()
    last.load_state_dict(first.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(first(pictures(64, 96)), last(pictures(64, 96)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["vmamba_tiny_s2l5", "vanilla_vmamba_tiny"])
def test_features_only(name):
    model = timm.create_model(name, features_only=True, **SHRUNK).eval()
    assert model.feature_info.channels() == [8, 16, 32, 64]
    assert model.feature_info.reduction() == [4, 8, 16, 32]
    with torch.no_grad():
        maps = model(pictures(64, 96))
        assert [tuple(y.shape) for y in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
        chosen = timm.create_model(name, features_only=True, out_indices=(1, -2), **SHRUNK)
        chosen.model.load_state_dict(model.model.state_dict(), strict=False)
        given = chosen.eval()(pictures(64, 96))
    assert all(torch.equal(a, maps[i]) for a, i in zip(given, (1, 2), strict=True))
    assert not any("layers.3" in key for key in chosen.state_dict())
    assert model.pretrained_cfg["architecture"] == name


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def checkpoint(tmp_path):
    model = small_model()
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    return model.state_dict(), {"file": str(path)}


@pytest.mark.parametrize("classes", [5, 9])
def test_weights_of_a_file(checkpoint, classes):
    state, overlay = checkpoint
    options = {**SMALL, "num_classes": classes, "ssm_ratio": 2.0}
    model = timm.create_model("vmamba_tiny_s1l8", pretrained=True, pretrained_cfg_overlay=overlay, **options)
    same = [key for key, value in model.state_dict().items() if torch.equal(value, state.get(key, value + 1))]
    assert len(same) == len(state) - (0 if classes == 5 else 2)


def test_weights_of_another_network(checkpoint):
    with pytest.raises(ValueError, match="layers"):
        timm.create_model("vmamba_tiny_s1l8", pretrained=True, pretrained_cfg_overlay=checkpoint[1], **SHRUNK)


def test_published_weights_are_asked_for_by_name(monkeypatch):
    asked = []
    monkeypatch.setattr("vmamba.weights.load_published", lambda model, name: asked.append((type(model), name)))
    for name in SIZES:
        timm.create_model(name, pretrained=True, **SHRUNK)
    assert asked == [(vmamba.VSSM, name) for name in SIZES]


def test_building_leaves_the_table_alone():
    before = copy.deepcopy(VARIANTS)
    build("vmamba_tiny_s2l5", num_classes=3, dims=[8, 8, 8, 8], norm_layer="ln")
    assert before == VARIANTS
    assert set(VARIANTS) == set(SIZES)
    assert all(getattr(factories, name).__name__ == name for name in VARIANTS)
