"""Files that are made to do harm, and files that came to harm: refused in one sentence, at no cost."""

import copy
import io
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from pickles import stream, window

from checkpoint import CheckpointError, read_checkpoint
from vmamba import weights
from vmamba.unpickling import read_without_running


def memory_taken(read):
    """The most memory that Python held at once, in bytes, while `read` failed."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is not a checkpoint that can be read"):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps(1, 2)[:-1] + b"r\xff\xff\xff\x0f.",  # remember it as object 268,435,455
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b".",  # a bytearray of 1 GiB
    ],
    ids=["memo", "bytearray"],
)
def test_a_file_that_asks_for_memory_gets_none(tmp_path, content):
    (tmp_path / "c.pth").write_bytes(content)
    assert memory_taken(lambda: read_without_running(tmp_path / "c.pth")) < 1 << 24


def test_storages_that_share_their_bytes_get_no_more_than_the_file_has(tmp_path):
    """A zip whose table of contents names the same megabyte as a thousand storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            of_storage = isinstance(value, range)
            return ("storage", torch.FloatStorage, str(value.start), "cpu", 1 << 18, None) if of_storage else None

    table = io.BytesIO()
    Pickler(table, 2).dump([range(key, 0) for key in range(1000)])
    with zipfile.ZipFile(tmp_path / "d.pth", "w") as file:
        file.writestr("archive/data.pkl", table.getvalue())
        file.writestr("archive/data/0", bytes(1 << 20))
        own = file.getinfo("archive/data/0")
        for key in range(1, 1000):
            again = copy.copy(own)
            again.filename = again.orig_filename = f"archive/data/{key}"
            file.filelist.append(again)
    assert memory_taken(lambda: read_without_running(tmp_path / "d.pth")) < 1 << 24


@pytest.mark.parametrize("known", ["torch.Size", "collections.OrderedDict"])
def test_a_tensor_is_not_taken_apart(tmp_path, known):
    """A tensor that says that it has 2^40 rows, where a list of sides or of entries belongs."""
    module, name = known.split(".")
    rebuilt = window(3, 0, (1 << 40, 2), (0, 0))[:-1]  # {"w": tensor}, without the stop
    start = rebuilt.index(b"ctorch._utils")
    call = f"c{module}\n{name}\n".encode() + rebuilt[start:-1] + b"\x85R."  # the function, (tensor,), called
    (tmp_path / "c.pth").write_bytes(stream(b"\x80\x02" + call, ["0"], struct.pack("=q3f", 3, 1.0, 2.0, 3.0)))
    assert memory_taken(lambda: read_without_running(tmp_path / "c.pth")) < 1 << 24


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("beside", [False, True])
def test_any_damage_is_one_sentence(tmp_path, legacy, beside):
    """Whatever three bytes of it become, a file is read, or refused in one sentence."""
    path, random = tmp_path / "c.pth", np.random.default_rng(0)
    contents = {"model": {"w": torch.arange(6.0), "v": torch.ones(2)}} | ({"where": tmp_path} if beside else {})
    torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        content = bytearray(whole)
        for place in random.integers(0, len(whole), 3):
            content[place] = random.integers(0, 256)
        path.write_bytes(content)
        for read, kind in ((weights.read_weights, ValueError), (read_checkpoint, CheckpointError)):
            try:
                read(str(path))
            except kind as error:
                assert "\n" not in str(error), error  # noqa: PT017
                refused += 1
    assert refused > 200
