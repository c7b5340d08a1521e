"""Against a slow definition in numpy, and an ordinary convolution."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.nn.convolution import LAYOUT
from knet_jax.nn.deformable import DeformConv, deform_conv

# size of the kernel, stride, dilation, padding
CASES = [(3, 1, 1, 1), (3, 2, 2, 2), (2, 2, 1, 1)]


def inputs(case, b=2, height=6, width=7, channels=3, out=4, spread=2.5, seed=0):
    """x, offsets and kernel; many positions lie beyond the border."""
    size, stride, dilation, padding = case
    h, w = (
        (side + 2 * padding - dilation * (size - 1) - 1) // stride + 1 for side in (height, width)
    )
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((b, height, width, channels))
    offsets = spread * rng.standard_normal((b, h, w, 2 * size**2))
    return x, offsets, rng.standard_normal((size, size, channels, out))


def definition(x, offsets, kernel, stride, dilation, padding):
    """One output at a time, one pixel at a time."""
    size = len(kernel)
    height, width = x.shape[1:3]
    y = np.zeros((*offsets.shape[:3], kernel.shape[-1]))
    for n, i, j in np.ndindex(y.shape[:3]):
        for p, q in np.ndindex(size, size):
            down, right = offsets[n, i, j, 2 * (p * size + q) :][:2]
            row = i * stride - padding + p * dilation + down
            column = j * stride - padding + q * dilation + right
            for u, v in np.ndindex(2, 2):
                u, v = math.floor(row) + u, math.floor(column) + v
                if 0 <= u < height and 0 <= v < width:
                    share = (1 - abs(row - u)) * (1 - abs(column - v))
                    y[n, i, j] += share * x[n, u, v] @ kernel[p, q]
    return y


def ordinary(x, kernel, stride, dilation, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=LAYOUT,
    )


@pytest.mark.parametrize("case", CASES)
def test_values_follow_the_definition(case):
    x, offsets, kernel = inputs(case)
    # Some positions are whole numbers, some exactly on the border and beyond.
    offsets[0] = np.round(offsets[0])
    with jax.enable_x64(True):
        y = deform_conv(*map(jnp.asarray, (x, offsets, kernel)), *case[1:])
    np.testing.assert_allclose(y, definition(x, offsets, kernel, *case[1:]), atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_without_offsets_it_is_an_ordinary_convolution(case):
    x, offsets, kernel = (jnp.asarray(a, jnp.float32) for a in inputs(case))
    arguments = case[1:]
    y, pull = jax.vjp(
        lambda x, kernel: deform_conv(x, jnp.zeros_like(offsets), kernel, *arguments), x, kernel
    )
    wanted, pull_wanted = jax.vjp(lambda x, kernel: ordinary(x, kernel, *arguments), x, kernel)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    for ours, theirs in zip(pull(jnp.cos(y)), pull_wanted(jnp.cos(y))):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("case", CASES[1:2])
def test_gradients_are_those_of_finite_differences(case):
    """Of every offset, pixel and weight, in a random direction of outputs."""
    with jax.enable_x64(True):
        arrays = [jnp.asarray(a) for a in inputs(case, b=1, height=4, width=5, channels=2, out=2)]
        direction = np.random.default_rng(1).standard_normal(ordinary_shape(arrays, case))

        @jax.jit
        def loss(*arrays):
            return (deform_conv(*arrays, *case[1:]) * direction).sum()

        grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
        step = 1e-6
        for number, (array, grad) in enumerate(zip(arrays, grads)):
            assert grad.dtype == jnp.float64
            moves = step * jnp.eye(array.size).reshape(array.size, *array.shape)

            def moved(move, number=number, array=array):
                return loss(*arrays[:number], array + move, *arrays[number + 1 :])

            both = [jax.jit(jax.vmap(moved))(sign * moves) for sign in (1, -1)]
            wanted = (both[0] - both[1]) / (2 * step)
            assert abs(wanted).max() > 0.1
            np.testing.assert_allclose(grad.ravel(), wanted, atol=1e-7)


def ordinary_shape(arrays, case):
    x, _, kernel = arrays
    return jax.eval_shape(
        partial(ordinary, stride=case[1], dilation=case[2], padding=case[3]), x, kernel
    ).shape


@pytest.mark.slow
def test_a_point_a_pixel_beyond_the_border_has_no_gradient():
    """Where all offsets of a new network are: the padding is exactly a pixel beyond."""
    x, kernel = jnp.ones((1, 3, 3, 1)), jnp.ones((3, 3, 1, 1))

    def loss(x, offsets):
        return deform_conv(x, offsets, kernel, 1, 1, 1).sum()

    grad = jax.grad(loss, 1)(x, jnp.zeros((1, 3, 3, 18))).reshape(3, 3, 3, 3, 2)
    assert not grad[0, :, 0].any() and not grad[:, 0, :, 0].any()
    # On the last row of pixels, a move down leaves the picture.
    assert (grad[2, 1, 1, :, 0] == -1).all() and not grad[1, 1, 1, 1].any()
    far = jnp.full((1, 3, 3, 18), 1e9).at[0, 0].set(-jnp.inf)
    assert loss(x, far) == 0 and all(not g.any() for g in jax.grad(loss, (0, 1))(x, far))


def test_bfloat16_keeps_positions():
    """The last columns of a wide map are told apart, and types stay."""
    x = jnp.arange(301, dtype=jnp.float32).reshape(1, 1, 301, 1) % 2
    offsets = jnp.zeros((1, 1, 301, 2), jnp.bfloat16)
    kernel = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    y, pull = jax.vjp(lambda *a: deform_conv(*a, 1, 1, 0), x.astype(jnp.bfloat16), offsets, kernel)
    np.testing.assert_array_equal(y, x)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}


def test_the_module_starts_as_an_ordinary_convolution():
    module = DeformConv(4, 3, stride=2, dilation=2)
    x = jnp.asarray(inputs(CASES[0], height=8, width=9)[0], jnp.float32)
    variables = module.init(jax.random.key(0), x)
    params = variables["params"]
    assert set(params) == {"kernel", "conv_offset"}
    assert params["conv_offset"]["kernel"].shape == (3, 3, 3, 18)
    assert params["conv_offset"]["bias"].shape == (18,)
    assert not any(leaf.any() for leaf in jax.tree.leaves(params["conv_offset"]))
    wanted = ordinary(x, params["kernel"], 2, 2, 2)
    np.testing.assert_allclose(module.apply(variables, x), wanted, atol=1e-5)
