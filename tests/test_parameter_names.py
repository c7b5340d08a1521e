import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny_model import MODEL, MODELS
from tiny_weights import BACKBONES, TINY, assert_equal, fill, shapes_of, zeros

from knet_jax.saved.parameter_names import Places, from_reference, reference_name, to_reference

SEMANTIC = {
    f"{neck}{stages}": MODELS["semantic"]
    | {"num_stages": stages, "neck": {"name": neck, "norm": "batch"}}
    for neck, stages in (("fcn", 1), ("psp", 1), ("aspp", 1), ("uper", 1), ("psp", 0))
}
NETWORKS = {
    "panoptic": TINY,
    **{name: MODEL | {"backbone": backbone} for name, backbone in BACKBONES.items()},
    **SEMANTIC,
}


@pytest.fixture(scope="module")
def variables():
    return fill(shapes_of(TINY))


@pytest.fixture
def state(variables):
    return to_reference(variables)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_goes_there_and_back_equal_in_every_bit(name):
    """No number is lost or used twice, and what follows from the architecture is ignored."""
    shapes = shapes_of(NETWORKS[name])
    variables = fill(shapes)
    state = to_reference(variables)
    both = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(x)]) for x in (variables, state)]
    np.testing.assert_array_equal(*map(np.sort, both))
    derived = {
        "backbone.bn1.num_batches_tracked": np.int64(7),
        "backbone.stages.0.blocks.0.attn.w_msa.relative_position_index": np.zeros((9, 9)),
    }
    assert_equal(from_reference(state | derived, shapes), variables)
    # Every array has a tensor of its own, or a third of one.
    places = Places.of(variables)
    names = [reference_name(key.partition("/")[2], places) for key in flatten_dict(shapes, sep="/")]
    assert len(set(names)) == len(names)
    thirds = {name: [p for n, p in names if n == name] for name, part in names if part is not None}
    assert all(sorted(parts) == [0, 1, 2] for parts in thirds.values())


def test_a_plain_decoder_is_a_network_of_its_own_in_the_reference():
    """Without updates there is no K-Net around it."""
    with_updates, plain = (to_reference(zeros(shapes_of(SEMANTIC[f"psp{s}"]))) for s in (1, 0))
    prefix = "decode_head.kernel_generate_head."
    heads = {name.removeprefix(prefix) for name in with_updates if name.startswith(prefix)}
    assert heads == {
        name.removeprefix("decode_head.") for name in plain if name.startswith("decode_head.")
    }
    assert {"conv_seg.weight", "conv_seg.bias", "bottleneck.bn.running_var"} <= heads


def test_layouts(variables, state):
    """Known places of a few tensors: outputs first."""
    params = variables["params"]
    head = "roi_head.mask_head"
    conv = params["backbone"]["layer2_block0"]["conv2"]["kernel"]
    assert state["backbone.layer2.0.conv2.weight"][3, 5, 0, 2] == conv[0, 2, 5, 3]
    attention = params["stage2"]["interaction"]["attention"]
    c, _, width = attention["key"]["kernel"].shape
    packed = state[f"{head}.1.attention.attn.in_proj_weight"]
    assert packed.shape == (3 * c, c)
    assert packed[c + 1 * width + 3, 7] == attention["key"]["kernel"][7, 1, 3]
    bias = state[f"{head}.1.attention.attn.in_proj_bias"]
    assert bias[3] == attention["query"]["bias"][0, 3]
    out = state[f"{head}.1.attention.attn.out_proj.weight"]
    assert out[5, 1 * width + 2] == attention["out"]["kernel"][1, 2, 5]
    linear = state[f"{head}.0.ffn.layers.0.0.weight"]
    assert linear[9, 4] == params["stage1"]["interaction"]["ffn_hidden"]["kernel"][4, 9]
    transform = state[f"{head}.0.feat_transform.conv.weight"]
    assert transform[2, 6, 0, 0] == params["stage1"]["transform_kernel"][6, 2]
    kernels = state["rpn_head.init_kernels.weight"]
    assert kernels[2, 6, 0, 0] == params["initial"]["proposals"][2, 6]


def test_what_does_not_belong_together_is_named(variables, state):
    """Of what attention packs, and of one axis; `test_convert.py` has the rest."""
    name = "roi_head.mask_head.0.attention.attn.in_proj_bias"
    rest = {key: x for key, x in state.items() if key != name}
    with pytest.raises(ValueError, match=f"no tensor {name}"):
        from_reference(rest, variables)
    for name, shape, needed in (
        ("roi_head.mask_head.1.attention.attn.in_proj_weight", (16, 16), [48, 16]),
        ("backbone.bn1.bias", (8, 1), [8]),
    ):
        with pytest.raises(ValueError) as error:
            from_reference(state | {name: np.zeros(shape, np.float32)}, variables)
        words = f"{name} has shape {list(shape)}; the network needs {needed}"
        assert words in str(error.value)
    with pytest.raises(ValueError, match="no name for the parameter neck/new/kernel"):
        reference_name("neck/new/kernel", Places("rpn_head", "", "roi_head.mask_head", "gn"))
