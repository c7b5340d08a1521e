"""Files are written here the way torch writes them; where torch is installed, by torch itself."""

import io
import os
import pickle
import tracemalloc
import zipfile

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
BASE = np.arange(12, dtype=np.float32)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_of_all_types_and_views(tmp_path, torch_names, legacy):
    state = {name: tensor(torch_names, x, str(i)) for i, (name, x) in enumerate(ARRAYS.items())}
    shared = {"base": BASE, "key": "shared"}
    wanted = ARRAYS | {
        "row": BASE[3:6],
        "transposed": BASE.reshape(3, 4).T,
        "integers": BASE.view(np.int32),
    }
    state["row"] = tensor(torch_names, BASE, size=(3,), stride=(1,), offset=3, **shared)
    state["transposed"] = tensor(torch_names, BASE, size=(4, 3), stride=(1, 4), **shared)
    state["integers"] = tensor(torch_names, BASE.view(np.int32), **shared)
    loaded = read(write(tmp_path / "a.pth", state, legacy))
    assert list(loaded) == list(wanted)
    for name, array in wanted.items():
        assert loaded[name].dtype == array.dtype and loaded[name].shape == array.shape
        np.testing.assert_array_equal(loaded[name], array)


def one(torch_names, **changes):
    return {"weight": tensor(torch_names, ARRAYS["float"], **changes)}


@pytest.mark.parametrize("legacy", [False, True])
def test_what_is_refused_in_both_formats(tmp_path, torch_names, legacy):
    path, called = tmp_path / "a.pth", tmp_path / "called"
    rebuild = torch_names("torch._utils", "_rebuild_tensor_v2")
    # Five times the last element, and from there five elements in a row: beyond the memory.
    last = tensor(torch_names, BASE[:5], size=(5,), stride=(0,), offset=4)
    words = f"touch {called}"
    function, sparse, layer = (
        torch_names(*name.rsplit(".", 1))
        for name in (
            "torch._utils._rebuild_qtensor",
            "torch._utils._rebuild_sparse_tensor",
            "torch.nn.modules.conv.Conv2d",
        )
    )
    table = [
        ({"x": Call(os.system, words)}, r"names (posix|nt)\.system; accepted are dense tensors"),
        ({"x": Call(eval, words)}, r"names __builtin__\.eval; accepted are dense tensors"),
        ({"x": Call(layer, words)}, r"names torch\.nn\.modules\.conv\.Conv2d; accepted are"),
        ({"x": Call(sparse, 1)}, r"names torch\._utils\._rebuild_sparse_tensor; accepted"),
        ({"x": Call(function, 1)}, r"names torch\._utils\._rebuild_qtensor; accepted"),
        ({"x": Call(rebuild, last, 0, (5,), (1,))}, "a tensor without a storage"),
        (one(torch_names, size=(7,), stride=(1,)), "beyond its storage"),
        (one(torch_names, size=(2, 3), stride=(4, 1)), "beyond its storage"),
        (one(torch_names, size=(1 << 40,), stride=(0,)), "beyond its storage"),
        (one(torch_names, size=(2,), stride=(1,), offset=5), "beyond its storage"),
        (one(torch_names, size=(2,), stride=(1,), offset=-1), "cannot be"),
        (one(torch_names, size=(2, 3), stride=(1,)), "cannot be"),
        (one(torch_names, numel=1 << 50), "truncated"),
        (one(torch_names, numel=-1), "cannot have -1 elements"),
        (
            {
                "a": tensor(torch_names, BASE[:4]),
                "b": tensor(torch_names, BASE[:4], numel=5, size=(5,), stride=(1,)),
            },
            "storage 0 cannot have 16 bytes and 20",
        ),
        # Each storage is smaller than the file, all of them are not.
        (
            {
                str(i): tensor(torch_names, BASE[:1], str(i), numel=(2000 - 1400 * legacy))
                for i in range(9)
            },
            "does not fit the file",
        ),
    ]
    for content, message in table:
        write(path, one(torch_names, key="w") | content, legacy)
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert not called.exists()
    for cut, end in ((5, None), (0, 60)):
        data = write(path, one(torch_names), legacy, cut=cut).read_bytes()
        path.write_bytes(data[:end])
        with pytest.raises(ValueError, match="is it truncated|broken or no checkpoint"):
            read(path)


def test_what_a_dict_carries_takes_no_methods_place(tmp_path):
    """A state dict has attributes; one named `items` would be called in the place of the method."""
    state = b"X\x05\x00\x00\x00itemsccollections\nOrderedDict\n"
    loaded = read(write_pickle(tmp_path, b"ccollections\nOrderedDict\n)R}" + state + b"sb."))
    assert loaded == {} and list(loaded.items()) == []


def write_pickle(folder, pickled):
    """A checkpoint without storages, of a pickle that is written by hand."""
    path = folder / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + pickled)
    return path


