"""Random changes of training pictures: what each does to known pictures, and how often it is made."""

import argparse
import pickle
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from augment import (
    Cover,
    GaussianBlur,
    RandomMove,
    Solarization,
    border_colour,
    gray_scale,
    horizontal_flip,
    new_data_aug_generator,
)
from datasets import build_transform
from flags import get_args_parser
from pictures import IMAGENET_MEAN, IMAGENET_STD, eval_transform
from training_data import training_transform

COLOUR = (200, 100, 50)
CHANGES = (GaussianBlur, Solarization, gray_scale, horizontal_flip)


@pytest.fixture(autouse=True)
def _seed_python():
    random.seed(0)


def plain(colour=COLOUR, size=(30, 20)) -> Image.Image:
    return Image.new("RGB", size, colour)


def noise(size=(30, 20)) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def settings(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{"input_size": 16, "src": False, "color_jitter": 0.0} | changes)


def values_of(image: torch.Tensor) -> torch.Tensor:
    """The 0 .. 255 values of a normalised picture."""
    mean, deviation = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    return ((image * deviation + mean) * 255).round().int()


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_made_as_often_as_asked(change):
    picture = noise((6, 4))
    assert change(p=0)(picture) is picture
    made = sum(change(p=0.3)(picture) is not picture for _ in range(2000))
    assert 520 < made < 680  # 600, within four standard deviations
    assert change(p=1)(picture) is not picture
    assert {change: 0.2, GaussianBlur: 0.1}[change] == change().p


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_no_probability(change, p):
    with pytest.raises(ValueError, match=r"`p` must be a probability"):
        change(p=p)


def test_solarization_inverts_bright_values():
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    changed = np.asarray(Solarization(p=1)(Image.fromarray(np.dstack([values] * 3))))
    expected = np.where(values < 128, values, 255 - values)
    assert (changed == expected[..., None]).all()


def test_grey_is_the_brightness_in_three_channels():
    picture = noise()
    changed = np.asarray(gray_scale(p=1)(picture))
    assert changed.shape == (20, 30, 3)
    expected = np.asarray(picture) @ np.array([0.299, 0.587, 0.114])
    assert abs(changed - expected[..., None]).max() <= 1


@pytest.mark.parametrize("activate_pred", [False, True])
def test_flip_mirrors_left_and_right(activate_pred):
    picture = noise()
    changed = horizontal_flip(p=1, activate_pred=activate_pred)(picture)
    assert (np.asarray(changed) == np.asarray(picture)[:, ::-1]).all()


def spread(blur: GaussianBlur) -> float:
    """The standard deviation, in pixels, of a bright line after blurring."""
    values = np.zeros((3, 61, 3), np.uint8)
    values[:, 30] = 255
    line = np.asarray(blur(Image.fromarray(values)))[1, :, 0].astype(float)
    return float(np.sqrt((line * (np.arange(61) - 30) ** 2).sum() / line.sum()))


def test_blur_draws_its_radius_between_the_limits():
    assert spread(GaussianBlur(1, 3, 3)) == pytest.approx(3, rel=0.1)
    spreads = [spread(GaussianBlur(1, 1, 4)) for _ in range(50)]
    assert min(spreads) < 1.5
    assert max(spreads) > 3.5
    assert (GaussianBlur().radius_min, GaussianBlur().radius_max) == (0.1, 2.0)
    for limits in ((-1, 2), (3, 2)):
        with pytest.raises(ValueError, match="radius_min"):
            GaussianBlur(1, *limits)


@pytest.mark.parametrize("src", [False, True])
def test_each_picture_is_either_grey_solarized_or_blurred(src):
    augment = new_data_aug_generator(settings(src=src))
    seen = {tuple(values_of(augment(plain()))[:, 3, 3].tolist()) for _ in range(60)}
    grey = round(np.dot(COLOUR, [0.299, 0.587, 0.114]))
    assert seen == {COLOUR, (55, 100, 50), (grey,) * 3}


