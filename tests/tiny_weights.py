"""Networks of every kind of backbone, and weights for them without two equal numbers."""

import jax
import jax.numpy as jnp
import numpy as np
from tiny_model import MODEL

from knet_jax.model import make_model

BACKBONES = {
    "deep stem": {"depths": (1, 2, 1, 1), "width": 8, "deep_stem": True},
    "deformable": {"depths": (1, 1, 2, 1), "width": 8, "num_deformable": 3},
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
    return jax.eval_shape(make_model(**model).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))


def fill(shapes):
    """Variables without two equal numbers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
