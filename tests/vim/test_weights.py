"""Weights into a model: the same, another size, another model; the position embedding's resizing."""

import pytest
import torch

from checkpoint import CheckpointError, load_weights, resize_pos_embed
from models_mamba import VisionMamba
from small_vim import SMALL, assert_equal_weights


def small_model(**options):
    """A network with its own random weights for each number of options."""
    torch.manual_seed(len(options))
    return VisionMamba(**{**SMALL, "depth": 2, **options}).eval()


@pytest.fixture
def weights():
    return small_model().state_dict()


def test_weights_of_the_same_model(weights):
    model = small_model(drop_rate=0.1)
    assert not torch.equal(
        model.state_dict()["layers.0.mixer.in_proj.weight"], weights["layers.0.mixer.in_proj.weight"]
    )
    report = load_weights(model, weights)
    assert_equal_weights(model.state_dict(), weights)
    assert (report.resized, report.dropped, report.missing, report.unexpected) == (None, [], [], [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, r"another model \(it lacks layers\.2\.mixer\.A_log.* and 14 more\)"),
        ({"depth": 1}, r"another model \(it has besides layers\.1\.mixer\.A_log.* and 14 more\)"),
        ({"if_cls_token": False}, r"another model \(it has besides cls_token\)"),
        ({"embed_dim": 24}, r"another size \(cls_token is \(1, 1, 16\), the model's is \(1, 1, 24\);.* more\)"),
        ({"num_classes": 7}, r"the checkpoint has 5 classes but the model has 7: create the model with num_classes=5"),
        ({"patch_size": 4}, r"another size \(patch_embed\.proj\.weight is"),
    ],
)
def test_weights_of_another_model(weights, options, message):
    model = small_model(**options)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, weights)
    assert "\n" not in str(caught.value)
    assert_equal_weights(model.state_dict(), before)


def test_the_head_can_be_left_out(weights):
    model = small_model(num_classes=7)
    own_head = model.head.weight.clone()
    report = load_weights(model, weights, drop_head=True)
    assert report.dropped == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, own_head)
    assert torch.equal(model.norm_f.weight, weights["norm_f.weight"])
    assert load_weights(small_model(num_classes=0), weights).dropped == ["head.weight", "head.bias"]


def test_a_loose_load_takes_what_fits_by_name(weights):
    model = small_model(depth=3)
    report = load_weights(model, weights, strict=False)
    assert len(report.missing) == 17
    assert torch.equal(model.state_dict()["layers.1.norm.weight"], weights["layers.1.norm.weight"])


def test_the_rotary_tables_are_the_models_own():
    small = small_model(if_rope=True, if_cls_token=False)
    large = small_model(if_rope=True, if_cls_token=False, img_size=(64, 32))
    tables = large.rope.freqs_cos.clone()
    load_weights(large, small.state_dict())
    assert torch.equal(large.rope.freqs_cos, tables)


# ------------------------------------------------------------------------------------------ position embedding


