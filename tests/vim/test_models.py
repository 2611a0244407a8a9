"""VisionMamba: upstream's recorded numbers, and every option against a plain restatement of the specification."""

import math
import random

import pytest
import timm
import torch

from golden import cases, fill_parameters, normal, tensors
from models_mamba import PatchEmbed, VisionMamba
from small_vim import pictures, small_model
from tolerances import GOLDEN_LOGITS, assert_close

# ---------------------------------------------------------------------------------------------- recorded numbers


@pytest.mark.parametrize(("name", "case"), cases("vision_mamba"))
def test_recorded_small_networks(name, case, backend):
    recorded = tensors(name)
    model = VisionMamba(**case["config"]).eval()
    assert [[key, list(value.shape)] for key, value in model.state_dict().items()] == case["keys"]
    fill_parameters(model)
    with torch.no_grad():
        features = model(recorded["x"], return_features=True)
        logits = model(recorded["x"])
    assert_close(features, recorded["features"], limit=GOLDEN_LOGITS)
    assert_close(logits, recorded["logits"], limit=GOLDEN_LOGITS)


def released_keys(width, patches):
    """The 415 names and shapes of a released network, in order (inner width e, state 16, dt rank r)."""
    e, r = 2 * width, math.ceil(width / 16)
    yield from [("cls_token", (1, 1, width)), ("pos_embed", (1, patches + 1, width))]
    yield from [("patch_embed.proj.weight", (width, 3, 16, 16)), ("patch_embed.proj.bias", (width,))]
    yield from [("head.weight", (1000, width)), ("head.bias", (1000,))]
    for i in range(24):
        mixer = f"layers.{i}.mixer."
        yield from [
            (mixer + "A_log", (e, 16)),
            (mixer + "D", (e,)),
            (mixer + "A_b_log", (e, 16)),
            (mixer + "D_b", (e,)),
        ]
        yield mixer + "in_proj.weight", (2 * e, width)
        for b in ("", "_b"):
            yield from [(f"{mixer}conv1d{b}.weight", (e, 1, 4)), (f"{mixer}conv1d{b}.bias", (e,))]
            yield f"{mixer}x_proj{b}.weight", (r + 32, e)
            yield from [(f"{mixer}dt_proj{b}.weight", (e, r)), (f"{mixer}dt_proj{b}.bias", (e,))]
        yield mixer + "out_proj.weight", (width, e)
        yield f"layers.{i}.norm.weight", (width,)
    yield "norm_f.weight", (width,)


@pytest.mark.parametrize(("name", "case"), cases("released_model"))
def test_recorded_released_models(name, case, backend):
    model = timm.create_model(name).eval()
    keys = [(key, tuple(value.shape)) for key, value in model.state_dict().items()]
    assert keys == list(released_keys(model.embed_dim, 729 if "stride8" in name else 196))
    assert sum(parameter.numel() for parameter in model.parameters()) == case["parameters"]
    fill_parameters(model)
    with torch.no_grad():
        logits = model(normal(case["input_key"], 2, 3, 224, 224))
    assert_close(logits, tensors(name)["logits"], limit=GOLDEN_LOGITS)


# ------------------------------------------------------------------------------------- options, against the definition


