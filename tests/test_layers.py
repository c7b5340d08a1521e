import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax import layers


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


def test_nearest2x_repeats_pixels():
    x = random(2, 3, 4, 5)
    np.testing.assert_array_equal(layers.nearest2x(x), np.asarray(x).repeat(2, 1).repeat(2, 2))


@pytest.mark.parametrize("height, width, channels", [(1, 1, 4), (3, 5, 8), (25, 42, 256)])
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


@pytest.mark.parametrize("channels, groups", [(256, 32), (64, 32), (48, 16), (20, 4), (7, 1)])
def test_group_norm_has_as_many_groups_as_the_width_allows(channels, groups):
    x = random(2, 3, 3, channels) * 3 + 1
    norm = layers.group_norm(channels, "float32", "norm")
    y = norm.apply(norm.init(jax.random.key(0), x), x)
    grouped = np.asarray(y).reshape(2, 9, groups, channels // groups)
    np.testing.assert_allclose(grouped.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(grouped.var((1, 3)), 1, atol=1e-3)
    if groups < channels:  # fewer normed together than a group of ours would differ
        assert np.abs(np.asarray(y).reshape(2, 9, channels).mean(1)).max() > 0.01


@pytest.mark.parametrize("size, stride", [(1, 1), (3, 1), (3, 2), (7, 2)])
@pytest.mark.parametrize("side", [8, 9])
def test_conv_is_padded_symmetrically(size, stride, side):
    x = np.asarray(random(1, side, side, 2))
    conv = layers.conv(3, size, stride)
    variables = conv.init(jax.random.key(0), x)
    kernel = np.asarray(variables["params"]["kernel"])
    pad = size // 2
    padded = np.pad(x[0], ((pad, pad), (pad, pad), (0, 0)))
    count = (side + 2 * pad - size) // stride + 1
    wanted = np.empty((count, count, 3))
    for i in range(count):
        for j in range(count):
            window = padded[i * stride : i * stride + size, j * stride : j * stride + size]
            wanted[i, j] = np.einsum("abc,abcd->d", window, kernel)
    np.testing.assert_allclose(conv.apply(variables, x)[0], wanted, atol=1e-5)


def test_conv_norm_relu_keeps_its_type_and_its_parameters_wide():
    block = layers.ConvNormRelu(16, 3, 2, dtype="bfloat16")
    y, variables = block.init_with_output(jax.random.key(0), random(2, 8, 6, 4))
    assert y.shape == (2, 4, 3, 16) and y.dtype == jnp.bfloat16
    assert (y >= 0).all() and (y > 0).any()
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    assert set(variables["params"]["conv"]) == {"kernel"}  # no bias before a norm


def test_wide_is_at_least_float32():
    assert layers.wide(jnp.bfloat16) == layers.wide("float32") == jnp.float32
    assert layers.wide("float64") == np.float64


def test_prior_bias_is_a_probability_of_one_percent():
    np.testing.assert_allclose(jax.nn.sigmoid(layers.PRIOR_BIAS), 0.01, rtol=1e-6)
