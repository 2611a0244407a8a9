"""Where class names come from, and what happens when they do not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import labels


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def refusal(num_classes: int, path: str) -> str:
    with pytest.raises(labels.LabelError) as caught:
        labels.class_names_for(num_classes, labels_file=path, checkpoint_names=None)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    assert path in message or repr(path)[1:-1] in message
    return message


def test_imagenet() -> None:
    names, wnids = labels.imagenet_names(), labels.imagenet_wnids()
    assert len(names) == len(wnids) == len(set(wnids)) == 1000
    assert (wnids[0], names[0]) == ("n01440764", "tench, Tinca tinca")
    assert (wnids[281], names[281]) == ("n02123045", "tabby, tabby cat")
    assert names[999].startswith("toilet tissue")


def test_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "names.txt", "one\ntwo\n")
    assert labels.class_names_for(1000, labels_file=None, checkpoint_names=None) == labels.imagenet_names()
    assert labels.class_names_for(2, labels_file=None, checkpoint_names=None) == ["Class 0", "Class 1"]
    assert labels.class_names_for(2, labels_file=None, checkpoint_names=["a", "b"]) == ["a", "b"]
    assert labels.class_names_for(2, labels_file=path, checkpoint_names=["a", "b"]) == ["one", "two"]


def test_the_names_are_for_people() -> None:
    given = ["n02123045", "n99999999", "red\x1b[31m\tpanda", "  大熊猫 "]
    shown = labels.class_names_for(4, labels_file=None, checkpoint_names=given)
    assert shown == ["tabby, tabby cat", "n99999999", "red [31m panda", "大熊猫"]
    assert given[0] == "n02123045"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "cat\ndog\n猫\n"),
        ("a.txt", "cat\r\ndog\r\n猫"),
        ("a.txt", " cat \ndog\n猫\n\n\n"),
        ("a.txt", b"\xef\xbb\xbfcat\ndog\n\xe7\x8c\xab\n"),
        ("a.txt", "cat\ndog\n猫\n".encode("utf-16")),
        ("a.json", json.dumps(["cat", "dog", "猫"])),
        ("a", '  ["cat", "dog", "猫"]'),
        ("a.json", json.dumps({"2": "猫", "0": "cat", "1": "dog"})),
        ("a.json", json.dumps({"0": ["n1", "cat"], "1": ["n2", "dog"], "2": ["n3", "猫"]})),
    ],
)
def test_file_formats(tmp_path: Path, name: str, content: str | bytes) -> None:
    assert labels.read_labels(write(tmp_path / name, content)) == ["cat", "dog", "猫"]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\ntwo\n", "has 2 names but the model has 3 classes"),
        ("a.txt", "1\n2\n3\n4\n", "has 4 names but the model has 3 classes"),
        ("a.txt", "", "is empty"),
        ("a.txt", "\n\n", "is empty"),
        ("a.txt", "one\n\nthree\n", "empty name for class 1"),
        ("a.txt", b"\xff\xd8\xff\xe0\x00", "not UTF-8"),
        ("a.txt", b"one\0two", "not a text file"),
        ("a.json", "[1, 2, 3]", "must be text"),
        ("a.json", '["one", "two", ', "not valid JSON"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.json", '"one"', "must hold a JSON list"),
        ("a.json", '{"0": "one", "1": "two", "3": "three"}', "none for index 2"),
        ("a.json", '{"cat": 0, "dog": 1, "hen": 2}', "none for index 0"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    assert expected in refusal(3, write(tmp_path / name, content))


def test_unreadable_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "No such file" in refusal(3, str(tmp_path / "gone.txt"))
    assert "Cannot read" in refusal(3, str(tmp_path))
    monkeypatch.setattr(labels, "MAX_LABEL_BYTES", 10)
    assert "larger than" in refusal(3, write(tmp_path / "long.txt", "x" * 11))


def test_checkpoint_names_of_the_wrong_length() -> None:
    with pytest.raises(labels.LabelError, match="The checkpoint has 2 names but the model has 3 classes"):
        labels.class_names_for(3, labels_file=None, checkpoint_names=["a", "b"])
