import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import save_file
from tiny_model import MODEL, MODELS

from knet_jax.convert import (
    Places,
    from_reference,
    load_backbone,
    read_tensors,
    reference_name,
    to_reference,
)
from knet_jax.knet import make_model

TINY = MODEL | {"backbone": MODEL["backbone"] | {"depths": (1, 2, 1, 1), "norm": "frozen_batch"}}


def shapes_of(model):
    return jax.eval_shape(make_model(**model).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


@pytest.fixture(scope="module")
def variables():
    """Variables without two equal numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes_of(TINY))


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


def test_names_and_shapes_are_the_references(fixtures):
    manifest = json.loads((fixtures / "det_panoptic_r50_fwd.json").read_text())
    wanted = {name for name, *_ in manifest["params"] if not name.endswith("num_batches_tracked")}
    shapes = shapes_of({"num_proposals": 100, "num_things": 80, "num_stuff": 53, "backbone": {}})
    flat = traverse_util.flatten_dict(shapes, sep="/")
    places = Places.of(shapes)
    assert {reference_name(key.partition("/")[2], places)[0] for key in flat} == wanted


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
    manifest = json.loads((fixtures / f"{name}.json").read_text())
    wanted = {
        name: tuple(shape)
        for name, shape, *_ in manifest["params"]
        if not name.startswith("backbone.") and not name.endswith("num_batches_tracked")
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


def test_weights_of_other_types_become_ours(tmp_path, variables, torchvision):
    half = {name: x.astype(np.float16) for name, x in torchvision.items()}
    loaded = load_backbone(write(tmp_path, ".npz", half), variables)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}


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
    (tmp_path / "model.pth").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"\.npz and \.safetensors"):
        read_tensors(tmp_path / "model.pth")
    for suffix in (".npz", ".safetensors"):
        path = tmp_path / f"broken{suffix}"
        path.write_bytes(b"no weights here")
        with pytest.raises(ValueError, match="cannot be read"):
            read_tensors(path)
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, x=np.array([{}], object))
    with pytest.raises(ValueError, match="cannot be read"):
        read_tensors(pickled)
