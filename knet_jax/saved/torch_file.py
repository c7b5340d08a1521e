"""Reading the checkpoints of PyTorch (`.pth`) without torch, and without trusting them.

A `.pth` is a pickle, and a pickle may name any function there is and have it called. Here it can
name only what makes tensors and plain containers. A few things that training programs leave beside
the weights are read as nothing at all (`INERT`); every other name ends the reading. Nor can a small
file take much memory or time: what it declares is held against its size, and nests of containers
are never walked.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from knet_jax.system.errors import UserError, one_line

MAGIC = 0x1950A86A20F9469CFC6C
"""What files of before torch 1.6 begin with."""

ZIP_START = b"PK\x03\x04"
"""What later files begin with."""

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

MAX_AXES = 32
"""Of a tensor."""

INERT = {
    ("__builtin__", "getattr"),
    ("_codecs", "encode"),
    ("argparse", "Namespace"),
    ("builtins", "getattr"),
    ("collections", "Counter"),
    ("mmengine.logging.history_buffer", "HistoryBuffer"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("torch", "device"),
    *(("torch", name) for name in ("float16", "float32", "float64", "bfloat16")),
}
"""Settings and logs beside the weights, which are not needed and not made."""


def read(path: str | Path) -> Any:
    """What was saved, with numpy arrays in the place of tensors.

    Args:
      path: of a file that `torch.save` wrote, in the format of any version since 0.4.

    Raises:
      ValueError: the file is of another kind, is truncated, or names something that is neither a
        tensor nor a plain container.
    """
    path = Path(path)
    storages = _Storages(path.stat().st_size)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_archive(archive, storages)
        with path.open("rb") as file:
            if file.read(len(ZIP_START)) == ZIP_START:
                # Its table of contents stands at the end.
                raise RefusedError("it is a zip file without an end: is it truncated?")
            file.seek(0)
            return _read_legacy(file, storages)
    except (RefusedError, PermissionError):
        raise
    except Exception as error:
        # A broken pickle leads its reader to any error.
        reason = one_line(error)[:200] or type(error).__name__
        raise UserError(f"it is broken or no checkpoint of PyTorch: {reason}") from error


class RefusedError(ValueError):
    """The file is of a kind, or has a content or an end, that is not accepted."""


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
    plain = all(isinstance(axes, tuple | list) and len(axes) <= MAX_AXES for axes in (size, stride))
    numbers = (offset, *size, *stride) if plain and len(size) == len(stride) else (None,)
    if any(not isinstance(n, int) or not 0 <= n < 1 << 63 for n in numbers):
        shown = f"size {reprlib.repr(size)} and strides {reprlib.repr(stride)}"
        raise RefusedError(f"a tensor of {shown} cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # More elements than are stored would be a small file that fills the memory.
    if math.prod(size) > array.size or (0 not in size and last >= array.size):
        raise RefusedError(f"a tensor of size {tuple(size)} goes beyond its storage")
    strides = tuple(step * array.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(array[offset:], tuple(size), strides)


def _rebuild_parameter(tensor: np.ndarray, *rest: Any) -> np.ndarray:
    del rest
    return tensor


def _make_dict(*pairs: Any) -> OrderedDict[Any, Any]:
    """An ordered dict: empty, or of the pairs that Python 2 left."""
    made: OrderedDict[Any, Any] = OrderedDict()
    for key, value in pairs[0] if pairs else ():
        made[_check_key(key)] = value
    return made


def _make_set(*items: Any) -> set[Any]:
    return {_check_key(item) for item in (items[0] if items else ())}


def _make_size(*sizes: Any) -> tuple[Any, ...]:
    [axes] = sizes
    if len(axes) > MAX_AXES:
        raise RefusedError(f"a tensor of {len(axes)} axes cannot be")
    return tuple(axes)


def _check_key(key: Any) -> Any:
    """The same key. Anything nested could take for ever to be hashed, or overflow the stack."""
    parts = key if isinstance(key, tuple) and len(key) <= MAX_AXES else (key,)
    if any(not isinstance(part, str | bytes | int | float | None) for part in parts):
        raise RefusedError(f"it has a key that is neither text nor number: {reprlib.repr(key)}")
    return key


ACCEPTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Maker(_make_dict),
    ("__builtin__", "set"): _Maker(_make_set),
    ("builtins", "set"): _Maker(_make_set),
    ("torch", "Size"): _Maker(_make_size),
    ("torch._utils", "_rebuild_tensor"): _Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Maker(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Maker(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): _Maker(_rebuild_parameter),
    **{("torch", name): _StorageType(dtype) for name, dtype in DTYPES.items()},
    **dict.fromkeys(INERT, _Inert),
}

LoadStorage = Callable[[str, np.dtype, int], np.ndarray]


class _Unpickler(pickle._Unpickler):
    """Reads a pickle with `ACCEPTED` alone.

    Python's own, not the one in C: that allocates as many places as the largest index that a pickle
    makes up, and hashes whatever a key consists of.
    """

    dispatch: ClassVar = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, load_storage: LoadStorage | None = None):
        super().__init__(file, encoding="latin1")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if (module, name) not in ACCEPTED:
            raise RefusedError(
                f"it names {module:.80}.{name:.80}; "
                "accepted are dense tensors and plain containers only"
            )
        return ACCEPTED[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        """The storage that a reference means."""
        if self._load_storage is None:
            raise RefusedError("it has a storage where none belongs")
        if not isinstance(reference, tuple) or not 5 <= len(reference) <= 6:
            raise RefusedError(f"it refers to {reprlib.repr(reference)}, which is no storage")
        kind, storage_type, key, _, numel, *rest = reference
        if (
            kind != "storage"
            or not isinstance(storage_type, _StorageType)
            or not isinstance(key, str | int)
            or rest not in ([], [None])
        ):
            raise RefusedError(f"it refers to {reprlib.repr(reference)}, which is no storage")
        if not isinstance(numel, int) or not 0 <= numel < 1 << 60:
            raise RefusedError(f"a storage cannot have {reprlib.repr(numel)} elements")
        return _Storage(self._load_storage(str(key), storage_type.dtype, numel))


def _with_checked_keys(load: Callable[[Any], None], step: int) -> Callable[[Any], None]:
    """A step of the unpickler whose keys, every so many items behind the mark, are checked first."""

    def checked(unpickler: Any) -> None:
        for key in unpickler.stack[::step]:
            _check_key(key)
        load(unpickler)

    return checked


def _set_item(unpickler: Any) -> None:
    _check_key(unpickler.stack[-2])
    unpickler.load_setitem()


def _refuse(unpickler: Any) -> None:
    del unpickler
    raise RefusedError("it is pickled as torch never does")


_Unpickler.dispatch |= {
    pickle.SETITEM[0]: _set_item,
    pickle.SETITEMS[0]: _with_checked_keys(pickle._Unpickler.load_setitems, 2),
    pickle.DICT[0]: _with_checked_keys(pickle._Unpickler.load_dict, 2),
    pickle.ADDITEMS[0]: _with_checked_keys(pickle._Unpickler.load_additems, 1),
    pickle.FROZENSET[0]: _with_checked_keys(pickle._Unpickler.load_frozenset, 1),
    **{
        code[0]: _refuse
        for code in (
            pickle.EXT1,  # a name that is a number
            pickle.EXT2,
            pickle.EXT4,
            pickle.INST,
            pickle.OBJ,
            pickle.BYTEARRAY8,  # which would be filled before it is read
            pickle.NEXT_BUFFER,
            pickle.READONLY_BUFFER,
        )
    },
}


class _Storages:
    """The memory that tensors are views of, by key; together it is never larger than the file."""

    def __init__(self, num_bytes: int):
        self.bytes: dict[str, np.ndarray] = {}
        self._left = num_bytes

    def view(
        self, key: str, dtype: np.dtype, numel: int, read: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        """A storage as elements of a type.

        Args:
          key: its name.
          dtype: of the elements; torch may give several to one storage.
          numel: how many.
          read: makes its bytes, given their number, the first time.
        """
        wanted = numel * dtype.itemsize
        if key not in self.bytes:
            if wanted > self._left:
                raise RefusedError(f"storage {key:.80} does not fit the file: is it truncated?")
            self._left -= wanted
            self.bytes[key] = read(wanted)
        if self.bytes[key].size != wanted:
            raise RefusedError(
                f"storage {key:.80} cannot have {self.bytes[key].size} bytes and {wanted}"
            )
        return self.bytes[key].view(dtype)


def _read_archive(archive: zipfile.ZipFile, storages: _Storages) -> Any:
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

    def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        def read(wanted: int) -> np.ndarray:
            with archive.open(f"{root}data/{key}") as file:
                data = file.read(wanted + 1)
            if len(data) != wanted:
                raise RefusedError(f"storage {key} does not have {wanted} bytes: is it truncated?")
            return np.frombuffer(data, np.uint8)

        return storages.view(key, dtype, numel, read)

    return _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")), load).load()


def _read_legacy(file: Any, storages: _Storages) -> Any:
    """The format before: five pickles, and the storages one after the other."""
    if _Unpickler(file).load() != MAGIC:
        raise RefusedError("it is no checkpoint of PyTorch")
    _Unpickler(file).load()  # version of the format
    if not _Unpickler(file).load().get("little_endian", True):
        raise RefusedError("its numbers are big-endian")
    types: dict[str, np.dtype] = {}

    def load(key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        types.setdefault(key, dtype)
        # Tensors are views of what is filled in later.
        return storages.view(key, dtype, numel, lambda wanted: np.zeros(wanted, np.uint8))

    content = _Unpickler(file, load).load()
    keys = [str(key) for key in _Unpickler(file).load()]
    if sorted(keys) != sorted(types):
        raise RefusedError("its storages are not those that its tensors refer to")
    for key in keys:
        storage = storages.bytes[key]
        (numel,) = struct.unpack("<q", file.read(8))
        if numel * types[key].itemsize != storage.size:
            have = storage.size // types[key].itemsize
            raise RefusedError(f"storage {key:.80} has {numel} elements instead of {have}")
        data = file.read(storage.size)
        if len(data) != storage.size:
            raise RefusedError(f"it ends within storage {key:.80}: is it truncated?")
        storage[:] = np.frombuffer(data, np.uint8)
    return content
