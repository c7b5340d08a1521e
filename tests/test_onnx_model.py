"""Every translation to ONNX computes in onnxruntime what jax computes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from knet_jax.export import onnx_model
from knet_jax.system.errors import UserError

ROWS, COLUMNS = 5, 6


def compare(functions, symbols="b, 5, 6", dtype=np.float32, weights=None):
    """Several functions of one array as one model: in jax and in onnxruntime, for two sizes of what is
    a symbol."""
    weights = weights or {}
    shape = jax.export.symbolic_shape(symbols)

    def program(weights, x):
        return {name: function(x, **weights) for name, function in functions.items()}

    inputs = {"x": jax.ShapeDtypeStruct(shape, dtype)}
    model = onnx_model.convert(program, weights, inputs, lambda outputs: {"about": f"{outputs}"})
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for size in (2, 3):
        sides = [size + i if not isinstance(side, int) else side for i, side in enumerate(shape)]
        x = np.random.default_rng(size).normal(0, 3, sides).astype(dtype)
        names = [output.name for output in session.get_outputs()]
        theirs = dict(zip(names, session.run(None, {"x": x})))
        for name, ours in jax.jit(program)(weights, x).items():
            assert theirs[name].shape == ours.shape, name
            np.testing.assert_allclose(theirs[name], ours, rtol=1e-5, atol=1e-5, err_msg=name)
    return model


ELEMENTWISE = {
    "arithmetic": lambda x: (x + 1) * x - x / 3 + abs(x),
    "exponential": lambda x: jnp.exp(-abs(x)),
    "logarithms": lambda x: jnp.log(abs(x) + 1) + jnp.log1p(x * x),
    "roots": lambda x: jnp.sqrt(x * x) + jax.lax.rsqrt(1 + x * x),
    "curves": lambda x: jax.lax.erf(x) + jax.nn.sigmoid(x),
    "rounding": lambda x: jnp.round(x) + jnp.floor(2 * x) + jnp.sign(x),
    "halves": lambda x: jnp.round(jnp.floor(x) + 0.5),
    "limits": lambda x: jnp.maximum(x, 1) + jnp.minimum(x, 0),
    "choice": lambda x: jnp.where((x > 0) & (x < 2) | (x <= -1), x, 2 * x),
    "choice of truths": lambda x: jnp.where(x > 0, x < 1, x != -2),
    "opposite": lambda x: ~(x > 0),
    "whole numbers": lambda x: x.astype(int) // 2 + x.astype(int) % 3,
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
    "least": lambda x: x.min((0, 2)),
    "place of the largest": lambda x: jnp.round(x).argmax(2),
    "sorted": lambda x: jnp.sort(x, axis=2),
    "order of equals": lambda x: jnp.argsort(jnp.floor(x / 3), axis=2),
    "best": lambda x: jax.lax.top_k(x, 3)[0],
    "places of the best": lambda x: jax.lax.top_k(jnp.floor(x / 3), 3)[1],
    "softmax": partial(jax.nn.softmax, axis=1),
}
PRODUCTS = {
    "matrix": lambda x: x @ jnp.arange(12.0).reshape(COLUMNS, 2),
    "matrices of each": lambda x: x @ x.swapaxes(1, 2),
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
    "a table of rows": lambda x: jnp.take(x, jnp.array([[3, 0], [1, 4]]), axis=1, mode="clip"),
    "part from a computed place": lambda x: jax.lax.dynamic_slice(
        x, (0, jnp.int32(x.sum()) % 3, jnp.int32(x.max()) + 9), (1, 2, 3)
    ),
    "counts": lambda x: (
        jnp.zeros(4, int).at[abs(x.astype(int)).reshape(-1) % 4].add(1, mode="promise_in_bounds")
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


def rounds(x):
    def enough(state):
        return (state[0] < x.shape[0]) & (state[1].max() < limit)

    def take_round(state):
        i, total = state
        return i + 1, total + jnp.take(x, i, axis=0, mode="clip") * factor

    limit, factor = x.max() + 100, x.sum()
    return jax.lax.while_loop(enough, take_round, (jnp.int32(1), x.max(0)))[1]


LOOPS = {
    "rounds": rounds,
    "no round": lambda x: jax.lax.fori_loop(0, jnp.int32(x.max() > 1e6), lambda i, x: x + 1, x),
    "scan": scan,
    "map": lambda x: jax.lax.map(lambda row: jax.lax.map(lambda v: 2 * v.max(), row), x),
    "branches": lambda x: jax.lax.cond(
        jnp.asarray(x.shape[0]) > 2, lambda x: x + 1, lambda x: x * 2 + jnp.arange(6.0), x
    ),
}


def test_every_operator():
    """In two models: in one, operators could read constants that another has made."""
    compare(ELEMENTWISE | REDUCTIONS | GATHERS)
    compare(SHAPES | PRODUCTS | LOOPS)


def convolve(x, kernel, strides, padding, dilation, groups=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def test_pictures():
    def pool(x, kernel):
        window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
        padding = ((0, 0), (1, 1), (1, 1), (0, 0))
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, padding)

    def pool_last(x, kernel):
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 1, 2, 3), (1, 1, 1, 2), "VALID")

    def each_channel(x, kernel):
        plain = partial(convolve, strides=(1, 1), padding="SAME", dilation=(1, 1), groups=3)
        return jax.lax.platform_dependent(
            x, kernel, cpu=lambda x, kernel: -plain(x, -kernel), default=plain
        )

    functions = {
        "same": partial(convolve, strides=(1, 1), padding=((1, 1), (1, 1)), dilation=(1, 1)),
        "uneven": partial(convolve, strides=(2, 2), padding=((0, 1), (2, 1)), dilation=(1, 2)),
        "no padding": partial(convolve, strides=(1, 2), padding="VALID", dilation=(1, 1)),
        "pool": pool,
        "pool of other axes": pool_last,
    }
    kernel = np.random.default_rng(0).normal(0, 1, (3, 3, 3, 4)).astype(np.float32)
    model = compare(functions, "b, 9, 8, 3", weights={"kernel": kernel})
    # Turned once, when it is written, and kept once.
    assert [c.dims for c in model.graph.initializer if len(c.dims) == 4] == [[4, 3, 3, 3]]
    # A file takes the form for platforms without one of their own, wherever it is written.
    kernel = {"kernel": kernel[:, :, :1, :3]}
    model = compare({"each channel": each_channel}, "b, 9, 8, 3", weights=kernel)
    assert "Neg" not in {node.op_type for node in model.graph.node}
    mean = {"mean": lambda x: x.astype(jnp.float32).mean(2) + x.shape[2]}
    compare(mean, "b, H, W", np.uint8)


def test_convolutions_take_in_what_their_channels_are_multiplied_and_shifted_by(tmp_path):
    rng = np.random.default_rng(0)
    kernel, large, wide = (
        rng.normal(0, 1, shape).astype(np.float32)
        for shape in ((3, 3, 3, 4), (1, 1, 3, 5), (1, 1, 2, 40_000))
    )
    factor, shift = np.float32([1, -2, 3, 0.5]), np.float32([5, 6, -7, 8])
    plain = partial(convolve, padding="SAME", dilation=(1, 1), strides=(1, 1))

    def products(x, kernel):
        x = jax.lax.slice(x, (0,) * 4, x.shape, (1,) * 4)  # as a stride of one is written
        return (x.reshape(-1, x.shape[3]) @ kernel[0, 0]).reshape(*x.shape[:3], -1)

    def two_ways(x):
        y = plain(x, kernel)
        return y * factor - y

    def other_pixels(x):
        return (x.reshape(-1, 3) @ large[0, 0]).reshape(-1, 2, 8, 5) + 1

    def branches(x, kernel=large):
        several = jnp.asarray(x.shape[0]) > 2
        more, less = (lambda x, k, n=n: products(x, k) + n * jnp.arange(5.0) for n in (2, 3))
        return jax.lax.cond(several, more, less, x, kernel)

    functions = {
        "norm": lambda x, **_: jax.nn.relu(plain(x, kernel) * factor + shift),
        "shifted before": lambda x, **_: (shift + plain(x, kernel)) * factor[None, None] + shift,
        "product": lambda x, large, **_: products(x, large) * 2 + jnp.arange(5.0),
        "large product": lambda x, wide, **_: products(x[..., :2], wide)[..., ::5000] + 1,
        "of pixels": lambda x, **_: plain(x, kernel) * x[0, :, :, :1],
        "of rows": lambda x, **_: plain(x, kernel) * jnp.arange(4.0)[:, None],
    }
    weights = {"large": large, "wide": wide}
    for name, function in functions.items():
        model = compare({name: function}, "b, 4, 4, 3", weights=weights)
        types = [node.op_type for node in model.graph.node]
        assert types.count("Conv") == 1 and "MatMul" not in types
        if name in ("norm", "shifted before"):
            assert not {"Add", "Mul", "Max"} & {*types}
        assert name != "product" or "Slice" not in types

    def before_a_loop(x):
        y = plain(x, kernel)
        return jax.lax.fori_loop(0, jnp.int32(x.max()) % 2 + 2, lambda _, s: s + y * factor, y)

    square, numbers = np.float32([[1, 2, 3], [0, 1, 0], [2, 0, 1]]), np.arange(12).reshape(3, 4)
    others = {
        "two ways": two_ways,
        "other pixels": other_pixels,
        "two products": lambda x: products(products(x, square[None, None]), large),
        "two products at once": lambda x: (x.reshape(-1, 3) @ square @ large[0, 0]).reshape(
            *x.shape[:3], -1
        ),
        "whole numbers": lambda x: products(x.astype(int), numbers[None, None]),
        "in a loop": lambda x: jax.lax.map(lambda row: plain(row[None], kernel)[0] * factor, x),
        "one for all": lambda x: jnp.broadcast_to(plain(x[:1], kernel), (*x.shape[:3], 4)) * factor,
    }
    compare(others, "b, 4, 4, 3")
    model = compare({"before a loop": before_a_loop}, "b, 4, 4, 3")
    assert [node.op_type for node in model.graph.node].count("Conv") == 1

    model = compare({"branches": branches}, "b, 4, 4, 3")
    assert [c.dims for c in model.graph.initializer if len(c.dims) == 4] == [[1, 1, 3, 5]]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    loaded = onnx.load(tmp_path / "loaded.onnx").graph
    [branching] = [node for node in loaded.node if node.op_type == "If"]
    for branch in branching.attribute:
        constants = [list(c.dims) for c in branch.g.initializer]
        assert [5, 3, 1, 1] in constants and [5] in constants


def test_what_nothing_needs_is_left_out():
    weights = {name: np.ones((3, 2), np.float32) for name in ("used", "unused")}

    def function(x, used, unused):
        return (x * 2, x @ used, unused)[1]

    model = compare({"y": function}, "b, 3", weights=weights)
    assert [c.name for c in model.graph.initializer] == ["used"]
    assert {node.op_type for node in model.graph.node} == {"MatMul", "Identity"}
    assert [p.key for p in model.metadata_props] == ["about"]


def test_a_constant_that_repeats_itself_is_kept_once():
    model = compare({"y": lambda x: x + jnp.ones((400, 300)).reshape(200, 600)}, "b, 200, 600")
    assert model.ByteSize() < 10_000


def test_what_has_no_translation_is_named():
    for function, word in (
        (lambda x: jax.lax.lgamma(x), "lgamma"),
        (lambda x: x[:, ::-1], "rev"),
        (lambda x: jax.lax.scan(lambda c, x: (c, x), 0.0, x, reverse=True)[1], "loop"),
        (lambda x: jnp.take(x, x.sum((0, 1)).astype(int), axis=1, mode="fill"), "gather"),
        (
            lambda x: convolve(x[..., None], x[0, :3, :3, None, None], (1, 1), "SAME", (1, 1)),
            "kernel",
        ),
    ):
        with pytest.raises(UserError, match=word):
            compare({"y": function})
