"""Reading checkpoints of PyTorch (`.pth`) without torch, and without trusting them.

A `.pth` is a pickle, and a pickle may name any function there is and have it called. Here it can name
only what makes tensors and plain containers; a few other things that training programs leave beside
the weights are read as nothing at all (`INERT`); every other name ends the reading. Nor can a small
file take much memory or time: the sizes that it declares are compared with its own, and how deeply it
nests is counted before anything is made.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import reprlib
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import jax.numpy as jnp
import numpy as np

from knet_jax.system.errors import UserError, one_line

MAGIC = 0x1950A86A20F9469CFC6C
"""The number with which files of torch before 1.6 begin."""

ZIP_START = b"PK\x03\x04"
"""The bytes with which later files begin."""

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

# fmt: off
INERT = (
    "__builtin__.getattr", "builtins.getattr", "_codecs.encode", "argparse.Namespace",
    "collections.Counter", "mmengine.logging.history_buffer.HistoryBuffer",
    "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "pathlib.PosixPath", "pathlib.WindowsPath",
    "pathlib._local.PosixPath", "pathlib._local.WindowsPath",  # Python 3.13
    "torch.device", "torch.float16", "torch.float32", "torch.float64", "torch.bfloat16",
)
# fmt: on
"""Names of settings and logs beside the weights, which are not needed and not made."""

MAX_AXES = 32
"""The most axes that a tensor may have."""

MAX_DEPTH, MAX_SIZE = 100, 30_000
"""The most that tuples may hold: tuples within tuples, and parts in all."""


def read(path: str | Path) -> Any:
    """Reads what was saved, with numpy arrays in the place of tensors.

    Args:
        path: a file that `torch.save` wrote, in the format of any version since 0.4.

    Raises:
        UserError: the file is of another kind, is truncated, or names something that is neither a
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
                # The table of contents stands at the end.
                raise UserError("it is a zip file without an end: is it truncated?")
            file.seek(0)
            return _read_legacy(file, storages)
    except (UserError, PermissionError):
        raise
    except Exception as error:
        # A broken pickle leads its reader to any error.
        reason = one_line(error)[:200] or type(error).__name__
        raise UserError(f"it is broken or no checkpoint of PyTorch: {reason}") from error


# What a pickle may name.


class _Maker:
    """A function that a pickle may call and, having slots only, cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise UserError("it changes a function")


class _Inert:
    """Stands for an object that is not made: takes any content, and drops it."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None: ...

    def append(self, item: Any) -> None:
        """Drops an item of a list."""

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Dict(dict):
    """Stands for an OrderedDict: state dicts carry attributes, which could take a method's place."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None: ...


class _StorageType(NamedTuple):
    dtype: np.dtype


class _Storage(NamedTuple):
    """The memory of tensors. A pickle cannot construct one, so no view of it leaves the memory."""

    array: np.ndarray
    """[numel]."""


def _rebuild_tensor(
    storage: _Storage, offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> np.ndarray:
    """A view of a storage; gradients and hooks, which follow, are not needed."""
    if not isinstance(storage, _Storage):
        raise UserError("it has a tensor without a storage")
    array = storage.array
    plain = all(isinstance(axes, tuple | list) and len(axes) <= MAX_AXES for axes in (size, stride))
    numbers = (offset, *size, *stride) if plain and len(size) == len(stride) else (None,)
    if any(not isinstance(n, int) or not 0 <= n < 1 << 63 for n in numbers):
        shown = f"size {reprlib.repr(size)} and strides {reprlib.repr(stride)}"
        raise UserError(f"a tensor of {shown} cannot be")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride))
    # More elements than are stored would be a small file that fills the memory.
    if math.prod(size) > array.size or (0 not in size and last >= array.size):
        raise UserError(f"a tensor of size {tuple(size)} goes beyond its storage")
    strides = tuple(step * array.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(array[offset:], tuple(size), strides)


def _rebuild_parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


def _make_size(axes: Sequence[int]) -> tuple[int, ...]:
    if not all(isinstance(n, int) for n in axes):
        raise UserError(f"a size of {reprlib.repr(axes)} cannot be")
    return tuple(axes)


ACCEPTED: dict[str, Any] = {
    "collections.OrderedDict": _Dict,
    "__builtin__.set": set,
    "builtins.set": set,
    "torch.Size": _Maker(_make_size),
    "torch._utils._rebuild_tensor": _Maker(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Maker(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Maker(_rebuild_parameter),
    "torch._utils._rebuild_parameter_with_state": _Maker(_rebuild_parameter),
    **{f"torch.{name}": _StorageType(dtype) for name, dtype in DTYPES.items()},
    **dict.fromkeys(INERT, _Inert),
}


# Pickles.


class _Storages:
    """The memory of all tensors of a file, which together is no larger than the file.

    It is zero until the file's numbers are written into it.
    """

    def __init__(self, num_bytes: int):
        self.bytes: dict[str, np.ndarray] = {}
        self.types: dict[str, np.dtype] = {}
        self._left = num_bytes

    def view(self, key: str, dtype: np.dtype, numel: int) -> np.ndarray:
        """The storage of a name as elements of a type; torch may give several types to one."""
        wanted = numel * dtype.itemsize
        if key not in self.bytes:
            if wanted > self._left:
                raise UserError(f"storage {key:.80} does not fit the file: is it truncated?")
            self._left -= wanted
            self.bytes[key] = np.zeros(wanted, np.uint8)
            self.types[key] = dtype
        if self.bytes[key].size != wanted:
            have = self.bytes[key].size
            raise UserError(f"storage {key:.80} cannot have {have} bytes and {wanted}")
        return self.bytes[key].view(dtype)


class _Unpickler(pickle.Unpickler):
    """Reads a pickle that names nothing but what is `ACCEPTED`."""

    def __init__(self, file: BinaryIO, storages: _Storages | None):
        super().__init__(file, encoding="latin1")
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name."""
        if f"{module}.{name}" not in ACCEPTED:
            raise UserError(
                f"it names {module:.80}.{name:.80}; "
                "accepted are dense tensors and plain containers only"
            )
        return ACCEPTED[f"{module}.{name}"]

    def persistent_load(self, reference: Any) -> _Storage:
        """The storage that a reference means."""
        if self._storages is None:
            raise UserError("it has a storage where none belongs")
        match reference:
            case (
                "storage",
                _StorageType() as kind,
                str() | int() as key,
                _,
                int() as numel,
                *rest,
            ):
                if rest in ([], [None]):
                    if not 0 <= numel < 1 << 60:
                        raise UserError(f"a storage cannot have {reprlib.repr(numel)} elements")
                    return _Storage(self._storages.view(str(key), kind.dtype, numel))
        raise UserError(f"it refers to {reprlib.repr(reference)}, which is no storage")


