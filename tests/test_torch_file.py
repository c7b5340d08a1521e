"""Files are written here the way torch writes them; where torch is installed, by torch itself."""

import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from torch_format import Call, tensor, write

from knet_jax.saved.torch_file import read

ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "double": np.array([1.5, -2.0]),
    "half": np.arange(4, dtype=np.float16),
    "bfloat": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
    "long": np.array(7, np.int64),
    "byte": np.array([[1, 255]], np.uint8),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_all_kinds(tmp_path, torch_names, legacy):
    state = {name: tensor(torch_names, x, str(i)) for i, (name, x) in enumerate(ARRAYS.items())}
    loaded = read(write(tmp_path / "a.pth", state, legacy))
    assert list(loaded) == list(ARRAYS)
    for name, wanted in ARRAYS.items():
        assert loaded[name].dtype == wanted.dtype and loaded[name].shape == wanted.shape
        np.testing.assert_array_equal(loaded[name], wanted)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_a_shared_storage(tmp_path, torch_names, legacy):
    base = np.arange(12, dtype=np.float32)
    row = tensor(torch_names, base, base=base, size=(3,), stride=(1,), offset=3)
    transposed = tensor(torch_names, base, base=base, size=(4, 3), stride=(1, 4))
    loaded = read(write(tmp_path / "a.pth", {"a": row, "b": transposed}, legacy))
    np.testing.assert_array_equal(loaded["a"], [3, 4, 5])
    np.testing.assert_array_equal(loaded["b"], base.reshape(3, 4).T)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("module", "name", "shown"),
    [
        ("os", "system", "posix|nt"),
        ("builtins", "eval", "__builtin__"),  # as the second protocol calls it
        ("torch.nn.modules.conv", "Conv2d", "torch.nn.modules.conv"),
    ],
)
def test_other_names_are_refused_and_not_called(tmp_path, torch_names, legacy, module, name, shown):
    called = tmp_path / "called"
    is_faked = module.startswith("torch")
    function = torch_names(module, name) if is_faked else getattr(__import__(module), name)
    content = {
        "weight": tensor(torch_names, ARRAYS["float"]),
        "x": Call(function, f"touch {called}"),
    }
    path = write(tmp_path / "a.pth", content, legacy)
    with pytest.raises(ValueError, match=rf"names ({shown})\.{name}; accepted are dense") as caught:
        read(path)
    assert not called.exists() and "\n" not in str(caught.value)


def write_pickle(folder, pickled):
    """A checkpoint without storages of a pickle that is written by hand."""
    path = folder / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
    return path


def test_functions_cannot_be_changed(tmp_path):
    """BUILD gives an object attributes; that of a function would be anything's."""
    pickled = b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."
    with pytest.raises(ValueError, match="changes a function"):
        read(write_pickle(tmp_path, pickled))


LAUGHS = b")" + b"2\x86" * 60
"""A pair of the same pair of the same pair …: 2^60 to whom follows it to the end."""
DEEP = b")" + b"\x85" * 200_000
"""A tuple in a tuple in a tuple …: more calls in one another than the stack has room for."""
ORDERED = b"ccollections\nOrderedDict\n"


@pytest.mark.parametrize("nest", [LAUGHS, DEEP], ids=["laughs", "deep"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"}", b"Ns."),
        (b"}(", b"Nu."),
        (b"(", b"Nd."),
        (b"\x8f(", b"\x90."),
        (b"(", b"\x91."),
        (b"c__builtin__\nset\n(]", b"atR."),
        (ORDERED + b"(]", b"N\x86atR."),
        (ORDERED + b")R", b"Ns."),
    ],
    ids=["SETITEM", "SETITEMS", "DICT", "ADDITEMS", "FROZENSET", "set", "pairs", "ordered"],
)
def test_nests_are_not_hashed(tmp_path, nest, before, after):
    """Which would take for ever, or end the process."""
    with pytest.raises(ValueError, match="a key that is neither text nor number"):
        read(write_pickle(tmp_path, before + nest + after))


@pytest.mark.parametrize("nest", [LAUGHS, DEEP], ids=["laughs", "deep"])
def test_nests_are_not_printed(tmp_path, nest):
    for reference in (nest, b"(X\x07\x00\x00\x00storage" + nest + b"NNNt", b"X\x01\x00\x00\x00a"):
        with pytest.raises(ValueError, match="which is no storage") as caught:
            read(write_pickle(tmp_path, reference + b"Q."))
        assert len(str(caught.value)) < 1000
    tensor_of = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00" + nest + b")tR."
    with pytest.raises(ValueError, match="without a storage"):
        read(write_pickle(tmp_path, tensor_of))
    assert read(write_pickle(tmp_path, b"(" + nest + b"K\x01" + b"t."))[1] == 1


