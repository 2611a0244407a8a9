"""What is recorded of a mixer must give its output again, token for token."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from analyze import recording
from analyze.recording import Direction, mixers_by_stage, read_mixer, read_registers, record
from analyze.scan_matrix import Scan, scan_matrix
from mamba_ssm.modules.mamba_simple import Mamba
from small_vim import pictures, small_model
from vmamba import VSSM
from vmamba.ss2d import SS2D


def output_of(direction: Direction, image: int) -> Tensor:
    """What one direction adds to the mixer's output, (d, l) with the tokens in the picture's order."""
    scan = direction.scan(image)
    rows = []
    for channel in range(scan.dt.shape[0]):
        part = slice(channel, channel + 1)
        y = scan_matrix(Scan(scan.dt[part], scan.A[part], scan.B, scan.C)) @ direction.u[image, channel]
        if direction.D is not None:
            y = y + direction.D[channel] * direction.u[image, channel]
        rows.append(y[direction.places])
    return direction.weight * torch.stack(rows)


# --- VMamba's mixer -------------------------------------------------------------------------------------------------


def recorded_ss2d(forward_type: str, height: int = 3, width: int = 5) -> SS2D:
    mixer = SS2D(8, 3, 1.0, forward_type=forward_type).double().eval()
    mixer.__DEBUG__ = True
    with torch.no_grad():
        mixer.A_logs.uniform_(-1, 3)
        mixer(torch.randn(2, height, width, 8, dtype=torch.float64))
    return mixer


@pytest.mark.parametrize(
    ("forward_type", "paths"), [("v05_noz", "cross"), ("v0", "cross"), ("v051d_noz", "rows"), ("v052d", "both")]
)
def test_the_directions_of_ss2d_give_its_scans(forward_type: str, paths: str) -> None:
    mixer = recorded_ss2d(forward_type)
    data = mixer.__data__
    found = read_registers(data, recording.paths_of(mixer))
    assert recording.paths_of(mixer) == paths
    assert (found.grid, found.batch, found.length, found.patch_tokens) == ((3, 5), 2, 15, list(range(15)))
    for image in range(2):
        for k, direction in enumerate(found.directions):
            mine = output_of(direction, image)
            as_it_runs = torch.empty_like(mine)
            as_it_runs[:, direction.places] = mine
            torch.testing.assert_close(as_it_runs, data["ys"][image, k].flatten(1), rtol=1e-10, atol=1e-12)
        whole = sum(output_of(direction, image) for direction in found.directions)
        torch.testing.assert_close(whole, data["y"][image], rtol=1e-10, atol=1e-12)


def test_places_on_a_picture_of_two_rows() -> None:
    """The example of the cross scan: a 2 x 3 picture is read 0 3 1 4 2 5 by columns."""
    found = read_registers(recorded_ss2d("v05_noz", 2, 3).__data__)
    orders = [direction.places.argsort().tolist() for direction in found.directions]
    assert orders == [[0, 1, 2, 3, 4, 5], [0, 3, 1, 4, 2, 5], [5, 4, 3, 2, 1, 0], [5, 2, 4, 1, 3, 0]]
    assert [direction.name for direction in found.directions] == [
        "rows", "columns", "rows, reversed", "columns, reversed",
    ]  # fmt: skip


def test_registers_without_skip_or_bias() -> None:
    data = recorded_ss2d("v05_noz").__data__
    plain = {name: value for name, value in data.items() if name not in ("Ds", "delta_bias")}
    found = read_registers(plain)
    assert all(direction.D is None for direction in found.directions)
    torch.testing.assert_close(found.directions[2].dt, F.softplus(data["dts"][:, 2]))
    with pytest.raises(ValueError, match=r"lack Bs, us; SS2D leaves them in __data__"):
        read_registers({name: value for name, value in data.items() if name not in ("Bs", "us")})
    with pytest.raises(ValueError, match=r"`directions` must be one of cross, rows, both, got 'cascade'"):
        read_registers(data, "cascade")


# --- Vim's mixer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kind", "halved", "directions", "weight"),
    [("none", False, 1, 1.0), ("v1", False, 2, 1.0), ("v2", False, 2, 1.0), ("v2", True, 2, 0.5)],
)
def test_the_directions_of_mamba_give_its_output(
    kind: str, halved: bool, directions: int, weight: float, bias: bool
) -> None:
    mixer = Mamba(8, 3, bimamba_type=kind, if_divide_out=halved, bias=bias, conv_bias=bias).double().eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    tokens = torch.randn(2, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = mixer(tokens)
        found = read_mixer(mixer, tokens, (2, 3), (3,))
        gate = F.silu(mixer.in_proj(tokens).transpose(1, 2).chunk(2, dim=1)[1])
        for image in range(2):
            total = sum(output_of(direction, image) for direction in found.directions)
            mine = mixer.out_proj((total * gate[image]).T)
            torch.testing.assert_close(mine, expected[image], rtol=1e-10, atol=1e-12)
    assert [direction.weight for direction in found.directions] == [weight] * directions
    assert (found.length, found.patch_tokens) == (7, [0, 1, 2, 4, 5, 6])


def test_a_narrow_mixer_is_recorded_in_fp32() -> None:
    mixer = Mamba(8, 3, bimamba_type="v2", if_divide_out=True).bfloat16()
    found = read_mixer(mixer, torch.randn(1, 5, 8, dtype=torch.bfloat16), (1, 5))
    for direction in found.directions:
        values = (direction.u, direction.dt, direction.A, direction.B, direction.C, direction.D)
        assert {value.dtype for value in values} == {torch.float32}


# --- networks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "class_rows"),
    [
        ({}, (8,)),
        ({"use_middle_cls_token": False}, (0,)),
        ({"use_double_cls_token": True}, (0, 17)),
        ({"if_cls_token": False}, ()),
    ],
)
def test_class_tokens_of_vim(options: dict, class_rows: tuple[int, ...]) -> None:
    model = small_model(**options)
    (found,) = record(model, pictures(), mixers_by_stage(model)[0][1:2])
    assert found.class_rows == class_rows
    assert found.grid == (4, 4)
    assert found.length == 16 + len(class_rows)
    assert len(found.patch_tokens) == 16


def test_what_vim_mixes_is_recorded_and_nothing_is_left_behind() -> None:
    model = small_model().double()
    mixers = mixers_by_stage(model)[0]
    assert mixers == [layer.mixer for layer in model.layers]
    seen: dict[int, Tensor] = {}
    hooks = [
        mixer.register_forward_hook(lambda _, given, __, i=i: seen.update({i: given[0]}))
        for i, mixer in enumerate(mixers)
    ]
    found = record(model, pictures().double(), [mixers[3], mixers[1]])
    for hook in hooks:
        hook.remove()
    for which, recorded in zip((3, 1), found, strict=True):
        expected = read_mixer(model.layers[which].mixer, seen[which], (4, 4), (8,))
        for mine, theirs in zip(recorded.directions, expected.directions, strict=True):
            assert torch.equal(mine.u, theirs.u)
            assert torch.equal(mine.places, theirs.places)
    assert all(not module._forward_hooks for module in model.modules())


def test_pairs_of_blocks_are_brought_into_the_picture_s_order() -> None:
    model = small_model(if_bidirectional=True, bimamba_type="none")
    ahead, back = record(model, pictures(), mixers_by_stage(model)[0][:2])
    assert torch.equal(ahead.directions[0].places, torch.arange(17))
    assert torch.equal(back.directions[0].places, torch.arange(17).flip(0))
    block = model.layers[1]  # reads the reversed tokens, as the second of its pair
    embedded, _ = model._embed(pictures())
    given = F.rms_norm(embedded.flip(1), (16,), block.norm.weight, block.norm.eps)
    expected = read_mixer(block.mixer, given, (4, 4), (8,)).directions[0]
    torch.testing.assert_close(back.directions[0].u, expected.u)


def test_random_flips_are_switched_off_while_recording() -> None:
    model = small_model(flip_img_sequences_ratio=1.0)
    plain = small_model()
    plain.load_state_dict(model.state_dict())
    (found,) = record(model, pictures(), mixers_by_stage(model)[0][:1])
    (expected,) = record(plain, pictures(), mixers_by_stage(plain)[0][:1])
    assert torch.equal(found.directions[0].u, expected.directions[0].u)
    assert model.flip_img_sequences_ratio == 1.0


def small_vmamba(**options: object) -> VSSM:
    return VSSM(**{"depths": (1, 2), "dims": 16, "ssm_d_state": 2, "num_classes": 3, **options}).eval()


def test_vmamba_is_recorded_stage_by_stage() -> None:
    model = small_vmamba(norm_layer="ln2d")
    stages = mixers_by_stage(model)
    assert [len(stage) for stage in stages] == [1, 2]
    assert stages[1][1] is model.layers[1].blocks[1].op
    found = record(model, torch.randn(2, 3, 32, 48), stages[1])
    assert [(recorded.grid, recorded.batch) for recorded in found] == [((4, 6), 2)] * 2
    assert not any("__DEBUG__" in vars(mixer) or "__data__" in vars(mixer) for mixer in model.modules())
    first, second = (recorded.directions[0].u for recorded in found)
    assert not torch.equal(first, second)


def test_the_debug_mark_is_taken_away_after_a_failure_too() -> None:
    model = small_vmamba()
    with pytest.raises(ValueError, match="the pictures must have shape"):
        record(model, torch.randn(1, 4, 32, 32), mixers_by_stage(model)[0])
    assert not any("__DEBUG__" in vars(mixer) for mixer in model.modules())


def test_a_cascade_says_why_it_has_no_maps() -> None:
    model = small_vmamba(forward_type="v052dc_noz")
    with pytest.raises(ValueError, match="a cascade scans no picture in four directions"):
        record(model, torch.randn(1, 3, 32, 32), mixers_by_stage(model)[0])


def test_a_network_without_scans_has_no_stages() -> None:
    assert mixers_by_stage(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())) == []
