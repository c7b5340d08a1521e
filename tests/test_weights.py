import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_model import MODEL
from tiny_weights import BACKBONES, TINY, assert_equal, fill, shapes_of
from torch_format import tensor

from knet_jax.backbones.swin import resize_position_bias
from knet_jax.reference import from_reference, to_reference
from knet_jax.weights import load_backbone, read_weights


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
