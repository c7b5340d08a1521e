import itertools
from functools import partial

import cv2
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_parts import Swin

from knet_jax.nn import swin
from knet_jax.nn.swin import Block, Merge

TINY = partial(Swin, channels=8, depths=(2, 1), num_heads=(1, 2), window=3)


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def jitter(variables, scale=0.5):
    """Variables of which none is zero."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(scale * rng.standard_normal(x.shape), x.dtype), variables
    )


@pytest.fixture(scope="module")
def image():
    return random(2, 45, 38, 3)


@pytest.fixture(scope="module")
def variables(image):
    return jitter(jax.jit(partial(TINY().init, train=False))(jax.random.key(0), image), 0.1)


# Windows.


def test_windows_are_parts_of_the_map_and_join_again():
    x = np.arange(2 * 6 * 9 * 2).reshape(2, 6, 9, 2)
    windows = swin.split_windows(jnp.asarray(x), 3)
    assert windows.shape == (2, 6, 9, 2)
    np.testing.assert_array_equal(windows[1, 4].reshape(3, 3, 2), x[1, 3:6, 3:6])
    np.testing.assert_array_equal(swin.join_windows(windows, 6, 9), x)


@pytest.mark.parametrize("height, width, window", [(6, 9, 3), (7, 7, 7), (8, 4, 4)])
def test_shifted_regions_are_the_cells_of_the_moved_grid(height, width, window):
    """Known from where each pixel was before the roll."""
    shift = window // 2
    regions = swin.shift_regions(height, width, window, shift)
    assert regions.shape == (height * width // window**2, window**2)
    rows, columns = np.mgrid[:height, :width]
    cells = (np.stack([rows, columns], -1) - shift) // window
    rolled = np.roll(cells, (-shift, -shift), (0, 1))
    windows = np.asarray(swin.split_windows(jnp.asarray(rolled[None]), window))[0]
    same = (windows[:, :, None] == windows[:, None]).all(-1)
    np.testing.assert_array_equal(regions[:, :, None] == regions[:, None], same)


def test_relative_positions_follow_their_formula():
    window = 7
    table = swin.relative_positions(window)
    for i, j in (0, 0), (0, 48), (48, 0), (13, 30):
        (yi, xi), (yj, xj) = divmod(i, window), divmod(j, window)
        assert table[i, j] == 13 * (yi - yj + 6) + (xi - xj + 6)
    assert table.min() == 0 and table.max() == 168 and len(np.unique(table)) == 169


@pytest.mark.parametrize("old, new", [(7, 12), (12, 7), (7, 8), (2, 5)])
def test_position_biases_are_resized_bicubically(old, new):
    """OpenCV has the same kernel, centers and borders."""
    side = 2 * old - 1
    table = np.random.default_rng(0).standard_normal((side, side, 3))
    resized = swin.resize_position_bias(table.reshape(-1, 3), new)
    wanted = cv2.resize(table, (2 * new - 1,) * 2, interpolation=cv2.INTER_CUBIC)
    np.testing.assert_allclose(resized, wanted.reshape(-1, 3), atol=1e-5)
    assert swin.resize_position_bias(table.reshape(-1, 3).astype("f4"), new).dtype == np.float32


def test_position_biases_of_the_same_window_stay_as_they_are():
    table = np.random.default_rng(0).standard_normal((169, 3)).astype(np.float32)
    assert swin.resize_position_bias(table, 7) is table
    for length in (168, 196):
        with pytest.raises(ValueError, match=f"{length} position biases"):
            swin.resize_position_bias(np.zeros((length, 3)), 7)


def test_gelu():
    x = jnp.linspace(-6, 6, 101)
    np.testing.assert_allclose(swin.gelu(x), jax.nn.gelu(x, approximate=False), atol=1e-6)
    assert swin.gelu(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


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
    [(3, 0, 2, 8), (3, 1, 2, 8), (7, 3, 6, 192)],
    ids=["plain", "shifted", "first stage of Swin-L"],
)
def test_a_block_pads_after_the_norm_and_attends_within_windows(window, shift, num_heads, c):
    """Window by window in numpy, on a map that no window fits."""
    block = Block(num_heads, window, shift, 0.0, "float32")
    height, width = window + 1, window + 2
    x = random(1, height, width, c)
    variables = jax.jit(block.init, static_argnums=2)(jax.random.key(0), x, False)
    variables = jitter(variables, 1.4 / np.sqrt(c))
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
    np.testing.assert_allclose(block.apply(variables, x, False)[0], wanted, atol=2e-5)


@pytest.mark.parametrize("height, width", [(4, 6), (3, 5)])
def test_merging_orders_four_pixels_channel_by_channel(height, width):
    c = 2
    x = random(1, height, width, c)
    variables = jitter(Merge("float32").init(jax.random.key(0), x))
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
    variables = jitter(block.init(jax.random.key(0), one, False))
    y = block.apply(variables, x, True, rngs={"dropout": jax.random.key(1)})
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
    y = block.apply({"params": quiet}, x, True, rngs={"dropout": jax.random.key(1)}) - x
    whole = block.apply({"params": quiet}, one, False) - one
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


def test_stochastic_depth_needs_training(image, variables):
    apply = jax.jit(TINY(drop_path=0.9).apply, static_argnums=2)
    quiet = apply(variables, image, False)
    for a, b in zip(quiet, jax.jit(partial(TINY().apply, train=True))(variables, image)):
        np.testing.assert_allclose(a, b, atol=1e-5)
    rngs = [{"dropout": jax.random.key(i)} for i in (0, 0, 1)]
    first, again, other = (apply(variables, image, True, rngs=rng)[-1] for rng in rngs)
    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 0.1 and abs(first - quiet[-1]).max() > 0.1


@pytest.mark.parametrize("height, width", [(64, 96), (65, 33), (5, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_levels_have_strides_4_to_32_at_any_size(height, width, dtype):
    shape = jax.ShapeDtypeStruct((2, height, width, 3), dtype)
    levels, variables = jax.eval_shape(
        partial(Swin(dtype=dtype).init_with_output, train=True), jax.random.key(0), shape
    )
    for i, level in enumerate(levels):
        stride = 4 * 2**i
        assert level.shape == (2, -(-height // stride), -(-width // stride), 96 * 2**i)
        assert level.dtype == jnp.dtype(dtype)
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


@pytest.mark.slow
def test_remat_changes_nothing_but_memory(image, variables):
    def run(model, variables):
        def loss(variables):
            rngs = {"dropout": jax.random.key(0)}
            return sum((x**3).sum() for x in model.apply(variables, image, True, rngs=rngs))

        return jax.jit(jax.value_and_grad(loss))(variables)

    plain, remat = (run(TINY(drop_path=0.3, remat=remat), variables) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(remat)):
        assert abs(a).max() > 0
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(abs(a).max()))


def test_pictures_of_a_batch_do_not_mix(image, variables):
    apply = jax.jit(partial(TINY().apply, train=False))
    for both, one in zip(apply(variables, image), apply(variables, image[1:])):
        np.testing.assert_allclose(both[1:], one, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close_to_float32(image, variables):
    exact, coarse = (
        jax.jit(partial(TINY(dtype=dtype).apply, train=False))(variables, image.astype(dtype))
        for dtype in ("float32", "bfloat16")
    )
    for a, b in zip(coarse, exact):
        assert np.median(abs(a.astype(jnp.float32) - b)) < 0.03 * abs(b).max()