def restated(model, x, *, rows, permutation=None, flipped=False, skip_first=True):
    """The forward pass as the specification tells it, one token at a time: normalised tokens in sequence order.

    Returns them with the number of each one's origin: patches 0 ..., class tokens -1, -2.
    """
    patches = list(model.patch_embed(x).unbind(1))
    numbers = list(range(len(patches)))
    names = ["cls_token_head", "cls_token_tail"] if len(rows) == 2 else ["cls_token"][: len(rows)]
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        patches.insert(row, getattr(model, name)[0].expand(x.shape[0], -1))
        numbers.insert(row, -1 - i)
    hidden = torch.stack(patches, dim=1)
    if model.if_abs_pos_embed:
        hidden = hidden + model.pos_embed
    if permutation is not None:
        hidden, numbers = hidden[:, permutation], [numbers[i] for i in permutation.tolist()]
    unflipped_numbers = list(numbers)
    if flipped:
        hidden, numbers = hidden.flip(1), numbers[::-1]
    residual = None

    def rotated(t):
        t = t.flip(1) if flipped else t
        kept = {0} if skip_first else {i for i, number in enumerate(unflipped_numbers) if number < 0}
        angles = iter(zip(model.rope.freqs_cos, model.rope.freqs_sin, strict=True))
        tokens = []
        for i, token in enumerate(t.unbind(1)):
            if i not in kept:
                cos, sin = next(angles)
                half = torch.stack((-token[:, 1::2], token[:, 0::2]), dim=-1).flatten(1)
                token = token * cos + half * sin
            tokens.append(token)
        t = torch.stack(tokens, dim=1)
        return t.flip(1) if flipped else t

    def one_block(block, hidden, residual):
        residual = hidden if residual is None else residual + hidden
        return block.mixer(block.norm(residual)), residual

    pairs = 2 if model.if_bidirectional else 1
    for i in range(0, len(model.layers) - pairs + 1, pairs):
        if model.if_rope:
            hidden = rotated(hidden)
            if residual is not None and model.if_rope_residual:
                residual = rotated(residual)
        ahead = one_block(model.layers[i], hidden, residual)
        if pairs == 2:
            turned = None if residual is None else residual.flip(1)
            back = one_block(model.layers[i + 1], hidden.flip(1), turned)
            ahead = tuple(a + b.flip(1) for a, b in zip(ahead, back, strict=True))
        hidden, residual = ahead
    return model.norm_f(hidden + residual), numbers


def class_state(x, numbers):
    """The mean state of the class tokens."""
    return torch.stack([x[:, i] for i, number in enumerate(numbers) if number < 0]).mean(0)


FIRST = {"use_middle_cls_token": False}
BOTH = {"use_double_cls_token": True}
NONE = {"if_cls_token": False}
ROPE = {"if_rope": True, "if_rope_residual": True, "pt_hw_seq_len": 4}


