"""One ONNX operator, or a few, for each primitive of JAX that this project's networks are made of."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import JaxprEqn, jaxpr_as_fun
from onnx import helper

from knet_jax.export.onnx_convolutions import convolve, multiply_pixels, reshape, with_channels
from knet_jax.export.onnx_graph import INTEGER, Graph, Operator, Tensor, onnx_type
from knet_jax.system.errors import UserError

# Element by element: axes of length 1 stretch by themselves.

ELEMENTWISE: dict[str, Any] = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "log1p": lambda g, eqn, x: g.op(
        "Log", g.op("Add", x, g.constant(np.ones((), eqn.outvars[0].aval.dtype)))
    ),
    "logistic": "Sigmoid",
    "lt": "Less",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "not": "Not",
    "or": "Or",
    "sign": "Sign",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "convert_element_type": lambda g, eqn, x: _cast(g, x, eqn.params["new_dtype"]),
    "ne": lambda g, eqn, x, y: g.op("Not", g.op("Equal", x, y)),
    "rem": lambda g, eqn, x, y: g.op("Mod", x, y, fmod=1),
    "rsqrt": lambda g, eqn, x: g.op("Reciprocal", g.op("Sqrt", x)),
    "square": lambda g, eqn, x: g.op("Mul", x, x),
    "name": lambda g, eqn, x: x,
    "stop_gradient": lambda g, eqn, x: x,
}


def _cast(g: Graph, x: str, dtype: Any) -> str:
    return g.op("Cast", x, to=onnx_type(dtype))


def _turn(g: Graph, x: str, axes: list[int]) -> str:
    return x if axes == sorted(axes) else g.op("Transpose", x, perm=axes)


def _round(g: Graph, eqn: JaxprEqn, x: str) -> str:
    if eqn.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise UserError("ONNX rounds halves to even numbers only")
    return g.op("Round", x)


def _select(g: Graph, eqn: JaxprEqn, which: str, *cases: str) -> str:
    dtype = eqn.outvars[0].aval.dtype
    if len(cases) != 2 or eqn.invars[0].aval.dtype != bool:
        raise UserError("ONNX selects between two cases only")
    if dtype != bool:
        return g.op("Where", which, cases[1], cases[0])
    cases = [_cast(g, case, np.uint8) for case in cases]  # runtimes have no kernel for bool
    return _cast(g, g.op("Where", which, cases[1], cases[0]), bool)


def _max(g: Graph, eqn: JaxprEqn, x: str, y: str) -> str:
    # Which runtimes compute together with what comes before.
    return g.op("Relu", x) if y == g.constant(np.float32(0)) else g.op("Max", x, y)


ELEMENTWISE |= {"max": _max, "round": _round, "select_n": _select}


def _elementwise(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    rule = ELEMENTWISE[eqn.primitive.name]
    shape = eqn.outvars[0].aval.shape
    full = any(x.full and v.aval.shape == shape for x, v in zip(inputs, eqn.invars))
    if convolution := with_channels(g, eqn.primitive.name, inputs):
        return [Tensor(convolution, full=full)]
    if isinstance(rule, str):
        if rule in ("And", "Or") and eqn.invars[0].aval.dtype != bool:
            raise UserError(f"there is no ONNX operator for {eqn.primitive.name!r} of numbers")
        name = g.op(rule, *map(g.read, inputs))
    else:
        name = rule(g, eqn, *map(g.read, inputs))
    return [Tensor(name, full=full)]


def _broadcast(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    x, shape = inputs[0], eqn.params["shape"]
    if x.array is None:
        x = g.fill(x, eqn.invars[0].aval.shape)
    ones = [1] * len(shape)
    for axis, size in zip(
        eqn.params["broadcast_dimensions"],
        eqn.invars[0].aval.shape if x.array is None else x.array.shape,
    ):
        ones[axis] = size
    full = tuple(ones) == tuple(shape)
    if x.array is not None:
        return [Tensor("", x.array.reshape(ones), full)]
    if tuple(ones) != eqn.invars[0].aval.shape:
        x = Tensor(g.reshape(x.name, ones))
    return [x._replace(full=full)]


def _transpose(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    [x] = inputs
    if x.array is not None and x.full:
        return [Tensor("", x.array.transpose(eqn.params["permutation"]))]
    name = g.op("Transpose", g.read(x), perm=eqn.params["permutation"])
    return [Tensor(name, full=x.full)]


def _iota(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    shape, axis = eqn.params["shape"], eqn.params["dimension"]
    scalar = g.constant(np.array([], np.int64))
    limits = (g.constant(np.int64(0)), g.op("Reshape", g.dim(shape[axis]), scalar))
    numbers = _cast(g, g.op("Range", *limits, g.constant(np.int64(1))), eqn.params["dtype"])
    ones = [1] * len(shape)
    ones[axis] = -1
    name = g.op("Reshape", numbers, g.constant(np.int64(ones)))
    return [Tensor(name, full=len(shape) == 1)]


def _gather(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    """A constant window; or whole slices at indices of one axis, in each element of those batched."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    shape, rank = eqn.invars[0].aval.shape, eqn.invars[0].aval.ndim
    x, indices = (g.fill(t, v.aval.shape) for t, v in zip(inputs, eqn.invars))
    sizes = params["slice_sizes"]
    if indices.array is not None and indices.array.ndim == 1:
        axes = numbers.start_index_map
        start = g.constant(indices.array.astype(np.int64))
        end = g.op("Add", start, g.shape([sizes[axis] for axis in axes]))
        y = g.op("Slice", g.read(x), start, end, g.constant(np.int64(axes)))
        return [Tensor(g.reshape(y, eqn.outvars[0].aval.shape))]

    batch, axes = numbers.operand_batching_dims, numbers.start_index_map
    whole = [i for i in range(rank) if i not in (*batch, *axes)]
    plain = (
        len(axes) == 1
        and tuple(numbers.collapsed_slice_dims) == tuple(axes)
        and all(sizes[i] == shape[i] for i in whole)
        and tuple(numbers.start_indices_batching_dims) == tuple(range(len(batch)))
    )
    modes = jax.lax.GatherScatterMode
    if not plain or params["mode"] not in (modes.CLIP, modes.PROMISE_IN_BOUNDS):
        raise UserError(f"a gather of {numbers} and {params['mode']} has no translation")
    places = _cast(g, g.read(indices), np.int64)  # the last axis, of length 1, has the coordinates
    if params["mode"] == modes.CLIP:
        limit = g.op("Sub", g.dim(shape[axes[0]]), g.constant(np.int64([1])))
        places = g.op("Max", g.op("Min", places, limit), g.constant(np.int64([0])))
    # JAX names where the axes of the slices are in the result; the others are those of the indices.
    slices = list(numbers.offset_dims)
    others = [i for i in range(eqn.outvars[0].aval.ndim) if i not in slices]
    if batch:
        y = _turn(g, g.read(x), [*batch, *axes, *whole])
        y = g.op("GatherND", y, places, batch_dims=len(batch))
        order = [*others, *slices]
    else:
        places = g.reshape(places, eqn.invars[1].aval.shape[:-1])
        y = g.op("Gather", g.read(x), places, axis=axes[0])
        order = [*slices[: axes[0]], *others, *slices[axes[0] :]]
    return [Tensor(_turn(g, y, np.argsort(order).tolist()))]


