import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_model import MODEL, MODELS
from tiny_parts import ResNet, Swin
from tiny_weights import BACKBONES, TINY, assert_equal, fill, shapes_of

from knet_jax.saved.parameter_names import (
    Places,
    from_reference,
    reference_name,
    to_reference,
)


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(TINY))


@pytest.fixture
def state(variables):
    return to_reference(variables)


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
