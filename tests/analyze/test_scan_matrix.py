"""The matrix of a scan against its definition, and against the scan itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from analyze import scan_matrix as module
from analyze.scan_matrix import MODES, Scan, scan_matrix
from mamba_ssm.ops.reference import scan_reference

LENGTHS = (1, 2, 7, 8, 9, 17, 63)


def made_scan(length: int, channels: int = 5, states: int = 3, *, decay: float = 4.0, dtype=torch.float64) -> Scan:
    """Positive step sizes up to 1, rates down to -`decay`, random B and C."""
    dt = torch.rand(channels, length, dtype=dtype)
    A = -decay * torch.rand(channels, states, dtype=dtype) - 0.01
    B, C = torch.randn(2, states, length, dtype=dtype)
    return Scan(dt, A, B, C)


def defined(scan: Scan, mode: str) -> Tensor:
    """The sum of the module's docstring, one entry after the other, averaged over the channels."""
    chosen = MODES[mode]
    sums = scan.dt.cumsum(-1)
    out = torch.zeros(scan.length, scan.length, dtype=scan.dt.dtype)
    for t in range(scan.length):
        for s in range(t + 1):
            term = torch.ones_like(scan.A)
            if chosen.decay:
                term = term * torch.exp(scan.A * (sums[:, t] - sums[:, s])[:, None])
            if chosen.contents:
                term = term * scan.C[:, t] * scan.B[:, s]
            if chosen.steps:
                term = term * scan.dt[:, s, None]
            out[t, s] = term.sum(1).mean()
    return out


def one_channel(scan: Scan, channel: int) -> Scan:
    part = slice(channel, channel + 1)
    return Scan(scan.dt[part], scan.A[part], scan.B, scan.C)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_mode_is_its_definition(mode: str, length: int) -> None:
    scan = made_scan(length)
    torch.testing.assert_close(scan_matrix(scan, mode), defined(scan, mode), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_those_of_the_whole(mode: str) -> None:
    scan = made_scan(63)
    rows = torch.tensor([62, 0, 8, 7, 31, 8])
    torch.testing.assert_close(scan_matrix(scan, mode, rows), scan_matrix(scan, mode)[rows], rtol=1e-12, atol=1e-13)
    assert scan_matrix(scan, mode, rows[:0]).shape == (0, 63)


@pytest.mark.parametrize(("length", "states"), [(1, 1), (30, 1), (63, 4), (200, 2)])
@pytest.mark.parametrize("decay", [0.01, 1.0, 60.0])
def test_the_matrix_of_a_channel_is_its_scan(length: int, states: int, decay: float) -> None:
    """Also where the cumulated decay underflows: at 60 per step it is exp(-6000) after 200 tokens."""
    scan = made_scan(length, channels=4, states=states, decay=decay)
    u = torch.randn(4, length, dtype=torch.float64)
    y, _ = scan_reference(u[None], scan.dt[None], scan.A, scan.B[None], scan.C[None])
    for channel in range(4):
        mine = scan_matrix(one_channel(scan, channel), "CwBdtw") @ u[channel]
        torch.testing.assert_close(mine, y[0, channel], rtol=1e-11, atol=1e-13)


def test_nothing_is_lost_in_fp32_where_a_quotient_would_be() -> None:
    scan = made_scan(500, decay=20.0)
    total = (scan.A * scan.dt.sum(-1, keepdim=True)).min()
    assert total < -1000, "the cumulated decay must underflow in fp32, and in fp64"
    narrow = Scan(*(value.float() for value in (scan.dt, scan.A, scan.B, scan.C)))
    assert scan_matrix(narrow).dtype == torch.float32
    wide = Scan(*(value.double() for value in (narrow.dt, narrow.A, narrow.B, narrow.C)))
    for mode in ("CwBdtw", "ww"):
        expected = scan_matrix(wide, mode)
        assert expected.diagonal(-1).abs().min() > 1e-8, "the neighbours must matter for this to be a test"
        torch.testing.assert_close(scan_matrix(narrow, mode).double(), expected, rtol=2e-5, atol=2e-6)


def test_slow_decay_over_a_long_sequence_stays_exact_in_fp32() -> None:
    """Sums of dt near 1,500: their differences would be off by 1e-4 if the sums were fp32."""
    scan = made_scan(3000, channels=2, states=1, decay=0.001, dtype=torch.float32)
    rows = torch.tensor([1500, 2999])
    wide = Scan(*(value.double() for value in (scan.dt, scan.A, scan.B, scan.C)))
    found, expected = scan_matrix(scan, "ww", rows).double(), scan_matrix(wide, "ww", rows)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-7)


def test_half_precision_is_computed_in_fp32() -> None:
    scan = made_scan(20)
    narrow = Scan(*(value.bfloat16() for value in (scan.dt, scan.A, scan.B, scan.C)))
    wide = Scan(*(value.double() for value in (narrow.dt, narrow.A, narrow.B, narrow.C)))
    assert scan_matrix(narrow).dtype == torch.float32
    torch.testing.assert_close(scan_matrix(narrow).double(), scan_matrix(wide), rtol=1e-5, atol=1e-6)


def test_portions_of_channels_change_nothing_and_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = made_scan(63, channels=13)
    expected = scan_matrix(scan)
    largest = 0

    def watched(value: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, value.numel())
        return original(value)

    original = torch.exp
    monkeypatch.setattr(module.torch, "exp", watched)
    for bound in (1, 500, 2000):
        monkeypatch.setattr(module, "MOST_NUMBERS", bound)
        largest = 0
        torch.testing.assert_close(scan_matrix(scan), expected, rtol=1e-12, atol=1e-13)
        assert 0 < largest <= max(bound, 3 * 64)


def test_a_rate_of_zero_keeps_everything() -> None:
    scan = made_scan(12)
    still = Scan(scan.dt, torch.zeros_like(scan.A), scan.B, scan.C)
    torch.testing.assert_close(scan_matrix(still, "CwBdtw"), scan_matrix(still, "CBdt"))


def test_bad_input() -> None:
    scan = made_scan(4)
    with pytest.raises(ValueError, match=r"got 'CwBdt'; the nearest is 'CwBdtw'"):
        scan_matrix(scan, "CwBdt")
    for row in (-1, 4):
        with pytest.raises(ValueError, match=r"`rows` must lie between 0 and 3"):
            scan_matrix(scan, rows=torch.tensor([0, row]))
    with pytest.raises(ValueError, match=r"`B` must have shape \(3, 4\), got \(3, 3\)"):
        Scan(scan.dt, scan.A, scan.B[:, :3], scan.C)
    with pytest.raises(ValueError, match=r"`A` must have shape \(5, 3\), got \(4, 3\)"):
        Scan(scan.dt, scan.A[:4], scan.B, scan.C)
    with pytest.raises(ValueError, match=r"`dt` must have two axes"):
        Scan(scan.dt[0], scan.A, scan.B, scan.C)