def _scatter_add(g: Graph, eqn: JaxprEqn, x: str, places: str, updates: str) -> str:
    """Numbers that are added to those of a list."""
    if eqn.invars[0].aval.ndim != 1 or eqn.params["dimension_numbers"].update_window_dims:
        raise UserError("what is added to slices, or to more than one axis, has no translation")
    places = g.reshape(_cast(g, places, np.int64), eqn.invars[2].aval.shape)
    return g.op("ScatterElements", x, places, updates, axis=0, reduction="add")


# Everything else.


def _reduce(op: str) -> Callable[..., str]:
    def translate(g: Graph, eqn: JaxprEqn, x: str) -> str:
        axes = g.constant(np.int64(eqn.params["axes"]))
        return g.op(op, x, axes, keepdims=0)

    return translate


def _argmax(g: Graph, eqn: JaxprEqn, x: str) -> str:
    [axis] = eqn.params["axes"]
    return _cast(g, g.op("ArgMax", x, axis=axis, keepdims=0), eqn.params["index_dtype"])


def _concatenate(g: Graph, eqn: JaxprEqn, *parts: str) -> str:
    parts = [part for part, v in zip(parts, eqn.invars) if 0 not in v.aval.shape]
    return g.op("Concat", *parts, axis=eqn.params["dimension"])


