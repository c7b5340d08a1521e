"""Files of weights as others write them, and backbones from them."""

import re
from collections import Counter, OrderedDict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file
from tiny_model import MODEL
from tiny_weights import BACKBONES, TINY, assert_equal, fill, shapes_of
from torch_format import Call, tensor

from knet_jax.nn.swin import resize_position_bias
from knet_jax.saved.fitting import load_backbone
from knet_jax.saved.parameter_names import from_reference, to_reference
from knet_jax.saved.weight_files import read_weights


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(TINY))


@pytest.fixture(scope="module")
def swin():
    return fill(shapes_of(MODEL | {"backbone": BACKBONES["swin"]}))


def backbone_of(variables):
    return {kind: {"backbone": tree["backbone"]} for kind, tree in variables.items() if tree}


def plain_names(variables):
    """The backbone's tensors in torchvision's names, with what else such a file holds."""
    state = to_reference(backbone_of(variables))
    tensors = {name.removeprefix("backbone."): x for name, x in state.items()}
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


def write_torch(folder, torch_names, tensors, **beside):
    state = {name: tensor(torch_names, x, str(i)) for i, (name, x) in enumerate(tensors.items())}
    return torch_format.write(folder / "r.pth", {"state_dict": state, **beside})


# Backbones.


def test_a_backbone_from_a_file_of_any_kind(tmp_path, torch_names, variables):
    """As published: of the backbone alone, or within a network whose other parts are left out."""
    tensors = plain_names(variables)
    assert {"conv1.weight", "bn1.running_mean", "layer2.1.conv3.weight"} <= tensors.keys()
    network = {f"backbone.{name}": x for name, x in tensors.items() if "fc." not in name}
    network["decode_head.conv.weight"] = np.zeros((2, 2), np.float32)
    fresh = jax.tree.map(lambda x: jnp.asarray(-x), variables)
    for path in (
        write(tmp_path, ".npz", tensors),
        write(tmp_path, ".safetensors", network),
        write_torch(tmp_path, torch_names, tensors, meta={"epoch": 1}),
    ):
        loaded = load_backbone(path, fresh)
        assert jax.tree.structure(loaded) == jax.tree.structure(fresh)
        for kind in ("params", "batch_stats"):
            for part in loaded[kind]:
                wanted = variables if part == "backbone" else fresh
                assert_equal(loaded[kind][part], wanted[kind][part])
    half = {name: x.astype(np.float16) for name, x in tensors.items()}
    loaded = load_backbone(write(tmp_path, ".npz", half), variables)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}


def test_a_deep_stem_of_timm_starts_one_with_offsets(tmp_path):
    """The offsets, which no classifier has, stay as they are initialized."""
    variables = fill(shapes_of(MODEL | {"backbone": BACKBONES["resnet"]}))
    stem = {"0": "conv1.0", "1": "conv1.1", "3": "conv1.3", "4": "conv1.4", "6": "conv1.6"}
    tensors = {}
    for name, x in plain_names(variables).items():
        if match := re.fullmatch(r"stem\.(\d)\.(\w+)", name):
            name = f"{stem.get(match[1], 'bn1')}.{match[2]}"
        if "conv_offset" not in name:
            tensors[name] = x
    assert {"conv1.6.weight", "bn1.running_var", "conv1.4.bias"} <= tensors.keys()
    path = write(tmp_path, ".safetensors", tensors)
    assert read_weights(path).original["backbone.stem.7.bias"] == "bn1.bias"
    fresh = jax.tree.map(lambda x: -x, variables)
    ours, wanted, kept = (
        flatten_dict(backbone_of(tree), sep="/")
        for tree in (load_backbone(path, fresh), variables, fresh)
    )
    assert len([key for key in ours if "conv_offset" in key]) == 8
    for key, array in ours.items():
        np.testing.assert_array_equal(array, (kept if "conv_offset" in key else wanted)[key])


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
    tensors["head.weight"] = np.zeros((1000, 64), np.float32)
    return tensors


