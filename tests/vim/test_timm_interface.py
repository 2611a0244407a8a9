"""What timm and its users expect of the model, and the registered variants."""

import copy

import pytest
import timm
import torch
from timm.data import resolve_data_config
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from checkpoint import CheckpointError, resize_pos_embed, save_checkpoint
from models_mamba import VisionMamba
from registry import VARIANTS
from small_vim import SMALL, pictures, small_model
from timm_methods import take_indices

RELEASED = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
PICO = "vim_pico_patch4_32"


# ---------------------------------------------------------------------------------------------- intermediate features


@pytest.mark.parametrize("flip", [-1.0, 2.0])
@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({}, [8]),
        ({"use_middle_cls_token": False}, [0]),
        ({"use_double_cls_token": True}, [0, 17]),
        ({"if_cls_token": False}, []),
        ({"stride": 4}, [24]),
        ({"img_size": (48, 24)}, [9]),
    ],
)
def test_intermediates_are_maps_without_the_class_tokens(options, rows, flip):
    model = small_model(**options, flip_img_sequences_ratio=flip)
    rows_of_map, columns_of_map = model.patch_embed.grid_size
    patches = [i for i in range(model.patch_embed.num_patches + len(rows)) if i not in rows]
    x = pictures(*model.patch_embed.img_size)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(x, norm=True, return_prefix_tokens=bool(rows))
        assert len(maps) == 4
        last, class_tokens = maps[-1] if rows else (maps[-1], None)
        assert last.shape == (2, 16, rows_of_map, columns_of_map)
        assert last.is_contiguous()
        assert torch.equal(last.flatten(2).transpose(1, 2), tokens[:, patches])
        if rows:
            assert torch.equal(class_tokens, tokens[:, rows])
            torch.testing.assert_close(tokens[:, rows].mean(1), model.forward_features(x))
        # A patch that is changed changes the map most where it lies.
        x[:, :, -4:, :4] += 5
        changed = model.forward_intermediates(x, norm=True, intermediates_only=True)[0]
        difference = (changed - (maps[0][0] if rows else maps[0])).abs().sum((0, 1))
        assert divmod(difference.argmax().item(), columns_of_map) == (rows_of_map - 1, 0)


def test_intermediates_without_norm_are_the_residual_stream():
    model = small_model()
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(pictures(), output_fmt="NLC")
        for given in (maps[3], model.get_intermediate_layers(pictures())[0]):
            assert given.shape == (2, 16, 16)
            torch.testing.assert_close(model.norm_f(given), tokens[:, [i for i in range(17) if i != 8]])
        hidden, residual = model.layers[0](model._embed(pictures())[0])
        stream = (hidden + residual)[:, [i for i in range(17) if i != 8]]
        torch.testing.assert_close(maps[0], stream)


def test_intermediates_that_are_asked_for():
    model = small_model()
    with torch.no_grad():
        every = model.forward_intermediates(pictures(), intermediates_only=True)
        for indices, expected in ((2, [2, 3]), ([0, -1], [0, 3]), ([3, 1], [3, 1])):
            given = model.forward_intermediates(pictures(), indices, intermediates_only=True)
            assert all(torch.equal(a, every[i]) for a, i in zip(given, expected, strict=True))
        calls = []
        model.layers[2].register_forward_pre_hook(lambda *_: calls.append(1))
        tokens, given = model.forward_intermediates(pictures(), [1], stop_early=True, norm=True, output_fmt="NLC")
        assert calls == []
        assert torch.equal(tokens[:, [i for i in range(17) if i != 8]], given[0])
        reshaped = model.get_intermediate_layers(pictures(), [1], reshape=True, norm=True)[0]
        assert torch.equal(reshaped.flatten(2).transpose(1, 2), given[0])
    with pytest.raises(ValueError, match="NCHW or NLC, got 'NHWC'"):
        model.forward_intermediates(pictures(), output_fmt="NHWC")


def test_steps_of_a_network_of_pairs():
    model = small_model(if_bidirectional=True, depth=5)
    with torch.no_grad():
        tokens, maps = model.forward_intermediates(pictures(), norm=True, output_fmt="NLC")
    assert len(maps) == len(model.feature_info) == 2
    assert [entry["module"] for entry in model.feature_info] == ["layers.1", "layers.3"]
    assert torch.equal(maps[1], tokens[:, [i for i in range(17) if i != 8]])