def _load(file: BinaryIO, storages: _Storages | None = None) -> Any:
    start = file.tell()
    _check_nesting(file)
    file.seek(start)
    return _Unpickler(file, storages).load()


def _check_nesting(file: BinaryIO) -> None:
    """Goes through a pickle without making anything, and refuses what would take time or memory.

    A key of a dict is hashed, which follows tuples within tuples: too deep, and the process ends; the
    same pair of the same pair sixty times, and it never does; as with tens of thousands of large numbers
    of one hash. And the reader has as many places to keep things in as the largest index that a pickle
    makes up.
    """
    stack: list[Any] = []  # (depth, size) of every thing that is there, None for a mark
    memo: dict[int, tuple[int, int]] = {}
    for number, (code, argument, _) in enumerate(pickletools.genops(file)):
        if isinstance(argument, int) and not -(2**63) <= argument < 2**64 and argument != MAGIC:
            raise UserError("it has numbers as torch never does")
        if "PUT" in code.name or code.name == "MEMOIZE":
            index = len(memo) if argument is None else argument
            if index > number:
                raise UserError("it is pickled as torch never does")
            memo[index] = stack[-1]
        elif "GET" in code.name:
            stack.append(memo[argument])
        elif code.name == "MARK":
            stack.append(None)
        elif code.name.startswith("EXT"):  # a name that is a number
            raise UserError("it is pickled as torch never does")
        else:
            parts, taken = [], code.stack_before
            if pickletools.markobject in taken:  # all above the last mark, and what stands below it
                taken = taken[: taken.index(pickletools.markobject)]
                while (part := stack.pop()) is not None:
                    parts.append(part)
            parts += [stack.pop() for _ in taken]
            made = code.stack_after
            if made and made[0] in (pickletools.pylist, pickletools.pydict, pickletools.pyset):
                parts = []  # cannot be hashed
            depth = 1 + max((depth for depth, _ in parts), default=0)
            size = 1 + sum(size for _, size in parts)
            if depth > MAX_DEPTH or size > MAX_SIZE:
                raise UserError("it nests tuples as torch never does")
            stack += [(depth, size)] * len(made)


# Files.


def _read_archive(archive: zipfile.ZipFile, storages: _Storages) -> Any:
    """Reads the format since torch 1.6: a pickle, and a file for every storage."""
    names = archive.namelist()
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise UserError("it is a zip file, but no checkpoint of PyTorch")
    [root] = roots
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise UserError("it is compressed, which torch never does")  # and might fill the memory
    if f"{root}constants.pkl" in names:
        raise UserError("it is a program (TorchScript), not a checkpoint")
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
        raise UserError("its numbers are big-endian")
    content = _load(io.BytesIO(archive.read(f"{root}data.pkl")), storages)
    for key, storage in storages.bytes.items():
        with archive.open(f"{root}data/{key}") as file:
            data = file.read(storage.size + 1)
        _fill(storage, data, key)
    return content


def _read_legacy(file: BinaryIO, storages: _Storages) -> Any:
    """Reads the format before: five pickles, and the storages one after the other."""
    if _load(file) != MAGIC:
        raise UserError("it is no checkpoint of PyTorch")
    _load(file)  # version of the format
    if not _load(file).get("little_endian", True):
        raise UserError("its numbers are big-endian")
    content = _load(file, storages)
    keys = [str(key) for key in _load(file)]
    if sorted(keys) != sorted(storages.bytes):
        raise UserError("its storages are not those that its tensors refer to")
    for key in keys:
        storage = storages.bytes[key]
        (numel,) = struct.unpack("<q", file.read(8))
        have = storage.size // storages.types[key].itemsize
        if numel != have:
            raise UserError(f"storage {key:.80} has {numel} elements instead of {have}")
        _fill(storage, file.read(storage.size), key)
    return content


def _fill(storage: np.ndarray, data: bytes, key: str) -> None:
    if len(data) != storage.size:
        raise UserError(f"storage {key:.80} does not have {storage.size} bytes: is it truncated?")
    storage[:] = np.frombuffer(data, np.uint8)