def test_a_swin_of_anyone(tmp_path, swin):
    """Of the authors, of later versions of timm, which merge at the beginning of a stage, and of
    networks around the authors': all but the norms of the levels. Of OpenMMLab, all."""
    authors = authors_file(swin)

    def later(name):
        name = re.sub(r"layers\.(\d)\.down", lambda match: f"layers.{int(match[1]) + 1}.down", name)
        return name.replace("head.", "head.fc.")

    timm = {later(name): x for name, x in authors.items()}
    around = {
        f"backbone.{name}": x
        for name, x in authors.items()
        if not name.startswith(("head.", "norm."))
    }
    new = ("norm0", "norm1", "norm2", "norm3")
    fresh = jax.tree.map(lambda x: -x, swin)
    state = to_reference(backbone_of(swin))
    for tensors in (authors, timm, around, state):
        loaded = load_backbone(write(tmp_path, ".safetensors", tensors), fresh)["params"]
        for name, tree in loaded["backbone"].items():
            kept = fresh if name in new and tensors is not state else swin
            assert_equal(tree, kept["params"]["backbone"][name])
        for part in loaded.keys() - {"backbone"}:
            assert_equal(loaded[part], fresh["params"][part])
    authors["layers.1.downsample.norm.weight"] = np.zeros(7, np.float32)
    with pytest.raises(ValueError, match=r"layers\.1\.downsample\.norm\.weight has shape \[7\]"):
        load_backbone(write(tmp_path, ".npz", authors), swin)


def test_position_biases_of_another_window_are_interpolated(tmp_path, swin):
    fresh = fill(shapes_of(MODEL | {"backbone": BACKBONES["swin"] | {"window": 5}}))
    loaded = load_backbone(write(tmp_path, ".npz", authors_file(swin)), fresh)
    ours, theirs = (x["params"]["backbone"]["stage1_block0"] for x in (loaded, swin))
    table = ours["attention"]["position_bias"]
    assert table.shape == (81, 2)
    wanted = resize_position_bias(theirs["attention"]["position_bias"], 5)
    np.testing.assert_array_equal(table, wanted)
    np.testing.assert_array_equal(ours["ffn_hidden"]["kernel"], theirs["ffn_hidden"]["kernel"])
    state = to_reference(swin)
    name = "backbone.stages.0.blocks.0.attn.w_msa.relative_position_bias_table"
    for shape in (25, 2), (24, 1):  # of other heads, and of no window
        with pytest.raises(ValueError, match=r"relative_position_bias_table has shape"):
            from_reference(state | {name: np.zeros(shape, np.float32)}, swin)


def test_a_file_of_another_backbone_is_named(tmp_path, variables):
    tensors = plain_names(variables)
    name = "layer3.0.conv2.weight"
    for change, words in (
        ({key: x for key, x in tensors.items() if key != name}, rf"no tensor {re.escape(name)}"),
        (tensors | {"layer1.1.conv1.weight": np.zeros(8)}, r"no place.*: layer1\.1\.conv1"),
    ):
        path = write(tmp_path, ".npz", change)
        start = f"config.init_weights: {path}: "
        with pytest.raises(ValueError, match=rf"^{re.escape(start)}.*{words}") as error:
            load_backbone(path, variables)
        assert "\n" not in str(error.value)


# What tensors are wrapped in.

A, B = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([1.5, -2.0])


