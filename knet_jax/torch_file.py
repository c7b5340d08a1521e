"""Reading the checkpoints of PyTorch (`.pth`) without torch, and without trusting them.

A `.pth` is a pickle, and a pickle may name any function there is and have it called. Here it can
name only what makes tensors and plain containers. A few things that training programs leave beside
the weights are read as nothing at all (`INERT`); every other name ends the reading.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from knet_jax.configuration import one_line

MAGIC = 0x1950A86A20F9469CFC6C
"""What files of before torch 1.6 begin with."""

DTYPES = {
    "DoubleStorage": np.dtype("float64"),
    "FloatStorage": np.dtype("float32"),
    "HalfStorage": np.dtype("float16"),
    "BFloat16Storage": jnp.dtype("bfloat16"),
    "LongStorage": np.dtype("int64"),
    "IntStorage": np.dtype("int32"),
    "ShortStorage": np.dtype("int16"),
    "CharStorage": np.dtype("int8"),
    "ByteStorage": np.dtype("uint8"),
    "BoolStorage": np.dtype("bool"),
}

WRAPPERS = ("state_dict", "model", "model_state_dict")
"""Where a checkpoint keeps its tensors, if not at the top."""

INERT = {
    ("__builtin__", "getattr"),
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("builtins", "getattr"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("torch", "device"),
}
"""Settings and logs beside the weights, which are not needed and not made."""


def read_state_dict(path: str | Path) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint by name, whatever it wraps them in.

    Args:
      path: of a file that `torch.save` wrote, in the format of any version since 0.4.

    Raises:
      ValueError: the file is of another kind, is truncated, holds no tensors, or names something
        that is neither a tensor nor a plain container.
    """
    content = read(path)
    for name in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    named = content.items() if isinstance(content, Mapping) else ()
    tensors = {
        str(name).removeprefix("module."): np.ascontiguousarray(value).reshape(value.shape)
        for name, value in named
        if isinstance(value, np.ndarray)
    }
    if not tensors:
        what = ", ".join(str(name) for name, _ in list(named)[:5]) or f"a {type(content).__name__}"
        raise ValueError(f"it holds no tensors by name but {what}")
    return tensors


def read(path: str | Path) -> Any:
    """What was saved, with numpy arrays in the place of tensors. Raises as `read_state_dict`."""
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_archive(archive)
        with path.open("rb") as file:
            return _read_legacy(file, path.stat().st_size)
    except RefusedError:
        raise
    except Exception as error:
        # A broken pickle leads its reader to any error.
        reason = one_line(error) or type(error).__name__
        raise ValueError(f"it is broken or no checkpoint of PyTorch: {reason}") from error


class RefusedError(ValueError):
    """The file is whole, but of a kind or with a content that is not accepted."""


# What a pickle may name. Slots keep it from changing what it was given.


class _Maker:
    """A function, to be called by a pickle."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise RefusedError("it changes a function")


class _Inert:
    """Stands for a thing that is not made."""

    __slots__ = ()

    def __new__(cls, *args: Any) -> Self:
        del args
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        del state

    def append(self, item: Any) -> None:
        """Drops an item of a list."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drops an item of a dict."""


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    """What tensors are views of. No name makes one: a view of a view could leave the memory."""

    array: np.ndarray
    """[numel]."""


def _rebuild_tensor(
    storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *rest: Any
) -> np.ndarray:
    """A view of a storage; what follows the strides are gradients and hooks."""
    del rest
    if not isinstance(storage, _Storage):
        raise RefusedError("it has a tensor without a storage")
    array = storage.array
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or any(not isinstance(n, int) or n < 0 for n in numbers):
        raise RefusedError(f"a tensor of size {size} and strides {stride} cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # More elements than are stored would be a small file that fills the memory.
    if math.prod(size) > array.size or (0 not in size and last >= array.size):
        raise RefusedError(f"a tensor of size {tuple(size)} goes beyond its storage")
    strides = tuple(step * array.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(array[offset:], tuple(size), strides)


def _rebuild_parameter(tensor: np.ndarray, *rest: Any) -> np.ndarray:
    del rest
    return tensor


ACCEPTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("__builtin__", "set"): set,
    ("builtins", "set"): set,
    ("torch", "Size"): tuple,
    ("torch._utils", "_rebuild_tensor"): _Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_rebuild_parameter),
    **{("torch", name): _StorageType(dtype) for name, dtype in DTYPES.items()},
    **dict.fromkeys(INERT, _Inert),
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: Any, load_storage: Callable[..., np.ndarray] | None = None):
        super().__init__(file, encoding="latin1")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ACCEPTED:
            raise RefusedError(
                f"it names {module}.{name}; accepted are tensors and plain containers only"
            )
        return ACCEPTED[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        if self._load_storage is None:
            raise RefusedError("it has a storage where none belongs")
        kind, storage_type, key, _, numel, *rest = reference
        if kind != "storage" or not isinstance(storage_type, _StorageType) or any(rest):
            raise RefusedError(f"it refers to {reference!r:.80}, which is no storage")
        if not isinstance(numel, int) or numel < 0:
            raise RefusedError(f"a storage cannot have {numel!r:.80} elements")
        return _Storage(self._load_storage(str(key), storage_type.dtype, numel))


def _read_archive(archive: zipfile.ZipFile) -> Any:
    """The format since torch 1.6: a pickle, and a file for every storage."""
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise RefusedError("it is a zip file, but no checkpoint of PyTorch")
    [root] = roots
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise RefusedError("it is compressed, which torch never does")  # and might fill the memory
    if f"{root}constants.pkl" in names:
        raise RefusedError("it is a program (TorchScript), not a checkpoint")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise RefusedError("its numbers are big-endian")
    storages: dict[str, np.ndarray] = {}

    def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        if key not in storages:
            wanted = numel * dtype.itemsize
            with archive.open(f"{root}data/{key}") as file:
                data = file.read(wanted + 1)
            if len(data) != wanted:
                raise RefusedError(f"storage {key} does not have {wanted} bytes: is it truncated?")
            storages[key] = np.frombuffer(data, dtype)
        return storages[key]

    return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), load).load()


def _read_legacy(file: Any, num_bytes: int) -> Any:
    """The format before: five pickles, and the storages one after the other."""
    if _Unpickler(file).load() != MAGIC:
        raise RefusedError("it is no checkpoint of PyTorch")
    _Unpickler(file).load()  # version of the format
    if not _Unpickler(file).load().get("little_endian", True):
        raise RefusedError("its numbers are big-endian")
    storages: dict[str, np.ndarray] = {}

    def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        # Tensors are views of what is filled in later.
        if numel * dtype.itemsize > num_bytes:
            raise RefusedError(f"storage {key} is larger than the file: is it truncated?")
        return storages.setdefault(key, np.zeros(numel, dtype))

    content = _Unpickler(file, load).load()
    for key in map(str, _Unpickler(file).load()):
        storage = storages[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel != storage.size:
            raise RefusedError(f"storage {key} has {numel} elements instead of {storage.size}")
        data = file.read(storage.nbytes)
        if len(data) != storage.nbytes:
            raise RefusedError(f"it ends within storage {key}: is it truncated?")
        storage[:] = np.frombuffer(data, storage.dtype)
    return content
