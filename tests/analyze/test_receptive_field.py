"""Effective receptive fields: the gradient against ones that are known, the layouts of features, the squares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from analyze import utils
from analyze.receptive_field import EffectiveReceptiveField, as_map, last_map, mean_field
from small_vim import small_model
from vmamba import VSSM

get_input_grad, get_rectangle = EffectiveReceptiveField.get_input_grad, EffectiveReceptiveField.get_rectangle


class Features(nn.Module):
    """A model whose `forward_features` is a module's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.forward_features = module


def test_two_convolutions_see_five_by_five() -> None:
    layers = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1))
    for parameter in layers.parameters():
        nn.init.constant_(parameter, 0.5)
    field = get_input_grad(Features(layers), torch.zeros(1, 3, 9, 12))
    expected = torch.zeros(9, 12)
    # The middle is (4, 6); paths to a pixel: 1 2 3 2 1 in each axis; 3 channels, 2 x 4 products of 0.5 * 0.5.
    profile = torch.tensor([1.0, 2.0, 3.0, 2.0, 1.0])
    expected[2:7, 4:9] = profile[:, None] * profile * 3 * 2 * 4 * 0.25
    torch.testing.assert_close(field, expected)
    assert all(parameter.grad is None for parameter in layers.parameters())


def test_both_relus_are_applied() -> None:
    """Channel 0 of the feature is negative, so only channel 1 counts; its negative gradient is cut off."""
    conv = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([[7.0, 7.0], [2.0, -3.0]])[..., None, None])
        conv.bias.copy_(torch.tensor([-1.0, 1.0]))
    field = get_input_grad(Features(conv), torch.zeros(2, 2, 3, 3))
    expected = torch.zeros(3, 3)
    expected[1, 1] = 2 * 2.0
    assert torch.equal(field, expected)


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d"])
def test_through_the_scans_of_vmamba(norm_layer: str) -> None:
    """Against the gradient of the definition of the scan, in fp64."""
    model = VSSM(depths=(1, 1), dims=8, ssm_d_state=2, num_classes=2, norm_layer=norm_layer).double().eval()
    picture = torch.randn(1, 3, 32, 24, dtype=torch.float64)
    field = get_input_grad(model, picture)
    assert field.shape == (32, 24)
    given = picture.clone().requires_grad_()
    final = model.forward_intermediates(given, 1, intermediates_only=True)[0]
    assert final.shape == (1, 16, 4, 3)
    total = final[0, :, 2, 1].clamp(min=0).sum()
    total.backward()
    torch.testing.assert_close(field, given.grad[0].clamp(min=0).sum(0))
    step = 1e-6
    spot = (0, 1, 17, 11)
    moved = picture.clone()
    moved[spot] += step
    after = model.forward_intermediates(moved, 1, intermediates_only=True)[0][0, :, 2, 1].clamp(min=0).sum()
    assert (after - total).item() / step == pytest.approx(float(given.grad[spot]), rel=1e-4, abs=1e-9)


def test_vim_lays_its_tokens_out_as_the_picture() -> None:
    """Without mixing, a token sees its own patch alone: the middle one of a grid of 2 x 4."""
    model = small_model(img_size=(16, 32), depth=1)
    with torch.no_grad():
        model.layers[0].mixer.out_proj.weight.zero_()
    picture = torch.rand(1, 3, 16, 32) + 0.5
    assert last_map(model, picture).shape == (1, 16, 2, 4)
    field = get_input_grad(model, picture)
    expected = torch.zeros(16, 32, dtype=torch.bool)
    expected[8:16, 16:24] = True
    assert torch.equal(field.nonzero(), (field * expected).nonzero())
    assert field.sum() > 0


@pytest.mark.parametrize(
    ("name", "options", "size", "expected"),
    [
        ("resnet10t", {}, (64, 96), (512, 2, 3)),
        ("convnext_atto", {}, (64, 96), (320, 2, 3)),
        ("deit_tiny_patch16_224", {"img_size": (64, 96), "depth": 1}, (64, 96), (192, 4, 6)),
        ("swin_tiny_patch4_window7_224", {"img_size": (64, 96), "depths": (1, 1, 1, 1)}, (64, 96), (768, 2, 3)),
    ],
)
def test_networks_of_timm(name: str, options: dict, size: tuple[int, int], expected: tuple[int, ...]) -> None:
    model = timm.create_model(name, **options).eval()
    found = last_map(model, torch.randn(1, 3, *size))
    assert tuple(found.shape[1:]) == expected
    field = get_input_grad(model, torch.randn(1, 3, *size))
    assert field.shape == size
    assert field.sum() > 0


