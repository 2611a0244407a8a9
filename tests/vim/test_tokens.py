"""Class tokens are found, read and removed wherever the sequence was arranged."""

import pytest
import torch

from tokens import PLACEMENTS, TokenOrder, class_token_rows, insert_class_tokens, remove_rows

PATCHES = 6


def numbered(placement, patches=PATCHES):
    """A sequence whose patches hold their own number and whose class tokens hold -1, -2."""
    rows = class_token_rows(placement, patches)
    tokens = [torch.full((1, 1, 1), -1.0 - i) for i in range(len(rows))]
    values = torch.arange(patches, dtype=torch.float32).reshape(1, patches, 1).expand(2, -1, -1)
    return insert_class_tokens(values, tokens, rows), rows


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("none", [0, 1, 2, 3, 4, 5]),
        ("first", [-1, 0, 1, 2, 3, 4, 5]),
        ("middle", [0, 1, 2, -1, 3, 4, 5]),
        ("both", [-1, 0, 1, 2, 3, 4, 5, -2]),
    ],
)
def test_class_tokens_stand_at_their_place(placement, expected):
    x, rows = numbered(placement)
    assert x.shape == (2, len(expected), 1)
    assert x[1, :, 0].tolist() == expected
    assert [expected[row] for row in rows] == [-1, -2][: len(rows)]


def test_the_middle_of_an_odd_grid_is_rounded_down():
    x, rows = numbered("middle", 5)
    assert rows == (2,)
    assert x[0, :, 0].tolist() == [0, 1, -1, 2, 3, 4]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_removal_undoes_insertion(placement):
    x, rows = numbered(placement)
    assert remove_rows(x, rows)[0, :, 0].tolist() == list(range(PATCHES))


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_order_is_followed_and_undone(placement, permuted, flipped):
    x, rows = numbered(placement)
    permutation = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(3)) if permuted else None
    order = TokenOrder(rows, permutation, flipped)
    arranged = order.arrange(x)
    assert sorted(arranged[0, :, 0].tolist()) == sorted(x[0, :, 0].tolist())
    if permuted or flipped:
        assert not torch.equal(arranged, x)
    assert [arranged[0, row, 0].item() for row in order.class_rows(x.shape[1])] == [-1, -2][: len(rows)]
    assert torch.equal(order.restore(arranged), x)
    patches, tokens = order.split(arranged)
    assert patches[0, :, 0].tolist() == list(range(PATCHES))
    assert tokens[0, :, 0].tolist() == [-1, -2][: len(rows)]
    if rows:
        expected = sum([-1, -2][: len(rows)]) / len(rows)
        assert order.read_class_token(arranged)[:, 0].tolist() == [expected, expected]


def test_unflipped_order_finds_the_rows_before_the_reversal():
    order = TokenOrder((1,), flipped=True)
    assert order.class_rows(10) == (8,)
    assert order.unflipped().class_rows(10) == (1,)


def test_unknown_placement_is_named():
    with pytest.raises(ValueError, match=r"one of none, first, middle, both, got 'end'"):
        class_token_rows("end", 4)
