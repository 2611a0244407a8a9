"""Where the pictures of a training run come from, which are kept for validation, and what is refused."""

import argparse
import hashlib
import json
import os
import pickle
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR100

from class_folders import folder_to_split, held_out
from datasets import DataError, Unreadable, build_dataset, collate_readable
from flags import get_args_parser
from labels import imagenet_wnids
from pictures import eval_transform
from training_data import open_training_data, training_transform


def write_picture(path, size=(40, 36)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path)


def fill(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_picture(root / name / f"{number}.png")


def parse(path, *words) -> argparse.Namespace:
    common = ("--input-size", 16, "--batch-size", 2, "--data-path", path)
    return get_args_parser().parse_args([str(word) for word in (*common, *words)])


def names_of(dataset) -> set[str]:
    """CLASS/picture of each picture."""
    return {"/".join(path.split(os.sep)[-2:]) for path, _ in dataset.samples}


def test_train_and_val_are_taken_as_they_are(tmp_path):
    fill(tmp_path / "train", dog=3, cat=2)
    fill(tmp_path / "val", cat=1, dog=0)
    data = open_training_data(parse(tmp_path))
    assert (data.num_classes, data.class_names, data.notes) == (2, ["cat", "dog"], ())
    assert sorted(data.train.targets) == [0, 0, 1, 1, 1]
    assert data.val.targets == [0]
    assert data.val.samples[0][0] == str(tmp_path / "val/cat/0.png")
    assert data.train.found_by == data.val.found_by == "the sorted order of the folders"


@pytest.mark.parametrize("below", ["train", ""])
def test_without_val_a_part_of_each_class_is_kept_for_validation(tmp_path, below):
    fill(tmp_path / below, cat=20, dog=10, emu=2, fox=1)
    (tmp_path / ".git/objects").mkdir(parents=True)
    data = open_training_data(parse(tmp_path, "--val-split", 0.2))
    counts = [data.val.targets.count(number) for number in range(4)]
    assert counts == [4, 2, 1, 0]
    assert [data.train.targets.count(number) for number in range(4)] == [16, 8, 1, 1]
    assert names_of(data.train).isdisjoint(names_of(data.val))
    assert data.class_names == ["cat", "dog", "emu", "fox"]
    (note,) = data.notes
    assert "of the 33 pictures" in note
    assert "7 are for validation and 26 for training" in note
    assert "--val-split 0.2 and --seed 0" in note


def test_evaluation_without_val_measures_what_training_kept(tmp_path):
    fill(tmp_path, cat=9, dog=9)
    args = parse(tmp_path, "--seed", 5, "--val-split", 0.3)
    data = open_training_data(args)
    val, classes = build_dataset(False, args, class_names=data.class_names, num_classes=2)
    assert (classes, val.samples, val.note) == (2, data.val.samples, data.notes[0])
    train, _ = build_dataset(True, args)
    assert train.samples == data.train.samples
    for name in ("cat", "dog"):
        write_picture(tmp_path / "val" / name / "own.png")
    val, _ = build_dataset(False, args)
    assert names_of(val) == {"cat/own.png", "dog/own.png"}
    assert val.note is None


def test_the_place_of_the_data_and_the_order_of_writing_do_not_matter(tmp_path):
    pictures = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(12)]
    kept = []
    for place, below in (("one", "train"), ("two", "train"), ("three", ".")):
        random.Random(place).shuffle(pictures)
        for picture in pictures:
            write_picture(tmp_path / place / below / picture)
        kept.append(names_of(open_training_data(parse(tmp_path / place)).val))
    assert kept[0] == kept[1] == kept[2]
    other_seed = open_training_data(parse(tmp_path / "one", "--seed", 1))
    assert names_of(other_seed.val) != kept[0]


parts = st.floats(0, 1, exclude_min=True, exclude_max=True)


@st.composite
def pictures(draw):
    sizes = draw(st.dictionaries(st.text("abé\udcff", min_size=1, max_size=3), st.integers(1, 40), min_size=1))
    return [f"{name}/deep/{number}" for name, size in sizes.items() for number in range(size)]


