import itertools
from functools import partial

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import made_up
from tiny_parts import Swin

from knet_jax.nn import swin
from knet_jax.nn.swin import Block, Merge
from knet_jax.system.errors import UserError

TINY = partial(Swin, channels=8, depths=(2, 1), num_heads=(1, 2), window=3)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.fixture(scope="module")
def image():
    return random(2, 45, 38, 3)


@pytest.fixture(scope="module")
def variables(image):
    return made_up(TINY(), image, train=False)


# Windows.


def test_position_biases_are_resized_bicubically():
    """OpenCV has the same kernel, centers and borders."""
    for old, new in (7, 12), (12, 7), (2, 5):
        side = 2 * old - 1
        table = np.random.default_rng(0).standard_normal((side, side, 3))
        resized = swin.resize_position_bias(table.reshape(-1, 3), new)
        wanted = cv2.resize(table, (2 * new - 1,) * 2, interpolation=cv2.INTER_CUBIC)
        np.testing.assert_allclose(resized, wanted.reshape(-1, 3), atol=1e-5)
    table = table.reshape(-1, 3).astype(np.float32)
    assert swin.resize_position_bias(table, new).dtype == np.float32
    assert swin.resize_position_bias(table, old) is table
    for length in (168, 196):
        with pytest.raises(UserError, match=f"{length} position biases"):
            swin.resize_position_bias(np.zeros((length, 3)), 7)


# Blocks.