def _stack(g: Graph, eqn: JaxprEqn, *parts: str) -> str:
    axis = eqn.params["axis"]
    parts = [g.op("Unsqueeze", part, g.constant(np.int64([axis]))) for part in parts]
    return g.op("Concat", *parts, axis=axis)


def _pad(g: Graph, eqn: JaxprEqn, x: str, value: str) -> str:
    low, high, inner = zip(*eqn.params["padding_config"])
    if any(inner) or any(isinstance(n, INTEGER) and n < 0 for n in low + high):
        raise UserError("ONNX pads at the ends only")
    return g.op("Pad", x, g.shape(low + high), value)


def _slice(g: Graph, eqn: JaxprEqn, x: str) -> str:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or [1] * len(start)
    if not any(start) and tuple(limit) == eqn.invars[0].aval.shape and {*steps} == {1}:
        return x
    axes = g.constant(np.arange(len(start)))
    return g.op("Slice", x, g.shape(start), g.shape(limit), axes, g.shape(steps))


def _dynamic_slice(g: Graph, eqn: JaxprEqn, x: str, *starts: str) -> str:
    sizes, zero = g.shape(eqn.params["slice_sizes"]), g.constant(np.int64([0]))
    last = g.op("Sub", g.shape(eqn.invars[0].aval.shape), sizes)
    starts = [
        g.op("Reshape", _cast(g, start, np.int64), g.constant(np.int64([1]))) for start in starts
    ]
    start = g.op("Max", g.op("Min", g.op("Concat", *starts, axis=0), last), zero)
    axes = g.constant(np.arange(len(starts)))
    return g.op("Slice", x, start, g.op("Add", start, sizes), axes)


def _split(g: Graph, eqn: JaxprEqn, x: str) -> list[str]:
    names = [g.new_name("split") for _ in eqn.outvars]
    sizes = g.shape(eqn.params["sizes"])
    g.nodes.append(helper.make_node("Split", [x, sizes], names, axis=eqn.params["axis"]))
    return names


def _unstack(g: Graph, eqn: JaxprEqn, x: str) -> list[str]:
    """How jax takes an array apart from 0.12 on; before, it was a split."""
    axis = eqn.params["axis"]
    parts = [g.new_name("unstack") for _ in eqn.outvars]
    sizes = g.constant(np.ones(len(parts), np.int64))
    g.nodes.append(helper.make_node("Split", [x, sizes], parts, axis=axis))
    return [g.op("Squeeze", part, g.constant(np.int64([axis]))) for part in parts]