@given(pictures(), parts, st.integers(-(2**63), 2**63), st.randoms(use_true_random=False))
def test_the_parts_are_whole_and_seeded(paths, part, seed, shuffler):
    sizes = {name: sum(path.startswith(f"{name}/") for path in paths) for name in {p.split("/")[0] for p in paths}}
    assume(max(sizes.values()) > 1)
    kept = held_out(paths, part, seed)
    assert kept == sorted(set(kept))
    for name, size in sizes.items():
        of_class = sum(paths[index].startswith(f"{name}/") for index in kept)
        assert (of_class == 0) if size == 1 else (1 <= of_class < size)
        if 1 < of_class < size - 1:
            assert abs(of_class - part * size) <= 0.5
    chosen = {paths[index] for index in kept}
    shuffler.shuffle(paths)
    assert {paths[index] for index in held_out(paths, part, seed)} == chosen
    alone = [path for path in paths if path.split("/")[0] == min(chosen).split("/")[0]]
    assert {alone[index] for index in held_out(alone, part, seed)} == chosen & set(alone)


@given(st.integers(2, 60), parts, st.integers(0, 9))
def test_another_picture_moves_at_most_one(size, part, seed):
    paths = [f"cat/{number}" for number in range(size + 1)]
    before = {paths[index] for index in held_out(paths[:-1], part, seed)}
    after = {paths[index] for index in held_out(paths, part, seed)}
    assert len((before ^ after) - {paths[-1]}) <= 1


def test_the_draw_is_the_same_for_ever():
    """A checkpoint of today must be measured on the same pictures by later versions."""
    assert held_out([f"cat/{number}.png" for number in range(20)], 0.2, 0) == [7, 12, 16, 19]


def test_a_resumed_run_has_the_numbers_of_its_checkpoint(tmp_path):
    fill(tmp_path, cat=3, dog=3)
    args = parse(tmp_path)
    data = open_training_data(args, class_names=["dog", "cat"])
    assert data.class_names == ["dog", "cat"]
    assert {path.split(os.sep)[-2]: target for path, target in data.train.samples} == {"dog": 0, "cat": 1}
    with pytest.raises(DataError, match="only in the data: 'dog'; only in the checkpoint: 'bee', 'emu'"):
        open_training_data(args, class_names=["cat", "emu", "bee"])
    with pytest.raises(DataError, match="not those that the checkpoint was trained on"):
        open_training_data(args, class_names=["cat", "cat", "dog"])


@pytest.mark.parametrize("count", [3, 1000])
def test_parts_of_imagenet_are_counted_and_all_of_it_has_its_own_order(tmp_path, count, monkeypatch):
    wnids = imagenet_wnids()[-count:]
    train, val = tmp_path / "train", tmp_path / "val"
    for wnid in wnids:
        for folder in (train, val):
            (folder / wnid).mkdir(parents=True)
            (folder / wnid / "1.JPEG").touch()
    data = open_training_data(parse(tmp_path))
    assert data.num_classes == count
    assert data.class_names == wnids
    assert data.train.targets == data.val.targets == list(range(count))


def test_transforms_are_those_of_training_and_of_evaluation(tmp_path):
    fill(tmp_path, cat=2, dog=2)
    args = parse(tmp_path, "--input-size", 48, "--eval-crop-ratio", 1)
    data = open_training_data(args)
    assert "RandAugment" in repr(data.train.transform)
    assert data.train[0][0].shape == (3, 48, 48)
    with Image.open(data.val.samples[0][0]) as picture:
        assert torch.equal(data.val[0][0], eval_transform(48, 1.0)(picture.convert("RGB")))
    moved = open_training_data(parse(tmp_path, "--input-size", 48, "--affine"))
    assert "RandomMove" in repr(moved.train.transform)
    assert "RandAugment" in repr(moved.train.transform)
    assert moved.train[0][0].shape == (3, 48, 48)
    assert repr(moved.val.transform) == repr(eval_transform(48))
    args.ThreeAugment = True
    three = open_training_data(args)
    assert "Solarization" in repr(three.train.transform)
    assert "RandAugment" not in repr(three.train.transform)
    assert three.train[0][0].shape == (3, 48, 48)
    assert repr(three.val.transform) == repr(data.val.transform)
    args.input_size = (32, 48)
    assert training_transform(args)(picture).shape == (3, 32, 48)


