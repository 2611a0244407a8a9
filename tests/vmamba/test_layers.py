"""The layers by their formulas, in both layouts, alone."""

import pytest
import torch
from models import fill
from torch import nn
from torch.nn import functional as F

from tolerances import assert_close
from vmamba import LayerNorm2d, Linear2d, Mlp, PatchMerging2D, Permute, SoftmaxSpatial, gMlp
from vmamba.layers import ACTIVATIONS, DOWNSAMPLES, NORMS, activate, choose


def maps(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(2))


def first(x):
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_channels_is_a_convolution_of_one_pixel(bias):
    layer = Linear2d(5, 7, bias=bias).double()
    x = maps(2, 5, 3, 4)
    assert_close(layer(x), F.conv2d(x, layer.weight[:, :, None, None], layer.bias))
    assert layer.weight.shape == (7, 5)


@pytest.mark.parametrize("shape", [(7, 5), (7, 5, 1, 1)])
def test_linear_of_channels_takes_weights_of_a_convolution(shape):
    layer = Linear2d(5, 7)
    given = {"weight": maps(*shape, dtype=torch.float32), "bias": maps(7, dtype=torch.float32)}
    layer.load_state_dict(given)
    assert torch.equal(layer.weight, given["weight"].view(7, 5))
    assert given["weight"].shape == shape
    assert torch.equal(layer.bias, given["bias"])


@pytest.mark.parametrize("shape", [(7, 5, 2, 2), (35,), (5, 7), (5, 7, 1, 1)])
def test_linear_of_channels_refuses_other_weights(shape):
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        Linear2d(5, 7, bias=False).load_state_dict({"weight": torch.zeros(shape)})


def test_linear_of_channels_misses_its_weight():
    with pytest.raises(RuntimeError, match="Missing key"):
        Linear2d(5, 7).load_state_dict({"bias": torch.zeros(7)})
    assert Linear2d(5, 7).load_state_dict({"bias": torch.zeros(7)}, strict=False).missing_keys == ["weight"]


