from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import made_up
from tiny_parts import ResNet

TINY = partial(ResNet, depths=(1, 1, 1, 1), width=8)


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 32, 3)), jnp.float32)


def shapes(model, height=64, width=96, train=False):
    image = jax.ShapeDtypeStruct((2, height, width, 3), model.dtype)
    init = partial(model.init_with_output, train=train)
    return jax.eval_shape(init, jax.random.key(0), image)


def test_levels_have_their_strides_widths_and_types():
    levels, variables = shapes(ResNet(dtype="bfloat16"), train=True)
    assert [x.shape for x in levels] == [(2, 64 // s, 96 // s, 64 * s) for s in (4, 8, 16, 32)]
    assert {level.dtype for level in levels} == {jnp.dtype("bfloat16")}
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    for output_stride, strides in (16, (4, 8, 16, 16)), (8, (4, 8, 8, 8)):
        levels, _ = shapes(ResNet(output_stride=output_stride, deep_stem=True, num_deformable=2))
        wanted = [(2, 64 // s, 96 // s, 256 * 2**i) for i, s in enumerate(strides)]
        assert [level.shape for level in levels] == wanted


def test_there_are_as_many_blocks_as_asked_for_and_the_last_stages_are_deformable():
    depths = (1, 2, 3, 2)
    params = shapes(TINY(depths=depths, num_deformable=3))[1]["params"]
    blocks = {name for name in params if "_block" in name}
    assert blocks == {
        f"layer{i + 1}_block{j}" for i, depth in enumerate(depths) for j in range(depth)
    }
    for name in blocks:
        assert ("conv_offset" in params[name]["conv2"]) == (not name.startswith("layer1")), name
    assert "batch_stats" not in shapes(TINY(norm="group"))[1]


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [8])
def test_a_dilated_network_has_every_pixel_of_the_strided_one(image, output_stride):
    """That is what the smaller dilation of the first block of a stage is for."""
    depths = (1, 1, 2, 2)
    strided = TINY(depths=depths)
    variables = made_up(strided, image, train=False)
    dilated = TINY(depths=depths, output_stride=output_stride)
    wanted, levels = (
        jax.jit(partial(model.apply, train=False))(variables, image) for model in (strided, dilated)
    )
    for a, b, stride in zip(levels, wanted, (4, 8, 16, 32)):
        every = max(1, stride // output_stride)
        np.testing.assert_allclose(a[:, ::every, ::every], b, atol=1e-4 * float(abs(b).max()))


def test_frozen_batch_norm_uses_running_statistics_in_training_too(image):
    model = TINY(norm="frozen_batch", frozen_stages=0)
    variables = made_up(model, image, train=False)
    # Other statistics must matter, or they would not be in use.
    other = variables | {"batch_stats": jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])}
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    levels, updates = apply(variables, image, train=True, mutable=("batch_stats",))
    for a, b in zip(levels, apply(variables, image, train=False)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    assert abs(apply(other, image, train=False)[0] - levels[0]).max() > 1e-2
    assert {"scale", "bias"} == set(variables["params"]["stem_norm"])
