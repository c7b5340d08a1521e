import json
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_format
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_model import MODEL, MODELS
from torch_format import tensor

from knet_jax.backbones.resnet import ResNet
from knet_jax.backbones.swin import Swin, resize_position_bias
from knet_jax.convert import (
    Places,
    from_reference,
    load_backbone,
    read_tensors,
    reference_name,
    to_reference,
)
from knet_jax.knet import make_model

BACKBONES = {
    "deep stem": {"depths": (1, 2, 1, 1), "width": 8, "deep_stem": True},
    "deformable": {"depths": (1, 1, 2, 1), "width": 8, "num_deformable": 3},
    "swin": {
        "name": "swin",
        "channels": 8,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window": 3,
    },
}
TINY = MODEL | {"backbone": MODEL["backbone"] | {"depths": (1, 2, 1, 1), "norm": "frozen_batch"}}


def shapes_of(model):
    return jax.eval_shape(make_model(**model).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def fill(shapes):
    """Variables without two equal numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(TINY))


@pytest.fixture
def state(variables):
    return to_reference(variables)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_there_and_back_is_equal_in_every_bit(variables, state):
    counters = {f"backbone.bn{i}.num_batches_tracked": np.int64(7) for i in (1, 2)}
    assert_equal(from_reference(state | counters, variables), variables)
    assert_equal(from_reference(state, shapes_of(TINY)), variables)
    back = to_reference(from_reference(state, variables))
    assert back.keys() == state.keys()
    for name in state:
        np.testing.assert_array_equal(back[name], state[name])


def test_nothing_is_lost_or_used_twice(variables, state):
    assert sum(x.size for x in jax.tree.leaves(variables)) == sum(x.size for x in state.values())
    both = [
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]) for tree in (variables, state)
    ]
    np.testing.assert_array_equal(*map(np.sort, both))


def test_every_parameter_has_a_name_of_its_own(variables):
    flat = traverse_util.flatten_dict(variables, sep="/")
    places = Places.of(variables)
    names = [reference_name(key.partition("/")[2], places) for key in flat]
    assert len(set(names)) == len(names)
    packed = {}
    for name, part in names:
        if part is not None:
            packed.setdefault(name, []).append(part)
    assert len(packed) == 2 * TINY["num_stages"]
    assert all(sorted(parts) == [0, 1, 2] for parts in packed.values())
    assert not {name for name, part in names if part is None} & packed.keys()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_comes_back_equal_in_every_bit(backbone):
    variables = fill(shapes_of(MODEL | {"backbone": BACKBONES[backbone]}))
    state = to_reference(variables)
    assert sum(x.size for x in jax.tree.leaves(variables)) == sum(x.size for x in state.values())
    derived = {"backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": np.zeros((9, 9))}
    assert_equal(from_reference(state | derived, variables), variables)


def manifest(fixtures, name):
    """{name: shape} of the weights of a network of the reference."""
    params = json.loads((fixtures / f"{name}.json").read_text())["params"]
    return {
        name: tuple(shape)
        for name, shape, derived in params
        if not derived and not name.endswith("num_batches_tracked")
    }


@pytest.mark.parametrize(
    "name, backbone",
    [
        ("det_panoptic_r50_fwd", {}),
        ("det_panoptic_r101dcn_fwd", {"depths": (3, 4, 23, 3), "num_deformable": 3}),
        ("det_panoptic_swint_fwd", {"name": "swin"}),
    ],
)
def test_names_and_shapes_are_the_references(fixtures, name, backbone):
    shapes = shapes_of(
        {"num_proposals": 100, "num_things": 80, "num_stuff": 53, "backbone": backbone}
    )
    ours = to_reference(jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes))
    assert {name: x.shape for name, x in ours.items()} == manifest(fixtures, name)


@pytest.mark.parametrize(
    "name, module",
    [
        ("seg_fcn_fwd", ResNet(deep_stem=True, output_stride=8)),
        ("seg_uper_fwd", ResNet(deep_stem=True)),
        ("seg_swint_fwd", Swin()),
    ],
)
def test_backbones_of_semantic_networks_have_the_references_names(fixtures, name, module):
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(partial(module.init, train=False), jax.random.key(0), image)
    zeros = {
        kind: {"backbone": jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), tree)}
        for kind, tree in shapes.items()
    }
    ours = {name: x.shape for name, x in to_reference(zeros).items()}
    wanted = manifest(fixtures, name).items()
    assert ours == {name: shape for name, shape in wanted if name.startswith("backbone.")}


# Networks of semantic segmentation, and those of its plain decoders.

SEMANTIC = {
    f"{neck} S={num_stages}": MODELS["semantic"]
    | {"num_stages": num_stages, "neck": {"name": neck, "norm": "batch"}}
    for neck in ("fcn", "psp", "aspp", "uper")
    for num_stages in (0, 2)
}


@pytest.mark.parametrize("model", [*SEMANTIC.values(), MODELS["instance"]], ids=[*SEMANTIC, "i"])
def test_networks_of_other_tasks_go_there_and_back(model):
    rng = np.random.default_rng(0)
    shapes = shapes_of(model)
    variables = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    state = to_reference(variables)
    assert sum(x.size for x in state.values()) == sum(x.size for x in jax.tree.leaves(variables))
    assert_equal(from_reference(state, shapes), variables)


FIXTURES = {
    "seg_fcn_fwd": {"neck": {"name": "fcn"}},
    "seg_psp_fwd": {"neck": {"name": "psp"}},
    "seg_dl3_fwd": {"neck": {"name": "aspp"}},
    "seg_uper_fwd": {"neck": {"name": "uper"}, "channels": 256},
    "seg_uper512_fwd": {"neck": {"name": "uper"}},
}


@pytest.mark.parametrize("name", FIXTURES)
def test_names_and_shapes_of_decoders_are_the_references(fixtures, name):
    wanted = {
        name: shape
        for name, shape in manifest(fixtures, name).items()
        if not name.startswith("backbone.")
    }
    counts = {"num_proposals": 0, "num_things": 0, "num_stuff": 150}
    model = counts | {"channels": 512, "auxiliary_channels": 256, "backbone": {}} | FIXTURES[name]
    zeros = to_reference(zeros_of(model))
    ours = {k: v.shape for k, v in zeros.items() if not k.startswith("backbone.")}
    assert ours == wanted


def test_a_plain_decoder_is_a_network_of_its_own_in_the_reference():
    """Without updates there is no K-Net around it."""
    with_updates, plain = (to_reference(zeros_of(SEMANTIC[f"psp S={s}"])) for s in (2, 0))
    prefix = "decode_head.kernel_generate_head."
    heads = {name.removeprefix(prefix) for name in with_updates if name.startswith(prefix)}
    assert heads == {
        name.removeprefix("decode_head.") for name in plain if name.startswith("decode_head.")
    }
    assert {"conv_seg.weight", "conv_seg.bias", "bottleneck.bn.running_var"} <= heads


def zeros_of(model):
    return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes_of(model))


def test_layouts(variables, state):
    """Known places of a few tensors: outputs first."""
    params = variables["params"]
    conv = params["backbone"]["layer2_block0"]["conv2"]["kernel"]
    theirs = state["backbone.layer2.0.conv2.weight"]
    assert theirs[3, 5, 0, 2] == conv[0, 2, 5, 3]
    attention = params["stage2"]["interaction"]["attention"]
    c, _, width = attention["key"]["kernel"].shape
    packed = state["roi_head.mask_head.1.attention.attn.in_proj_weight"]
    assert packed.shape == (3 * c, c)
    assert packed[c + 1 * width + 3, 7] == attention["key"]["kernel"][7, 1, 3]
    assert (
        state["roi_head.mask_head.1.attention.attn.in_proj_bias"][3]
        == attention["query"]["bias"][0, 3]
    )
    out = state["roi_head.mask_head.1.attention.attn.out_proj.weight"]
    assert out[5, 1 * width + 2] == attention["out"]["kernel"][1, 2, 5]
    linear = state["roi_head.mask_head.0.ffn.layers.0.0.weight"]
    assert linear[9, 4] == params["stage1"]["interaction"]["ffn_hidden"]["kernel"][4, 9]
    transform = state["roi_head.mask_head.0.feat_transform.conv.weight"]
    assert transform[2, 6, 0, 0] == params["stage1"]["transform_kernel"][6, 2]
    kernels = state["rpn_head.init_kernels.weight"]
    assert kernels[2, 6, 0, 0] == params["initial"]["proposals"][2, 6]


@pytest.mark.parametrize(
    "name", ["backbone.bn1.running_var", "roi_head.mask_head.0.attention.attn.in_proj_bias"]
)
def test_a_missing_tensor_is_named(variables, state, name):
    del state[name]
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        from_reference(state, variables)


def test_an_extra_tensor_is_named(variables, state):
    extra = {f"roi_head.mask_head.2.fc_cls.{leaf}": np.zeros(5) for leaf in ("weight", "bias")}
    with pytest.raises(ValueError, match="no place for 2 tensors.*mask_head.2.fc_cls.bias"):
        from_reference(state | extra, variables)


@pytest.mark.parametrize(
    "name, shape, needed",
    [
        ("rpn_head.conv_seg.weight", (6, 16, 1, 1), [5, 16, 1, 1]),
        ("backbone.conv1.weight", (7, 7, 3, 8), [8, 3, 7, 7]),
        ("roi_head.mask_head.1.attention.attn.in_proj_weight", (16, 16), [48, 16]),
        ("backbone.bn1.bias", (8, 1), [8]),
    ],
)
def test_a_tensor_of_another_shape_is_named(variables, state, name, shape, needed):
    state[name] = np.zeros(shape, np.float32)
    with pytest.raises(ValueError) as error:
        from_reference(state, variables)
    message = str(error.value)
    assert name in message and str(list(shape)) in message and str(needed) in message


def test_a_parameter_that_the_reference_lacks_is_named():
    with pytest.raises(ValueError, match="no name for the parameter neck/new/kernel"):
        reference_name("neck/new/kernel", Places("rpn_head", "", "roi_head.mask_head", "gn"))


# Backbones from files.


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
        read_tensors(tmp_path / "none.npz")
    (tmp_path / "model.h5").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"\.npz, \.safetensors, \.pth"):
        read_tensors(tmp_path / "model.h5")
    for suffix in (".npz", ".safetensors", ".pth"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no weights here")
        with pytest.raises(ValueError, match="cannot be read") as caught:
            read_tensors(path)
        assert suffix != ".npz" or "pickle" not in str(caught.value)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(pickled)