def smooth_embedding(grid, placement, channels=3):
    """Channels: the row's and the column's place in the picture, and a constant; class tokens hold 100, 200."""
    rows, columns = ((torch.arange(n) + 0.5) / n for n in grid)
    points = torch.stack([rows[:, None].expand(grid), columns[None].expand(grid), torch.ones(grid)], dim=-1)
    patches = points.reshape(1, -1, channels)
    tokens = {"none": [], "both": [100.0, 200.0]}.get(placement, [100.0])
    where = {"none": [], "first": [0], "middle": [patches.shape[1] // 2], "both": [0, patches.shape[1] + 1]}[placement]
    sequence = list(patches.unbind(1))
    for row, value in zip(where, tokens, strict=True):
        sequence.insert(row, torch.full((1, channels), value))
    return torch.stack(sequence, dim=1), where


@pytest.mark.parametrize("grid", [(8, 8), (6, 9), (3, 4)])
@pytest.mark.parametrize("placement", ["none", "first", "middle", "both"])
def test_resizing_keeps_class_rows_and_places(placement, grid):
    source, _ = smooth_embedding((5, 5), placement)
    expected, where = smooth_embedding(grid, placement)
    resized = resize_pos_embed(source, grid, placement=placement)
    assert resized.shape == expected.shape
    assert torch.equal(resized[:, where], expected[:, where])
    # Bicubic interpolation keeps a slope but for the clamped borders, where it is off by a few hundredths.
    assert (resized - expected).abs().max() < 0.06


def test_resizing_a_rectangle_needs_its_grid():
    source, _ = smooth_embedding((4, 6), "middle")
    expected, _ = smooth_embedding((8, 6), "middle")
    assert (resize_pos_embed(source, (8, 6), source_grid=(4, 6)) - expected).abs().max() < 0.06
    with pytest.raises(ValueError, match="24 patches, which is no square grid"):
        resize_pos_embed(source, (8, 6))
    with pytest.raises(ValueError, match="24 patches, got 5 x 5"):
        resize_pos_embed(source, (8, 6), source_grid=(5, 5))


@pytest.mark.parametrize("mode", ["middle", "upstream"])
def test_the_same_grid_changes_nothing(mode):
    source = torch.randn(1, 17, 6)
    assert resize_pos_embed(source, (4, 4), mode=mode) is source


def test_the_published_recipe_takes_the_first_row_for_the_class_token():
    source = torch.randn(1, 17, 6)
    resized = resize_pos_embed(source, (7, 7), mode="upstream")
    assert torch.equal(resized[:, 0], source[:, 0])
    picture = source[:, 1:].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(picture, size=(7, 7), mode="bicubic", align_corners=False)
    assert torch.equal(resized[:, 1:], expected.permute(0, 2, 3, 1).reshape(1, 49, 6))
    assert not torch.allclose(resized, resize_pos_embed(source, (7, 7)))
    with pytest.raises(ValueError, match="square grids only"):
        resize_pos_embed(source, (7, 6), mode="upstream")


def test_half_precision_stays_half_precision():
    source = torch.randn(1, 17, 6)
    resized = resize_pos_embed(source.half(), (6, 6))
    assert resized.dtype == torch.float16
    torch.testing.assert_close(resized.float(), resize_pos_embed(source, (6, 6)), rtol=2e-3, atol=2e-3)


def test_impossible_arguments_are_named():
    with pytest.raises(ValueError, match="one of middle, upstream, got 'bilinear'"):
        resize_pos_embed(torch.zeros(1, 17, 2), (4, 4), mode="bilinear")
    with pytest.raises(ValueError, match=r"shape \(1, patches \+ 1, channels\), got \(17, 2\)"):
        resize_pos_embed(torch.zeros(17, 2), (4, 4))


@pytest.mark.parametrize("mode", ["middle", "upstream"])
def test_loading_into_another_picture_size(weights, mode):
    model = small_model(img_size=48)
    report = load_weights(model, weights, resize=mode)
    assert report.resized == (17, 37)
    assert torch.equal(model.pos_embed, resize_pos_embed(weights["pos_embed"], (6, 6), mode=mode))
    assert torch.equal(model.pos_embed[:, 18], weights["pos_embed"][:, 8]) == (mode == "middle")
    assert model(torch.randn(1, 3, 48, 48)).shape == (1, 5)


def test_loading_between_rectangles():
    source = small_model(img_size=(48, 32))
    target = small_model(img_size=(32, 64), stride=8)
    with pytest.raises(CheckpointError, match="no square grid"):
        load_weights(target, source.state_dict())
    load_weights(target, source.state_dict(), source_grid=(6, 4))
    expected = resize_pos_embed(source.pos_embed.detach(), (4, 8), source_grid=(6, 4))
    assert torch.equal(target.pos_embed, expected)
