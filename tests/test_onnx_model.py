"""Every translation to ONNX computes in onnxruntime what jax computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")
onnx_model = pytest.importorskip("knet_jax.onnx_model")
onnx = pytest.importorskip("onnx")

ROWS, COLUMNS = 5, 6


def both(function, symbols="b, 5, 6", dtype=np.float32, weights=None):
    """A function of one array, in jax and in onnxruntime, for two sizes of what is a symbol."""
    weights = weights or {}
    shape = jax.export.symbolic_shape(symbols)
    inputs = {"x": jax.ShapeDtypeStruct(shape, dtype)}
    named = lambda weights, x: {"y": function(x, **weights)}
    model = onnx_model.convert(named, weights, inputs, lambda outputs: {"about": f"{outputs['y']}"})
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 2
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    for size in (2, 3):
        sides = [size + i if not isinstance(s, int) else s for i, s in enumerate(shape)]
        x = np.random.default_rng(size).normal(0, 3, sides).astype(dtype)
        [theirs] = session.run(None, {"x": x})
        ours = np.asarray(jax.jit(function)(x, **weights))
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs, ours, rtol=1e-5, atol=1e-5)
    return model


ELEMENTWISE = {
    "arithmetic": lambda x: (x + 1) * x - x / 3 + abs(x),
    "functions": lambda x: jnp.exp(-abs(x)) + jnp.log(1 + x * x) + jnp.log1p(x * x),
    "roots": lambda x: jnp.sqrt(x * x) + jax.lax.rsqrt(1 + x * x),
    "curves": lambda x: jax.lax.erf(x) + jax.nn.sigmoid(x),
    "rounding": lambda x: jnp.round(x) + jnp.floor(2 * x) + jnp.sign(x),
    "halves": lambda x: jnp.round(jnp.floor(x) + 0.5),
    "limits": lambda x: jnp.maximum(x, 1) + jnp.minimum(x, 0),
    "choice": lambda x: jnp.where((x > 0) & (x < 2) | (x <= -1), x, 2 * x),
    "choice of truths": lambda x: jnp.where(x > 0, x < 1, x != -2),
    "whole numbers": lambda x: (x.astype(int) // 2, x.astype(int) % 3)[1] + jnp.int32(4),
    "remainder": lambda x: jax.lax.rem(x.astype(jnp.int32), jnp.int32(3)),
    "types": lambda x: x.astype(jnp.int16) * jnp.int16(2),
}
SHAPES = {
    "transposed": lambda x: x.transpose(2, 0, 1),
    "reshaped": lambda x: x.reshape(-1, ROWS * COLUMNS),
    "joined axes": lambda x: x.reshape(-1, COLUMNS),
    "broadcast": lambda x: x + jnp.arange(COLUMNS) + jnp.arange(ROWS)[:, None],
    "broadcast of a result": lambda x: jnp.broadcast_to(x.sum(2)[:, None], (x.shape[0], 3, ROWS)),
    "ones stretch": lambda x: jnp.broadcast_to(x[:, :1], x.shape) * 2,
    "part": lambda x: x[:, 1:4, -2:],
    "steps": lambda x: jax.lax.slice(x, (0, 1, 0), x.shape, (1, 2, 3)),
    "one": lambda x: x[:, 2],
    "concatenated": lambda x: jnp.concatenate([x, x[:, :2]], axis=1),
    "stacked": lambda x: jnp.stack([x, 2 * x], axis=2),
    "taken apart": lambda x: sum(row * i for i, row in enumerate(jnp.unstack(x, axis=1))),
    "split": lambda x: jnp.split(x, 3, axis=2)[1],
    "padded": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 3)), constant_values=7.0),
    "edges repeated": lambda x: jnp.pad(x, ((0, 0), (1, 1), (0, 0)), mode="edge"),
    "rolled": lambda x: jnp.roll(x, (1, -2), (1, 2)),
    "empty part": lambda x: jnp.concatenate([x[:, :0], x], axis=1),
    "size as a number": lambda x: x * jnp.asarray(x.shape[0]),
    "numbers of a symbol": lambda x: x[:, 0, 0] + jnp.arange(x.shape[0]),
    "size computed": lambda x: jnp.broadcast_to(
        x[:, :1, :1], (x.shape[0], (x.shape[0] + 3) // 4 * 4 - 1, 2)
    ),
}
REDUCTIONS = {
    "sum": lambda x: x.sum((1, 2)),
    "mean": lambda x: x.mean((0, 2)),
    "largest": lambda x: x.max(1),
    "place of the largest": lambda x: jnp.round(x).argmax(2),
    "sorted": lambda x: jnp.sort(x, axis=2),
    "order of equals": lambda x: jnp.argsort(jnp.floor(x / 3), axis=2),
    "best": lambda x: jax.lax.top_k(x, 3)[0],
    "places of the best": lambda x: jax.lax.top_k(jnp.floor(x / 3), 3)[1],
    "softmax": partial(jax.nn.softmax, axis=1),
}
PRODUCTS = {
    "matrix": lambda x: x @ jnp.arange(12.0).reshape(COLUMNS, 2),
    "batched": lambda x: jnp.einsum("bij,bkj->bik", x, x),
    "two axes": lambda x: jnp.einsum("bij,cij->bc", x, x),
    "from the left": lambda x: jnp.einsum("ki,bij->bkj", jnp.arange(10.0).reshape(2, ROWS), x),
}
GATHERS = {
    "rows": lambda x: jnp.take(x, jnp.array([3, 0, 0]), axis=1, mode="clip"),
    "computed rows": lambda x: jnp.take(x, x.sum((0, 1)).astype(int), axis=1, mode="clip"),
    "rows of each": lambda x: jax.vmap(partial(jnp.take, axis=0, mode="clip"))(
        x, jnp.round(x[:, 0, :4]).astype(int)
    ),
    "elements of each": lambda x: jnp.take_along_axis(
        x, jnp.argsort(x, axis=2), axis=2, mode="promise_in_bounds"
    ),
    "columns of each": lambda x: jax.vmap(partial(jnp.take, axis=1, mode="clip"))(
        x, jnp.round(x[:, 0, :4]).astype(int)
    ),
}


def scan(x):
    def step(total, row):
        return total + row, (total * row).sum() + largest

    largest = x.max()
    total, sums = jax.lax.scan(step, jnp.zeros((ROWS, COLUMNS)), x)
    return total.sum() + sums


LOOPS = {
    "scan": scan,
    "map": lambda x: jax.lax.map(lambda row: jax.lax.map(lambda v: 2 * v.max(), row), x),
    "branches": lambda x: jax.lax.cond(
        jnp.asarray(x.shape[0]) > 2, lambda x: x + 1, lambda x: x * 2 + jnp.arange(6.0), x
    ),
}
ALL = ELEMENTWISE | SHAPES | REDUCTIONS | PRODUCTS | GATHERS | LOOPS


@pytest.mark.parametrize("name", ALL)
def test_translation(name):
    both(ALL[name])


@pytest.mark.parametrize(
    "strides, padding, dilation, kernel",
    [
        ((1, 1), ((1, 1), (1, 1)), (1, 1), 3),
        ((2, 2), ((0, 1), (2, 1)), (1, 2), 3),
        ((1, 2), "VALID", (1, 1), 2),
    ],
)
def test_convolution(strides, padding, dilation, kernel):
    rng = np.random.default_rng(0)
    weights = {"kernel": rng.normal(0, 1, (kernel, kernel, 3, 4)).astype(np.float32)}

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            strides,
            padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    model = both(convolve, "b, 9, 8, 3", weights=weights)
    [constant] = [c.name for c in model.graph.initializer]
    assert constant.startswith("kernel")  # once, as runtimes want it


def test_pooling():
    def pool(x):
        window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    both(pool, "b, 9, 8, 3")


def test_two_symbols_and_pictures():
    both(lambda x: x.astype(jnp.float32).mean(2) + x.shape[2], "b, H, W", np.uint8)


def test_what_nothing_needs_is_left_out():
    weights = {name: np.ones((3, 2), np.float32) for name in ("used", "unused")}

    def function(x, used, unused):
        return (x * 2, x @ used, unused)[1]

    model = both(function, "b, 3", weights=weights)
    assert [c.name for c in model.graph.initializer] == ["used"]
    assert {node.op_type for node in model.graph.node} == {"MatMul", "Identity"}
    assert [p.key for p in model.metadata_props] == ["about"]


@pytest.mark.parametrize(
    "function, word",
    [
        (lambda x: jax.lax.lgamma(x), "lgamma"),
        (lambda x: x[:, ::-1], "rev"),
        (lambda x: jax.lax.scan(lambda c, x: (c, x), 0.0, x, reverse=True)[1], "loop"),
        (lambda x: jnp.take(x, x.sum((0, 1)).astype(int), axis=1, mode="fill"), "gather"),
    ],
)
def test_what_has_no_translation_is_named(function, word):
    with pytest.raises(ValueError, match=word):
        both(function)
