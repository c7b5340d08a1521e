"""Files are written here the way torch writes them; where torch is installed, by torch itself."""

import pickle
import zipfile
from collections import OrderedDict

import jax.numpy as jnp
import numpy as np
import pytest
from torch_format import Call, tensor, write

from knet_jax.torch_file import read, read_state_dict

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
    loaded = read_state_dict(write(tmp_path / "a.pth", state, legacy))
    assert list(loaded) == list(ARRAYS)
    for name, wanted in ARRAYS.items():
        assert loaded[name].dtype == wanted.dtype and loaded[name].shape == wanted.shape
        np.testing.assert_array_equal(loaded[name], wanted)


@pytest.mark.parametrize("legacy", [False, True])
def test_views_of_a_shared_storage(tmp_path, torch_names, legacy):
    base = np.arange(12, dtype=np.float32)
    row = tensor(torch_names, base, base=base, size=(3,), stride=(1,), offset=3)
    transposed = tensor(torch_names, base, base=base, size=(4, 3), stride=(1, 4))
    loaded = read_state_dict(write(tmp_path / "a.pth", {"a": row, "b": transposed}, legacy))
    np.testing.assert_array_equal(loaded["a"], [3, 4, 5])
    np.testing.assert_array_equal(loaded["b"], base.reshape(3, 4).T)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_what_tensors_are_wrapped_in(tmp_path, torch_names, wrapper):
    """With what training leaves beside them: settings, logs, the state of an optimizer."""
    parameter = torch_names("torch._utils", "_rebuild_parameter")
    state = OrderedDict()
    state["module.conv.weight"] = tensor(torch_names, ARRAYS["float"])
    state["module.bias"] = Call(
        parameter, tensor(torch_names, ARRAYS["double"], "1"), True, OrderedDict()
    )
    state._metadata = OrderedDict({"": {"version": 1}})
    buffer = torch_names("mmengine.logging.history_buffer", "HistoryBuffer")
    log = buffer()
    log.history = np.arange(3)
    content = {
        wrapper: state,
        "meta": {"epoch": 12, "CLASSES": ("wall", "sky"), "config": "model = dict()"},
        "optimizer": {"param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}]},
        "message_hub": {"loss": log, "best": np.float64(3), "device": {1, 2}},
    }
    path = write(tmp_path / "a.pth", content if wrapper else state)
    loaded = read_state_dict(path)
    assert list(loaded) == ["conv.weight", "bias"]
    np.testing.assert_array_equal(loaded["bias"], ARRAYS["double"])
    if wrapper:
        assert read(path)["meta"] == content["meta"]


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
    with pytest.raises(ValueError, match=rf"names ({shown})\.{name}; accepted are ten") as caught:
        read(path)
    assert not called.exists() and "\n" not in str(caught.value)


def test_functions_cannot_be_changed(tmp_path):
    """BUILD gives an object attributes; that of a function would be anything's."""
    pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb."
    path = tmp_path / "a.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
    with pytest.raises(ValueError, match="changes a function"):
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
    with pytest.raises(ValueError, match="broken or no checkpoint"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "no tensors by name but a list"), ({"epoch": 3}, "no tensors by name but epoch")],
)
def test_no_tensors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_state_dict(write(tmp_path / "a.pth", content))


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
    loaded = read_state_dict(path)
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