def test_sizes_that_a_pickle_makes_up_take_no_memory(tmp_path):
    far = (1 << 28).to_bytes(4, "little")
    huge = (1 << 40).to_bytes(8, "little")
    axes = b"(" + b"K\x01" * 40 + b"t"
    tracemalloc.start()
    assert read(write_pickle(tmp_path, b"Nr" + far + b".")) is None
    for pickled, message in {
        b"\x8e" + huge + b".": "broken or no checkpoint",
        b"\x8d" + huge + b".": "broken or no checkpoint",
        b"\x96" + huge + b".": "as torch never does",
        b"\x95" + huge + b".": "broken or no checkpoint",
        b"ctorch\nSize\n(" + axes + b"tR.": "40 axes",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(write_pickle(tmp_path, pickled))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize("code", [b"\x82\x01", b"(cos\nsystem\no", b"(ios\nsystem\n"])
def test_other_ways_to_make_things_are_refused(tmp_path, code):
    with pytest.raises(ValueError, match=r"as torch never does|names os\.system"):
        read(write_pickle(tmp_path, code + b"."))


@pytest.mark.parametrize("name", ["_rebuild_sparse_tensor", "_rebuild_qtensor"])
def test_tensors_that_are_not_dense_are_refused(tmp_path, torch_names, name):
    content = {"weight": Call(torch_names("torch._utils", name), 1)}
    with pytest.raises(ValueError, match=rf"names torch\._utils\.{name}; accepted are dense"):
        read(write(tmp_path / "a.pth", content))


def test_long_names_are_shown_in_part(tmp_path):
    for pickled in (b"c" + b"a" * 100_000 + b"\nb\n.", b"X" + b"\xa0\x86\x01\x00" + b"a" * 99_999):
        with pytest.raises(ValueError, match="names aaa|broken") as caught:
            read(write_pickle(tmp_path, pickled))
        assert len(str(caught.value)) < 300


def test_a_storage_with_tensors_of_two_types(tmp_path, torch_names):
    base = np.arange(4, dtype=np.float32)
    content = {
        "a": tensor(torch_names, base),
        "b": tensor(torch_names, base.view(np.int32)),
        "c": tensor(torch_names, base, numel=5, size=(5,), stride=(1,)),
    }
    with pytest.raises(ValueError, match="storage 0 cannot have 16 bytes and 20"):
        read(write(tmp_path / "a.pth", content))
    del content["c"]
    loaded = read(write(tmp_path / "a.pth", content))
    np.testing.assert_array_equal(loaded["a"], base)
    np.testing.assert_array_equal(loaded["b"], base.view(np.int32))


def test_legacy_storages_together_fit_the_file(tmp_path, torch_names):
    content = {
        str(i): tensor(torch_names, np.zeros(1, np.float32), str(i), numel=150) for i in range(9)
    }
    path = write(tmp_path / "a.pth", content, legacy=True)
    assert path.stat().st_size > 4 * 150
    with pytest.raises(ValueError, match="does not fit the file"):
        read(path)


def test_a_legacy_storage_that_is_not_there(tmp_path, torch_names):
    """Its tensors would be zero."""
    path = write(tmp_path / "a.pth", bad(torch_names), legacy=True)
    data = path.read_bytes()
    listed = pickle.dumps(["0"], protocol=2)
    assert data.count(listed) == 1
    path.write_bytes(data[: data.index(listed)] + pickle.dumps([], protocol=2))
    with pytest.raises(ValueError, match="not those that its tensors refer to"):
        read(path)


def bad(torch_names, **changes):
    return {"weight": tensor(torch_names, ARRAYS["float"], **changes)}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (7,), "stride": (1,)}, "beyond its storage"),
        ({"size": (2, 3), "stride": (4, 1)}, "beyond its storage"),
        ({"size": (1 << 40,), "stride": (0,)}, "beyond its storage"),
        ({"size": (2,), "stride": (1,), "offset": 5}, "beyond its storage"),
        ({"size": (2,), "stride": (1,), "offset": -1}, "cannot be"),
        ({"size": (2, 3), "stride": (1,)}, "cannot be"),
        ({"numel": 1 << 50}, "truncated"),
        ({"numel": -1}, "cannot have -1 elements"),
    ],
)
def test_tensors_that_cannot_be(tmp_path, torch_names, legacy, changes, message):
    path = write(tmp_path / "a.pth", bad(torch_names, **changes), legacy)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_view_of_a_view_is_refused(tmp_path, torch_names, legacy):
    """Five times the last element, and from there five elements in a row: beyond the memory."""
    base = np.arange(5, dtype=np.float32)
    last = tensor(torch_names, base, base=base, size=(5,), stride=(0,), offset=4)
    rebuild = torch_names("torch._utils", "_rebuild_tensor_v2")
    path = write(tmp_path / "a.pth", {"weight": Call(rebuild, last, 0, (5,), (1,))}, legacy)
    with pytest.raises(ValueError, match="a tensor without a storage"):
        read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_file(tmp_path, torch_names, legacy):
    path = write(tmp_path / "a.pth", bad(torch_names), legacy, cut=5)
    with pytest.raises(ValueError, match="is it truncated"):
        read(path)
    path.write_bytes(path.read_bytes()[:60])
    message = "broken or no checkpoint" if legacy else "is it truncated"
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("size", [4, 10, 30, 60, 200])
def test_a_truncated_archive_is_no_pickle(tmp_path, torch_names, size):
    """Its first letter would be a reference to a storage, if a line ended before the file does."""
    path = write(tmp_path / "a.pth", bad(torch_names))
    path.write_bytes(path.read_bytes()[:size].replace(b"\0", b"\n"))
    with pytest.raises(ValueError, match="a zip file without an end"):
        read(path)


