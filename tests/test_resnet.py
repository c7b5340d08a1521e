from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from tiny_parts import ResNet

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


@pytest.mark.parametrize("output_stride, strides", [(16, (4, 8, 16, 16)), (8, (4, 8, 8, 8))])
def test_levels_stay_at_the_output_stride(output_stride, strides):
    model = ResNet(output_stride=output_stride, deep_stem=True, num_deformable=2)
    shape = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
    levels, _ = jax.eval_shape(
        partial(model.init_with_output, train=False), jax.random.key(0), shape
    )
    wanted = [(1, 64 // s, 96 // s, 256 * 2**i) for i, s in enumerate(strides)]
    assert [level.shape for level in levels] == wanted


@pytest.mark.parametrize("num_deformable", [0, 3])
def test_blocks_that_add_nothing_make_no_difference(image, num_deformable):
    """So a deeper network is the shallow one with more steps: of no other stride, width or order."""
    shallow, deep = (
        TINY(depths=depths, num_deformable=num_deformable) for depths in ((1,) * 4, (1, 2, 4, 2))
    )
    variables = initialize(deep, image)
    for name, block in variables["params"].items():
        if "_block" in name and not name.endswith("_block0"):
            block["norm3"] = jax.tree.map(jnp.zeros_like, block["norm3"])
    names = jax.eval_shape(partial(shallow.init, train=False), jax.random.key(0), image)["params"]
    fewer = {
        part: {name: tree[name] for name in names if name in tree}
        for part, tree in variables.items()
    }
    assert len(fewer["params"]) < len(variables["params"])
    levels = (
        jax.jit(partial(model.apply, train=False))(tree, image)
        for model, tree in ((shallow, fewer), (deep, variables))
    )
    for a, b in zip(*levels):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(abs(a).max()))


@pytest.mark.slow
@pytest.mark.parametrize("output_stride", [8, 16])
def test_a_dilated_network_has_every_pixel_of_the_strided_one(image, output_stride):
    """That is what the smaller dilation of the first block of a stage is for."""
    depths = (1, 1, 2, 2)
    strided = TINY(depths=depths)
    variables = initialize(strided, image)
    variables = jax.tree.map(
        lambda x: x + 0.05 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), variables
    )
    dilated = TINY(depths=depths, output_stride=output_stride)
    wanted, levels = (
        jax.jit(partial(model.apply, train=False))(variables, image) for model in (strided, dilated)
    )
    for a, b, stride in zip(levels, wanted, (4, 8, 16, 32)):
        every = max(1, stride // output_stride)
        np.testing.assert_allclose(a[:, ::every, ::every], b, atol=1e-4 * float(abs(b).max()))


def test_the_deep_stem_is_three_convolutions(image):
    """Up to the pooling, which sees what the three give."""
    model = TINY(deep_stem=True)
    variables = initialize(model, image)
    params = variables["params"]
    kernels = [params[f"stem_conv{i}"]["kernel"] for i in (1, 2, 3)]
    assert [kernel.shape for kernel in kernels] == [(3, 3, 3, 4), (3, 3, 4, 4), (3, 3, 4, 8)]
    assert "stem_conv" not in params and {"scale", "bias"} == set(params["stem_norm3"])
    x = image
    for kernel, stride in zip(kernels, (2, 1, 1)):
        x = jax.lax.conv_general_dilated(
            x, kernel, (stride, stride), [(1, 1)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x / np.sqrt(1 + 1e-5))  # the statistics of a new norm are 0 and 1

    last = partial(model.apply, capture_intermediates=lambda m, _: m.name == "stem_norm3")
    _, state = last(variables, image, False)
    ours = jax.nn.relu(state["intermediates"]["stem_norm3"]["__call__"][0])
    np.testing.assert_allclose(ours, x, atol=1e-5)


def test_the_last_stages_are_deformable(image):
    plain, deformable = TINY(), TINY(num_deformable=3)
    variables, moving = initialize(plain, image), initialize(deformable, image)
    for name, tree in moving["params"].items():
        has_offsets = "conv2" in tree and "conv_offset" in tree["conv2"]
        assert has_offsets == name.startswith(("layer2", "layer3", "layer4")), name
    # New offsets are zero.
    both = traverse_util.flatten_dict(moving["params"]) | traverse_util.flatten_dict(
        variables["params"]
    )
    moving = variables | {"params": traverse_util.unflatten_dict(both)}
    apply = jax.jit(partial(deformable.apply, train=False))
    levels = apply(moving, image)
    for a, b in zip(levels, plain.apply(variables, image, False)):
        np.testing.assert_allclose(a, b, atol=1e-4 * float(abs(b).max()))
    offset = moving["params"]["layer2_block0"]["conv2"]["conv_offset"]
    offset["bias"] += 0.3
    moved = apply(moving, image)
    np.testing.assert_array_equal(moved[0], levels[0])
    assert all(abs(a - b).max() > 1e-3 for a, b in zip(moved[1:], levels[1:]))


@pytest.mark.parametrize(
    "keywords, message",
    [
        (
            {"output_stride": 12},
            r"config\.model\.backbone\.output_stride is 12; accepted: 8, 16, 32",
        ),
        ({"num_deformable": 5}, r"config\.model\.backbone\.num_deformable is 5; accepted: 0 to 4"),
    ],
)
def test_what_a_resnet_cannot_be_is_named(image, keywords, message):
    with pytest.raises(ValueError, match=message):
        TINY(**keywords).init(jax.random.key(0), image, False)


@pytest.mark.parametrize("frozen_stages", [0, 2])
@pytest.mark.parametrize("deep_stem", [False, True])
def test_frozen_stages_have_no_gradient_and_all_others_do(image, frozen_stages, deep_stem):
    model = TINY(norm="group", frozen_stages=frozen_stages, deep_stem=deep_stem)
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


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(image):
    variables = initialize(TINY(norm="group", frozen_stages=0), image)

    def run(remat):
        model = TINY(norm="group", frozen_stages=0, remat=remat)

        def loss(variables):
            return sum((x**3).sum() for x in model.apply(variables, image, True))

        return jax.jit(jax.value_and_grad(loss))(variables)

    for a, b in zip(*map(jax.tree.leaves, (run(False), run(True)))):
        assert abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(a).max()))