def _dot(g: Graph, eqn: JaxprEqn, x: str, y: str) -> str:
    contract, batch = eqn.params["dimension_numbers"]
    ranks = [v.aval.ndim for v in eqn.invars]
    stacked = tuple(range(ranks[1] - 2))  # axes over matrices that lie in the same places
    in_place = contract == ((ranks[0] - 1,), (ranks[1] - 2,)) and batch == (stacked, stacked)
    if in_place and (not stacked or ranks[0] == ranks[1]):
        return multiply_pixels(g, x, y)
    letters = iter(string.ascii_letters)
    names = [[next(letters) for _ in range(rank)] for rank in ranks]
    for first, second in (*zip(*contract), *zip(*batch)):
        names[1][second] = names[0][first]
    shared = [names[0][axis] for axis in batch[0]]
    gone = {names[0][axis] for axis in contract[0]} | set(shared)
    free = [letter for side in names for letter in side if letter not in gone]
    equation = f"{''.join(names[0])},{''.join(names[1])}->{''.join(shared + free)}"
    return g.op("Einsum", x, y, equation=equation)


def _max_pool(g: Graph, eqn: JaxprEqn, x: str) -> str:
    params = eqn.params
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    window, strides, padding = (
        params[key] for key in ("window_dimensions", "window_strides", "padding")
    )
    axes = [i for i in range(len(window)) if (window[i], strides[i], padding[i]) != (1, 1, (0, 0))]
    if dilations != {1} or len(window) != 4 or len(axes) > 2:
        raise UserError("a pooling that is not of rows and columns has no translation")
    # The other axes first.
    order = sorted(range(4), key=lambda i: (i in axes, i))
    window, strides, padding = ([each[i] for i in order[2:]] for each in (window, strides, padding))
    low, high = zip(*padding)
    x = _turn(g, x, order)
    y = g.op("MaxPool", x, kernel_shape=window, strides=strides, pads=low + high)
    return _turn(g, y, np.argsort(order).tolist())


def _top_k(g: Graph, eqn: JaxprEqn, x: str) -> list[str]:
    axis = eqn.params.get("axis", eqn.invars[0].aval.ndim - 1)
    return _ranked(g, x, eqn.params["k"], axis, eqn.outvars[1].aval.dtype, largest=1)


def _sort(g: Graph, eqn: JaxprEqn, keys: str, *others: str) -> list[str]:
    axis, size = eqn.params["dimension"], eqn.invars[0].aval.shape[eqn.params["dimension"]]
    if eqn.params["num_keys"] != 1:
        raise UserError("ONNX sorts by one key only")
    keys, places = _ranked(g, keys, size, axis, np.int64, largest=0)
    return [keys, *(g.op("GatherElements", x, places, axis=axis) for x in others)]


def _ranked(g: Graph, x: str, count: Any, axis: int, dtype: Any, largest: int) -> list[str]:
    """The first so many and where they were; of equals the first stays the first."""
    values, places = g.new_name("topk"), g.new_name("topk")
    node = helper.make_node("TopK", [x, g.dim(count)], [values, places], axis=axis, largest=largest)
    g.nodes.append(node)
    return [values, _cast(g, places, dtype)]


def _scan(g: Graph, eqn: JaxprEqn, *inputs: str) -> list[str]:
    body = eqn.params["jaxpr"]
    # Told by their ranks: how parameters of the primitive count them differs between versions of JAX.
    num_xs = sum(v.aval.ndim > a.ndim for v, a in zip(eqn.invars, body.in_avals))
    num_carry = sum(v.aval.ndim == a.ndim for v, a in zip(eqn.outvars, body.out_avals))
    num_consts = len(inputs) - num_carry - num_xs
    if eqn.params["reverse"] or not num_xs:
        raise UserError("a loop backwards, or over nothing, has no translation")
    consts = [Tensor(name, g.constants.get(name)) for name in inputs[:num_consts]]
    looped = [Tensor(g.new_name("step")) for _ in inputs[num_consts:]]
    graph = g.body("step", body, [*consts, *looped], list(zip(looped, body.in_avals[num_consts:])))
    names = [g.new_name("scan") for _ in eqn.outvars]
    node = helper.make_node("Scan", inputs[num_consts:], names, body=graph, num_scan_inputs=num_xs)
    g.nodes.append(node)
    return names