def test_other_files(tmp_path, torch_names):
    path = tmp_path / "a.pth"
    for data, message in {
        b"": "broken or no checkpoint",
        b"a text": "broken or no checkpoint",
        pickle.dumps({"a": 1}): "no checkpoint of PyTorch",
    }.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="a zip file, but no checkpoint"):
        read(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 1000)
    with pytest.raises(ValueError, match="compressed"):
        read(path)
    with pytest.raises(ValueError, match="TorchScript"):
        read(write(path, bad(torch_names), extra=["constants.pkl"]))


@pytest.mark.parametrize("legacy", [False, True])
def test_random_changes_end_in_an_error_of_ours_or_in_nothing(tmp_path, torch_names, legacy):
    content = {"state_dict": bad(torch_names), "meta": {"epoch": 1, "set": {1, 2}}}
    path = write(tmp_path / "a.pth", content, legacy)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    start, stop = 0, len(whole)
    if not legacy:  # within the pickle: elsewhere, the zip file notices
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read("archive/data.pkl")
        start = whole.index(pickled)
        stop = start + len(pickled)
    failures = 0
    for _ in range(300):
        changed = bytearray(whole)
        for at in rng.integers(start, stop, rng.integers(1, 6)):
            changed[at] = rng.integers(256)
        if not legacy:
            changed[:] = with_sums(changed)
        path.write_bytes(changed)
        try:
            read(path)
        except ValueError as error:
            failures += 1
            assert len(str(error)) < 500
    assert 150 < failures < 300


def with_sums(data):
    """A zip file whose checksums fit its content again."""
    file = io.BytesIO(data)
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            head = info.header_offset
            name, extra = struct.unpack("<HH", data[head + 26 : head + 30])
            begin = head + 30 + name + extra
            total = zlib.crc32(data[begin : begin + info.file_size])
            old = struct.pack("<L", info.CRC)
            data = data.replace(old, struct.pack("<L", total))
    return data


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_itself(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    state = {
        "a": base,
        "b": base[1].T,
        "c": torch.nn.Parameter(torch.ones(3)),
        "d": torch.tensor(5),
        "e": torch.zeros(2, 0),
        "f": torch.arange(5).to(torch.bfloat16),
    }
    optimizer = torch.optim.AdamW([state["c"]])
    state["c"].sum().backward()
    optimizer.step()
    content = {"state_dict": state, "optimizer": optimizer.state_dict(), "meta": {"epoch": 1}}
    path = tmp_path / "a.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    loaded = read(path)["state_dict"]
    assert list(loaded) == list(state)
    for name, value in state.items():
        wanted = value.detach()
        if name == "f":
            assert loaded[name].dtype == jnp.bfloat16
            wanted = wanted.float()
        np.testing.assert_array_equal(loaded[name].astype(wanted.numpy().dtype), wanted.numpy())
    model = torch.nn.Conv2d(1, 1, 1)
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"it names torch\.nn\.modules\.conv\.Conv2d"):
        read(path)
