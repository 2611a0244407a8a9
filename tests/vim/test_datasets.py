"""Folders of pictures, class numbers, pictures that cannot be read."""

import argparse
import json
import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from datasets import (
    Batch,
    DataError,
    INatDataset,
    PictureFolder,
    Unreadable,
    build_dataset,
    build_transform,
    collate_readable,
    match_classes,
)
from flags import get_args_parser
from labels import imagenet_wnids
from pictures import eval_transform
from training_data import training_transform


def write_picture(path, shade=0, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(path)


def parse(*words) -> argparse.Namespace:
    return get_args_parser().parse_args([str(word) for word in words])


def test_folders_take_the_numbers_of_the_checkpoints_names():
    match = match_classes(["cat", "ant"], class_names=["dog", "cat", "bee", "ant"], num_classes=4)
    assert match.number_of == {"cat": 1, "ant": 3}
    assert match.num_classes == 4
    assert "checkpoint" in match.found_by


@pytest.mark.parametrize("num_classes", [1000, None])
def test_folders_take_the_numbers_of_imagenet(num_classes):
    wnids = imagenet_wnids()
    match = match_classes([wnids[999], wnids[7]], num_classes=num_classes)
    assert match.number_of == {wnids[999]: 999, wnids[7]: 7}
    assert match.num_classes == 1000


def test_wordnet_ids_serve_where_the_checkpoint_names_its_classes_in_words():
    names = [f"words {number}" for number in range(1000)]
    wnid = imagenet_wnids()[3]
    assert match_classes([wnid], class_names=names, num_classes=1000).number_of == {wnid: 3}


def test_folders_without_known_names_are_numbered_in_sorted_order():
    match = match_classes(["b", "a", "10", "2"], num_classes=6)
    assert match.number_of == {"10": 0, "2": 1, "a": 2, "b": 3}
    assert "sorted" in match.found_by
    assert "guess" in match.found_by
    assert "guess" not in match_classes(["b", "a"], num_classes=2).found_by
    assert match_classes(["b", "a"]).num_classes == 2


@pytest.mark.parametrize(
    ("folders", "names", "count", "sentence"),
    [
        (["cat", "cow"], ["cat", "dog"], 2, r"1 of 2 class folders .*checkpoint's class names: 'cow'"),
        ([f"f{i}" for i in range(9)], ["cat"], 1, "'f0', 'f1', 'f2', 'f3', 'f4' and 4 more"),
        (["n01440764", "x"], None, 1000, "none of ImageNet's WordNet ids: 'x'"),
        (["a", "b", "c"], None, 2, "3 class folders .* only 2 outputs"),
        (["cat"], ["cat", "dog"], 3, "names 2 classes but its model has 3 outputs"),
        (["crane"], ["crane", "dog", "crane"], 3, r"'crane' could be any of the classes \[0, 2\]"),
    ],
)
def test_folders_that_do_not_fit_the_model(folders, names, count, sentence):
    with pytest.raises(DataError, match=sentence):
        match_classes(folders, class_names=names, num_classes=count)


def test_build_dataset_reads_val_alone_and_a_part_of_the_classes(tmp_path):
    write_picture(tmp_path / "val/dog/1.png", 200)
    write_picture(tmp_path / "val/ant/deep/2.JPG", 100)
    write_picture(tmp_path / "val/.hidden/3.png")
    write_picture(tmp_path / "val/ant/.4.png")
    (tmp_path / "val/cat").mkdir()
    (tmp_path / "val/ant/notes.txt").write_text("no picture")
    args = parse("--data-path", tmp_path, "--input-size", 8)
    dataset, classes = build_dataset(False, args, class_names=["bee", "dog", "cat", "ant"], num_classes=4)
    assert classes == 4
    assert sorted(dataset.targets) == [1, 3]
    image, target = dataset[[target for _, target in dataset.samples].index(1)]
    assert target == 1
    expected = (torch.full((3, 8, 8), 200 / 255) - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / (
        torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    )
    torch.testing.assert_close(image, expected)


def test_unreadable_pictures_come_out_by_name_and_leave_the_others_alone(tmp_path):
    for number in range(4):
        write_picture(tmp_path / f"c{number}" / "fine.png", 50 * number)
    (tmp_path / "c1/broken.png").write_bytes(b"not a picture at all")
    dataset = pickle.loads(pickle.dumps(PictureFolder(tmp_path, eval_transform(8))))  # as workers get it
    assert isinstance(dataset[1], Unreadable)
    batch = next(iter(DataLoader(dataset, batch_size=5, collate_fn=collate_readable)))
    assert isinstance(batch, Batch)
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.targets.tolist() == [0, 1, 2, 3]
    assert len(batch.unreadable) == 1
    assert "broken.png" in batch.unreadable[0]
    nothing = collate_readable([Unreadable("why")])
    assert (len(nothing.images), len(nothing.targets), nothing.unreadable) == (0, 0, ["why"])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        ([], "does not exist"),
        (["data/"], "has no folder 'val'"),
        (["data/val/"], "no class folders"),
        (["data/val/cat/"], "hold no pictures"),
    ],
)
def test_missing_data_is_named(tmp_path, make, sentence):
    for name in make:
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(DataError, match=sentence):
        build_dataset(False, parse("--data-path", tmp_path / "data"))


