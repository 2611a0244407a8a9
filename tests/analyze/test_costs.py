"""FLOPs by the rule of the published tables, and what the command prints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from command_calls import WEIGHTS, Outcome, call_elsewhere, call_here
from torch import Tensor, nn

import models_mamba  # noqa: F401  (registers the models)
import vmamba  # noqa: F401
from analyze import costs, flops
from analyze.costs import count_cost
from flops import count_flops

VIM_S = "vim_small_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
PUBLISHED = {
    "vmamba_tiny_s2l5": (30_705_832, 4_857_742_080),
    "vmamba_tiny_s1l8": (30_249_064, 4_905_609_984),
    "vanilla_vmamba_tiny": (22_893_448, 5_626_895_040),
    VIM_S: (25_796_584, 5_301_500_928),
}
Call = Callable[[str], Outcome]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    monkeypatch.chdir(tmp_path)
    return lambda line: call_here(flops.run, line, capfd)


def counted(model: nn.Module, size: int = 8) -> costs.Cost:
    return count_cost(model.eval(), size)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_figures(name: str) -> None:
    parameters, published = PUBLISHED[name]
    cost = count_cost(timm.create_model(name))
    assert (cost.parameters, cost.published) == (parameters, published)


def test_the_figure_of_vanilla_base_follows_from_rounding_too() -> None:
    cost = count_cost(timm.create_model("vanilla_vmamba_base"))
    assert (cost.total, cost.published) == (18_019_627_008, 18_020_115_136)
    assert list(cost.differences) == [costs.ROUNDED]


def test_the_rule_for_vim() -> None:
    model = timm.create_model("vim_pico_patch4_32", num_classes=10)
    cost, layers = count_cost(model), count_flops(model)
    tokens, blocks, inner, state, rank = 65, 6, 128, 8, 4
    assert cost.counted == layers
    assert cost.total == layers.multiply_adds + layers.scan_flops + layers.channel_updates
    fused = 2 * blocks * tokens * inner * (4 + rank + 2 * state + rank)
    gates = 2 * blocks * tokens * inner
    assert cost.differences == {costs.FUSED: gates - fused}
    assert cost.total == layers.fvcore_flops
    assert sum(cost.parts().values()) == cost.total


class Products(nn.Module):
    """Every product that no layer makes, beside a layer."""

    default_cfg: Any = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.layer(x[0])  # (3, 8, 6): 3 * 8 * 6 * 8, the layer's own
        square = rows @ rows.transpose(1, 2)  # (3, 8, 8): 3 * 8 * 8 * 6
        square = torch.matmul(square, rows)  # (3, 8, 6): 3 * 8 * 6 * 8
        square = torch.bmm(square, rows.transpose(1, 2))  # (3, 8, 8): 3 * 8 * 8 * 6
        square = torch.baddbmm(square, rows, rows.transpose(1, 2))  # the same
        plain = nn.functional.linear(square, x[0, 0])  # (3, 8, 8): 3 * 8 * 8 * 8
        summed = torch.einsum("bij,bkj->bk", plain, plain)  # sums of 8 x 8 for each of 3 x 8
        summed = summed + torch.einsum("bij,kj", plain, plain[0]).sum(1)  # (3, 8, 8) of sums of 8
        ahead = torch.einsum("...i,ij->...j", plain, plain[0])  # (3, 8, 8) of sums of 8
        attended = nn.functional.scaled_dot_product_attention(ahead, ahead[:, :5], ahead[:, :5, :4])
        conv = nn.functional.conv2d(x, x.new_ones(2, 3, 3, 3))  # (1, 2, 6, 6) of sums of 27
        return attended.sum() + summed.sum() + conv.sum()


def test_products_that_no_layer_makes() -> None:
    cost = counted(Products())
    expected = 3 * 8 * 8 * 6 * 3 + 3 * 8 * 6 * 8  # four products of matrices
    expected += 3 * 8 * 8 * 8  # linear
    expected += 3 * 8 * 8 * 8 + 3 * 8 * 8 * 8 + 3 * 8 * 8 * 8  # einsum
    expected += 3 * 8 * 5 * (8 + 4)  # attention
    expected += 2 * 6 * 6 * 27  # convolution
    assert cost.products == expected
    assert cost.counted.multiply_adds == 3 * 8 * 6 * 8
    assert cost.published == cost.total == expected + 3 * 8 * 6 * 8


def test_attention_of_timm() -> None:
    """DeiT-Tiny: two products of 197 x 197 x 64 for each of 3 heads and 12 blocks; 1.258 G as usually given."""
    cost = count_cost(timm.create_model("deit_tiny_patch16_224"))
    assert cost.products == 12 * 3 * 2 * 197 * 197 * 64
    assert cost.total == 1_258_411_200
    assert cost.published == cost.total


def test_norms_and_pooling() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )
    parts = counted(model).parts()
    assert parts["norms"] == 2 * 3 * 64 + 5 * 4 * 64
    assert parts["pooling"] == 4 * 64
    assert parts["convolutions and linears"] == 64 * 12 + 8


def test_a_model_is_left_as_it_was() -> None:
    model = timm.create_model("vim_pico_patch4_32", num_classes=10).train()
    count_cost(model)
    assert model.training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


# --- the command ----------------------------------------------------------------------------------------------------


def test_text(call: Call) -> None:
    outcome = call(f"--model {VIM_S} resnet10t")
    assert outcome.code == 0
    assert "random" not in outcome.err
    text = outcome.out
    assert f"{VIM_S}, 3 x 224 x 224\n  parameters  25,796,584\n  FLOPs       5.904264192 G\n" in text
    assert "    1.045758 G  scans, 9 * b * l * d * n" in text
    assert "  counted as in upstream's tables 5.301500928 G: without the convolutions, x_proj and dt_proj" in text
    assert text.count("counted as in upstream's tables") == 1


def test_json_of_a_checkpoint(call: Call) -> None:
    outcome = call(f"--checkpoint {WEIGHTS} --json --img-size 24 40")
    (found,) = json.loads(outcome.out)
    assert (found["model"], found["input"]) == ("vim_pico_patch4_32", [3, 24, 40])
    cost = count_cost(timm.create_model("vim_pico_patch4_32", num_classes=10, img_size=(24, 40)), (24, 40))
    assert (found["parameters"], found["flops"]) == (cost.parameters, cost.total)
    assert (found["flops_as_published"], found["parts"]) == (cost.published, cost.parts())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--model vmamba_tiny_s1l9", "There is no model called 'vmamba_tiny_s1l9'"),
        ("--model vim_pico_patch4_32 --img-size 2", "cannot be built for 2 pixels"),
        ("--model deit_tiny_patch16_224 --img-size 8", "cannot run on an input of 1 x 3 x 8 x 8"),
        ("--model a b --checkpoint c", "--checkpoint names 1 and --model 2"),
        ("--threads 0", "must be a whole number from 1"),
    ],
)
def test_bad_input(call: Call, line: str, message: str) -> None:
    outcome = call(line)
    assert outcome.code == 2
    assert outcome.out == ""
    assert len(outcome.errors) == 1
    assert message in outcome.errors[0]


def test_from_another_folder(tmp_path: Path) -> None:
    outcome = call_elsewhere("flops.py", "--model vim_pico_patch4_32 --threads 1", tmp_path)
    assert outcome.code == 0
    assert outcome.out.startswith("vim_pico_patch4_32, 3 x 32 x 32\n  parameters  280,168\n")
