"""The backbone: which maps it gives, its names, and that weights that cannot be had are an error."""

import pytest
import torch
from models import SMALL, fill, pictures, small_model
from torch.nn import functional as F

from vmamba import VSSM, Backbone_VSSM

TINY = {
    "dims": 96,
    "depths": (2, 2, 5, 2),
    "ssm_d_state": 1,
    "ssm_conv_bias": False,
    "forward_type": "v05_noz",
    "norm_layer": "ln2d",
    "downsample_version": "v3",
    "patchembed_version": "v2",
}
OPTIONS = {key: value for key, value in SMALL.items() if key not in ("norm_layer", "num_classes")}


def backbone(**options):
    model = Backbone_VSSM(**{**OPTIONS, **options}).eval()
    fill(model)
    return model


@pytest.mark.parametrize("norm_layer", ["ln", "ln2d", "bn"])
def test_maps_of_every_stage(norm_layer):
    model = backbone(norm_layer=norm_layer)
    seen = []
    for layer in model.layers:
        layer.blocks.register_forward_hook(lambda module, given, result: seen.append(result))
    with torch.no_grad():
        maps = model(pictures(64, 96))
    assert [tuple(y.shape) for y in maps] == [(2, 8, 16, 24), (2, 16, 8, 12), (2, 32, 4, 6), (2, 64, 2, 3)]
    for i, (given, raw) in enumerate(zip(maps, seen, strict=True)):
        norm = getattr(model, f"outnorm{i}")
        if norm_layer == "bn":
            expected = F.batch_norm(raw, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        else:
            last = raw if norm_layer == "ln" else raw.permute(0, 2, 3, 1)
            expected = F.layer_norm(last, last.shape[-1:], norm.weight, norm.bias).permute(0, 3, 1, 2)
        assert given.is_contiguous()
        torch.testing.assert_close(given, expected)


def test_chosen_stages_and_none():
    every = backbone(norm_layer="ln2d")(pictures())
    chosen = backbone(norm_layer="ln2d", out_indices=(2, -4))
    assert [name for name, _ in chosen.named_children()] == ["patch_embed", "layers", "outnorm2", "outnorm0"]
    assert [tuple(y.shape) for y in chosen(pictures())] == [tuple(every[i].shape) for i in (2, 0)]
    for norm_layer in ("ln", "ln2d"):
        model = backbone(norm_layer=norm_layer, out_indices=())
        last = model(pictures(64, 96))
        assert last.shape == (2, 64, 2, 3)
        assert last.is_contiguous()
        expected = model.forward_intermediates(pictures(64, 96), 1, intermediates_only=True)[0]
        torch.testing.assert_close(last, expected)
    with pytest.raises(ValueError, match="between -4 and 3, got 4"):
        backbone(out_indices=(0, 4))


def test_names():
    with torch.device("meta"):
        model, classifier = Backbone_VSSM(**TINY), VSSM(**TINY)
    own, other = set(model.state_dict()), set(classifier.state_dict())
    assert len(own) == 226
    assert own - other == {f"outnorm{i}.{kind}" for i in range(4) for kind in ("weight", "bias")}
    assert other - own == {f"classifier.{part}.{kind}" for part in ("norm", "head") for kind in ("weight", "bias")}
    assert model.outnorm3.weight.shape == (768,)
    assert not Backbone_VSSM(**OPTIONS).channel_first


def test_every_parameter_learns():
    model = backbone().train()
    sum(y.square().sum() for y in model(pictures(64, 64))).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    assert silent == []


def test_half_precision():
    maps = backbone().bfloat16()(pictures().bfloat16())
    assert {y.dtype for y in maps} == {torch.bfloat16}


def test_a_backbone_has_no_classifier():
    model = backbone()
    for call in (
        model.get_classifier,
        lambda: model.reset_classifier(3),
        lambda: model.forward_head(torch.zeros(1, 64, 2, 2)),
        model.prune_intermediate_layers,
    ):
        with pytest.raises(ValueError, match="a Backbone_VSSM has no classifier: build a VSSM"):
            call()
    with pytest.raises(ValueError, match="`norm` must be False for a Backbone_VSSM"):
        model.forward_intermediates(pictures(), norm=True)
    with torch.no_grad():
        final, maps = model.forward_intermediates(pictures(64, 96))
        assert torch.equal(final, maps[-1])
        assert torch.equal(model.forward_features(pictures(64, 96)), final)


def test_unknown_options_are_refused():
    with pytest.raises(TypeError, match="no option 'out_index'; the nearest is"):
        Backbone_VSSM(out_index=3)


# ------------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def checkpoint(tmp_path):
    model = small_model()
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict(), "other": {"patch_embed.0.weight": torch.zeros(1)}}, path)
    return model.state_dict(), str(path)


def assert_loaded(model, state):
    own = model.state_dict()
    shared = own.keys() & state.keys()
    assert len(shared) == len(own) - 8
    assert all(torch.equal(own[key], state[key]) for key in shared)


def test_weights_of_a_classifier(checkpoint):
    state, path = checkpoint
    assert_loaded(Backbone_VSSM(**OPTIONS, pretrained=path), state)
    model = Backbone_VSSM(**OPTIONS)
    model.load_pretrained(path)
    assert_loaded(model, state)


def test_no_weights():
    for nothing in (None, ""):
        assert Backbone_VSSM(**OPTIONS, pretrained=nothing)(pictures())[0].shape == (2, 8, 8, 8)


def test_weights_that_cannot_be_had_are_an_error(checkpoint, tmp_path):
    _, path = checkpoint
    with pytest.raises(ValueError, match=r"missing\.pth"):
        Backbone_VSSM(**OPTIONS, pretrained=str(tmp_path / "missing.pth"))
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"broken\.pth"):
        Backbone_VSSM(**OPTIONS, pretrained=str(tmp_path / "broken.pth"))
    with pytest.raises(ValueError, match="nothing_here"):
        Backbone_VSSM(**OPTIONS).load_pretrained(path, key="nothing_here")
    for other in ({"dims": 16}, {"depths": (2, 2, 1, 1)}, {"depths": (1, 1, 1, 1)}):
        with pytest.raises(ValueError, match=r"layers|patch_embed"):
            Backbone_VSSM(**{**OPTIONS, **other}, pretrained=path)
