"""The four orders of an image's pixels and the way back, against index arithmetic pixel by pixel."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vmamba import cross_scan

SIZES = [(1, 1), (1, 7), (5, 1), (2, 3), (3, 2), (4, 4), (7, 5)]
FLAGS = list(itertools.product([True, False], [True, False], [False, True], [0, 1, 2]))
flags = pytest.mark.parametrize(("in_first", "out_first", "one_by_one", "scans"), FLAGS)


def places(height, width, scans):
    """For each direction the pixel (its row-major number) that comes at each place of the sequence."""
    rows = [h * width + w for h in range(height) for w in range(width)]
    columns = [h * width + w for w in range(width) for h in range(height)]
    return {
        0: [rows, columns, rows[::-1], columns[::-1]],
        1: [rows] * 4,
        2: [rows, rows, rows[::-1], rows[::-1]],
    }[scans]


def expected_scan(x, scans):
    """(b, 4, c, l) of the images x (b, 4, c, h, w), one pixel at a time."""
    order = places(*x.shape[3:], scans)
    flat = x.flatten(3)
    return torch.stack([torch.stack([flat[:, k, :, i] for i in order[k]], dim=-1) for k in range(4)], dim=1)


def expected_merge(y, scans):
    """(b, 4, c, l) in the order of the rows, of sequences y (b, 4, c, h, w)."""
    order = places(*y.shape[3:], scans)
    flat, merged = y.flatten(3), torch.full_like(y.flatten(3), torch.nan)
    for k, i in itertools.product(range(4), range(flat.shape[3])):
        merged[:, k, :, order[k][i]] = flat[:, k, :, i]
    return merged


def images(height, width, in_first, one_by_one, dtype=torch.float64):
    """The argument of a scan, and the same as (b, 4, c, h, w)."""
    each = torch.randn(2, 4, 3, height, width, dtype=dtype)
    if not one_by_one:
        each = each[:, :1].expand(-1, 4, -1, -1, -1)
        return (each[:, 0] if in_first else each[:, 0].permute(0, 2, 3, 1)).contiguous(), each
    return (each if in_first else each.permute(0, 3, 4, 1, 2)).contiguous(), each


def sequences(height, width, out_first):
    """The argument of a merge, and the same as (b, 4, c, h, w)."""
    each = torch.randn(2, 4, 3, height, width, dtype=torch.float64)
    return (each if out_first else each.permute(0, 3, 4, 1, 2)).contiguous(), each


def test_the_example_of_the_definition():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    expected = [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    found = cross_scan.cross_scan_fn(x)
    assert found.shape == (1, 4, 1, 6)
    assert found[0, :, 0].tolist() == expected
    back = cross_scan.cross_merge_fn(found.view(1, 4, 1, 2, 3))
    assert back.shape == (1, 1, 6)
    assert back.flatten().tolist() == [0, 4, 8, 12, 16, 20]


@flags
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_scan_puts_each_pixel_in_its_place(height, width, in_first, out_first, one_by_one, scans):
    x, each = images(height, width, in_first, one_by_one)
    found = cross_scan.cross_scan_fn(x, in_first, out_first, one_by_one, scans)
    expected = expected_scan(each, scans)
    assert torch.equal(found, expected if out_first else expected.permute(0, 3, 1, 2))
    assert found.is_contiguous()


@flags
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_merge_puts_each_token_back(height, width, in_first, out_first, one_by_one, scans):
    y, each = sequences(height, width, out_first)
    found = cross_scan.cross_merge_fn(y, in_first, out_first, one_by_one, scans)
    expected = expected_merge(each, scans)
    if one_by_one:
        assert torch.equal(found, expected if in_first else expected.permute(0, 3, 1, 2))
    else:
        total = expected.sum(1)
        torch.testing.assert_close(found, total if in_first else total.transpose(1, 2), rtol=1e-14, atol=1e-14)
    assert found.is_contiguous()


@settings(max_examples=80, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(1, 9),
    st.booleans(), st.booleans(), st.booleans(), st.integers(0, 2),
)  # fmt: skip
def test_merge_is_the_adjoint_of_scan(b, c, h, w, in_first, out_first, one_by_one, scans):
    image = (b, 4, c, h, w) if one_by_one else (b, c, h, w)
    x = torch.randn(image, dtype=torch.float64)
    x = x if in_first else x.movedim((-2, -1), (1, 2))
    y = torch.randn(b, 4, c, h, w, dtype=torch.float64)
    y = y if out_first else y.movedim((-2, -1), (1, 2))
    scanned = cross_scan.cross_scan_fn(x, in_first, out_first, one_by_one, scans)
    merged = cross_scan.cross_merge_fn(y, in_first, out_first, one_by_one, scans)
    tokens = y.flatten(3) if out_first else y.flatten(1, 2)
    pixels = (x.flatten(-2) if in_first else x.flatten(1, 2)).reshape(merged.shape)
    torch.testing.assert_close((scanned * tokens).sum(), (pixels * merged).sum(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scans", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_merge_of_scan_is_four_times_the_image(scans, dtype):
    x = torch.randint(-50, 50, (2, 3, 5, 7)).to(dtype)
    back = cross_scan.cross_merge_fn(cross_scan.cross_scan_fn(x, scans=scans).view(2, 4, 3, 5, 7), scans=scans)
    assert back.dtype is dtype
    assert torch.equal(back, 4 * x.flatten(2))


@flags
def test_gradients(in_first, out_first, one_by_one, scans):
    x, _ = images(3, 2, in_first, one_by_one)
    y, _ = sequences(3, 2, out_first)
    rest = (in_first, out_first, one_by_one, scans)
    assert torch.autograd.gradcheck(lambda v: cross_scan.cross_scan_fn(v, *rest), x.requires_grad_())
    assert torch.autograd.gradcheck(lambda v: cross_scan.cross_merge_fn(v, *rest), y.requires_grad_())


def test_arguments_stay_as_they_are_and_results_share_no_memory():
    x = torch.randn(1, 2, 3, 4)
    kept = x.clone()
    for value in (cross_scan.cross_scan_fn(x), cross_scan.cross_scan_fn(x, scans=1)):
        value.zero_()
    for one_by_one, scans in itertools.product([False, True], [0, 1, 2]):
        y = torch.randn(1, 4, 2, 3, 4)
        before = y.clone()
        cross_scan.cross_merge_fn(y, one_by_one=one_by_one, scans=scans).zero_()
        assert torch.equal(y, before)
    assert torch.equal(x, kept)


def test_strided_inputs_and_force_torch():
    x = torch.randn(2, 9, 5, 6)[:, ::2, 1:, :].transpose(2, 3)
    assert torch.equal(cross_scan.cross_scan_fn(x, force_torch=True), cross_scan.cross_scan_fn(x.contiguous()))
    y = torch.randn(2, 4, 5, 3, 8)[..., ::2]
    assert torch.equal(cross_scan.cross_merge_fn(y, force_torch=True), cross_scan.cross_merge_fn(y.contiguous()))


class Both(torch.nn.Module):
    """Scan, a step that tells places apart, merge."""

    def __init__(self, scans, channel_first):
        super().__init__()
        self.options = {"in_channel_first": channel_first, "out_channel_first": channel_first, "scans": scans}

    def forward(self, x):
        first = self.options["in_channel_first"]
        h, w = x.shape[2:] if first else x.shape[1:3]
        xs = cross_scan.cross_scan_fn(x, **self.options)
        ys = xs.cumsum(3 if first else 1)
        ys = ys.unflatten(3, (h, w)) if first else ys.unflatten(1, (h, w))
        return cross_scan.cross_merge_fn(ys, **self.options)


@pytest.mark.parametrize("scans", [0, 2])
@pytest.mark.parametrize("channel_first", [True, False])
def test_export_at_other_sizes_than_the_example(scans, channel_first):
    model = Both(scans, channel_first)
    b, h, w = (torch.export.Dim(name, min=2, max=64) for name in "bhw")
    axes = {0: b, 2: h, 3: w} if channel_first else {0: b, 1: h, 2: w}
    exported = torch.export.export(model, (torch.randn(2, 5, 6, 7),), dynamic_shapes=(axes,)).module()
    x = torch.randn(3, 5, 4, 7) if channel_first else torch.randn(3, 9, 4, 7)
    torch.testing.assert_close(exported(x), model(x))


def test_names_of_earlier_code():
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3, 4, 5)
    scanned, merged = cross_scan.cross_scan_fn(x), cross_scan.cross_merge_fn(y)
    for name in ("CrossScan", "CrossScanTriton", "CrossScanF", "CrossScanTritonF"):
        assert torch.equal(getattr(cross_scan, name).apply(x), scanned)
    for name in ("CrossMerge", "CrossMergeTriton", "CrossMergeF", "CrossMergeTritonF"):
        assert torch.equal(getattr(cross_scan, name).apply(y), merged)
    rest = (False, True, True, 2)
    last = x.permute(0, 2, 3, 1)[:, :, :, None].expand(-1, -1, -1, 4, -1)
    assert torch.equal(cross_scan.CrossScanF.apply(last, *rest), cross_scan.cross_scan_fn(last, *rest))
    assert torch.equal(cross_scan.CrossMergeF.apply(y, *rest), cross_scan.cross_merge_fn(y, *rest))
    for name in ("CrossScanTriton1b1", "CrossScanTriton1b1F"):
        found = getattr(cross_scan, name).apply(y)
        assert torch.equal(found, cross_scan.cross_scan_fn(y, one_by_one=True))
        found = getattr(cross_scan, name).apply(y, True, False, 2)
        assert torch.equal(found, cross_scan.cross_scan_fn(y, True, False, True, 2))


@pytest.mark.parametrize("mode", [0, 1, 2])
def test_pairs_by_mode(mode):
    scan, merge = cross_scan.getCSM(mode)
    x, y = torch.randn(2, 3, 4, 5), torch.randn(2, 4, 3, 4, 5)
    assert torch.equal(scan.apply(x), cross_scan.cross_scan_fn(x, scans=mode))
    assert torch.equal(merge.apply(y), cross_scan.cross_merge_fn(y, scans=mode))
    names = {1: "_Ab_1direction", 2: "_Ab_2direction"}
    assert scan.__name__ == "CrossScan" + names.get(mode, "F")
    assert merge.__name__ == "CrossMerge" + names.get(mode, "F")


def test_raw_functions():
    x, y = torch.randn(2, 4, 5, 3), torch.randn(2, 4, 5, 4, 3)
    for scans in (0, 1, 2):
        rest = (False, False)
        assert torch.equal(cross_scan.cross_scan_fwd(x, *rest, scans), cross_scan.cross_scan_fn(x, *rest, False, scans))
        assert torch.equal(
            cross_scan.cross_merge_fwd(y, *rest, scans), cross_scan.cross_merge_fn(y, *rest, False, scans)
        )
        assert torch.equal(
            cross_scan.cross_scan1b1_fwd(y, *rest, scans), cross_scan.cross_scan_fn(y, *rest, True, scans)
        )
        assert torch.equal(
            cross_scan.cross_merge1b1_fwd(y, *rest, scans), cross_scan.cross_merge_fn(y, *rest, True, scans)
        )


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: cross_scan.cross_scan_fn(torch.zeros(1, 2, 3)),
            r"`x` must have shape \(b, c, h, w\), got \(1, 2, 3\)",
        ),
        (lambda: cross_scan.cross_scan_fn(torch.zeros(1, 2, 3), False), r"`x` must have shape \(b, h, w, c\)"),
        (lambda: cross_scan.cross_scan1b1_fwd(torch.zeros(1, 3, 3, 3, 3)), r"`x` must have shape \(b, 4, c, h, w\)"),
        (lambda: cross_scan.cross_scan1b1_fwd(torch.zeros(1, 4, 3, 3, 3), False), r"\(b, h, w, 4, c\)"),
        (lambda: cross_scan.cross_merge_fn(torch.zeros(1, 2, 3, 4)), r"`y` must have shape \(b, 4, c, h, w\)"),
        (lambda: cross_scan.cross_merge_fn(torch.zeros(1, 4, 3, 3, 3), True, False), r"`y` .*\(b, h, w, 4, c\)"),
        (lambda: cross_scan.cross_scan_fn(torch.zeros(1, 2, 3, 4), scans=3), "`scans` must be 0 .*, got 3"),
        (lambda: cross_scan.cross_merge_fn(torch.zeros(1, 4, 3, 4, 5), scans=-1), "`scans` must be 0 .*, got -1"),
        (lambda: cross_scan.getCSM("cross"), "`scans` must be 0 .*, got 'cross'"),
    ],
)
def test_refusals(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