def numpy_attention(x, places, params, num_heads, window):
    """Pair by pair. Some pixels [t, c] and where they are [t, 2] -> [t, c]."""
    t, c = x.shape
    qkv = x @ params["qkv"]["kernel"] + params["qkv"]["bias"]
    query, key, value = (a.reshape(t, num_heads, -1) for a in np.split(qkv, 3, axis=-1))
    out = np.zeros_like(query)
    for head in range(num_heads):
        logits = query[:, head] @ key[:, head].T / np.sqrt(c // num_heads)
        for i, j in np.ndindex(t, t):
            down, right = places[i] - places[j]
            row = (2 * window - 1) * (down + window - 1) + right + window - 1
            logits[i, j] += params["position_bias"][row, head]
        weights = np.exp(logits)
        out[:, head] = weights / weights.sum(-1, keepdims=True) @ value[:, head]
    return out.reshape(t, c) @ params["output"]["kernel"] + params["output"]["bias"]


def numpy_norm(x, params):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


@pytest.mark.parametrize(
    "window, shift, num_heads, c",
    [(3, 0, 2, 8), (3, 1, 2, 8)],
    ids=["plain", "shifted"],
)
def test_a_block_pads_after_the_norm_and_attends_within_windows(window, shift, num_heads, c):
    """Window by window in numpy, on a map that no window fits."""
    block = Block(num_heads, window, shift, 0.0, "float32")
    height, width = window + 1, window + 2
    x = random(1, height, width, c)
    variables = made_up(block, x, train=False)
    params = jax.tree.map(np.asarray, variables["params"])

    y = np.zeros((2 * window, 2 * window, c))
    y[:height, :width] = numpy_norm(np.asarray(x[0], np.float64), params["norm1"])
    attended = np.zeros_like(y)
    # A shift moves the grid of windows; beyond the map they are cut off.
    edges = sorted({0, shift, shift + window, 2 * window})
    for top, bottom in itertools.pairwise(edges):
        for left, right in itertools.pairwise(edges):
            part = y[top:bottom, left:right].reshape(-1, c)
            places = np.argwhere(np.ones((bottom - top, right - left)))
            out = numpy_attention(part, places, params["attention"], num_heads, window)
            attended[top:bottom, left:right] = out.reshape(bottom - top, right - left, c)
    wanted = np.asarray(x[0], np.float64) + attended[:height, :width]
    hidden = numpy_norm(wanted, params["norm2"]) @ params["ffn_hidden"]["kernel"]
    hidden = np.asarray(jax.nn.gelu(hidden + params["ffn_hidden"]["bias"], approximate=False))
    wanted += hidden @ params["ffn_output"]["kernel"] + params["ffn_output"]["bias"]
    ours = jax.jit(block.apply, static_argnums=2)(variables, x, False)
    np.testing.assert_allclose(ours[0], wanted, atol=2e-5)


@pytest.mark.parametrize("height, width", [(4, 6), (3, 5)])
def test_merging_orders_four_pixels_channel_by_channel(height, width):
    c = 2
    x = random(1, height, width, c)
    variables = made_up(Merge("float32"), x)
    params = jax.tree.map(np.asarray, variables["params"])
    y = np.asarray(Merge("float32").apply(variables, x))
    assert y.shape == (1, -(-height // 2), -(-width // 2), 2 * c)
    padded = np.pad(x[0], ((0, height % 2), (0, width % 2), (0, 0)))
    for i, j in np.ndindex(y.shape[1:3]):
        four = [
            padded[2 * i + down, 2 * j + right, channel]
            for channel in range(c)
            for down in range(2)
            for right in range(2)
        ]
        wanted = numpy_norm(np.array(four), params["norm"]) @ params["reduction"]["kernel"]
        np.testing.assert_allclose(y[0, i, j], wanted, atol=1e-5)


def test_stochastic_depth_leaves_out_whole_branches_of_pictures():
    rate, b = 0.4, 400
    block = Block(1, 2, 0, rate, "float32")
    one = random(1, 2, 2, 4)
    x = jnp.tile(one, (b, 1, 1, 1))
    variables = made_up(block, one, train=False)
    apply = jax.jit(block.apply, static_argnums=2)
    y = apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
    kinds, counts = np.unique(np.round(np.asarray(y), 4).reshape(b, -1), axis=0, return_counts=True)
    # Both branches, one of them, or none.
    assert len(kinds) == 4
    untouched = counts[abs(kinds - np.asarray(one).ravel()).max(1).argsort()[0]]
    expected = rate**2 * b
    assert abs(untouched - expected) < 4 * np.sqrt(expected * (1 - rate**2))
    # Attention alone is scaled so that its mean is that of an evaluation.
    quiet = variables["params"] | {
        "ffn_output": jax.tree.map(jnp.zeros_like, variables["params"]["ffn_output"])
    }
    y = apply({"params": quiet}, x, True, rngs={"dropout": jax.random.key(1)}) - x
    whole = apply({"params": quiet}, one, False) - one
    kept = abs(y).max((1, 2, 3)) > 0
    np.testing.assert_allclose(
        y[kept], jnp.tile(whole / (1 - rate), (int(kept.sum()), 1, 1, 1)), atol=1e-5
    )
    assert abs(kept.mean() - (1 - rate)) < 0.1


# The network.


def test_shares_that_are_left_out_grow_from_block_to_block(image):
    found = {}

    def record(method, arguments, keywords, context):
        if isinstance(context.module, Block):
            found[context.module.name] = context.module.drop_path, context.module.shift
        return method(*arguments, **keywords)

    with nn.intercept_methods(record):
        jax.eval_shape(partial(TINY(drop_path=0.4).init, train=False), jax.random.key(0), image)
    wanted = {
        "stage0_block0": (0.0, 0),
        "stage0_block1": (0.2, 1),
        "stage1_block0": (0.4, 0),
    }
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, err_msg=name)


def test_levels_have_strides_4_to_32_at_any_size():
    for height, width in (64, 96), (65, 33), (5, 3):
        shape = jax.ShapeDtypeStruct((2, height, width, 3), jnp.bfloat16)
        model = Swin(dtype="bfloat16")
        levels, variables = jax.eval_shape(
            partial(model.init_with_output, train=True), jax.random.key(0), shape
        )
        for i, level in enumerate(levels):
            stride = 4 * 2**i
            assert level.shape == (2, -(-height // stride), -(-width // stride), 96 * 2**i)
            assert level.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "num_heads, message",
    [((1, 2, 4), r"\(1, 2, 4\); accepted: one .*\(2, 1\)"), ((1, 3), "3 .* 16")],
)
def test_heads_that_do_not_fit_are_named(image, num_heads, message):
    with pytest.raises(ValueError, match=rf"config\.model\.backbone\.num_heads.*{message}"):
        TINY(num_heads=num_heads).init(jax.random.key(0), image, False)


def test_levels_are_normalized_each_by_its_own(image, variables):
    params = variables["params"]
    plain = {
        f"norm{i}": {"scale": jnp.ones(8 * 2**i), "bias": jnp.zeros(8 * 2**i)} for i in range(2)
    }
    apply = jax.jit(partial(TINY().apply, train=False))
    levels = apply({"params": params | plain}, image)
    for i, level in enumerate(levels):
        np.testing.assert_allclose(level.mean(-1), 0, atol=1e-4)
        np.testing.assert_allclose(level.var(-1), 1, atol=1e-2)
        changed = params | plain | {f"norm{i}": jax.tree.map(lambda x: x + 1, plain[f"norm{i}"])}
        for j, (a, b) in enumerate(zip(levels, apply({"params": changed}, image))):
            np.testing.assert_allclose(b, 2 * a + 1 if i == j else a, atol=1e-4)
