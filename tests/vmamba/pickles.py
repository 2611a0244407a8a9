"""Files of torch.save and pickles made by hand, for tests of what reads them."""

import io
import pickle
import sys

import torch


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def stream(*parts):
    """A file of torch's older format with these pickles and bytes after its three first pickles."""
    numbers = {"protocol_version": 1001, "little_endian": sys.byteorder == "little", "type_sizes": {}}
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, numbers)]
    return b"".join([*start, *(part if isinstance(part, bytes) else pickle.dumps(part, 2) for part in parts)])


def window(length, offset, size, stride):
    """A pickle of {"w": a tensor of a storage of `length` floats}."""

    class Storage: ...

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", length, None) if isinstance(value, Storage) else None

    file = io.BytesIO()
    tensor = Call(torch._utils._rebuild_tensor_v2, Storage(), offset, size, stride, False, {})
    Pickler(file, 2).dump({"w": tensor})
    return file.getvalue()
