"""Made-up inputs: pictures with targets for the network, logits for the fusion. From a seed."""

from __future__ import annotations

from functools import partial

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from knet_jax.evaluation import last_stage
from knet_jax.knet import make_model
from knet_jax.structs import EMPTY, Batch, PanopticTargets
from knet_jax.training import init_variables

SCENES = ("random", "objects")
"""What a fusion gets. Its time depends on it: masks that cannot win a pixel are never resampled.

`random` is hard: the masks of a network of random weights, which overlap everywhere, at the scale
that the reference's have with its random weights; the scores are all alike. `objects` is what a
trained network gives: a few confident things with weaker duplicates, a few regions of stuff, and
many proposals that nobody believes.
"""

MASK_STD = 7.0
LABEL_MEAN, LABEL_STD = -2.0, 0.65
"""Logits of the reference's network with random weights."""

THINGS, STUFF = 8, 5
"""Segments of a made-up picture; COCO has 7 things and 4 kinds of stuff on average."""

NO = -6.0
"""A logit that nobody believes."""


def batch(count: int, size: tuple[int, int], config: ConfigDict, seed: int) -> Batch:
    """`count` pictures that fill the canvas, with discs as things on regions of stuff."""
    rng = np.random.default_rng(seed)
    num_stuff, max_things = config.model.num_stuff, config.data.max_things
    height, width = size
    images, maps = [], []
    labels = np.full((count, max_things + num_stuff), EMPTY, np.int32)
    stuff_count, thing_count = min(STUFF, num_stuff), min(THINGS, max_things)
    for i in range(count):
        image = 128 + 40 * np.moveaxis(_fields(rng, 3, height, width), 0, -1)
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        kinds = rng.choice(num_stuff, stuff_count, replace=False)
        regions = _fields(rng, stuff_count, height // 2, width // 2).argmax(0)
        segments = 1 + max_things + kinds[regions]
        for thing, disc in enumerate(_discs(rng, thing_count, height // 2, width // 2)):
            segments[disc > 0] = 1 + thing
            labels[i, thing] = rng.integers(config.model.num_things)
        labels[i, max_things + kinds] = config.model.num_things + kinds
        maps.append(segments)
    dtype = np.uint8 if labels.shape[1] < 256 else np.uint16
    sizes = np.array([size] * count, np.int32)
    ids = np.arange(count, dtype=np.int32)
    targets = PanopticTargets(np.stack(maps).astype(dtype), labels)
    return Batch(np.stack(images), targets, sizes, sizes, ids)


def logits(scene: str, count: int, size: tuple[int, int], config: ConfigDict):
    """Mask logits [count, n, h, w] and class logits [count, n, k] of one of `SCENES`."""
    if scene == "random":
        return _random(count, size, config)
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    masks, labels = zip(*(_objects(rng, size, config) for rng in rngs))
    return np.stack(masks), np.stack(labels)


def _random(count: int, size: tuple[int, int], config: ConfigDict):
    model = make_model(**config.model)
    run = jax.jit(partial(last_stage, model=model))
    one = jax.device_get(
        [
            run(init_variables(model, config.seed), batch(1, size, config, seed))
            for seed in range(count)
        ]
    )
    masks, labels = (np.concatenate(parts).astype(np.float32) for parts in zip(*one))
    masks = MASK_STD * (masks - masks.mean()) / masks.std()
    return masks, LABEL_MEAN + LABEL_STD * (labels - labels.mean()) / labels.std()


def _objects(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict):
    """One picture as a trained network sees it."""
    num_proposals, num_things, num_stuff = (
        config.model[key] for key in ("num_proposals", "num_things", "num_stuff")
    )
    height, width = size[0] // 8, size[1] // 8
    n = num_proposals + num_stuff
    # Proposals that nobody believes still claim pixels, here and there.
    masks = 3 * _fields(rng, n, height, width) + NO
    labels = rng.normal(NO, 1, (n, num_things + num_stuff))

    discs = np.clip(_discs(rng, min(THINGS, num_proposals // 3), height, width), -12, 12)
    for i, disc in enumerate(discs):
        label = rng.integers(num_things)
        for copy in range(3):  # a thing, and two proposals that see it less clearly
            masks[i + copy * len(discs)] = disc + rng.normal(0, 0.3, disc.shape)
            labels[i + copy * len(discs), label] = rng.uniform(1, 3) - 2 * copy

    kinds = rng.choice(num_stuff, min(STUFF, num_stuff), replace=False)
    fields = 8 * _fields(rng, len(kinds), height, width)
    best = np.sort(fields, axis=0)
    for field, kind in zip(fields, kinds):
        others = np.where(field == best[-1], best[-2], best[-1]) if len(kinds) > 1 else NO
        region = np.minimum(field - others, -discs.max(0))
        masks[num_proposals + kind] = np.clip(region, -12, 12)
        labels[num_proposals + kind, num_things + kind] = rng.uniform(0, 2)
    return masks.astype(np.float32), labels.astype(np.float32)


def _fields(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Smooth noise of about unit variance, [count, height, width]."""
    coarse = rng.normal(0, 1.3, (count, 5, 7))
    return np.stack([cv2.resize(c, (width, height), interpolation=cv2.INTER_CUBIC) for c in coarse])


def _discs(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Distances to the rim of discs, positive inside, in pixels. [count, height, width]."""
    y, x = np.mgrid[:height, :width]
    side = min(height, width)
    shape = (count, 1, 1)
    cy, cx = rng.uniform(0, height, shape), rng.uniform(0, width, shape)
    return rng.uniform(0.06, 0.25, shape) * side - np.hypot(y - cy, x - cx)
