"""Convolutions in ONNX, in the form that runtimes compute fastest.

What the channels of a result are multiplied by, or what is added to them, as by a frozen norm, becomes
part of the kernel and the bias; and the product of all pixels of a map with a matrix becomes the 1x1
convolution that it is. Between such convolutions runtimes keep maps in a layout of their own, and what
follows one, an addition or an activation, they compute with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import JaxprEqn
from onnx import numpy_helper

from knet_jax.export.onnx_graph import Graph, Tensor
from knet_jax.system.errors import UserError

NHWC = (0, 3, 1, 2)
"""The axes of images, channels, rows and columns; the order in which ONNX has them."""


class Convolution(NamedTuple):
    """What is noted about the result of a convolution."""

    x: str
    """[b, c', h, w]."""
    kernel: np.ndarray
    """[c, c', size, size]."""
    bias: np.ndarray
    """[c]."""
    attributes: Mapping[str, Any]


class Pixels(NamedTuple):
    """What is noted about the pixels of a map [n, c'], or about their product with a matrix."""

    x: str
    """[b, h, w, c']."""
    shape: tuple[Any, ...]
    """(b, h, w)."""
    matrix: np.ndarray | None = None
    """[c', c]."""


def convolve(g: Graph, eqn: JaxprEqn, inputs: list[Tensor]) -> list[Tensor]:
    """The operator of `jax.lax.conv_general_dilated`."""
    params = eqn.params
    layout, kernel = params["dimension_numbers"], inputs[1].array
    if {*params["lhs_dilation"]} != {1} or {layout.lhs_spec, layout.out_spec} != {NHWC}:
        raise UserError("a convolution of dilated inputs, or not of NHWC, has no translation")
    if kernel is None:
        raise UserError("a convolution with a large kernel that is computed has no translation")
    x = g.read(g.fill(inputs[0], eqn.invars[0].aval.shape))
    kernel = np.broadcast_to(kernel, eqn.invars[1].aval.shape).transpose(layout.rhs_spec)
    low, high = zip(*params["padding"])
    attributes = {
        "strides": params["window_strides"],
        "pads": low + high,
        "dilations": params["rhs_dilation"],
        "group": params["feature_group_count"],
    }
    return [Tensor(_add(g, x, kernel, attributes))]


def _add(g: Graph, x: str, kernel: np.ndarray, attributes: Mapping[str, Any]) -> str:
    bias = np.zeros(len(kernel), kernel.dtype)
    return _add_turned(g, Convolution(g.op("Transpose", x, perm=NHWC), kernel, bias, attributes))


def _add_turned(g: Graph, note: Convolution) -> str:
    if g.in_body:
        # onnxruntime packs kernels only if they are constants of the body. The transpose of a constant
        # from outside becomes one when the file is loaded, and the file holds the kernel once.
        kernel = g.op("Transpose", g.constant(note.kernel.transpose(2, 3, 1, 0)), perm=(3, 2, 0, 1))
        bias = g.op("Constant", value=numpy_helper.from_array(note.bias))
    else:
        kernel, bias = g.constant(note.kernel), g.constant(note.bias)
    name = g.op("Conv", note.x, kernel, bias, **note.attributes)
    name = g.op("Transpose", name, perm=np.argsort(NHWC).tolist())
    g.notes[name] = note
    return name


def with_channels(g: Graph, primitive: str, inputs: list[Tensor]) -> str | None:
    """The convolution whose result is the sum or product of one's result and constants of its channels.

    The convolution before stays too where something else reads it.

    Args:
        primitive: `add` or `mul`, else nothing is done.
        inputs: its two sides.

    Returns:
        The name of the result; None where the sides are something else.
    """
    if primitive not in ("add", "mul"):
        return None
    for side, other in (inputs, inputs[::-1]):
        note = g.notes.get(side.name)
        if not isinstance(note, Convolution) or other.array is None or not other.array.shape:
            continue
        if other.array.size == other.array.shape[-1] == len(note.bias):
            channels = other.array.reshape(-1)
            if primitive == "add":
                return _add_turned(g, note._replace(bias=note.bias + channels))
            kernel = note.kernel * channels[:, None, None, None]
            return _add_turned(g, note._replace(kernel=kernel, bias=note.bias * channels))
    return None


def multiply_pixels(g: Graph, x: str, matrix: str) -> str:
    """The product of two matrices."""
    name, note, array = g.op("MatMul", x, matrix), g.notes.get(x), g.constants.get(matrix)
    is_map = isinstance(note, Pixels) and note.matrix is None
    if is_map and array is not None and array.dtype.kind == "f":  # there is no Conv of integers
        g.notes[name] = note._replace(matrix=array)
    return name


def reshape(g: Graph, eqn: JaxprEqn, x: str, *_: str) -> str:
    """The operator of all primitives that change nothing but the shape."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    note = g.notes.get(x)
    if isinstance(note, Pixels) and note.matrix is not None and new[:-1] == note.shape:
        return _add(g, note.x, note.matrix.T[:, :, None, None], {})
    name = g.reshape(x, new)
    if len(old) == 4 and len(new) == 2 and old[3] == new[1]:
        g.notes[name] = Pixels(x, old[:3])
    return name
