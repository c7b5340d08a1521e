from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.backbones.resnet import ResNet

TINY = partial(ResNet, depths=(1, 1, 1, 1), width=8)


@pytest.fixture(scope="module")
def image():
    return jnp.asarray(np.random.default_rng(0).standard_normal((2, 64, 32, 3)), jnp.float32)


def initialize(model, image):
    return jax.jit(partial(model.init, train=False))(jax.random.key(0), image)


@pytest.mark.parametrize("depths, width", [((3, 4, 6, 3), 64), ((1, 1, 1, 1), 8)])
def test_levels_have_strides_4_to_32(depths, width):
    model = ResNet(depths, width, "group", dtype="bfloat16")
    shape = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.bfloat16)
    levels, _ = jax.eval_shape(
        partial(model.init_with_output, train=True), jax.random.key(0), shape
    )
    wanted = [(2, 64 // s, 96 // s, width * s) for s in (4, 8, 16, 32)]
    assert [level.shape for level in levels] == wanted
    assert {level.dtype for level in levels} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("frozen_stages", [0, 2])
def test_frozen_stages_have_no_gradient_and_all_others_do(image, frozen_stages):
    model = TINY(norm="group", frozen_stages=frozen_stages)
    variables = initialize(model, image)

    @jax.jit
    def gradient(params):
        # Every level counts, also those that are frozen. Squares: the sum of a norm is a constant.
        return jax.grad(
            lambda p: sum((x**2).sum() for x in model.apply({"params": p}, image, True))
        )(params)

    grads = gradient(variables["params"])
    frozen = {f"layer{i + 1}_" for i in range(frozen_stages)} | (
        {"stem_"} if frozen_stages else set()
    )
    for name, tree in grads.items():
        largest = [float(abs(leaf).max()) for leaf in jax.tree.leaves(tree)]
        if name.startswith(tuple(frozen)):
            assert max(largest) == 0, name
        else:
            assert min(largest) > 0, name


def test_frozen_batch_norm_uses_running_statistics_in_training_too(image):
    model = TINY(norm="frozen_batch", frozen_stages=0)
    variables = initialize(model, image)
    # Other statistics must matter, or they would not be in use.
    other = variables | {"batch_stats": jax.tree.map(lambda x: x + 0.5, variables["batch_stats"])}
    apply = jax.jit(model.apply, static_argnames=("train", "mutable"))
    levels, updates = apply(variables, image, train=True, mutable=("batch_stats",))
    for a, b in zip(levels, apply(variables, image, train=False)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, updates["batch_stats"], variables["batch_stats"])
    assert abs(apply(other, image, train=False)[0] - levels[0]).max() > 1e-2
    assert {"scale", "bias"} == set(variables["params"]["stem_norm"])


def test_batch_norm_learns_the_statistics_of_all_devices(image):
    model = TINY(norm="batch", frozen_stages=0)
    variables = initialize(model, image)

    # Two "devices" of one image each, against the statistics of both images at once.
    def train(image):
        return model.apply(variables, image, train=True, mutable=["batch_stats"])

    levels, updates = jax.jit(jax.vmap(train, axis_name="batch"))(image[:, None])
    both, together = jax.jit(jax.vmap(train, axis_name="batch"))(image[None])
    for a, b in zip(levels, both):
        np.testing.assert_allclose(a.reshape(b.shape), b, rtol=1e-3, atol=1e-3)
    for ours, wanted in zip(jax.tree.leaves(updates), jax.tree.leaves(together)):
        np.testing.assert_allclose(ours, [*wanted, *wanted], rtol=1e-4, atol=1e-5)

    kernel = variables["params"]["stem_conv"]["kernel"]
    stem = jax.lax.conv_general_dilated(
        image, kernel, (2, 2), [(3, 3)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    norm = together["batch_stats"]["stem_norm"]
    np.testing.assert_allclose(norm["mean"][0], 0.1 * stem.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(norm["var"][0], 0.9 + 0.1 * stem.var((0, 1, 2), ddof=1), rtol=1e-4)


def test_group_norm_has_no_statistics(image):
    assert set(initialize(TINY(norm="group"), image)) == {"params"}


def test_pictures_of_a_batch_do_not_mix(image):
    model = TINY(norm="group")
    variables = initialize(model, image)
    apply = jax.jit(partial(model.apply, train=True))
    for both, one in zip(apply(variables, image), apply(variables, image[1:])):
        np.testing.assert_allclose(both[1:], one, rtol=1e-4, atol=1e-5)
