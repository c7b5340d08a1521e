"""Networks that compile in seconds, one a task, and pictures and targets for them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.matching import LossWeights
from knet_jax.structs import (
    EMPTY,
    Batch,
    InstanceTargets,
    Output,
    PanopticTargets,
    Segments,
    SemanticTargets,
    Stage,
)

NUM_PROPOSALS, NUM_THINGS, NUM_STUFF = 6, 3, 2

WEIGHTS = LossWeights(mask=1.0, dice=4.0, label=2.0, rank=0.1, dense=1.0)

MODEL = {
    "num_proposals": NUM_PROPOSALS,
    "num_things": NUM_THINGS,
    "num_stuff": NUM_STUFF,
    "num_stages": 2,
    "channels": 16,
    "num_heads": 2,
    "ffn_channels": 32,
    "backbone": {"depths": (1, 1, 1, 1), "width": 8, "norm": "group", "frozen_stages": 0},
}
"""Of the panoptic task."""

MODELS = {
    "panoptic": MODEL,
    "instance": MODEL | {"num_stuff": 0},
    # Kernels of another width, and a signal beside them.
    "semantic": MODEL
    | {
        "num_proposals": 0,
        "num_things": 0,
        "num_stuff": NUM_THINGS + NUM_STUFF,
        "auxiliary_channels": 8,
        "dropout": 0.0,
        "channels": 24,
        "neck": {"name": "uper", "scales": (1, 2), "norm": "group"},
    },
}
"""`config.model` of each task."""


def random(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_output(num_stages, b=4, n=NUM_PROPOSALS + NUM_STUFF, k=NUM_THINGS + NUM_STUFF) -> Output:
    """Random masks and logits at stride 8 of the pictures of `make_batch`."""
    masks = [random(b, n, 8, 8, seed=s, scale=2) for s in range(num_stages + 1)]
    logits = [None] + [random(b, n, k, seed=10 + s) for s in range(num_stages)]
    stages = tuple(Stage(None, *both) for both in zip(masks, logits))
    return Output(stages, random(b, k, 8, 8, seed=20))


def make_batch(b=4, height=64, width=64, slots=4, seed=0, task="panoptic") -> Batch:
    """Smooth pictures with random boxes: the last has no thing, the first no stuff; void below."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (b, height // 16, width // 16, 3))
    image = coarse.repeat(16, 1).repeat(16, 2).astype(np.uint8)
    targets = TARGETS[task](rng, b, height, width, slots)
    size = np.tile(np.int32([height - 8, width]), (b, 1))
    return Batch(image, targets, size, size * 2, np.arange(b, dtype=np.int32))


def panoptic_targets(rng, b, height, width, slots) -> PanopticTargets:
    """Two bands of stuff, and boxes that hide each other."""
    segment_map = np.zeros((b, height // 2, width // 2), np.uint8)
    labels, stuff = (np.full((b, n), EMPTY, np.int32) for n in (slots, NUM_STUFF))
    for i in range(b):
        if i > 0:
            segment_map[i, : height // 4] = 1 + slots
            segment_map[i, height // 4 : -4] = 1 + slots + 1
            stuff[i] = NUM_THINGS + np.arange(NUM_STUFF)
        if i < b - 1:
            for slot in range(1 + i % slots):
                y, x = rng.integers(0, height // 2 - 8), rng.integers(0, width // 2 - 8)
                segment_map[i, y : y + 9, x : x + 7] = 1 + slot
                labels[i, slot] = rng.integers(NUM_THINGS)
    return PanopticTargets(segment_map, labels, stuff)


def instance_targets(rng, b, height, width, slots) -> InstanceTargets:
    """Boxes that overlap."""
    masks = np.zeros((b, slots, height // 2, width // 2), bool)
    labels = np.full((b, slots), EMPTY, np.int32)
    for i in range(b - 1):
        for slot in range(1 + i % slots):
            y, x = rng.integers(0, height // 4), rng.integers(0, width // 4)
            masks[i, slot, y : y + height // 4 + 1, x : x + width // 4 - 1] = True
            labels[i, slot] = rng.integers(NUM_THINGS)
    return InstanceTargets(np.packbits(masks, axis=3), labels)


def semantic_targets(rng, b, height, width, slots) -> SemanticTargets:
    """Boxes of classes on a class, ignored below."""
    label_map = np.zeros((b, height, width), np.uint8)
    for i in range(b):
        label_map[i, : height - 8] = 1 + i % NUM_STUFF
        for _ in range(slots):
            y, x = rng.integers(0, height - 8), rng.integers(0, width - 8)
            label_map[i, y : y + 15, x : x + 21] = 1 + rng.integers(NUM_THINGS + NUM_STUFF)
    return SemanticTargets(label_map)


TARGETS = {
    "panoptic": panoptic_targets,
    "instance": instance_targets,
    "semantic": semantic_targets,
}


def make_segments(b, m, h, w, labels, seed=0) -> Segments:
    """Random boxes whose borders cover quarters of pixels; slots of `EMPTY` hold rubbish."""
    rng = np.random.default_rng(seed)
    fine = np.zeros((b, m, 2 * h, 2 * w), np.float32)
    for i in range(b):
        for j in range(m):
            (top, bottom), (left, right) = (np.sort(rng.permutation(n)[:2]) for n in (2 * h, 2 * w))
            fine[i, j, top : bottom + 1, left : right + 1] = 1
    masks = fine.reshape(b, m, h, 2, w, 2).mean((3, 5))
    return Segments(jnp.asarray(masks), jnp.asarray(np.broadcast_to(labels, (b, m)), jnp.int32))


def part(tree, start, stop, axis=0):
    """Every array of a tree from `start` to `stop` of an axis."""
    where = (slice(None),) * axis + (slice(start, stop),)
    return jax.tree.map(lambda x: x[where], tree)


def init(model, height=64, width=64):
    """Variables that are no longer those of an initialization, whose masks are almost zero."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, height, width, 3)))
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * np.abs(rng.standard_normal(x.shape)), x.dtype), variables
    )


def made_up(model, *inputs, **keywords):
    """Variables of a module that leave none of its layers idle, without compiling its `init`."""
    shapes = jax.eval_shape(partial(model.init, **keywords), jax.random.key(0), *inputs)
    rng = np.random.default_rng(1)

    def one(path, leaf):
        mean = 1.0 if path[-1].key in ("scale", "var") else 0.0
        spread = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
        return jnp.asarray(mean + spread * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)
