"""Writes files the way torch writes them, without torch.

Pickles speak of names of torch; the fixture `torch_names` of conftest.py makes them.
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np

from knet_jax.saved.torch_file import DTYPES, MAGIC


class Call:
    """Pickles as a call of something."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class Stored:
    """A storage, which pickles as a reference."""

    def __init__(self, kind, key, data, numel=None):
        self.kind, self.key, self.data = kind, key, data
        self.numel = data.size if numel is None else numel


class Pickler(pickle.Pickler):
    def __init__(self, file, storages, legacy):
        super().__init__(file, protocol=2)
        self.storages, self.legacy = storages, legacy

    def persistent_id(self, obj):
        if isinstance(obj, Stored):
            self.storages[obj.key] = obj.data
            reference = ("storage", obj.kind, obj.key, "cpu", obj.numel)
            return (*reference, None) if self.legacy else reference
        return None


def tensor(torch_names, array, key="0", *, size=None, stride=None, offset=0, base=None, numel=None):
    """What torch pickles for a tensor."""
    array = np.array(array, order="C")
    base = array if base is None else base
    kind = next(name for name, dtype in DTYPES.items() if dtype == array.dtype)
    rebuild = torch_names("torch._utils", "_rebuild_tensor_v2")
    stored = Stored(torch_names("torch", kind), key, base, numel)
    size = array.shape if size is None else size
    if stride is None:
        stride = tuple(step // array.itemsize for step in array.strides)
    return Call(rebuild, stored, offset, size, stride, False, OrderedDict())


def write(path, content, legacy=False, cut=0, extra=()):
    storages, file = {}, io.BytesIO()
    if legacy:
        for header in (MAGIC, 1001, {"little_endian": True}):
            pickle.dump(header, file, protocol=2)
    Pickler(file, storages, legacy).dump(content)
    if legacy:
        pickle.dump(sorted(storages), file, protocol=2)
        for _, data in sorted(storages.items()):
            file.write(struct.pack("<q", data.size) + data.tobytes())
        path.write_bytes(file.getvalue()[: len(file.getvalue()) - cut])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", file.getvalue())
            archive.writestr("archive/byteorder", "little")
            for name in extra:
                archive.writestr(f"archive/{name}", "")
            for key, data in storages.items():
                raw = data.tobytes()
                archive.writestr(f"archive/data/{key}", raw[: len(raw) - cut])
    return path