@pytest.mark.parametrize(
    ("indices", "message"), [(0, "last 1 to 4"), (5, "last 1 to 4"), ([4], "-4 and 3, got 4"), ([-5], "got -5")]
)
def test_indices_out_of_range(indices, message):
    with pytest.raises(ValueError, match=message):
        take_indices(4, indices)


def test_features_only():
    model = timm.create_model(PICO, features_only=True, out_indices=(1, -1)).eval()
    with torch.no_grad():
        maps = model(pictures())
        expected = model.model.forward_intermediates(pictures(), [1, 5], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([64, 64], [4, 4])
    assert len(timm.create_model(PICO, features_only=True)(pictures())) == 3


# --------------------------------------------------------------------------------------------------- head and groups


def test_head_and_features_make_the_logits():
    model = small_model()
    with torch.no_grad():
        features = model.forward_features(pictures())
        assert features.shape == (2, 16)
        assert torch.equal(model.forward_head(features), model(pictures()))
        assert torch.equal(model.forward_head(features, pre_logits=True), features)
        assert torch.equal(model(pictures(), return_features=True), features)


def test_the_classifier_is_replaced():
    model = small_model()
    assert model.get_classifier() is model.head
    model.double().reset_classifier(7)
    assert (model.num_classes, model.head.weight.shape, model.head.weight.dtype) == (7, (7, 16), torch.float64)
    assert model.head.bias.abs().max() == 0
    assert model(pictures().double()).shape == (2, 7)
    model.reset_classifier(0, "mean")
    assert isinstance(model.head, nn.Identity)
    assert model.final_pool_type == "mean"
    assert model(pictures().double()).shape == (2, 16)
    with pytest.raises(ValueError, match="got 'avg'"):
        model.reset_classifier(3, "avg")


def test_a_network_without_head():
    assert small_model(num_classes=0)(pictures()).shape == (2, 16)


def test_what_is_not_decayed():
    model = small_model(use_double_cls_token=True)
    groups = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.1).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert {"layers.0.mixer.A_log", "layers.0.mixer.conv1d.weight", "head.weight"} <= decayed
    assert not decayed & {"pos_embed", "cls_token_head", "cls_token_tail", "layers.0.mixer.D", "head.bias"}


def test_layers_are_grouped():
    groups = group_parameters(small_model(), small_model().group_matcher())
    assert [len(groups[i]) for i in sorted(groups)] == [4, 17, 17, 17, 18, 2]
    assert sorted(groups[0]) == ["cls_token", "patch_embed.proj.bias", "patch_embed.proj.weight", "pos_embed"]
    coarse = group_parameters(small_model(), small_model().group_matcher(coarse=True))
    assert len(coarse[1]) == 17


def test_data_configuration():
    for model in (timm.create_model(PICO, in_chans=1, img_size=(32, 48)), small_model(channels=1, img_size=(32, 48))):
        config = resolve_data_config(model=model)
        assert config["input_size"] == (1, 32, 48)
        assert (config["crop_pct"], config["interpolation"], config["mean"][0]) == (0.875, "bicubic", 0.485)


def test_copies_are_independent():
    model = small_model()
    twin = copy.deepcopy(model)
    twin.head.weight.data.zero_()
    assert not torch.equal(twin(pictures()), model(pictures()))


# ------------------------------------------------------------------------------------------------------- variants


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_every_registered_name_runs_at_its_size(name):
    model = timm.create_model(name, depth=1, num_classes=3).eval()
    size = 384 if "384" in name else 32 if name.endswith("_32") else 224
    assert model.patch_embed.img_size == (size, size)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, size, size)).shape == (1, 3)


def test_the_two_spellings_of_the_middle_token_mean_one_network():
    for name, variant in VARIANTS.items():
        if name.endswith("with_middle_cls_token_div2"):
            assert VARIANTS[name.replace("with_middle_cls_token", "with_midclstok")] == variant
    assert VARIANTS["vim_tiny_patch16_224"] == VARIANTS[RELEASED]


@pytest.mark.parametrize(
    ("ending", "patch", "placement"),
    [
        ("patch16_224_{}_rope_also_residual", 16, "none"),
        ("patch16_224_{}_rope_also_residual_with_cls_token", 16, "first"),
        ("patch8_224_{}_rope_also_residual", 8, "none"),
        ("patch8_224_{}_rope_also_residual_with_cls_token", 8, "first"),
    ],
)
def test_the_rotary_family_is_another_architecture(ending, patch, placement):
    name = "vim_tiny_" + ending.format("bimambav2_final_pool_mean_abs_pos_embed")
    model = timm.create_model(name, depth=2)
    assert (model.if_rope, model.if_rope_residual, model.final_pool_type) == (True, True, "mean")
    assert not model.layers[0].mixer.if_divide_out
    assert model.class_token_placement == placement
    assert model.patch_embed.patch_size == (patch, patch)
    assert model.patch_embed.stride == patch