def test_features_without_intermediates_come_in_three_layouts() -> None:
    picture = torch.randn(2, 3, 24, 40)
    patches = nn.Conv2d(3, 6, 8, stride=8)
    expected = patches(picture)

    def known(features: Tensor, **attributes: Any) -> Tensor:
        return as_map(features, SimpleNamespace(**attributes), 24 / 40)

    tokens = expected.flatten(2).transpose(1, 2)
    both = torch.cat([torch.zeros(2, 2, 6), tokens], 1)
    for found in (
        known(expected, num_features=6),
        known(expected),
        known(expected.permute(0, 2, 3, 1), num_features=6),
        known(expected.permute(0, 2, 3, 1), output_fmt="NHWC"),
        known(tokens),
        known(both, num_prefix_tokens=2),
        known(tokens, patch_embed=SimpleNamespace(grid_size=(3, 5))),
        known(tokens, patch_embed=SimpleNamespace(grid_size=(14, 14))),
    ):
        assert torch.equal(found, expected)
    square = torch.randn(2, 6, 6, 6)
    assert torch.equal(known(square, output_fmt="NHWC"), square.permute(0, 3, 1, 2))
    assert torch.equal(known(square, num_features=6), square)
    whole = nn.Module()
    whole.forward_features = lambda pictures: patches(pictures).flatten(2).transpose(1, 2)
    assert torch.equal(last_map(whole, picture), expected)  # whose rows and columns are those of the picture
    with pytest.raises(ValueError, match="13 tokens are no grid"):
        known(both[:, :13])
    with pytest.raises(ValueError, match=r"features of shape \(2, 6\) are no map: they have been pooled"):
        known(torch.randn(2, 6))
    with pytest.raises(ValueError, match="Linear has neither forward_intermediates nor forward_features"):
        last_map(nn.Linear(2, 2), picture)


# --- squares and display --------------------------------------------------------------------------------------------


def squares(data: Tensor, share: float) -> tuple[int, float] | tuple[None, None]:
    """Every odd square in the middle, one after the other."""
    height, width = data.shape
    h, w = height // 2, width // 2
    for half in range(max(height, width)):
        top, left, bottom, right = h - half, w - half, h + half + 1, w + half + 1
        if top < 0 or left < 0 or bottom > height or right > width:
            return None, None
        if data[top:bottom, left:right].sum() > share * data.sum():
            return 2 * half + 1, (2 * half + 1) ** 2 / data.numel()
    return None, None


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (8, 8), (9, 4), (5, 12)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5, 0.9, 0.99])
def test_rectangles(size: tuple[int, int], share: float) -> None:
    data = torch.rand(size) ** 4
    assert get_rectangle(data, share) == squares(data.double(), share)


def test_rectangles_at_the_edges() -> None:
    spot = torch.zeros(5, 5)
    spot[2, 2] = 1
    assert get_rectangle(spot, 0.99) == (1, 1 / 25)
    assert get_rectangle(spot, 1.0) == (None, None)
    assert get_rectangle(torch.zeros(5, 5), 0.5) == (None, None)
    even = torch.zeros(4, 4)
    even[0, 0] = 1  # the largest odd square that has (2, 2) in its middle is rows and columns 1 to 3
    assert get_rectangle(even, 0.5) == (None, None)
    for bad in (torch.zeros(3), torch.zeros(0, 4), torch.zeros(1, 2, 2)):
        with pytest.raises(ValueError, match="`data` must have shape"):
            get_rectangle(bad, 0.5)


def test_simpnorm() -> None:
    data = torch.tensor([0.0, 1.0, 32.0])
    torch.testing.assert_close(EffectiveReceptiveField.simpnorm(data), torch.tensor([0.0, 0.5, 1.0]))
    assert torch.equal(EffectiveReceptiveField.simpnorm(torch.zeros(3)), torch.zeros(3))


def test_upstream_s_name() -> None:
    assert utils.EffectiveReceiptiveField is EffectiveReceptiveField


def test_the_mean_leaves_out_what_is_not_finite() -> None:
    layers = Features(nn.Conv2d(1, 1, 3, padding=1, bias=False))
    with torch.no_grad():
        layers.forward_features.weight.fill_(1.0)

    def scaled(model: Any, samples: Tensor) -> Tensor:
        return last_map(model, samples * samples)

    pictures = [torch.full((1, 5, 5), value) for value in (1.0, torch.nan, 3.0)]
    mean, used, skipped = mean_field(layers, pictures, scaled)
    assert (used, skipped) == (2, 1)
    assert mean is not None
    assert mean.dtype == torch.float64
    torch.testing.assert_close(mean[1:4, 1:4], torch.full((3, 3), 4.0, dtype=torch.float64))
    assert mean_field(layers, pictures[1:2], scaled) == (None, 0, 1)
    assert mean_field(layers, []) == (None, 0, 0)
