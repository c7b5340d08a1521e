"""Networks of every kind of backbone, and weights for them without two equal numbers."""

import functools
import json

import jax
import numpy as np
from tiny_model import MODEL

from knet_jax.model import make_model, variable_shapes

BACKBONES = {
    "resnet": {"depths": (1, 2, 1, 1), "width": 8, "deep_stem": True, "num_deformable": 3},
    "swin": {
        "name": "swin",
        "channels": 8,
        "depths": (1, 1, 2, 1),
        "num_heads": (1, 2, 4, 8),
        "window": 3,
    },
}
TINY = MODEL | {"backbone": MODEL["backbone"] | {"depths": (1, 2, 1, 1), "norm": "frozen_batch"}}


def shapes_of(model):
    """Shapes of the variables of a network, traced once for all tests."""
    return _trace(json.dumps(dict(model), sort_keys=True))


@functools.cache
def _trace(model):
    network = make_model(**json.loads(model))
    return variable_shapes(network)


def fill(shapes):
    """Variables without two equal numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


def zeros(shapes):
    """Variables that take no memory."""
    return jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