def test_pickles_that_would_take_time_or_memory(tmp_path):
    laughs = b")" + b"2\x86" * 60  # a pair of the same pair …: 2^60 to whom follows it to the end
    deep = b")" + b"\x85" * 200_000  # more calls in one another than the stack has room for
    ordered = b"ccollections\nOrderedDict\n"
    nests = [
        (b"}", b"Ns."),
        (b"}(", b"Nu."),
        (b"(", b"Nd."),
        (b"\x8f(", b"\x90."),
        (b"(", b"\x91."),
        (b"c__builtin__\nset\n(]", b"atR."),
        (ordered + b"(]", b"N\x86atR."),
        (ordered + b")R", b"Ns."),
        (b"", b"Q."),
        (b"(X\x07\x00\x00\x00storage", b"NNNtQ."),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00", b")tR."),
    ]
    table = {
        before + nest + after: "nests tuples" for nest in (laughs, deep) for before, after in nests
    }
    # A size of sizes, each in a list, which would hide how deep they are.
    table[b"ctorch\nSize\n(]ctorch\nSize\n(]K\x01atRatR."] = "a size of .* cannot be"
    one_hash = [b"\x8a\x0a" + ((2**61 - 1) * k).to_bytes(10, "little") for k in range(30_000)]
    table[b"\x8f(" + b"".join(one_hash) + b"\x90."] = "numbers as torch never does"
    table[b"}(" + b"N".join(one_hash) + b"Nu."] = "numbers as torch never does"
    far, huge = (1 << 28).to_bytes(4, "little"), (1 << 40).to_bytes(8, "little")
    table |= {
        b"Nr" + far + b".": "as torch never does",
        b"\x8e" + huge + b".": "broken or no checkpoint",
        b"\x8d" + huge + b".": "broken or no checkpoint",
        b"\x96" + huge + b".": "broken or no checkpoint",
        b"\x95" + huge + b".": "broken or no checkpoint",
        b"\x82\x01.": "as torch never does",
        b"(cos\nsystem\no.": r"names os\.system",
        b"(ios\nsystem\n.": r"names os\.system",
        b"(K\x01tQ.": "which is no storage",
        b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.": "changes a function",
        b"c" + b"a" * 100_000 + b"\nb\n.": "names aaa",
        b"X\xa0\x86\x01\x00" + b"a" * 99_999: "broken",
    }
    for pickled, message in table.items():
        path = write_pickle(tmp_path, pickled)
        tracemalloc.start()
        with pytest.raises(ValueError, match=message) as caught:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        tracemalloc.stop()
        assert len(str(caught.value)) < 1000


def test_other_files(tmp_path, torch_names):
    path = tmp_path / "a.pth"
    whole = write(path, one(torch_names)).read_bytes()
    legacy = write(path, one(torch_names), legacy=True).read_bytes()
    listed = pickle.dumps(["0"], protocol=2)
    assert legacy.count(listed) == 1

    def archive(name, **options):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", **options) as archive:
            archive.writestr(name, b"0" * 1000)
        return file.getvalue()

    deflated = archive("archive/data.pkl", compression=zipfile.ZIP_DEFLATED)
    table = [
        (b"", "broken or no checkpoint"),
        (b"a text", "broken or no checkpoint"),
        (pickle.dumps({"a": 1}), "no checkpoint of PyTorch"),
        (archive("readme.txt"), "a zip file, but no checkpoint"),
        (deflated, "compressed"),
        (write(path, one(torch_names), extra=["constants.pkl"]).read_bytes(), "TorchScript"),
        # A storage that is not there, whose tensors would be zero.
        (legacy[: legacy.index(listed)] + pickle.dumps([], protocol=2), "not those that its tens"),
        # A truncated archive is no pickle, though its first letter would be a reference to a storage.
        *((whole[:n].replace(b"\0", b"\n"), "a zip file without an end") for n in (4, 30, 200)),
    ]
    for data, message in table:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            read(path)


def test_random_changes_end_in_an_error_of_ours_or_in_nothing(tmp_path, torch_names):
    """In the older format, where no checksum notices them."""
    content = {"state_dict": one(torch_names), "meta": {"epoch": 1, "set": {1, 2}}}
    path = write(tmp_path / "a.pth", content, legacy=True)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    failures = 0
    for _ in range(500):
        changed = bytearray(whole)
        for at in rng.integers(len(whole), size=rng.integers(1, 6)):
            changed[at] = rng.integers(256)
        path.write_bytes(changed)
        try:
            read(path)
        except ValueError as error:
            failures += 1
            assert len(str(error)) < 500
    assert 250 < failures < 500


@pytest.mark.parametrize("zipped", [True, False])
def test_files_of_torch_itself(tmp_path, zipped):
    torch = pytest.importorskip("torch")
    path, options = tmp_path / "a.pth", {"_use_new_zipfile_serialization": zipped}
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    weight = torch.nn.Parameter(torch.ones(3))
    state = {"a": base, "b": base[1].T, "c": weight, "d": torch.tensor(5), "e": torch.zeros(2, 0)}
    state["f"] = torch.arange(5).to(torch.bfloat16)
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save({"state_dict": state, "optimizer": optimizer.state_dict()}, path, **options)
    loaded = read(path)["state_dict"]
    assert list(loaded) == list(state) and loaded["f"].dtype == jnp.bfloat16
    for name, value in state.items():
        wanted = value.detach().float().numpy()
        np.testing.assert_array_equal(loaded[name].astype(np.float32), wanted)
    torch.save(torch.nn.Conv2d(1, 1, 1), path, **options)
    with pytest.raises(ValueError, match=r"it names torch\.nn\.modules\.conv\.Conv2d"):
        read(path)