def _platform_index(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    """What is computed on platforms of no form of their own."""
    return [Tensor("", np.int32(eqn.params["platforms"].index(None)))]


def _branch(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    branches = eqn.params["branches"]
    which, *arguments = inputs
    if which.array is not None:
        return g.run(branches[which.array], arguments)
    if len(branches) != 2:
        raise UserError("ONNX has branches of two cases only")
    shapes = [v.aval.shape for v in eqn.invars[1:]]
    arguments = [g.fill(x, shape) for x, shape in zip(arguments, shapes)]
    no, yes = (g.body("branch", branch, arguments, []) for branch in branches)
    names = [g.new_name("if") for _ in eqn.outvars]
    which = _cast(g, which.name, bool)
    g.nodes.append(helper.make_node("If", [which], names, then_branch=yes, else_branch=no))
    return [Tensor(name) for name in names]


def _while(g: Graph, eqn: JaxprEqn, *inputs: str) -> list[str]:
    goes_on, step = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    num_read, num_others = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    num_consts = num_read + num_others
    consts = [Tensor(name, g.constants.get(name)) for name in inputs[:num_consts]]
    state = inputs[num_consts:]
    [begins] = g.run(goes_on, [*consts[:num_read], *map(Tensor, state)])

    def take_round(*arguments: jax.Array) -> list[jax.Array]:
        """Whether the loop goes on, and the next state: what the body of an ONNX Loop returns."""
        state = jaxpr_as_fun(step)(*arguments[num_read:])
        return [*jaxpr_as_fun(goes_on)(*arguments[:num_read], *state), *state]

    looped = [Tensor(g.new_name("state")) for _ in state]
    avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars]
    closed = jax.make_jaxpr(take_round)(*avals)
    count, going = (Tensor(g.new_name("round")) for _ in range(2))
    number, truth = (jax.ShapeDtypeStruct((), dtype) for dtype in (np.int64, bool))
    described = [(count, number), (going, truth), *zip(looped, avals[num_consts:])]
    graph = g.body("round", closed, [*consts, *looped], described)
    names = [g.new_name("while") for _ in eqn.outvars]
    g.nodes.append(helper.make_node("Loop", ["", g.read(begins), *state], names, body=graph))
    return names


def _dim_as_value(g: Graph, eqn: JaxprEqn) -> str:
    scalar = g.op("Reshape", g.dim(eqn.params["dim"]), g.constant(np.array([], np.int64)))
    return _cast(g, scalar, eqn.outvars[0].aval.dtype)


def _plain(translate: Callable[..., str | list[str]]) -> Operator:
    """An operator of tensors whose axes have their length, by their names."""

    def operator(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
        names = [g.read(g.fill(x, v.aval.shape)) for x, v in zip(inputs, eqn.invars)]
        results = translate(g, eqn, *names)
        return [Tensor(name) for name in ([results] if isinstance(results, str) else results)]

    return operator


PLAIN: dict[str, Callable[..., str | list[str]]] = {
    "argmax": _argmax,
    "concatenate": _concatenate,
    "dim_as_value": _dim_as_value,
    "dot_general": _dot,
    "dynamic_slice": _dynamic_slice,
    "pad": _pad,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _max_pool,
    "reshape": reshape,
    "scan": _scan,
    "scatter-add": _scatter_add,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": reshape,
    "stack": _stack,
    "top_k": _top_k,
    "unstack": _unstack,
    "while": _while,
}

OPERATORS: dict[str, Operator] = {
    **{name: _plain(translate) for name, translate in PLAIN.items()},
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "broadcast_in_dim": _broadcast,
    "cond": _branch,
    "conv_general_dilated": convolve,
    "gather": _gather,
    "iota": _iota,
    "platform_index": _platform_index,
    "transpose": _transpose,
}
"""What translates a primitive of JAX, by its name. Most need axes of their full length; those at the
end do not, or look at constants."""
