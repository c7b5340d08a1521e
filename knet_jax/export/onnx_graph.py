"""An ONNX model as it grows, and the walk through a traced function that makes it grow.

Sizes may be symbols, as `jax.export` makes them; they become computations on the shapes of the inputs.
Constants are shared, and small results of constants are computed here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import jax
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from onnx import helper

from knet_jax.system.errors import UserError

FOLD = 1 << 16
"""Constants of at most so many elements are computed here rather than by the model."""

INTEGER = (int, np.integer)
"""Sizes that are known."""

WIDE = {"int8": "int32", "int16": "int32", "uint16": "int32"}
"""Types that runtimes have few kernels for, and what they are computed in."""

VIEWS = ("reshape", "squeeze")
"""Primitives that are computed here for constants of any size: a file grows by none of them."""

UNFOLDED = ("dim_as_value", "platform_index")
"""Primitives without inputs whose results are not those of this machine."""

CALLS = ("jit", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")
"""Primitives that are programs of their own."""


class Tensor(NamedTuple):
    """A value of the model: a constant, or the name of what a node makes."""

    name: str
    array: np.ndarray | None = None
    full: bool = True
    """Whether its axes have their length; those of a broadcast may still be 1."""


Operator = Callable[["Graph", JaxprEqn, list[Tensor]], list[Tensor]]
"""What adds the nodes of a primitive, and gives their results."""


def onnx_type(dtype: Any) -> int:
    """The number that ONNX has for the type in which values of a type are computed."""
    return helper.np_dtype_to_tensor_dtype(wide_dtype(dtype))


def wide_dtype(dtype: Any) -> np.dtype:
    """The type in which values of a type are computed."""
    return np.dtype(WIDE.get(np.dtype(dtype).name, dtype))


class Dim:
    """A size that the model computes: an int64 tensor [1] by its name. It adds, and multiplies."""

    def __init__(self, graph: Graph, name: str):
        self.graph, self.name = graph, name

    @classmethod
    def of(cls, graph: Graph, op: str, *sides: Any) -> Dim:
        """What an operator makes of two sizes, numbers or symbols."""
        names = [graph.dim(side) if isinstance(side, INTEGER) else side.name for side in sides]
        return cls(graph, graph.op(op, *names, outside=True))

    def __add__(self, other: Any) -> Dim:
        return self.of(self.graph, "Add", self, other)

    def __sub__(self, other: Any) -> Dim:
        return self.of(self.graph, "Sub", self, other)

    def __mul__(self, other: Any) -> Dim:
        return self.of(self.graph, "Mul", self, other)

    def __neg__(self) -> Dim:
        return self * -1

    __radd__, __rmul__ = __add__, __mul__


class Graph:
    """The model as it grows, by operators that are named after primitives of JAX."""

    def __init__(self, operators: Mapping[str, Operator]):
        self._operators = operators
        self.constants: dict[str, np.ndarray] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.notes: dict[str, Any] = {}
        """What an operator notes about a tensor, by its name, for those that come after."""
        self._top = self.nodes
        self._count = 0
        self._named: dict[Any, str] = {}
        self._dims: dict[str, Dim] = {}

    @property
    def in_body(self) -> bool:
        """Whether what grows is the body of a loop or a branch."""
        return self.nodes is not self._top

    # Nodes and constants.

    def new_name(self, kind: str) -> str:
        """A name that nothing has yet."""
        self._count += 1
        return f"{kind.lower()}_{self._count}"

    def op(self, op: str, *inputs: str, outside: bool = False, **attributes: Any) -> str:
        """Adds a node of one result, and gives its name; `outside` of all bodies if asked."""
        name = self.new_name(op)
        node = helper.make_node(op, inputs, [name], name=name, **attributes)
        (self._top if outside else self.nodes).append(node)
        return name

    def constant(self, array: np.ndarray, name: str | None = None) -> str:
        """The name of a constant; equal ones have one."""
        array = np.asarray(array, wide_dtype(array.dtype))
        key = name or (array.dtype.str, array.shape, sha256(array.tobytes()).digest())
        if key not in self._named:
            self._named[key] = name or self.new_name("constant")
            self.constants[self._named[key]] = array
        return self._named[key]

    def read(self, tensor: Tensor) -> str:
        """The name under which nodes find a tensor."""
        if tensor.array is None:
            return tensor.name
        return self.constant(tensor.array, tensor.name or None)

    # Sizes.

    def add_dims(self, name: str, shape: Sequence[Any]) -> None:
        """Makes the symbols of an input's shape known."""
        for i, size in enumerate(shape):
            if not isinstance(size, INTEGER) and str(size) not in self._dims:
                size_name = self.op("Shape", name, start=i, end=i + 1)
                self._dims[str(size)] = Dim(self, size_name)

    def dim(self, size: Any) -> str:
        """The name of an int64 tensor [1] that holds a size."""
        if isinstance(size, INTEGER):
            return self.constant(np.int64([size]))
        text = str(size)
        if text not in self._dims:
            # The text of a symbolic size is an expression of this grammar, which JAX documents.
            operators = {"floordiv": "Div", "mod": "Mod", "max": "Max", "min": "Min"}
            functions = {name: partial(Dim.of, self, op) for name, op in operators.items()}
            self._dims[text] = eval(text, {"__builtins__": {}}, functions | self._dims)
        return self._dims[text].name

    def shape(self, sizes: Sequence[Any]) -> str:
        """The name of an int64 tensor that holds a shape."""
        if is_static(sizes):
            return self.constant(np.array(sizes, np.int64))
        return self.op("Concat", *map(self.dim, sizes), axis=0)

    def reshape(self, name: str, sizes: Sequence[Any]) -> str:
        """A tensor in another shape."""
        symbols = [size for size in sizes if not isinstance(size, INTEGER)]
        if len(symbols) == 1:
            sizes = [size if isinstance(size, INTEGER) else -1 for size in sizes]
        return self.op("Reshape", name, self.shape(sizes))

    def fill(self, tensor: Tensor, shape: Sequence[Any]) -> Tensor:
        """A tensor whose axes have their length, which `shape` says."""
        if tensor.full:
            return tensor
        return Tensor(self.op("Expand", self.read(tensor), self.shape(shape)))

    # Programs.

    def run(self, closed: ClosedJaxpr | Jaxpr, arguments: Sequence[Tensor]) -> list[Tensor]:
        """Adds the nodes of a program, and gives its results."""
        consts = getattr(closed, "consts", ())
        jaxpr = getattr(closed, "jaxpr", closed)
        values = dict(zip(jaxpr.invars, arguments))
        values |= {v: Tensor("", np.asarray(c)) for v, c in zip(jaxpr.constvars, consts)}

        def value(atom: Any) -> Tensor:
            if isinstance(atom, Literal):
                return Tensor("", np.asarray(atom.val, atom.aval.dtype))
            return values[atom]

        for eqn in jaxpr.eqns:
            values |= zip(eqn.outvars, self._translate(eqn, [value(v) for v in eqn.invars]))
        return [self.fill(value(v), v.aval.shape) for v in jaxpr.outvars]

    def body(
        self, name: str, closed: ClosedJaxpr, arguments: Sequence[Tensor], inputs: Sequence[Any]
    ) -> onnx.GraphProto:
        """The graph of a loop's or a branch's body, which sees everything outside of it."""
        outer, self.nodes = self.nodes, []
        notes, self.notes = self.notes, {}  # what is outside is computed there, once
        results = []
        for result in self.run(closed, arguments):
            results.append(self.op("Identity", self.read(result)))
        nodes, self.nodes, self.notes = self.nodes, outer, notes

        def describe(name: str, aval: Any) -> onnx.ValueInfoProto:
            # Runtimes do not see through loops: they are told the sizes that are known.
            shape = [size if isinstance(size, INTEGER) else None for size in aval.shape]
            return helper.make_tensor_value_info(name, onnx_type(aval.dtype), shape)

        return helper.make_graph(
            nodes,
            name,
            [describe(a.name, v) for a, v in inputs],
            [describe(r, v) for r, v in zip(results, closed.out_avals)],
        )

    def _translate(self, eqn: JaxprEqn, inputs: list[Tensor]) -> Sequence[Tensor]:
        name = eqn.primitive.name
        if name in CALLS:
            inner = eqn.params.get("jaxpr") or eqn.params["call_jaxpr"]
            return self.run(inner, inputs)
        if name not in UNFOLDED and (folded := _fold(eqn, inputs)):
            return folded
        if name not in self._operators:
            raise UserError(f"there is no ONNX operator for the primitive {name!r} of jax")
        return self._operators[name](self, eqn, inputs)


def _fold(eqn: JaxprEqn, inputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Results that are empty, or small and of constants alone; else None."""
    sizes = [math.prod(v.aval.shape) for v in eqn.outvars if is_static(v.aval.shape)]
    if len(sizes) == len(eqn.outvars) and not any(sizes):  # runtimes differ on empty tensors
        return [Tensor("", np.zeros(v.aval.shape, v.aval.dtype)) for v in eqn.outvars]
    if len(sizes) < len(eqn.outvars) or any(x.array is None for x in inputs):
        return None
    if sum(sizes) > FOLD and not (eqn.primitive.name in VIEWS and inputs[0].full):
        return None
    arrays = [np.broadcast_to(x.array, v.aval.shape) for x, v in zip(inputs, eqn.invars)]
    with jax.ensure_compile_time_eval():
        results = eqn.primitive.bind(*map(jax.numpy.asarray, arrays), **eqn.params)
    results = results if eqn.primitive.multiple_results else [results]
    return [Tensor("", np.asarray(result)) for result in results]


def is_static(shape: Sequence[Any]) -> bool:
    """Whether all sizes of a shape are known."""
    return all(isinstance(size, INTEGER) for size in shape)