def test_norm_of_channels():
    layer = fill(LayerNorm2d(5).double())
    x = maps(2, 5, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    expected = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
    assert_close(layer(x), expected * layer.weight[:, None, None] + layer.bias[:, None, None])


def test_permute():
    x = maps(2, 3, 4, 5)
    layer = Permute(0, 3, 1, 2)
    assert layer(x).data_ptr() == x.data_ptr()
    assert torch.equal(layer(x), first(x))
    assert repr(layer) == "Permute(0, 3, 1, 2)"


@pytest.mark.parametrize("dim", [-1, 1])
def test_softmax_over_the_pixels(dim):
    x = maps(2, 3, 4, 5)
    expected = x.exp() / x.exp().sum((1, 2), keepdim=True)
    given = SoftmaxSpatial(1)(x) if dim == 1 else SoftmaxSpatial()(first(x)).permute(0, 2, 3, 1)
    assert_close(given, expected)


def test_softmax_over_other_axes_is_refused():
    with pytest.raises(ValueError, match=r"`dim` must be -1 .* got 2"):
        SoftmaxSpatial(2)


@pytest.mark.parametrize("channel_first", [False, True])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 6), (4, 3), (1, 1), (7, 5)])
def test_patch_merging(height, width, channel_first):
    norm = LayerNorm2d if channel_first else nn.LayerNorm
    layer = fill(PatchMerging2D(3, norm_layer=norm, channel_first=channel_first).double())
    x = maps(2, height, width, 3)
    padded = torch.zeros(2, (height + 1) // 2 * 2, (width + 1) // 2 * 2, 3, dtype=x.dtype)
    padded[:, :height, :width] = x
    phases = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    normed = F.layer_norm(torch.cat(phases, -1), (12,), layer.norm.weight, layer.norm.bias)
    given = layer(first(x)).permute(0, 2, 3, 1) if channel_first else layer(x)
    assert_close(given, normed @ layer.reduction.weight.T)
    assert [(key, tuple(value.shape)) for key, value in layer.state_dict().items()] == [
        ("reduction.weight", (6, 12)),
        ("norm.weight", (12,)),
        ("norm.bias", (12,)),
    ]


def test_patch_merging_defaults():
    assert type(PatchMerging2D(3).norm) is nn.LayerNorm
    assert type(PatchMerging2D(3, channel_first=True).norm) is LayerNorm2d
    assert PatchMerging2D(3, 5).reduction.weight.shape == (5, 12)
    assert PatchMerging2D(3, 5, channel_first=True)(maps(1, 3, 3, 3).float()).shape == (1, 5, 2, 2)


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("kind", [Mlp, gMlp])
def test_perceptrons(kind, channels_first, act):
    layer = fill(kind(4, 6, 5, act_layer=act, channels_first=channels_first).double())
    x = maps(2, 3, 5, 4)
    hidden = F.linear(x, layer.fc1.weight, layer.fc1.bias)
    if kind is gMlp:
        assert hidden.shape[-1] == 12
        hidden = hidden[..., :6] * act()(hidden[..., 6:])
    else:
        hidden = act()(hidden)
    given = layer(first(x)).permute(0, 2, 3, 1) if channels_first else layer(x)
    assert_close(given, F.linear(hidden, layer.fc2.weight, layer.fc2.bias))
    assert set(layer.state_dict()) == {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}


@pytest.mark.parametrize("kind", [Mlp, gMlp])
def test_perceptrons_by_default_keep_the_channels_and_drop_in_training_alone(kind):
    x = maps(2, 3, 5, 4).float()
    layer = kind(4, drop=0.5)
    assert layer.fc2.weight.shape == (4, 4)
    assert layer(x).shape == x.shape
    assert (layer(x) == 0).any()
    assert not (layer.eval()(x) == 0).any()


@pytest.mark.parametrize(
    "layer",
    [
        Linear2d(4, 6),
        LayerNorm2d(4),
        Mlp(4, 8, channels_first=True),
        gMlp(4, 8, channels_first=True),
        PatchMerging2D(4, channel_first=True),
        SoftmaxSpatial(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_maps_with_the_channels_last_in_memory_stay_so(layer):
    x = maps(2, 6, 8, 4).float()
    y = layer(first(x))
    assert y.permute(0, 2, 3, 1).is_contiguous()
    torch.testing.assert_close(layer(first(x).contiguous()), y)


def test_choices_by_name():
    assert choose("norm_layer", "LN2D", NORMS) is LayerNorm2d
    with pytest.raises(ValueError, match="`act` must be one of silu, gelu, relu, sigmoid, got 'swish'; the nearest is"):
        choose("act", "swish", ACTIVATIONS)
    with pytest.raises(ValueError, match="got None"):
        choose("act", None, ACTIVATIONS)


@pytest.mark.parametrize("channels_first", [False, True])
def test_an_activation_in_place_is_seen_by_nobody(channels_first):
    """Gradients, hooks and the input are as without it, and so is every value."""
    mlp = Mlp(6, 12, channels_first=channels_first)
    x = torch.randn(2, 6, 3, 5) if channels_first else torch.randn(2, 3, 5, 6)
    before = x.clone()
    expected = mlp(x)
    expected.sum().backward()
    assert mlp.fc1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(mlp(x), expected, rtol=0, atol=0)
        assert torch.equal(x, before)
        seen = []
        handle = mlp.fc1.register_forward_hook(lambda module, inputs, output: seen.append(output))
        mlp(x)
        handle.remove()
        torch.testing.assert_close(seen[0], mlp.fc1(x), rtol=0, atol=0)
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(output) if module is mlp.fc1 else None
        )
        mlp(x)
        handle.remove()
        torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=0)


class Keeps(nn.Module):
    """Returns what it keeps, as a cache or an identity does."""

    def __init__(self, kept):
        super().__init__()
        self.kept = kept

    def forward(self, _):
        return self.kept


@pytest.mark.parametrize("act", [nn.GELU, nn.SiLU])
def test_an_activation_is_in_place_only_after_layers_that_are_known(act):
    mlp = Mlp(4, 6, act_layer=act)
    kept = torch.randn(3, 6)
    with torch.no_grad():
        known, source = mlp.fc1(torch.randn(3, 4)), mlp.fc1
        assert activate(mlp.act, known, source).data_ptr() == known.data_ptr()
        mlp.fc1 = Keeps(kept.clone())
        assert torch.equal(mlp(torch.randn(3, 4)), mlp.fc2(act()(kept)))
        assert torch.equal(mlp.fc1.kept, kept)


@pytest.mark.parametrize("version", ["v2", "v3"])
@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize("autocast", [False, True])
def test_downsampling_of_narrow_maps_in_bf16(version, width, autocast):
    """Some processors' convolutions are wrong for maps that become one pixel wide."""
    if version == "v2" and width == 1:
        pytest.skip("two columns are needed")
    down = DOWNSAMPLES[version](96, 192, LayerNorm2d, True)
    x = torch.randn(8, 96, 14, width)
    expected = down(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        found = down(x) if autocast else down.bfloat16()(x.bfloat16())
        again = down(x) if autocast else down(x.bfloat16())
    assert torch.equal(found, again)
    assert found.dtype is torch.bfloat16 or autocast
    assert_close(found.float(), expected, limit=2e-2)
