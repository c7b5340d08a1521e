from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.nn import layers


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(
    "shape, axes",
    [((2, 3, 5, 7), (2, 3)), ((2, 5, 1, 3), (1, 2)), ((4, 6, 1), (-3, -2))],
)
def test_upsample2x_equals_resize(shape, axes):
    x = random(*shape)
    wanted = [
        2 * n if i in (axes[0] % x.ndim, axes[1] % x.ndim) else n for i, n in enumerate(shape)
    ]

    def resize(x):
        return jax.image.resize(x, wanted, "bilinear", antialias=False)

    def ours(x):
        return layers.upsample2x(x, axes)

    np.testing.assert_allclose(ours(x), resize(x), atol=1e-6)
    weights = random(*wanted, seed=1)
    grads = [jax.jit(jax.grad(lambda x, f=f: (f(x) * weights).sum()))(x) for f in (ours, resize)]
    np.testing.assert_allclose(*grads, atol=1e-5)


@pytest.mark.parametrize("size, axes", [((9, 10), (1, 2)), ((3, 2), (2, 3)), ((13, 4), (1, 2))])
def test_resize_is_bilinear_with_half_pixel_centers(size, axes):
    """Against the definition, pixel by pixel; smaller maps are not averaged."""
    shape = [2, 5, 5, 5]
    shape[axes[0]], shape[axes[1]] = 5, 7
    x = np.asarray(random(*shape))
    ours = np.moveaxis(np.asarray(layers.resize(x, size, axes)), axes, (0, 1))
    x = np.moveaxis(x, axes, (0, 1))
    assert ours.shape[:2] == size

    def taps(i, large, small):
        source = min(max((i + 0.5) * small / large - 0.5, 0), small - 1)
        lower = int(source)
        return (lower, 1 - (source - lower)), (min(lower + 1, small - 1), source - lower)

    for i, j in np.ndindex(size):
        wanted = 0
        for row, a in taps(i, size[0], 5):
            for column, c in taps(j, size[1], 7):
                wanted = wanted + a * c * x[row, column]
        np.testing.assert_allclose(ours[i, j], wanted, atol=1e-5)


