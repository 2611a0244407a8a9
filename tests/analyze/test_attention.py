"""Attention maps: their order, sums and norms against short definitions, and upstream's functions."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor

from analyze import utils
from analyze.attention import (
    attention_map,
    attention_row,
    attnmap_mamba,
    get_attnmap_mamba,
    map_names,
    normalise,
    rollout,
)
from analyze.recording import Recording, mixers_by_stage, read_registers, record
from analyze.scan_matrix import MODES, scan_matrix
from small_vim import pictures, small_model
from vmamba.ss2d import SS2D

HEIGHT, WIDTH = 3, 5


@pytest.fixture
def mixer() -> SS2D:
    made = SS2D(8, 2, 1.0, forward_type="v05_noz").double().eval()
    made.__DEBUG__ = True
    with torch.no_grad():
        made(torch.randn(2, HEIGHT, WIDTH, 8, dtype=torch.float64))
    return made


@pytest.fixture
def recorded(mixer: SS2D) -> Recording:
    return read_registers(mixer.__data__)


def by_pixels(k: int, raw: Tensor) -> Tensor:
    """A raw map of direction k with rows and columns as pixels, looked up one by one."""
    out = torch.empty_like(raw)
    for row in range(HEIGHT * WIDTH):
        for column in range(HEIGHT * WIDTH):
            out[row, column] = raw[step(k, row), step(k, column)]
    return out


def step(k: int, pixel: int) -> int:
    """When direction k of the cross scan reads a pixel."""
    h, w = divmod(pixel, WIDTH)
    along = h * WIDTH + w if k in (0, 2) else w * HEIGHT + h
    return HEIGHT * WIDTH - 1 - along if k in (2, 3) else along


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("image", [0, 1])
def test_directions_in_the_picture_s_order_where_height_and_width_differ(
    recorded: Recording, mode: str, image: int
) -> None:
    total = 0
    for k, direction in enumerate(recorded.directions):
        raw = scan_matrix(direction.scan(image), mode)
        assert torch.equal(attention_map(recorded, mode, f"ao{k}", image=image), raw)
        assert torch.equal(attention_map(recorded, mode, f"a{k}", image=image), by_pixels(k, raw))
        total = total + by_pixels(k, raw)
    torch.testing.assert_close(attention_map(recorded, mode, "all", image=image), total)


def test_what_a_pixel_can_take(recorded: Recording) -> None:
    """The middle pixel (1, 2): rows above, columns to the left, and the reverse; and itself always."""
    pixel = 1 * WIDTH + 2
    before = {
        0: [(h, w) for h in range(HEIGHT) for w in range(WIDTH) if (h, w) <= (1, 2)],
        1: [(h, w) for h in range(HEIGHT) for w in range(WIDTH) if (w, h) <= (2, 1)],
        2: [(h, w) for h in range(HEIGHT) for w in range(WIDTH) if (h, w) >= (1, 2)],
        3: [(h, w) for h in range(HEIGHT) for w in range(WIDTH) if (w, h) >= (2, 1)],
    }
    for k, expected in before.items():
        row = attention_map(recorded, "CwBdtw", f"a{k}")[pixel].view(HEIGHT, WIDTH)
        assert [tuple(found) for found in row.nonzero().tolist()] == expected


@pytest.mark.parametrize("ret", ["a0", "a1", "a3", "ao1", "ao2", "all"])
def test_a_row_is_that_of_the_map(recorded: Recording, ret: str) -> None:
    whole = attention_map(recorded, "CwBdtw", ret, image=1)
    for token in (0, 7, 14):
        at = step(int(ret[2:]), token) if ret.startswith("ao") else token
        found = attention_row(recorded, token, "CwBdtw", ret, image=1)
        torch.testing.assert_close(found, whole[at], rtol=1e-12, atol=1e-14)


def test_both_directions_of_vim_and_its_halved_sum() -> None:
    model = small_model().double()
    (found,) = record(model, pictures().double(), mixers_by_stage(model)[0][-1:])
    ahead, back = (attention_map(found, "CwBdtw", name) for name in ("a0", "a1"))
    assert torch.equal(ahead, ahead.tril())
    assert torch.equal(back, back.triu())
    assert torch.equal(ahead, 0.5 * scan_matrix(found.directions[0].scan()))
    assert torch.equal(back, 0.5 * scan_matrix(found.directions[1].scan()).flip(0, 1))
    torch.testing.assert_close(attention_map(found, "CwBdtw", "all"), ahead + back)
    class_row = attention_row(found, 8, "CwBdtw", "all")
    assert (class_row != 0).all(), "the class token in the middle sees the first half forward, the second backward"
    assert map_names(found) == ["a0", "a1", "ao0", "ao1", "all", "nall"]


def test_norms(recorded: Recording) -> None:
    plain = attention_map(recorded, "CB", "a1")
    assert plain.min() < 0 < plain.max()
    spread = attention_map(recorded, "CB", "a1", absnorm=1)
    torch.testing.assert_close(spread, (plain - plain.min()) / (plain.max() - plain.min()))
    size = attention_map(recorded, "CB", "a1", absnorm=2)
    torch.testing.assert_close(size, plain.abs() / plain.abs().max())
    for constant in (torch.zeros(3, 3), torch.ones(3, 3)):
        assert torch.equal(normalise(constant, 1), torch.zeros(3, 3))
    assert torch.equal(normalise(torch.zeros(3, 3), 2), torch.zeros(3, 3))


@pytest.mark.parametrize(("absnorm", "each"), [(0, 1), (1, 1), (2, 2)])
def test_nall_is_the_mean_of_normalised_directions(recorded: Recording, absnorm: int, each: int) -> None:
    singles = [attention_map(recorded, "CwBw", f"a{k}", absnorm=each) for k in range(4)]
    expected = normalise(torch.stack(singles).mean(0), absnorm)
    torch.testing.assert_close(attention_map(recorded, "CwBw", "nall", absnorm=absnorm), expected)


def test_rollout_follows_two_blocks() -> None:
    first = torch.tensor([[0.5, 0.0], [1.0, 0.0]], dtype=torch.float64)
    second = torch.tensor([[0.0, 0.0], [0.25, 0.5]], dtype=torch.float64)
    one = torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    two = torch.tensor([[1.0, 0.0], [1 / 7, 6 / 7]], dtype=torch.float64)
    found = rollout([first, second])
    torch.testing.assert_close(found, two @ one)
    torch.testing.assert_close(found.sum(-1), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(rollout(iter([first])), one)


def test_rollout_refuses_what_it_cannot_follow() -> None:
    with pytest.raises(ValueError, match=r"values from 0 to 1, got -1 to"):
        rollout([-torch.eye(2)])
    with pytest.raises(ValueError, match=r"got 0 to 2"):
        rollout([2 * torch.eye(2)])
    with pytest.raises(ValueError, match="got nan"):
        rollout([torch.full((2, 2), torch.nan)])
    with pytest.raises(ValueError, match="one size, got 2 and 3 tokens"):
        rollout([torch.eye(2), torch.eye(3)])
    with pytest.raises(ValueError, match="at least one block"):
        rollout([])


# --- upstream's names -----------------------------------------------------------------------------------------------


def test_attnmap_mamba(mixer: SS2D, recorded: Recording, caplog: pytest.LogCaptureFixture) -> None:
    found, height, width = attnmap_mamba(mixer.__data__)
    assert (height, width) == (HEIGHT, WIDTH)
    assert torch.equal(found, attention_map(recorded, "CB", "all"))
    with caplog.at_level(logging.INFO, "analyze.attention"):
        second, _, _ = attnmap_mamba(mixer.__data__, "ww", "a3", 2, 1, True, "cpu", image=1)
    assert torch.equal(second, attention_map(recorded, "ww", "a3", 2, image=1))
    assert "map of 3 x 5 tokens, 2 pictures, mode ww, a3" in caplog.text


def test_scale_is_clamped_to_the_largest_value(mixer: SS2D) -> None:
    plain, _, _ = attnmap_mamba(mixer.__data__, "CwBdtw", "a0")
    found, _, _ = attnmap_mamba(mixer.__data__, "CwBdtw", "a0", scale=3)
    torch.testing.assert_close(found, (3 * plain).clamp(max=plain.max()))
    assert (found == plain.max()).sum() > 1


def test_get_attnmap_mamba(mixer: SS2D) -> None:
    other = SS2D(8, 2, 1.0, forward_type="v05_noz").double().eval()
    other.__DEBUG__ = True
    with torch.no_grad():
        other(torch.randn(2, HEIGHT, WIDTH, 8, dtype=torch.float64))
    stages = [[other], [mixer, other]]
    single = get_attnmap_mamba(stages, 1, "a1_absnorm_CwBw", raw_attn=True, block_id=0, scale=2, image=1)
    expected = attnmap_mamba(mixer.__data__, "CwBw", "a1", absnorm=2, scale=2, image=1)[0]
    assert torch.equal(single, expected)
    last = get_attnmap_mamba(stages, mode="ao2_CB", raw_attn=True, block_id=-1)
    assert torch.equal(last, attnmap_mamba(other.__data__, "CB", "ao2")[0])
    maps = [attnmap_mamba(block.__data__, "CwBdtw", "all", absnorm=1)[0] for block in (mixer, other)]
    assert torch.equal(get_attnmap_mamba(stages, 1, "all_norm_CwBdtw"), rollout(maps))
    own = [attention_map(read_registers(block.__data__), "CB", "all", 2) for block in stages[-1]]
    assert torch.equal(get_attnmap_mamba(stages), rollout(own))
    assert utils.AttnMamba.get_attnmap_mamba is utils.get_attnmap_mamba
    assert utils.AttnMamba.attnmap_mamba is utils.attnmap_mamba


def test_other_paths_are_known_from_the_module() -> None:
    mixer = SS2D(8, 2, 1.0, forward_type="v052d_noz").double().eval()
    mixer.__DEBUG__ = True
    with torch.no_grad():
        mixer(torch.randn(1, HEIGHT, WIDTH, 8, dtype=torch.float64))
    found = get_attnmap_mamba([[mixer]], 0, "a1_CwBdtw", raw_attn=True)
    assert torch.equal(found, attnmap_mamba(mixer.__data__, "CwBdtw", "a1", directions="both")[0])
    assert torch.equal(found, found.tril())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "CC"}, "`mode` must be one of CB, CBdt"),
        ({"ret": "a4"}, r"`ret` must be one of a0, a1.*got 'a4'; the nearest is 'a"),
        ({"absnorm": 3}, "`absnorm` must be 0, 1 or 2, got 3"),
        ({"image": 2}, "`image` must lie between 0 and 1, got 2"),
    ],
)
def test_bad_arguments(recorded: Recording, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention_map(recorded, **options)


def test_bad_rows(recorded: Recording) -> None:
    with pytest.raises(ValueError, match="`token` must lie between 0 and 14, got 15"):
        attention_row(recorded, 15)
    with pytest.raises(ValueError, match="got 'nall'"):
        attention_row(recorded, 0, ret="nall")


def test_bad_mode_strings(mixer: SS2D) -> None:
    for mode in ("", "CB", "CB_", "a0_nrom_CB", "a0_norm_absnorm_CB"):
        with pytest.raises(ValueError, match="must read like 'a0_CB'"):
            get_attnmap_mamba([[mixer]], 0, mode, raw_attn=True)
    with pytest.raises(ValueError, match="`ret` must be one of"):
        get_attnmap_mamba([[mixer]], 0, "a_CB", raw_attn=True)
    with pytest.raises(ValueError, match="`stage` must lie between -1 and 0, got 1"):
        get_attnmap_mamba([[mixer]], 1, "a0_CB", raw_attn=True)
    with pytest.raises(ValueError, match="`block_id` must lie between -1 and 0, got 5"):
        get_attnmap_mamba([[mixer]], 0, "a0_CB", raw_attn=True, block_id=5)
    with pytest.raises(ValueError, match="an SS2D has no __data__"):
        get_attnmap_mamba([[SS2D(8, 2, forward_type="v05")]], 0, "a0_CB", raw_attn=True)
    with pytest.raises(ValueError, match="a rollout needs maps with values from 0 to 1"):
        get_attnmap_mamba([[mixer]], 0, "a0_CB")
