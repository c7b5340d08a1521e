"""From a traced function to an ONNX model.

Only what the networks and results of this project are made of is understood (`onnx_operators.py`);
anything else is refused by name. The `onnx` package is an optional dependency.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from onnx import helper, numpy_helper

from knet_jax.export.onnx_graph import INTEGER, Graph, Tensor, onnx_type
from knet_jax.export.onnx_operators import OPERATORS

OPSET = 18
IR_VERSION = 9
"""What runtimes of 2023 already read."""


def convert(
    function: Callable[..., Mapping[str, jax.Array]],
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, jax.ShapeDtypeStruct],
    properties: Callable[[Mapping[str, Any]], Mapping[str, str]],
) -> onnx.ModelProto:
    """The model of `function(weights, *inputs)`, which returns named arrays.

    Args:
      function: of jax.
      weights: by name, kept in the model.
      inputs: their shapes by name; symbols must stand alone in a shape, as "b" and not "2*b".
      properties: texts that are kept with the model, by the shapes of its outputs.

    Raises:
      ValueError: a primitive, or a variant of one, has no translation.
    """
    shapes = {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()}
    closed, outputs = jax.make_jaxpr(function, return_shape=True)(shapes, *inputs.values())
    graph = Graph(OPERATORS)
    for name, struct in inputs.items():
        graph.add_dims(name, struct.shape)
    flat = [Tensor(name, weights[name]) for name in jax.tree.leaves({n: n for n in shapes})]
    arguments = [*flat, *map(Tensor, inputs)]
    results = graph.run(closed, arguments)
    names = jax.tree.leaves({name: name for name in outputs})
    for name, result in zip(names, results):
        graph.nodes.append(helper.make_node("Identity", [graph.read(result)], [name]))

    def describe(name: str, struct: jax.ShapeDtypeStruct) -> onnx.ValueInfoProto:
        shape = [d if isinstance(d, INTEGER) else str(d) for d in struct.shape]
        return helper.make_tensor_value_info(name, onnx_type(struct.dtype), shape)

    nodes, used = _prune(graph.nodes, set(names))
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "knet",
            [describe(name, struct) for name, struct in inputs.items()],
            [describe(name, outputs[name]) for name in names],
            [
                numpy_helper.from_array(a, name)
                for name, a in graph.constants.items()
                if name in used
            ],
        ),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="knet_jax",
    )
    helper.set_model_props(model, dict(properties(outputs)))
    return model


def _prune(
    nodes: Sequence[onnx.NodeProto], wanted: set[str]
) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that some results need, and the names of everything that they need."""
    kept, wanted = [], set(wanted)
    for node in reversed(nodes):
        if wanted.isdisjoint(node.output):
            continue
        kept.append(node)
        wanted.update(node.input)
        for body in (attribute.g for attribute in node.attribute if attribute.HasField("g")):
            inner, names = _prune(body.node, {output.name for output in body.output})
            del body.node[:]
            body.node.extend(inner)
            wanted |= names
    return kept[::-1], wanted
