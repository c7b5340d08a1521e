import re
from collections import Counter, OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_model import MODEL
from tiny_weights import BACKBONES, TINY, assert_equal, fill, shapes_of
from torch_format import Call, tensor

from knet_jax.nn.swin import resize_position_bias
from knet_jax.saved.parameter_names import from_reference, to_reference
from knet_jax.saved.weight_files import load_backbone, read_weights


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(TINY))


@pytest.fixture
def state(variables):
    return to_reference(variables)


@pytest.fixture
def torchvision(state):
    """A backbone's tensors in torchvision's names, with what else such a file holds."""
    tensors = {
        k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")
    }
    assert {"conv1.weight", "bn1.running_mean", "layer2.1.conv3.weight"} <= tensors.keys()
    return tensors | {
        "fc.weight": np.zeros((1000, 256), np.float32),
        "fc.bias": np.zeros(1000, np.float32),
        "bn1.num_batches_tracked": np.int64(3).reshape(()),
    }


def write(folder, suffix, tensors):
    path = folder / f"resnet{suffix}"
    if suffix == ".npz":
        np.savez(path, **tensors)
    else:
        save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, path)
    return path


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_backbone_from_a_file(tmp_path, variables, torchvision, suffix):
    path = write(tmp_path, suffix, torchvision)
    fresh = jax.tree.map(lambda x: jnp.asarray(-x), variables)
    loaded = load_backbone(path, fresh)
    assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
    for kind in ("params", "batch_stats"):
        for part in loaded[kind]:
            wanted = variables if part == "backbone" else fresh
            assert_equal(loaded[kind][part], wanted[kind][part])


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_from_a_checkpoint_of_pytorch(
    tmp_path, torch_names, variables, torchvision, prefix
):
    """As published: of the backbone alone, or within a network whose other parts are left out."""
    tensors = {f"{prefix}{name}": x for name, x in torchvision.items()}
    if prefix:
        tensors = {"decode_head.conv.weight": np.zeros((2, 2), np.float32)} | tensors
        tensors = {name: x for name, x in tensors.items() if ".fc." not in name}
    state = {name: tensor(torch_names, x, str(i)) for i, (name, x) in enumerate(tensors.items())}
    path = torch_format.write(tmp_path / "r.pth", {"state_dict": state, "meta": {"epoch": 1}})
    fresh = jax.tree.map(lambda x: jnp.asarray(-x), variables)
    loaded = load_backbone(path, fresh)
    assert_equal(loaded["params"]["backbone"], variables["params"]["backbone"])


def test_weights_of_other_types_become_ours(tmp_path, variables, torchvision):
    half = {name: x.astype(np.float16) for name, x in torchvision.items()}
    loaded = load_backbone(write(tmp_path, ".npz", half), variables)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_a_resnet_of_imagenet_starts_one_with_offsets(tmp_path, variables, torchvision):
    """The offsets stay as they are initialized."""
    backbone = TINY["backbone"] | {"num_deformable": 2}
    fresh = fill(shapes_of(TINY | {"backbone": backbone}))
    loaded = load_backbone(write(tmp_path, ".npz", torchvision), fresh)
    ours = traverse_util.flatten_dict(loaded["params"]["backbone"], sep="/")
    kept = traverse_util.flatten_dict(fresh["params"]["backbone"], sep="/")
    wanted = traverse_util.flatten_dict(variables["params"]["backbone"], sep="/")
    assert {path for path in ours if "conv_offset" in path} == ours.keys() - wanted.keys()
    for path, array in ours.items():
        np.testing.assert_array_equal(array, wanted.get(path, kept[path]))


@pytest.fixture
def swin():
    """Variables of a network with Swin."""
    return fill(shapes_of(MODEL | {"backbone": BACKBONES["swin"]}))