@pytest.mark.parametrize("wrapper", [None, "state_dict", "weights"])
def test_what_tensors_are_wrapped_in(tmp_path, torch_names, wrapper):
    """With what training leaves beside them: settings, logs, the states of other objects."""
    parameter = torch_names("torch._utils", "_rebuild_parameter")
    state = OrderedDict()
    state["module.neck.conv.weight"] = tensor(torch_names, A)
    state["_orig_mod.module.neck.bias"] = Call(
        parameter, tensor(torch_names, B, "1"), True, OrderedDict()
    )
    state["neck.bn.num_batches_tracked"] = tensor(torch_names, np.array(3), "2")
    state["data_preprocessor.mean"] = state["criterion.weight"] = tensor(torch_names, B, "3")
    state._metadata = OrderedDict({"": {"version": 1}})
    buffer = torch_names("mmengine.logging.history_buffer", "HistoryBuffer")
    log = buffer()
    log.history = np.arange(3)
    content = {
        wrapper: state,
        "meta": {"epoch": 12, "CLASSES": ("wall", " sky"), "config": "model = dict()"},
        "optimizer": {"param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999)}], "state": {0: {}}},
        "param_schedulers": [{"milestones": Counter([8, 11])}],
        "message_hub": {"loss": log, "best": np.float64(3), "device": {1, 2}},
        "args": tmp_path,
    }
    path = torch_format.write(tmp_path / "a.pth", content if wrapper else state)
    weights = read_weights(path)
    assert list(weights.tensors) == ["neck.conv.weight", "neck.bias"]
    np.testing.assert_array_equal(weights.tensors["neck.bias"], B)
    assert weights.surplus == tuple(state)[2:]
    assert weights.entry == (wrapper or "") and weights.entries == (wrapper or "",)
    assert weights.classes == (("wall", "sky") if wrapper else ())


def test_the_second_set_of_weights_of_a_checkpoint(tmp_path, torch_names):
    """As MMEngine keeps it, and timm; and as MMCV does, in buffers: no mean of running statistics."""
    state = {
        "neck.conv_0.weight": tensor(torch_names, A, "0"),
        "neck.bn.running_mean": tensor(torch_names, B, "1"),
        "ema_neck_conv_0_weight": tensor(torch_names, 2 * A, "2"),
    }
    content = {
        "state_dict": state,
        "ema_state_dict": {
            "steps": tensor(torch_names, np.array(9), "3"),
            "module.neck.w": tensor(torch_names, 3 * A, "4"),
        },
        "meta": {"dataset_meta": {"classes": ["a", "b"], "palette": [[1, 2, 3]]}},
    }
    path = torch_format.write(tmp_path / "a.pth", content)
    weights = read_weights(path)
    assert weights.entry == "state_dict" and weights.classes == ("a", "b")
    assert weights.entries == ("state_dict", "ema_buffers", "ema_state_dict")
    assert list(weights.tensors) == ["neck.conv_0.weight", "neck.bn.running_mean"]
    np.testing.assert_array_equal(weights.tensors["neck.conv_0.weight"], A)
    average = read_weights(path, "ema_buffers").tensors
    np.testing.assert_array_equal(average["neck.conv_0.weight"], 2 * A)
    np.testing.assert_array_equal(average["neck.bn.running_mean"], B)
    second = read_weights(path, "ema_state_dict")
    assert list(second.tensors) == ["neck.w"] and second.surplus == ("steps",)
    np.testing.assert_array_equal(second.tensors["neck.w"], 3 * A)
    with pytest.raises(ValueError, match="no entry 'ema' of tensors; accepted: ema_buffers, ema_"):
        read_weights(path, "ema")


def test_the_entry_that_holds_the_network(tmp_path, torch_names):
    """Not what stands beside it: scores, states of random numbers and of an optimizer."""
    keys = map(str, range(100))
    network, average, moments = (
        {f"module.{name}{i}": tensor(torch_names, A, next(keys)) for i in range(count)}
        for name, count in (("neck.w", 8), ("neck.w", 8), ("exp_avg.neck.w", 24))
    )
    score, state = tensor(torch_names, np.array(76.1), "s"), tensor(torch_names, B, "r")
    counted = network | {"n_averaged": score, "num_updates": score}
    for content, entry in (
        ({"state_dict": network, "best_acc1": score}, "state_dict"),
        ({"model": network, "rng_state": state, "cuda_rng_state": state}, "model"),
        ({"state_dict": {"neck.w": state}, "model": counted, "optimizer": moments}, "model"),
        ({"net": network, "mean": state, "iteration": score}, "net"),
        ({"model_ema": average, "model": network, "step": score}, "model"),
        ({**network, "ema": average}, ""),
        (counted, ""),
    ):
        weights = read_weights(torch_format.write(tmp_path / "a.pth", content))
        assert weights.entry == entry
        assert list(weights.tensors) == [f"neck.w{i}" for i in range(8)]


def test_classes_that_are_no_list_of_names(tmp_path):
    path = tmp_path / "a.safetensors"
    for classes in ("80", '{"cat": 1}', "cat, dog", "[1, 2]"):
        save_file({"neck.w": A}, path, {"classes": classes})
        assert read_weights(path).classes == ()


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.pth"
    for content, words in (([1, 2], "a list"), ({"epoch": 3}, "epoch")):
        with pytest.raises(ValueError, match=f"no tensors by name but {words}"):
            read_weights(torch_format.write(path, content))
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