def test_a_damaged_picture_is_left_out_of_its_batch(tmp_path):
    fill(tmp_path / "train", cat=2, dog=2)
    fill(tmp_path / "val", cat=1, dog=1)
    (tmp_path / "train/cat/0.png").write_bytes(b"\x89PNG but no more")
    data = pickle.loads(pickle.dumps(open_training_data(parse(tmp_path))))  # as workers get it
    assert isinstance(data.train[0], Unreadable)
    (batch,) = DataLoader(data.train, batch_size=4, collate_fn=collate_readable)
    assert batch.images.shape == (3, 3, 16, 16)
    assert batch.targets.tolist() == [0, 1, 1]
    assert len(batch.unreadable) == 1
    assert str(tmp_path / "train/cat/0.png") in batch.unreadable[0]


def refusal(args, **options) -> str:
    with pytest.raises(DataError) as refused:
        open_training_data(args, **options)
    text = str(refused.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        ({}, "does not exist"),
        ({"data": {}}, "has no folder 'train'"),
        ({"data/train": {}}, "holds no class folders"),
        ({"data/val": {"cat": 2}}, "has no folder 'train'"),
        ({"data": {"cat": 0, "dog": 0}}, "has no folder 'train'"),
        ({"data/train": {"cat": 0, "dog": 0}}, "hold no pictures; known are the endings .bmp"),
        ({"data/train": {"cat": 9}}, "has 1 class ('cat'); a classifier needs at least two"),
        ({"data": {"cat": 9}}, "has 1 class ('cat'); a classifier needs at least two"),
        ({"data": {"cat": 9, "dog": 0, "emu": 4}}, "1 of the 3 class folders of"),
        ({"data/train": {"cat": 9, "dog": 0}, "data/val": {"cat": 1, "dog": 1}}, "hold no pictures: 'dog'; remove"),
        ({"data/train": {"cat": 2, "dog": 2}, "data/val": {}}, "val' holds no class folders"),
        ({"data/train": {"cat": 2, "dog": 2}, "data/val": {"cat": 0, "dog": 0}}, "val' hold no pictures"),
        ({"data": {"cat": 1, "dog": 1}}, "no class has two pictures"),
        ({"data/training": {"cat/in": 2}, "data/validation": {"cat/in": 2}}, "has no folder 'train'"),
        ({"data/photos/train": {"cat": 2}, "data/photos/val": {"cat": 2}}, "has no folder 'train'"),
    ],
    ids=str,
)
def test_what_cannot_be_trained_on_is_named(tmp_path, make, sentence):
    for folder, counts in make.items():
        (tmp_path / folder).mkdir(parents=True)
        fill(tmp_path / folder, **counts)
    assert sentence in refusal(parse(tmp_path / "data"))


def test_different_classes_in_train_and_val_are_shown(tmp_path):
    fill(tmp_path / "train", cat=1, **{f"t{number}": 1 for number in range(8)})
    fill(tmp_path / "val", cat=1, Cat=1)
    text = refusal(parse(tmp_path))
    assert "only in train: 't0', 't1', 't2', 't3', 't4' and 3 more; only in val: 'Cat'" in text
    fill(tmp_path / "train", Cat=1)
    text = refusal(parse(tmp_path))
    assert "only in train" in text
    assert "only in val" not in text


@pytest.mark.parametrize("part", ["0", "1", "-0.1", "1.5", "nan"])
def test_the_part_for_validation_is_a_part(tmp_path, part):
    fill(tmp_path, cat=4, dog=4)
    assert f"--val-split must lie between 0 and 1, got {float(part)}" in refusal(parse(tmp_path, "--val-split", part))
    with pytest.raises(DataError, match="--val-split"):
        build_dataset(False, parse(tmp_path, "--val-split", part))


@pytest.mark.parametrize(
    ("processes", "batch", "sentence"),
    [
        (1, 9, "There are 8 training pictures, too few for one step of --batch-size 9; lower --batch-size to 8"),
        (2, 5, "--batch-size 5 in each of 2 processes; lower --batch-size to 4 or less."),
        (3, 2, None),
        (1, 8, None),
        (None, 8, None),
    ],
)
def test_fewer_pictures_than_a_step_takes(tmp_path, processes, batch, sentence):
    fill(tmp_path, cat=5, dog=5)
    args = parse(tmp_path, "--batch-size", batch)
    args.world_size = processes
    if sentence is None:
        assert len(open_training_data(args).train) == 8
    else:
        assert sentence in refusal(args)