@pytest.mark.parametrize("flip", [-1.0, 2.0])
@pytest.mark.parametrize(
    ("options", "rows", "skip_first"),
    [
        ({}, (8,), True),
        (FIRST, (0,), True),
        (BOTH, (0, 17), True),
        ({"stride": 4}, (24,), True),
        ({"img_size": (48, 24)}, (9,), True),
        ({"if_abs_pos_embed": False}, (8,), True),
        ({"init_layer_scale": 0.1}, (8,), True),
        ({"if_divide_out": False}, (8,), True),
        ({"rms_norm": False}, (8,), True),
        ({"residual_in_fp32": False}, (8,), True),
        ({"fused_add_norm": False}, (8,), True),
        ({"bimamba_type": "v1"}, (8,), True),
        ({"if_bimamba": True}, (8,), True),
        ({"bimamba_type": "none", "if_bidirectional": True, "depth": 5}, (8,), True),
        ({"bimamba_type": "none", "if_bidirectional": True, **ROPE}, (8,), True),
        ({"ssm_cfg": {"d_conv": 3, "expand": 3}}, (8,), True),
        (ROPE, (8,), True),
        ({**ROPE, **FIRST}, (0,), True),
        ({**ROPE, "if_rope_residual": False}, (8,), True),
        ({**ROPE, "img_size": (48, 32)}, (12,), True),
        ({**ROPE, "img_size": (24, 40)}, (7,), False),
        ({**ROPE, "stride": 4}, (24,), False),
        ({**ROPE, **BOTH}, (0, 17), False),
    ],
)
def test_class_token_networks(options, rows, skip_first, flip):
    model = small_model(**options, flip_img_sequences_ratio=flip)
    x = pictures(*model.patch_embed.img_size)
    with torch.no_grad():
        expected = class_state(*restated(model, x, rows=rows, flipped=flip > 0, skip_first=skip_first))
        torch.testing.assert_close(model(x, return_features=True), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(x), model.head(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("flip", [-1.0, 2.0])
@pytest.mark.parametrize("rope", [{}, ROPE, {**ROPE, "img_size": (24, 40)}])
@pytest.mark.parametrize("pool", ["none", "mean", "max", "all"])
def test_pooled_networks(pool, rope, flip):
    model = small_model(**NONE, **rope, final_pool_type=pool, flip_img_sequences_ratio=flip)
    x = pictures(*model.patch_embed.img_size)
    with torch.no_grad():
        tokens, _ = restated(model, x, rows=(), flipped=flip > 0, skip_first=False)
        in_order = tokens.flip(1) if flip > 0 else tokens
        features = {"none": tokens[:, -1], "mean": tokens.mean(1)}.get(pool, in_order)
        torch.testing.assert_close(model(x, return_features=True), features, rtol=1e-4, atol=1e-5)
        logits = model.head(features)
        if pool == "max":
            logits = logits.max(1).values
        torch.testing.assert_close(model(x), logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool", ["none", "mean", "max", "all"])
def test_a_class_token_makes_the_pooling_irrelevant(pool):
    x = pictures()
    assert small_model(final_pool_type=pool)(x).shape == (2, 5)
    assert torch.equal(small_model(final_pool_type=pool)(x), small_model()(x))


@pytest.mark.parametrize("flip", [-1.0, 2.0])
@pytest.mark.parametrize("options", [{}, FIRST, BOTH, NONE, {"stride": 4}, {**ROPE, **BOTH}])
def test_random_token_rank(options, flip, capsys):
    model = small_model(**options, flip_img_sequences_ratio=flip)
    m = model.patch_embed.num_patches
    rows = {"middle": (m // 2,), "first": (0,), "both": (0, m + 1), "none": ()}[model.class_token_placement]
    torch.manual_seed(5)
    permutation = torch.randperm(m + len(rows))
    torch.manual_seed(5)
    with torch.no_grad():
        features = model(pictures(), return_features=True, if_random_token_rank=True)
        tokens, numbers = restated(
            model, pictures(), rows=rows, permutation=permutation, flipped=flip > 0, skip_first=False
        )
    expected = class_state(tokens, numbers) if rows else tokens[:, -1]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr() == ("", "")


def test_random_class_token_position(capsys):
    model = small_model(**FIRST)
    random.seed(3)
    row = random.randint(0, 16)
    assert row > 0
    random.seed(3)
    with torch.no_grad():
        features = model(pictures(), return_features=True, if_random_cls_token_position=True)
        expected = class_state(*restated(model, pictures(), rows=(row,)))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [{}, BOTH, NONE])
def test_random_class_token_position_is_for_a_first_token_alone(options):
    model = small_model(**options)
    assert torch.equal(model(pictures(), if_random_cls_token_position=True), model(pictures()))


def test_sequences_are_flipped_in_the_given_share_of_calls():
    model = small_model(**NONE, flip_img_sequences_ratio=0.5)
    random.seed(0)
    draws = [0.5 - random.random() > 1e-5 for _ in range(12)]
    assert 0 < sum(draws) < 12
    random.seed(0)
    with torch.no_grad():
        plain = small_model(**NONE)(pictures())
        same = [torch.equal(model(pictures()), plain) for _ in range(12)]
    assert same == [not draw for draw in draws]


@pytest.mark.parametrize("residual_in_fp32", [False, True])
@pytest.mark.parametrize("rms_norm", [False, True])
def test_fused_and_plain_norms_are_the_same_maths(rms_norm, residual_in_fp32):
    options = {"rms_norm": rms_norm, "residual_in_fp32": residual_in_fp32}
    fused, plain = (small_model(**options, fused_add_norm=fused).to(torch.bfloat16) for fused in (True, False))
    assert torch.equal(fused(pictures().bfloat16()), plain(pictures().bfloat16()))


@pytest.mark.parametrize("fast", [False, True], ids=["slow-bf16", "fast-bf16"])
def test_patches_in_bf16(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The convolution of bf16 is computed in fp32 where the CPU has no instructions for it; gradients go either way."""
    monkeypatch.setattr("blocks.has_fast_bf16", lambda: fast)
    embed, x = PatchEmbed(24, 8, 8, embed_dim=12), torch.randn(2, 3, 24, 24)
    expected = embed(x)
    narrow = embed.bfloat16()
    with torch.no_grad():
        out = narrow(x.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)
    narrow(x.bfloat16()).float().sum().backward()
    assert narrow.proj.weight.grad is not None
    narrow.proj.register_forward_hook(lambda *_: torch.zeros(2, 12, 3, 3, dtype=torch.bfloat16))
    with torch.no_grad():
        assert not narrow(x.bfloat16()).any()