def authors_file(variables):
    """The classifier of the authors of Swin with the weights of our backbone, written by hand."""
    params = variables["params"]["backbone"]
    tensors = {}

    def put(name, tree):
        for leaf, array in tree.items():
            if leaf == "kernel":
                array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            tensors[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"] = array

    put("patch_embed.proj", params["patches"])
    put("patch_embed.norm", params["patches_norm"])
    for name, tree in params.items():
        if match := re.fullmatch(r"stage(\d)_block(\d)", name):
            block = f"layers.{match[1]}.blocks.{match[2]}"
            attention = tree["attention"]
            put(f"{block}.attn.qkv", attention["qkv"])
            put(f"{block}.attn.proj", attention["output"])
            table = attention["position_bias"]
            tensors[f"{block}.attn.relative_position_bias_table"] = table
            tensors[f"{block}.attn.relative_position_index"] = np.zeros((9, 9), np.int64)
            put(f"{block}.mlp.fc1", tree["ffn_hidden"])
            put(f"{block}.mlp.fc2", tree["ffn_output"])
            for norm in ("norm1", "norm2"):
                put(f"{block}.{norm}", tree[norm])
    for i in range(3):
        merge, c = params[f"stage{i}_merge"], 8 * 2**i
        # Their input: the pixels (0, 0), (1, 0), (0, 1), (1, 1) of rows and columns, one by one.
        order = [4 * ch + 2 * y + x for y, x in ((0, 0), (1, 0), (0, 1), (1, 1)) for ch in range(c)]
        name = f"layers.{i}.downsample"
        tensors[f"{name}.reduction.weight"] = merge["reduction"]["kernel"].T[:, order]
        for leaf, theirs in ("scale", "weight"), ("bias", "bias"):
            tensors[f"{name}.norm.{theirs}"] = merge["norm"][leaf][order]
    tensors["layers.0.blocks.1.attn_mask"] = np.zeros((4, 9, 9), np.float32)
    tensors["norm.weight"] = tensors["norm.bias"] = np.zeros(64, np.float32)
    return tensors | {
        "head.weight": np.zeros((1000, 64), np.float32),
        "head.bias": np.zeros(1000, np.float32),
    }


def test_a_swin_of_its_authors(tmp_path, swin):
    """All but the norms of the levels, which a classifier does not have."""
    fresh = jax.tree.map(lambda x: -x, swin)
    loaded = load_backbone(write(tmp_path, ".npz", authors_file(swin)), fresh)
    for name, tree in loaded["params"]["backbone"].items():
        kept = fresh if name in ("norm0", "norm1", "norm2", "norm3") else swin
        assert_equal(tree, kept["params"]["backbone"][name])
    for part in loaded["params"].keys() - {"backbone"}:
        assert_equal(loaded["params"][part], fresh["params"][part])


def test_a_swin_of_openmmlab(tmp_path, swin):
    state = to_reference({"params": {"backbone": swin["params"]["backbone"]}})
    tensors = {name.removeprefix("backbone."): x for name, x in state.items()}
    fresh = jax.tree.map(lambda x: -x, swin)
    loaded = load_backbone(write(tmp_path, ".safetensors", tensors), fresh)
    assert_equal(loaded["params"]["backbone"], swin["params"]["backbone"])


def test_position_biases_of_another_window_are_interpolated(tmp_path, swin):
    backbone = BACKBONES["swin"] | {"window": 5}
    fresh = fill(shapes_of(MODEL | {"backbone": backbone}))
    loaded = load_backbone(write(tmp_path, ".npz", authors_file(swin)), fresh)
    ours, theirs = (x["params"]["backbone"]["stage1_block0"] for x in (loaded, swin))
    table = ours["attention"]["position_bias"]
    assert table.shape == (81, 2)
    wanted = resize_position_bias(theirs["attention"]["position_bias"], 5)
    np.testing.assert_array_equal(table, wanted)
    np.testing.assert_array_equal(ours["ffn_hidden"]["kernel"], theirs["ffn_hidden"]["kernel"])


def test_position_biases_of_other_heads_are_named(swin):
    state = to_reference(swin)
    name = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
    for shape in (25, 2), (24, 1):
        with pytest.raises(ValueError, match=r"relative_position_bias_table|24 position biases"):
            from_reference(state | {name: np.zeros(shape, np.float32)}, swin)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_a_file_that_lacks_a_tensor_is_named_with_it(tmp_path, variables, torchvision, suffix):
    del torchvision["layer3.0.conv2.weight"]
    path = write(tmp_path, suffix, torchvision)
    with pytest.raises(
        ValueError, match=r"config\.init_weights: .*layer3\.0\.conv2\.weight"
    ) as error:
        load_backbone(path, variables)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_file_of_another_backbone_is_named(tmp_path, variables, torchvision):
    deeper = torchvision | {"layer1.1.conv1.weight": np.zeros((8, 32, 1, 1), np.float32)}
    with pytest.raises(ValueError, match=r"config\.init_weights: .*no place.*layer1\.1\.conv1"):
        load_backbone(write(tmp_path, ".npz", deeper), variables)


# What tensors are wrapped in.

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1.5, -2.0])


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model", "model_ema", "weights"])
def test_what_tensors_are_wrapped_in(tmp_path, torch_names, wrapper):
    """With what training leaves beside them: settings, logs, the states of other objects."""
    parameter = torch_names("torch._utils", "_rebuild_parameter")
    state = OrderedDict()
    state["module.neck.conv.weight"] = tensor(torch_names, A)
    state["_orig_mod.module.neck.bias"] = Call(
        parameter, tensor(torch_names, B, "1"), True, OrderedDict()
    )
    state["neck.bn.num_batches_tracked"] = tensor(torch_names, np.array(3), "2")
    state._metadata = OrderedDict({"": {"version": 1}})
    buffer = torch_names("mmengine.logging.history_buffer", "HistoryBuffer")
    log = buffer()
    log.history = np.arange(3)
    meta = {"epoch": 12, "CLASSES": ("wall", " sky"), "config": "model = dict()"}
    content = {
        wrapper: state,
        "meta": meta,
        "optimizer": {"param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}], "state": {0: {}}},
        "param_schedulers": [{"milestones": Counter([8, 11])}],
        "message_hub": {"loss": log, "best": np.float64(3), "device": {1, 2}},
        "args": tmp_path,
    }
    path = torch_format.write(tmp_path / "a.pth", content if wrapper else state)
    weights = read_weights(path)
    assert list(weights.tensors) == ["neck.conv.weight", "neck.bias"]
    np.testing.assert_array_equal(weights.tensors["neck.bias"], B)
    assert weights.surplus == ("neck.bn.num_batches_tracked",)
    assert weights.entry == (wrapper or "") and weights.entries == (wrapper or "",)
    assert weights.classes == (("wall", "sky") if wrapper else ())


def test_the_second_set_of_weights_of_a_checkpoint(tmp_path, torch_names):
    """As MMEngine keeps it, and timm."""
    content = {
        "state_dict": {"neck.w": tensor(torch_names, A, "0")},
        "ema_state_dict": {
            "steps": tensor(torch_names, np.array(9), "1"),
            "module.neck.w": tensor(torch_names, 2 * A, "2"),
        },
        "meta": {"dataset_meta": {"classes": ["a", "b"], "palette": [[1, 2, 3]]}},
    }
    path = torch_format.write(tmp_path / "a.pth", content)
    weights = read_weights(path)
    assert (weights.entry, weights.entries) == ("state_dict", ("state_dict", "ema_state_dict"))
    np.testing.assert_array_equal(weights.tensors["neck.w"], A)
    assert weights.classes == ("a", "b")
    second = read_weights(path, "ema_state_dict")
    assert list(second.tensors) == ["neck.w"] and second.surplus == ("steps",)
    np.testing.assert_array_equal(second.tensors["neck.w"], 2 * A)
    with pytest.raises(
        ValueError, match="no entry 'ema' of tensors; accepted: ema_state_dict, state_dict"
    ):
        read_weights(path, "ema")


def test_the_second_set_of_weights_as_buffers(tmp_path, torch_names):
    """As MMCV keeps it: no mean of running statistics."""
    state = {
        "neck.conv_0.weight": tensor(torch_names, A, "0"),
        "neck.bn.running_mean": tensor(torch_names, B, "1"),
        "ema_neck_conv_0_weight": tensor(torch_names, 2 * A, "2"),
    }
    path = torch_format.write(tmp_path / "a.pth", {"state_dict": state})
    weights = read_weights(path)
    assert (weights.entry, weights.entries) == ("state_dict", ("state_dict", "ema_buffers"))
    assert list(weights.tensors) == ["neck.conv_0.weight", "neck.bn.running_mean"]
    np.testing.assert_array_equal(weights.tensors["neck.conv_0.weight"], A)
    average = read_weights(path, "ema_buffers").tensors
    np.testing.assert_array_equal(average["neck.conv_0.weight"], 2 * A)
    np.testing.assert_array_equal(average["neck.bn.running_mean"], B)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_names_of_a_network_within_others(tmp_path, state, suffix):
    wrapped = {f"module.model.{name}": x for name, x in state.items()}
    assert read_weights(write(tmp_path, suffix, wrapped)).tensors.keys() == state.keys()


@pytest.mark.parametrize("classes", ["80", '{"cat": 1}', "cat, dog", "[1, 2]"])
def test_classes_that_are_no_list_of_names(tmp_path, classes):
    save_file({"neck.w": A}, tmp_path / "a.safetensors", {"classes": classes})
    assert read_weights(tmp_path / "a.safetensors").classes == ()


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "no tensors by name but a list"), ({"epoch": 3}, "no tensors by name but epoch")],
)
def test_no_tensors(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_weights(torch_format.write(tmp_path / "a.pth", content))


def test_what_is_no_weight_is_told_apart(tmp_path, state):
    surplus = {
        "backbone.bn1.num_batches_tracked": np.array(3),
        "data_preprocessor.mean": np.zeros(3, np.float32),
        "criterion.empty_weight": np.zeros(3, np.float32),
    }
    weights = read_weights(write(tmp_path, ".npz", state | surplus))
    assert set(weights.surplus) == surplus.keys() and weights.tensors.keys() == state.keys()
    assert weights.original == {name: name for name in state}


# Names of others.


def test_a_deep_stem_of_timm(tmp_path):
    variables = fill(shapes_of(MODEL | {"backbone": BACKBONES["deep stem"]}))
    ours = to_reference({kind: {"backbone": x["backbone"]} for kind, x in variables.items()})
    stem = {"0": "conv1.0", "1": "conv1.1", "3": "conv1.3", "4": "conv1.4", "6": "conv1.6"}
    tensors = {}
    for name, x in ours.items():
        name = name.removeprefix("backbone.")
        if match := re.fullmatch(r"stem\.(\d)\.(\w+)", name):
            name = f"{stem.get(match[1], 'bn1')}.{match[2]}"
        tensors[name] = x
    assert {"conv1.6.weight", "bn1.running_var", "conv1.4.bias"} <= tensors.keys()
    tensors["fc.weight"] = np.zeros((10, 256), np.float32)
    weights = read_weights(write(tmp_path, ".safetensors", tensors))
    assert weights.original["backbone.stem.7.bias"] == "bn1.bias"
    assert_equal(
        from_reference(
            weights.tensors, {k: {"backbone": x["backbone"]} for k, x in variables.items()}
        ),
        {k: {"backbone": x["backbone"]} for k, x in variables.items()},
    )


@pytest.mark.parametrize("prefix", ["", "backbone."])
@pytest.mark.parametrize("later", [False, True])
def test_a_swin_of_timm(tmp_path, swin, later, prefix):
    """Later versions merge at the beginning of a stage. Or a network around the authors' Swin."""
    tensors = {}
    for name, x in authors_file(swin).items():
        if later:
            name = re.sub(
                r"layers\.(\d)\.downsample",
                lambda match: f"layers.{int(match[1]) + 1}.downsample",
                name,
            ).replace("head.", "head.fc.")
        if not prefix or not name.startswith(("head.", "norm.")):
            tensors[prefix + name] = x
    fresh = jax.tree.map(lambda x: -x, swin)
    loaded = load_backbone(write(tmp_path, ".safetensors", tensors), fresh)
    for name, tree in loaded["params"]["backbone"].items():
        kept = fresh if name in ("norm0", "norm1", "norm2", "norm3") else swin
        assert_equal(tree, kept["params"]["backbone"][name])


def test_a_merging_of_the_wrong_shape_is_named(tmp_path, swin):
    tensors = authors_file(swin)
    tensors["layers.1.downsample.norm.weight"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.downsample\.norm\.weight has shape \[7\]"):
        load_backbone(write(tmp_path, ".npz", tensors), swin)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        read_weights(tmp_path / "none.npz")
    (tmp_path / "model.h5").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"\.npz, \.safetensors, \.pth"):
        read_weights(tmp_path / "model.h5")
    for suffix in (".npz", ".safetensors", ".pth"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no weights here")
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read_weights(path)
        assert suffix != ".npz" or "pickle" not in str(caught.value)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(pickled)
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, x=np.zeros(10_000_000, np.uint8))
    with pytest.raises(ValueError, match="compressed further than weights can be"):
        read_weights(bomb)