@pytest.mark.parametrize("src", [False, True])
@pytest.mark.parametrize("input_size", [16, (24, 40), [40, 24]])
def test_the_result_has_the_size_asked_for(src, input_size):
    augment = new_data_aug_generator(settings(src=src, input_size=input_size, color_jitter=0.3))
    expected = (3, *([input_size] * 2 if isinstance(input_size, int) else input_size))
    for size in ((30, 20), (20, 90), (50, 50)):
        image = augment(noise(size))
        assert (tuple(image.shape), image.dtype) == (expected, torch.float32)
    assert "jitter" in repr(augment).lower()
    assert "jitter" not in repr(new_data_aug_generator(settings(color_jitter=None))).lower()


def test_jitter_changes_the_colours():
    augment = new_data_aug_generator(settings(color_jitter=0.3))
    assert len({tuple(values_of(augment(plain()))[:, 0, 0].tolist()) for _ in range(30)}) > 10


@pytest.mark.parametrize("src", [False, True])
def test_one_half_of_the_pictures_is_mirrored(src):
    values = np.zeros((64, 64, 3), np.uint8)
    values[:, 32:] = 120  # dark and bright, neither changed by solarization
    augment = new_data_aug_generator(settings(src=src, input_size=64))
    images = [augment(Image.fromarray(values)) for _ in range(80)]
    brighter_right = [image[..., 54:].mean() > image[..., :10].mean() for image in images]
    brighter_left = [image[..., 54:].mean() < image[..., :10].mean() for image in images]
    assert sum(brighter_right) > 15
    assert sum(brighter_left) > 15


@pytest.mark.parametrize("words", [["--ThreeAugment", "--src"], ["--ThreeAugment"], ["--aa", "none"]])
@pytest.mark.parametrize("probability", [0, 1])
def test_hflip_is_the_probability_that_a_training_picture_is_mirrored(words, probability):
    values = np.zeros((64, 64, 3), np.uint8)
    values[:, 32:] = 120
    words = [*words, "--hflip", str(probability), "--color-jitter", "0", "--reprob", "0", "--input-size", "64"]
    augment = training_transform(get_args_parser().parse_args(words))
    for _ in range(12):
        columns = augment(Image.fromarray(values)).mean((0, 1))
        left, right = columns[0], columns[-1]
        assert (left >= right) if probability else (left <= right)


def test_the_simple_crop_sees_all_of_a_square_but_its_margin():
    ramp = np.repeat(np.repeat(np.arange(64, dtype=np.uint8)[None, :], 64, 0)[..., None], 3, 2)
    simple, part = (new_data_aug_generator(settings(src=src, input_size=64)) for src in (True, False))
    spans = [
        [int(values.max() - values.min()) for values in (values_of(augment(Image.fromarray(ramp))) for _ in range(40))]
        for augment in (simple, part)
    ]
    assert min(spans[0]) >= 63 - 4 - 2  # the crop is shifted by 4 at most; blur takes a little off the ends
    assert min(spans[1]) < 45  # a random part can be small


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (16, 16), (7, 9)])
def test_the_simple_crop_resizes_the_shorter_side_of_squares(size):
    picture = noise(size)
    expected = transforms.Resize(16, transforms.InterpolationMode.BICUBIC)(picture)
    assert (np.asarray(Cover((16, 16))(picture)) == np.asarray(expected)).all()
    covering = Cover((16, 48))(picture)
    assert covering.height >= 16
    assert covering.width >= 48
    assert covering.height == 16 or covering.width == 48


@pytest.mark.parametrize("src", [False, True])
def test_the_same_seeds_give_the_same_picture_and_workers_can_have_it(src):
    augment = new_data_aug_generator(settings(src=src, color_jitter=0.3))

    def draw(transform) -> torch.Tensor:
        random.seed(3)
        torch.manual_seed(3)
        return transform(noise())

    assert torch.equal(draw(augment), draw(pickle.loads(pickle.dumps(augment))))


@pytest.mark.parametrize("input_size", [0, (16, 0)])
def test_no_size(input_size):
    with pytest.raises(ValueError, match="at least 1 pixel"):
        new_data_aug_generator(settings(input_size=input_size))


# --- --affine ---------------------------------------------------------------------------------------------------------

# What changes a picture beside the move, each with the words that leave it out.
OTHERS = {"--hflip": 0, "--color-jitter": 0, "--aa": "none", "--reprob": 0}


