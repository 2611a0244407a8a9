"""The example of sums of two digits: its pictures, and its fine-tuning with an interruption, as a user runs it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "digit_sums"
sys.path[:0] = [str(EXAMPLE), str(ROOT / "examples" / "digits")]

import make_dataset  # noqa: E402
import make_sums  # noqa: E402

FEW = {"train": 38, "val": 19, "held_out": 19}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sums") / "data"
    make_sums.write_sums(folder, FEW)
    return folder


def pictures_of(data, split):
    return sorted((data / make_dataset.FOLDERS[split]).glob("*/*.png"), key=lambda path: path.name)


def scans_of(path):
    """The indices of the two scans, which the name of the picture says."""
    return [int(number) for number in path.stem.split("_")[1:]]


@pytest.mark.parametrize("split", FEW)
def test_class_is_the_sum_of_two_scans_of_this_split(data, split):
    _, digits = make_dataset.load_scans()
    allowed = set(make_dataset.split_indices(digits)[split])
    paths = pictures_of(data, split)
    assert len(paths) == FEW[split]
    for path in paths:
        scans = scans_of(path)
        assert set(scans) <= allowed
        assert path.parent.name == f"sum_{digits[scans].sum():02d}"


def test_sums_are_equally_frequent(data):
    for split, count in FEW.items():
        folders = list((data / make_dataset.FOLDERS[split]).iterdir())
        assert {len(list(folder.iterdir())) for folder in folders} == {count // 19}
        assert sorted(folder.name for folder in folders) == list(make_sums.CLASS_NAMES)


def test_pairs_are_of_all_kinds():
    _, digits = make_dataset.load_scans()
    pairs = make_sums.deal_pairs(digits, range(1797), 3000, np.random.RandomState(0))
    assert {tuple(digits[list(pair)]) for pair in pairs} == {(one, two) for one in range(10) for two in range(10)}


def test_both_digits_are_in_what_evaluation_looks_at(data):
    """The scans are dark on a paper that is pale everywhere else; the cut-out middle is 32 x 64 pixels."""
    scans, _ = make_dataset.load_scans()
    random = np.random.RandomState(3)
    for _ in range(20):
        dark = np.asarray(make_sums.draw_sum(scans[random.randint(0, 1797, 2)], random)) < 60
        assert dark.shape == (make_sums.HEIGHT, make_sums.WIDTH)
        middle = dark[2:34, 4:68]
        assert middle.sum() == dark.sum()
        assert middle[:, :32].any()
        assert middle[:, 32:].any()


def test_pictures_depend_on_the_seed_alone(data, tmp_path):
    make_sums.write_sums(tmp_path / "again", FEW)
    for path in pictures_of(data, "train"):
        assert (tmp_path / "again" / path.relative_to(data)).read_bytes() == path.read_bytes()


def test_data_folder_that_is_not_empty_is_refused(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert make_sums.run([str(tmp_path)]) == 2
    assert re.fullmatch(r"error: .* is not empty; name a new folder\.\n", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_class_without_pictures_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        make_sums.run([str(tmp_path / "data"), "--val", "18"])
    assert "at least 19 pictures" in capsys.readouterr().err


def test_samples_are_of_held_out_scans():
    _, digits = make_dataset.load_scans()
    held_out = set(make_dataset.split_indices(digits)["held_out"])
    samples = list((EXAMPLE / "samples").glob("*.png"))
    assert len(samples) >= 4
    for path in samples:
        total, _, *scans = (int(number) for number in re.findall(r"\d+", path.stem))
        assert set(scans) <= held_out
        assert total == digits[scans].sum()
        with Image.open(path) as picture:
            assert picture.size == (make_sums.WIDTH, make_sums.HEIGHT)


def test_the_recipe_is_interrupted_goes_on_and_names_the_samples(tmp_path):
    """reproduce.py as a person starts it, on a few pictures for two epochs."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, EXAMPLE / "reproduce.py", tmp_path / "run", "--num_workers", "0", "--epochs", "2"]
    command += ["--pictures", "--train 304 --val 19 --held-out 19", "--log-interval", "1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=600)
    assert "with a new head for these classes" in done.stdout
    assert "19 classes, 32 x 64 pixels" in done.stdout
    assert "reproduce.py sends SIGTERM" in done.stdout
    assert "go on with the same command and --auto-resume" in done.stderr
    assert "resumed: " in done.stdout
    assert "on the 19 test images" in done.stdout
    assert all(path.name in done.stdout for path in (EXAMPLE / "samples").glob("*.png"))
    log = (tmp_path / "run" / "training" / "log.txt").read_text(encoding="utf-8")
    assert [json.loads(line)["epoch"] for line in log.splitlines()] == [0, 1]