def test_a_class_folder_without_permission_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    write_picture(tmp_path / "open/1.png")
    write_picture(tmp_path / "shut/1.png")
    monkeypatch.setattr(os, "access", lambda path, mode: "shut" not in str(path))
    with pytest.raises(DataError, match=r"shut' cannot be read: permission denied"):
        PictureFolder(tmp_path)


@pytest.fixture
def inat(tmp_path):
    categories = [{"name": f"species {i}", "genus": f"genus {i // 2}"} for i in range(4)]
    (tmp_path / "categories.json").write_text(json.dumps(categories))
    for part, numbers in (("train", [3, 0, 3, 1, 2]), ("val", [0, 3])):
        images = [
            {"id": i, "file_name": f"train_val2019/Birds/{number}/{part}{i}.png"} for i, number in enumerate(numbers)
        ]
        annotations = [{"image_id": i, "category_id": number} for i, number in enumerate(numbers)]
        text = json.dumps({"images": images, "annotations": annotations})
        (tmp_path / f"{part}2019.json").write_text(text)
        for i, number in enumerate(numbers):
            write_picture(tmp_path / f"train_val2019/{number}/{part}{i}.png")
    return tmp_path


def test_inat_numbers_classes_as_training_first_names_them(inat):
    by_name = INatDataset(inat, train=False, year=2019)
    assert (by_name.nb_classes, by_name.targets) == (4, [1, 0])
    assert by_name.samples[0][0].endswith("val0.png")
    by_genus = INatDataset(inat, train=True, year=2019, category="genus")
    assert by_genus.nb_classes == 2
    assert by_genus.targets == [0, 1, 0, 1, 0]
    args = parse("--data-path", inat, "--data-set", "INAT19", "--input-size", 8)
    dataset, classes = build_dataset(False, args)
    assert classes == 4
    assert dataset[0][0].shape == (3, 8, 8)
    with pytest.raises(DataError, match="4 classes but the model has 5 outputs"):
        build_dataset(False, args, num_classes=5)


def test_inat_without_its_files(inat):
    with pytest.raises(DataError, match=r"train2018\.json"):
        INatDataset(inat, year=2018)
    (inat / "train2019.json").write_text(json.dumps({"annotations": [{"category_id": 99}], "images": []}))
    with pytest.raises(DataError, match="not those of iNaturalist 2019"):
        INatDataset(inat, year=2019)


def test_cifar_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="CIFAR-100"):
        build_dataset(False, parse("--data-path", tmp_path, "--data-set", "CIFAR"))


@pytest.mark.parametrize("size", [16, 48])
def test_training_transform_crops_to_the_input_size(size):
    transform = build_transform(True, parse("--input-size", size))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8))
    assert transform(picture).shape == (3, size, size)
    assert any("RandAugment" in repr(step) for step in transform.transforms)
    names = [type(step).__name__ for step in transform.transforms]
    assert ("RandomCrop" in names) == (size <= 32)
    assert ("RandomResizedCropAndInterpolation" in names) == (size > 32)


def test_a_small_input_sees_the_whole_of_a_large_picture():
    """Left half red, right half blue: a crop of 32 of the 400 pixels would mostly show one of them."""
    picture = Image.new("RGB", (400, 400), (255, 0, 0))
    picture.paste((0, 0, 255), (200, 0, 400, 400))
    words = ("--input-size", 32, "--aa", "none", "--hflip", 0, "--color-jitter", 0, "--reprob", 0)
    seen = build_transform(True, parse(*words))(picture)
    left, right = seen[:, 16, 8], seen[:, 16, 24]
    assert left[0] > right[0]
    assert left[2] < right[2]


def test_a_small_input_takes_pictures_of_its_size_as_they_are():
    values = np.random.default_rng(0).integers(1, 255, (32, 32, 3), np.uint8)
    words = ("--input-size", 32, "--aa", "none", "--hflip", 0, "--color-jitter", 0, "--reprob", 0)
    cover, crop, *_ = build_transform(True, parse(*words)).transforms
    assert np.array_equal(np.asarray(cover(Image.fromarray(values))), values)
    assert crop.padding == 4


@pytest.mark.parametrize("words", ["", "--affine", "--ThreeAugment", "--ThreeAugment --src"])
@pytest.mark.parametrize("size", [(1, 1), (20, 20), (1, 40), (40, 2)])
def test_pictures_smaller_than_the_input_can_be_trained_on(words, size):
    transform = training_transform(parse("--input-size", 32, *words.split()))
    assert all(transform(Image.new("RGB", size, (9, 200, 3))).shape == (3, 32, 32) for _ in range(20))


def test_eval_transform_follows_size_and_crop_ratio():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 100, 3), np.uint8))
    args = parse("--input-size", 48, "--eval-crop-ratio", 1)
    assert torch.equal(build_transform(False, args)(picture), eval_transform(48, 1.0)(picture))
    args.input_size = (40, 48)
    assert build_transform(False, args)(picture).shape == (3, 40, 48)
