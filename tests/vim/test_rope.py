"""The rotary embedding against its definition, point by point."""

import math

import pytest
import torch

from rope import VisionRotaryEmbedding, VisionRotaryEmbeddingFast, broadcat, rotate_half

DIM = 8


def by_definition(t, grid, trained, dim=DIM):
    """Turn each channel pair of t (b, m, 2 * dim) by position / size * trained * theta ** (-2 i / dim)."""
    out = torch.empty_like(t)
    for row in range(grid[0]):
        for column in range(grid[1]):
            point = row * grid[1] + column
            for pair in range(dim):
                axis_pair = pair % (dim // 2)
                position = row / grid[0] if pair < dim // 2 else column / grid[1]
                angle = position * trained * 10000 ** (-2 * axis_pair / dim)
                a, b = t[:, point, 2 * pair], t[:, point, 2 * pair + 1]
                out[:, point, 2 * pair] = a * math.cos(angle) - b * math.sin(angle)
                out[:, point, 2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def test_rotate_half_turns_neighbouring_pairs():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-2.0, 1.0, -4.0, 3.0]


def test_broadcat_broadcasts_the_other_axes():
    left, right = torch.zeros(3, 1, 2), torch.ones(1, 4, 5)
    joined = broadcat((left, right), dim=-1)
    assert joined.shape == (3, 4, 7)
    assert joined[2, 3].tolist() == [0.0] * 2 + [1.0] * 5
    with pytest.raises(ValueError, match="same number of axes"):
        broadcat((left, right[0]))


@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (3, 3)])
def test_every_patch_is_turned_by_its_own_angles(grid):
    t = torch.randn(2, grid[0] * grid[1], 2 * DIM)
    rope = VisionRotaryEmbeddingFast(DIM, pt_seq_len=7, ft_seq_len=grid)
    assert rope.freqs_cos.shape == rope.freqs_sin.shape == (grid[0] * grid[1], 2 * DIM)
    torch.testing.assert_close(rope(t), by_definition(t, grid, 7), rtol=1e-5, atol=1e-5)


def test_an_odd_sequence_keeps_its_first_token_wherever_the_class_token_is():
    t = torch.randn(2, 17, 2 * DIM)
    rope = VisionRotaryEmbeddingFast(DIM, pt_seq_len=4)
    out = rope(t, class_rows=(8,))
    assert torch.equal(out[:, :1], t[:, :1])
    torch.testing.assert_close(out[:, 1:], by_definition(t[:, 1:], (4, 4), 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("grid", "rows"), [((3, 3), (4,)), ((4, 4), (0, 17)), ((3, 3), (0, 10))])
def test_other_sequences_are_turned_in_their_patches(grid, rows):
    points = grid[0] * grid[1]
    t = torch.randn(2, points + len(rows), 2 * DIM)
    out = VisionRotaryEmbeddingFast(DIM, pt_seq_len=4, ft_seq_len=grid)(t, class_rows=rows)
    patches = [i for i in range(t.shape[1]) if i not in rows]
    assert torch.equal(out[:, list(rows)], t[:, list(rows)])
    torch.testing.assert_close(out[:, patches], by_definition(t[:, patches], grid, 4), rtol=1e-5, atol=1e-5)


def test_a_sequence_of_the_wrong_length_is_refused():
    with pytest.raises(ValueError, match="16 patches besides its class tokens, got 20 tokens of which 1"):
        VisionRotaryEmbeddingFast(DIM, pt_seq_len=4)(torch.randn(1, 20, 2 * DIM), class_rows=(3,))


def test_the_map_version_turns_a_slice():
    rope = VisionRotaryEmbedding(DIM, pt_seq_len=3)
    t = torch.randn(2, 3, 3, 2 * DIM + 5)
    out = rope(t, start_index=2)
    assert torch.equal(out[..., :2], t[..., :2])
    assert torch.equal(out[..., 2 + 2 * DIM :], t[..., 2 + 2 * DIM :])
    inner = t[..., 2 : 2 + 2 * DIM].flatten(1, 2)
    expected = by_definition(inner, (3, 3), 3).unflatten(1, (3, 3))
    torch.testing.assert_close(out[..., 2 : 2 + 2 * DIM], expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="at least 24 channels, got 21"):
        rope(t, start_index=8)


def test_frequency_kinds():
    pixel = VisionRotaryEmbeddingFast(4, pt_seq_len=2, freqs_for="pixel", max_freq=6)
    angle = 0.5 * 2 * math.pi * 3  # second row of two, second of the frequencies pi * linspace(1, 3, 2)
    assert pixel.freqs_cos[2, 2].item() == pytest.approx(math.cos(angle), abs=1e-5)
    constant = VisionRotaryEmbeddingFast(2, pt_seq_len=2, freqs_for="constant", num_freqs=1)
    assert constant.freqs_sin[1].tolist() == pytest.approx([0.0, 0.0, math.sin(1.0), math.sin(1.0)])
    custom = VisionRotaryEmbeddingFast(2, pt_seq_len=2, custom_freqs=torch.tensor([0.25]))
    assert custom.freqs_sin[1, 2].item() == pytest.approx(math.sin(0.25))
    with pytest.raises(ValueError, match="lang, pixel or constant, got 'sound'"):
        VisionRotaryEmbedding(4, pt_seq_len=2, freqs_for="sound")


def test_nothing_is_printed(capsys):
    VisionRotaryEmbeddingFast(DIM, pt_seq_len=4)
    assert capsys.readouterr() == ("", "")
