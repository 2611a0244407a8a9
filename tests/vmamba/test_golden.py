"""Whole networks against the numbers that the published code gives for reproducible weights."""

from functools import lru_cache

import pytest
import torch
from models import fill, picture

import vmamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
from tolerances import GOLDEN_LOGITS

# (height, width): first six logits, their sum over all classes, the greatest.
LOGITS = {
    "vmamba_tiny_s2l5": {
        (64, 64): ([0.0717, -0.5755, -0.3428, -1.2086, -0.7826, -0.3943], 3.6041, 176),
        (96, 64): ([0.7698, -0.5307, -0.3206, -1.0683, -0.1628, 0.3466], -9.8728, 782),
    },
    "vmamba_tiny_s1l8": {
        (64, 64): ([0.4738, 1.4512, 0.1216, -0.0125, 0.5914, -0.9659], -2.3883, 219),
        (96, 64): ([-0.4500, 1.0167, 0.6752, -0.1861, 0.1515, 0.5443], 10.8612, 932),
    },
    "vanilla_vmamba_tiny": {
        (64, 64): ([0.0310, 0.2171, -0.0199, 0.8319, -0.6676, 0.2085], 10.4142, 558),
        (96, 64): ([0.0787, -0.0786, -0.0204, 0.9530, 0.1699, 0.0285], -13.7102, 440),
    },
}
ROUNDING = 5e-5  # of the four digits above
SUM = 1e-3  # of a thousand logits, whose errors may add up


@lru_cache(maxsize=1)
def weights(name, device):
    return fill(getattr(vmamba, name)()).state_dict()


def network(name, norm_layer):
    model = getattr(vmamba, name)(norm_layer=norm_layer).eval()
    model.load_state_dict(weights(name, torch.get_default_device()))
    return model


@pytest.mark.parametrize("name", LOGITS)
def test_logits(name, backend):
    answers = {}
    for norm_layer in ("ln2d", "ln"):
        model = network(name, norm_layer)
        for size, (first, total, greatest) in LOGITS[name].items():
            with torch.no_grad():
                logits = model(picture(3, *size))
            answers[norm_layer, size] = logits
            torch.testing.assert_close(logits[0, :6], torch.tensor(first), rtol=0, atol=GOLDEN_LOGITS + ROUNDING)
            torch.testing.assert_close(logits.sum(), torch.tensor(total), rtol=0, atol=SUM)
            assert logits.argmax() == greatest
    for size in LOGITS[name]:
        torch.testing.assert_close(answers["ln", size], answers["ln2d", size], rtol=0, atol=3e-5)


def test_sizes_of_the_maps(backend):
    model = network("vmamba_tiny_s2l5", "ln2d")
    means = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, given, result: means.append(result.abs().mean()))
    with torch.no_grad():
        logits = model(picture(3, 64, 64))
    expected = torch.tensor([0.78965, 0.79219, 0.78493, 1.69340, 0.58968])
    torch.testing.assert_close(torch.stack([*means, logits.abs().mean()]), expected, rtol=0, atol=2e-5)


def test_exchanged_directions_are_noticed():
    """The numbers above tell apart what a plausible mistake would give."""
    model = network("vmamba_tiny_s2l5", "ln2d")
    state = model.state_dict()
    for key, value in state.items():
        if ".op." in key and key.endswith(("A_logs", "Ds", "x_proj_weight", "dt_projs_weight", "dt_projs_bias")):
            by_direction = value if value.ndim > 1 and value.shape[0] == 4 else value.unflatten(0, (4, -1))
            state[key] = by_direction[[0, 2, 1, 3]].reshape(value.shape)
    given = model(picture(3, 96, 64))
    model.load_state_dict(state)
    assert (model(picture(3, 96, 64)) - given).abs().max() > 2


def test_a_network_in_double_precision():
    model = network("vmamba_tiny_s2l5", "ln2d")
    with torch.no_grad():
        given = model(picture(3, 96, 64))
        wide = model.double()(picture(3, 96, 64).double())
    assert wide.dtype is torch.float64
    torch.testing.assert_close(given, wide.float(), rtol=0, atol=GOLDEN_LOGITS)


def test_the_scan_by_hand(backend):
    u = torch.tensor([[[1.0, 2, 3, 4]]])
    one = torch.ones(1, 1, 4)
    y = selective_scan_fn(u, torch.zeros_like(u), -torch.ones(1, 1), one, one, torch.ones(1), delta_softplus=True)
    expected = torch.tensor([[[1.6931472, 3.7328680, 5.9458756, 8.2455263]]])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-6)