def moving(**others) -> transforms.Compose:
    """The training transform with --affine; of the other changes only those that are named, as in hflip=1."""
    words = ["--affine"]
    for flag, value in (OTHERS | {f"--{name.replace('_', '-')}": value for name, value in others.items()}).items():
        words += [flag, *map(str, value if isinstance(value, tuple) else (value,))]
    return training_transform(get_args_parser().parse_args(words))


def framed(frame=(250, 240, 230), size=(40, 30)) -> Image.Image:
    """A dark disc, 12 pixels wide, in the middle of paper of the colour `frame`."""
    rows, columns = np.indices(size[::-1])
    disc = (rows - (size[1] - 1) / 2) ** 2 + (columns - (size[0] - 1) / 2) ** 2 <= 36
    return Image.fromarray(np.where(disc[..., None], 20, np.array(frame)).astype(np.uint8))


@pytest.mark.parametrize("size", [(7, 5), (6, 4), (1, 9), (1, 1)])
def test_border_colour_is_the_median_of_the_outermost_pixels(size):
    values = np.asarray(noise(size))
    inside = np.zeros(values.shape[:2], bool)
    inside[1:-1, 1:-1] = True
    colour = border_colour(Image.fromarray(np.where(inside[..., None], 0, values).astype(np.uint8)))
    assert colour == border_colour(Image.fromarray(np.where(inside[..., None], 255, values).astype(np.uint8)))
    assert all(isinstance(value, int) and 0 <= value <= 255 for value in colour)
    assert border_colour(framed()) == (250, 240, 230)


def test_a_speck_on_the_border_does_not_change_its_colour():
    picture = framed()
    picture.paste((0, 0, 0), (3, 0, 9, 2))
    assert border_colour(picture) == (250, 240, 230)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
@pytest.mark.parametrize("picture", [plain(size=(33, 20)), plain((0, 255, 0), (1, 5))])
def test_what_comes_in_has_the_colour_of_the_border(interpolation, picture):
    move = RandomMove(interpolation)
    for _ in range(20):
        assert np.array_equal(np.asarray(move(picture)), np.asarray(picture))


def test_a_moved_picture_loses_nothing_and_differs_each_time():
    """The disc takes 12 of 40 x 30 pixels; no move brings a part of it over the border."""
    move, picture = RandomMove(), framed()
    moved = [np.asarray(move(picture)) for _ in range(100)]
    assert all(values.shape == (30, 40, 3) for values in moved)
    assert len({values.tobytes() for values in moved}) == 100
    before = (np.asarray(picture)[..., 0] < 135).sum()
    areas = [(values[..., 0] < 135).sum() / before for values in moved]
    assert 0.85**2 * 0.9 < min(areas) < 0.85
    assert 1.15 < max(areas) < 1.15**2 * 1.1
    centres = np.array([np.argwhere(values[..., 0] < 135).mean(0) - [14.5, 19.5] for values in moved])
    for offsets, side in zip(centres.T, (30, 40), strict=True):
        assert 0.06 * side < abs(offsets).max() < 0.1 * side + 1.5
        assert abs(offsets.mean()) < 0.03 * side


def test_a_moved_line_is_turned_and_slanted_within_the_limits():
    """The angle of an upright line is that of the turn less the slant's: 24 degrees at most, a level one's 12."""
    angles = {}
    for upright in (False, True):
        values = np.full((101, 101, 3), 255, np.uint8)
        values[(slice(15, 86), 50) if upright else (50, slice(15, 86))] = 0
        found = []
        for _ in range(150):
            rows, columns = np.nonzero(np.asarray(RandomMove()(Image.fromarray(values)))[..., 0] < 128)
            along, across = (rows, columns) if upright else (columns, rows)
            found.append(abs(np.degrees(np.arctan(np.polyfit(along, across, 1)[0]))))
        angles[upright] = max(found)
    assert 10 < angles[False] < 12.6
    assert 16 < angles[True] < 24.6