@pytest.mark.parametrize("shut", ["data", "shut"])
def test_folders_without_permission(tmp_path, monkeypatch, shut):
    fill(tmp_path / "data/train", cat=2, shut=2)
    monkeypatch.setattr(os, "access", lambda path, mode: os.path.basename(path) != shut)
    if shut == "data":
        monkeypatch.setattr(os.path, "isdir", lambda path: str(path).endswith("data"))
    text = refusal(parse(tmp_path / "data"))
    assert f"{shut}' cannot be read: permission denied" in text


def test_a_class_folder_without_permission_beside_others(tmp_path, monkeypatch):
    fill(tmp_path, a_shut=2, cat=2, dog=2)
    look = os.scandir

    def scandir(path):
        if "a_shut" in str(path):
            raise PermissionError(13, "Permission denied")
        return look(path)

    monkeypatch.setattr(os, "access", lambda path, mode: "a_shut" not in str(path))
    monkeypatch.setattr(os, "scandir", scandir)
    assert folder_to_split(tmp_path) == tmp_path
    assert "a_shut' cannot be read: permission denied" in refusal(parse(tmp_path))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """CIFAR-100's files with three pictures and five; torchvision is told their MD5 sums."""
    folder = tmp_path / CIFAR100.base_folder
    folder.mkdir()
    names = [f"thing {number:02}" for number in range(100)]
    contents = {"meta": {"fine_label_names": names}}
    for part, labels in (("train", [7, 99, 7, 3, 1]), ("test", [99, 0, 3])):
        contents[part] = {"data": np.zeros((len(labels), 3072), np.uint8), "fine_labels": labels}
    sums = {}
    for part, content in contents.items():
        (folder / part).write_bytes(pickle.dumps(content))
        sums[part] = hashlib.md5((folder / part).read_bytes()).hexdigest()
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "filename": "meta", "md5": sums["meta"]})
    return tmp_path


def test_cifar_has_its_fine_names(cifar):
    args = parse(cifar, "--data-set", "CIFAR", "--input-size", 32)
    data = open_training_data(args, class_names=[f"thing {number:02}" for number in range(100)])
    assert data.num_classes == 100
    assert data.class_names[99] == "thing 99"
    assert (data.train.targets, data.val.targets) == ([7, 99, 7, 3, 1], [99, 0, 3])
    assert "RandomCrop" in repr(data.train.transform)
    assert repr(data.val.transform) == repr(eval_transform(32))
    assert data.train[0][0].shape == (3, 32, 32)
    assert "only in the checkpoint: 'cat'" in refusal(args, class_names=["cat"])
    args.batch_size = 6
    assert "5 training pictures" in refusal(args)


def test_inaturalist_has_its_classes(tmp_path):
    (tmp_path / "categories.json").write_text(json.dumps([{"name": "wasp"}, {"name": "ant"}]))
    for part, numbers in (("train", [1, 0, 1]), ("val", [0])):
        images = [{"id": i, "file_name": f"all/Insects/{n}/{part}{i}.png"} for i, n in enumerate(numbers)]
        annotations = [{"image_id": i, "category_id": n} for i, n in enumerate(numbers)]
        (tmp_path / f"{part}2019.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    args = parse(tmp_path, "--data-set", "INAT19")
    data = open_training_data(args, class_names=["ant", "wasp"])
    assert (data.num_classes, data.class_names, data.notes) == (2, ["ant", "wasp"], ())
    assert (data.train.targets, data.val.targets) == ([0, 1, 0], [1])
    assert "the same in another order" in refusal(args, class_names=["wasp", "ant"])
    for part, called in (("train", "training"), ("val", "validation")):
        file = tmp_path / f"{part}2019.json"
        before = file.read_text()
        file.write_text(json.dumps({**json.loads(before), "images": []}))
        assert f"names no pictures for {called}" in refusal(args)
        file.write_text(before)