@pytest.mark.parametrize("height, width, channels", [(1, 1, 4), (25, 42, 32)])
def test_sine_encoding_follows_its_formula(height, width, channels):
    half = channels // 2
    encoding = np.asarray(layers.sine_encoding(height, width, channels, jnp.float32))
    wanted = np.empty((height, width, channels))
    for c in range(channels):
        axis, i = divmod(c, half)
        size = (height, width)[axis]
        position = np.arange(1, size + 1) / (size + 1e-6) * 2 * np.pi
        angle = position / 10000 ** (2 * (i // 2) / half)
        value = np.sin(angle) if i % 2 == 0 else np.cos(angle)
        wanted[:, :, c] = value[:, None] if axis == 0 else value[None]
    assert encoding.shape == wanted.shape
    np.testing.assert_allclose(encoding, wanted, atol=5e-6)
    assert layers.sine_encoding(2, 2, 4, jnp.bfloat16).dtype == jnp.bfloat16


# Norms.


@pytest.mark.parametrize("channels, groups", [(64, 32), (48, 16), (7, 1)])
def test_group_norm_has_as_many_groups_as_the_width_allows(channels, groups):
    x = random(2, 3, 3, channels) * 3 + 1
    norm = layers.GroupNorm()
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    grouped = np.asarray(y).reshape(2, 9, groups, channels // groups)
    np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(grouped.var((1, 3)), 1, atol=1e-3)
    weights = random(*x.shape, seed=1)
    parameters = {"scale": random(channels, seed=2), "bias": random(channels, seed=3)}
    ours, theirs = (
        jax.grad(lambda p, x, n=n: (n.apply({"params": p}, x) * weights).sum(), (0, 1))(
            parameters, x
        )
        for n in (norm, nn.GroupNorm(groups, epsilon=layers.EPSILON))
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), ours, theirs)
    if groups < channels:  # fewer normed together than a group of ours would differ
        assert np.abs(np.asarray(y).reshape(2, 9, channels).mean(1)).max() > 0.01


def test_the_gradient_that_is_written_out_is_that_of_the_formula():
    def plain(x, factor, shift):
        return x * factor + shift

    given = x, _, _ = random(2, 3, 4, 5), random(5, seed=2), random(5, seed=3)
    written = partial(layers.scale_and_shift, dtype="float32")
    grads = (jax.vjp(function, *given)[1](x + 1) for function in (written, plain))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *grads)


@pytest.mark.parametrize("norm", ["group", "frozen_batch"])
def test_a_norm_of_bfloat16_rounds_only_its_result_and_the_gradient_of_its_input(norm):
    x, weights = (jnp.asarray(random(2, 3, 4, 8, seed=i), jnp.bfloat16) for i in (0, 1))

    def grads(dtype):
        module = layers.make_norm(norm, dtype, train=True)(8, None)
        y, pull = jax.vjp(
            lambda p, x: module.apply({**variables, "params": p}, x), variables["params"], x
        )
        return y, *pull(weights.astype(y.dtype))

    variables = layers.make_norm(norm, "float32", train=True)(8, None).init(jax.random.key(0), x)
    (y, of_params, of_x), (wide_y, wide_params, wide_x) = grads("bfloat16"), grads("float32")
    np.testing.assert_array_equal(y, wide_y.astype(jnp.bfloat16))
    jax.tree.map(np.testing.assert_array_equal, (of_params, of_x), (wide_params, wide_x))
    # What waits in a barrier is stored: the gradient as it arrives, not as it is computed with.
    gradient = jax.make_jaxpr(lambda x: grads("bfloat16")[2])(x)
    stored = [
        operand.aval.dtype
        for eqn in gradient.eqns
        if eqn.primitive.name == "optimization_barrier"
        for operand in eqn.invars
    ]
    assert set(stored) == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_first_of_the_largest(axis):
    x = np.random.default_rng(0).integers(-3, 3, (4, 5, 6)).astype(np.float32)
    x[0] = -np.inf
    found = jax.jit(partial(layers.argmax, axis=axis))(x)
    np.testing.assert_array_equal(found, x.argmax(axis))
    assert found.dtype == jnp.argmax(x, axis).dtype


BATCHES = random(3, 4, 5, 6, 2) * 3 + 1  # of three steps, or of three devices


def normed(x, mean, var, parameters):
    return (x - mean) / np.sqrt(var + 1e-5) * parameters["scale"] + parameters["bias"]


def batch_norm_variables(channels=2):
    return {
        "params": {"scale": random(channels, seed=1), "bias": random(channels, seed=2)},
        "batch_stats": {"mean": random(channels, seed=3), "var": 1 + random(channels, seed=4) ** 2},
    }


def train_batch_norm(variables, x):
    """Per device: (output, new running statistics); devices are a leading axis of `x`."""

    def one(x):
        return layers.BatchNorm(False).apply(variables, x, mutable=["batch_stats"])

    return jax.vmap(one, axis_name=layers.AXIS)(x)


@pytest.mark.parametrize("num_devices", [1, 3])
def test_batch_norm_takes_the_statistics_of_all_devices(num_devices):
    x = BATCHES[:num_devices]
    variables = batch_norm_variables()
    y, updated = jax.jit(train_batch_norm)(variables, x)
    pixels = np.asarray(x, float).reshape(-1, 2)
    mean, var = pixels.mean(0), pixels.var(0)
    np.testing.assert_allclose(y, normed(x, mean, var, variables["params"]), atol=1e-5)
    unbiased = pixels.var(0, ddof=1)
    assert (unbiased / var > 1.002).all()  # or the next lines could not tell them apart
    for name, batch in ("mean", mean), ("var", unbiased):
        before = variables["batch_stats"][name]
        after = np.asarray(updated["batch_stats"][name])
        assert (after == after[0]).all()  # the same on all devices
        np.testing.assert_allclose(after[0], 0.9 * before + 0.1 * batch, rtol=1e-5)


def test_batch_norm_of_bfloat16_keeps_its_statistics_wide():
    x = (BATCHES[:1] + 100).astype(jnp.bfloat16)

    def one(x):
        module = layers.BatchNorm(False, "bfloat16")
        return module.apply(batch_norm_variables(), x, mutable=["batch_stats"])

    y, updated = jax.vmap(one, axis_name=layers.AXIS)(x)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updated)} == {jnp.dtype("float32")}
    wanted = np.asarray(x, float).reshape(-1, 2).mean(0)
    before = batch_norm_variables()["batch_stats"]["mean"]
    mean = updated["batch_stats"]["mean"][0]
    np.testing.assert_allclose(mean, 0.9 * before + 0.1 * wanted, rtol=1e-5)