@pytest.mark.parametrize("size", [(40, 30), (31, 57), (9, 90)])
@pytest.mark.parametrize("input_size", [24, 48, (24, 40), (40, 24)])
def test_a_moved_picture_is_cropped_as_in_evaluation(size, input_size, monkeypatch):
    monkeypatch.setattr(RandomMove, "__call__", lambda self, picture: picture)
    for ratio in (0.875, 1.0):
        transform = moving(input_size=input_size, eval_crop_ratio=ratio)
        assert torch.equal(transform(noise(size)), eval_transform(input_size, ratio)(noise(size)))


@pytest.mark.parametrize("input_size", [16, (24, 40), (40, 24), 48])
def test_a_moved_input_is_in_the_range_of_any_other(input_size):
    transform = moving(input_size=input_size, hflip=0.5, color_jitter=0.3, aa="rand-m9-mstd0.5-inc1")
    expected = (3, *([input_size] * 2 if isinstance(input_size, int) else input_size))
    for size in ((30, 20), (20, 90), (1, 1), (64, 64)):
        image = transform(noise(size))
        assert (tuple(image.shape), image.dtype) == (expected, torch.float32)
        assert values_of(image).min() >= 0
        assert values_of(image).max() <= 255


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "random"])
def test_the_same_seeds_give_the_same_move_and_workers_can_have_it(interpolation):
    transform = moving(input_size=24, train_interpolation=interpolation)

    def draw(seed, own=transform) -> torch.Tensor:
        random.seed(seed)
        torch.manual_seed(seed)
        return own(noise())

    again = pickle.loads(pickle.dumps(transform))
    assert all(torch.equal(draw(seed), draw(seed, again)) for seed in range(5))
    assert not torch.equal(draw(0), draw(1))
    assert "RandomMove" in repr(transform)
    assert "Crop" not in repr(transform)


def test_the_interpolation_is_that_of_the_flag():
    drawn = {}
    for name in ("bilinear", "bicubic", "random"):
        drawn[name] = set()
        for seed in range(12):
            random.seed(seed)
            torch.manual_seed(0)
            drawn[name].add(moving(input_size=24, train_interpolation=name)(noise()).numpy().tobytes())
    assert len(drawn["bilinear"]) == len(drawn["bicubic"]) == 1
    assert drawn["bilinear"] != drawn["bicubic"]
    assert drawn["random"] == drawn["bilinear"] | drawn["bicubic"]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ({"hflip": 1.0}, lambda still, image: torch.equal(image, still.flip(-1))),
        ({"color_jitter": 0.4}, lambda still, image: not torch.equal(image, still)),
        ({"aa": "rand-m9-n3"}, lambda still, image: not torch.equal(image, still)),
        ({"reprob": 1.0, "remode": "const"}, lambda still, image: bool((image == 0).any())),
        ({"reprob": 1.0, "remode": "rand", "recount": 3}, lambda still, image: not torch.equal(image, still)),
    ],
    ids=["hflip", "color-jitter", "auto-augment", "erased-black", "erased-at-random"],
)
def test_other_changes_are_made_after_the_move(words, change, monkeypatch):
    monkeypatch.setattr(RandomMove, "__call__", lambda self, picture: picture)
    still = eval_transform((24, 32))(noise())
    assert torch.equal(moving(input_size=(24, 32))(noise()), still)
    torch.manual_seed(1)
    assert change(still, moving(input_size=(24, 32), **words)(noise()))


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9-mstd0.5", "original", "v0", "augmix-m5"])
def test_timms_policies_take_every_number_of_bits(policy):
    """A policy that draws 0 bits for a posterized picture gives a black one, whatever the version of Pillow."""
    steps = build_transform(True, get_args_parser().parse_args(["--aa", policy, "--input-size", "40"]))
    found = []

    def find(thing):
        if isinstance(thing, list | tuple):
            for part in thing:
                find(part)
        elif getattr(thing, "name", "").startswith("Posterize"):
            found.append(thing)
        else:
            for inner in ("transforms", "ops", "policy"):
                find(getattr(thing, inner, ()))

    find(steps)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 9, 3), np.uint8))
    for operation in found:
        for bits in range(9):
            kept = np.asarray(operation.aug_fn(picture, bits))
            mask = 256 - 2 ** (8 - bits)
            assert (kept == (np.asarray(picture) & mask)).all()
    assert found or policy.startswith("augmix")