def test_the_small_variant_is_small():
    model = timm.create_model(PICO, num_classes=10)
    assert sum(parameter.numel() for parameter in model.parameters()) < 250_000
    assert (model.embed_dim, len(model.layers), model.layers[0].mixer.d_state) == (64, 6, 8)
    assert model.class_token_placement == "middle"
    assert model.layers[0].mixer.if_divide_out


# ------------------------------------------------------------------------------------------------- timm's own options


def test_timm_options():
    model = timm.create_model(
        PICO, depth=2, embed_dim=32, in_chans=1, img_size=(16, 24), num_classes=3, drop_rate=0.1, drop_path_rate=0.2,
        drop_block_rate=None, if_divide_out=False,
    )  # fmt: skip
    assert model(pictures(16, 24, channels=1)).shape == (2, 3)
    assert (model.embed_dim, len(model.layers), model.drop_path.drop_prob) == (32, 2, 0.2)
    assert not model.layers[1].mixer.if_divide_out
    assert model.pretrained_cfg["architecture"] == PICO
    assert model.default_cfg is model.pretrained_cfg


def test_options_without_effect_and_other_spellings():
    model = VisionMamba(
        **SMALL, pretrained_cfg={"a": 1}, pretrained_cfg_overlay=None, cache_dir=None, drop_block_rate=0.1
    )
    assert model.pretrained_cfg == {"a": 1}
    assert not VisionMamba(**SMALL, if_devide_out=False).layers[0].mixer.if_divide_out
    assert VisionMamba(**SMALL, in_chans=2).patch_embed.proj.in_channels == 2
    with pytest.raises(TypeError, match="no option 'imgsize'; the nearest is 'img_size'"):
        timm.create_model(PICO, imgsize=32)


@pytest.fixture
def published(tmp_path):
    """A checkpoint of the small variant, under the name by which a variant without repository finds it."""
    model = timm.create_model(PICO, depth=2, num_classes=5)
    path = tmp_path / "weights.pth"
    save_checkpoint(path, {"model": model.state_dict()})
    return model.state_dict(), {"file": str(path)}


def test_pretrained_weights(published):
    state, overlay = published
    model = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, num_classes=5)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_pretrained_weights_are_fitted(published):
    state, overlay = published
    model = timm.create_model(
        PICO, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, num_classes=9, img_size=(40, 24), in_chans=1
    )
    assert torch.equal(model.pos_embed, resize_pos_embed(state["pos_embed"], (10, 6)))
    torch.testing.assert_close(model.patch_embed.proj.weight, state["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert torch.equal(model.norm_f.weight, state["norm_f.weight"])
    assert model(pictures(40, 24, channels=1)).shape == (2, 9)
    features = timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=overlay, depth=2, num_classes=0)
    assert torch.equal(features.layers[1].mixer.D, state["layers.1.mixer.D"])


def test_pretrained_weights_of_another_network(published):
    with pytest.raises(CheckpointError, match="belongs to another model"):
        timm.create_model(PICO, pretrained=True, pretrained_cfg_overlay=published[1], depth=3)


def test_a_variant_without_published_weights():
    with pytest.raises(CheckpointError, match=f"no published weights for {PICO}"):
        timm.create_model(PICO, pretrained=True)


@pytest.mark.parametrize(
    ("name", "repository", "finetuned"),
    [
        ("vim_tiny_patch16_224", "hustvl/Vim-tiny-midclstok", False),
        (RELEASED.replace("tiny_patch16", "small_patch16_stride8"), "hustvl/Vim-small-midclstok", True),
        ("vim_base_patch16_384", "hustvl/Vim-base-midclstok", False),
    ],
)
def test_where_published_weights_are(name, repository, finetuned, monkeypatch):
    asked = []

    def refuse(source, *, finetuned, cache_dir):
        asked.append((source, finetuned, cache_dir))
        raise CheckpointError("the hub is away")

    monkeypatch.setattr("registry.read_checkpoint", refuse)
    with pytest.raises(CheckpointError, match="the hub is away"):
        timm.create_model(name, pretrained=True, depth=1, cache_dir="somewhere")
    assert asked == [(repository, finetuned, "somewhere")]