def test_running_statistics_are_used_where_batches_are_not():
    """In training of a frozen norm, and in evaluation; an initialization leaves them alone."""
    variables, x = batch_norm_variables(), BATCHES[0]
    wanted = normed(x, **variables["batch_stats"], parameters=variables["params"])
    for norm, train in ("batch", False), ("frozen_batch", True):
        module = layers.make_norm(norm, "float32", train)(2, name="norm")
        y, updated = module.apply(variables, x, mutable=["batch_stats"])
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)
        same = np.testing.assert_array_equal
        jax.tree.map(same, updated["batch_stats"], variables["batch_stats"])
    module = layers.make_norm("batch", "float32", train=True)(2, name="norm")
    statistics = module.init(jax.random.key(0), x)["batch_stats"]
    assert statistics["mean"].tolist() == [0, 0] and statistics["var"].tolist() == [1, 1]


# Convolutions.


@pytest.mark.parametrize("size, stride, dilation", [(1, 1, 1), (3, 2, 1), (7, 2, 1), (3, 1, 2)])
def test_conv_is_padded_symmetrically(size, stride, dilation):
    for side in 8, 9:
        x = np.asarray(random(1, side, side, 2))
        conv = layers.conv(3, size, stride, dilation)
        variables = conv.init(jax.random.key(0), x)
        kernel = np.asarray(variables["params"]["kernel"])
        reach = dilation * (size - 1) + 1
        pad = reach // 2
        padded = np.pad(x[0], ((pad, pad), (pad, pad), (0, 0)))
        count = (side + 2 * pad - reach) // stride + 1
        wanted = np.empty((count, count, 3))
        for i, j in np.ndindex(count, count):
            rows, columns = (np.s_[n * stride : n * stride + reach : dilation] for n in (i, j))
            wanted[i, j] = np.einsum("abc,abcd->d", padded[rows, columns], kernel)
        np.testing.assert_allclose(conv.apply(variables, x)[0], wanted, atol=1e-5)


def test_conv_norm_relu_keeps_its_type_and_its_parameters_wide():
    norm = layers.make_norm("group", "bfloat16", train=True)
    block = layers.ConvNormRelu(16, 3, 2, norm=norm, dtype="bfloat16")
    y, variables = block.init_with_output(jax.random.key(0), random(2, 8, 6, 4))
    assert y.shape == (2, 4, 3, 16) and y.dtype == jnp.bfloat16
    assert (y >= 0).all() and (y > 0).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert set(variables["params"]["conv"]) == {"kernel"}  # no bias before a norm


def test_wide_is_at_least_float32():
    assert layers.wide(jnp.bfloat16) == layers.wide("float32") == jnp.float32
    assert layers.wide("float64") == np.float64


@pytest.mark.parametrize("norm", ["group", "frozen_batch"])
def test_for_its_gradient_a_block_keeps_what_it_reads_and_what_its_convolution_makes(norm):
    block = layers.ConvNormRelu(8, 3, norm=layers.make_norm(norm, "float32", train=True))
    x = jnp.ones((2, 16, 16, 8))
    variables = block.init(jax.random.key(0), x)

    def gradient(variables):
        return jax.vjp(lambda v: block.apply(v, x * 2), variables)[1]

    kept = jax.tree.leaves(jax.eval_shape(gradient, variables))
    assert sum(array.ndim == 4 and array.shape[1] == 16 for array in kept) == 2
