"""Made-up inputs: pictures with targets for the network, logits for its results. From a seed."""

from __future__ import annotations

from functools import partial

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict

from knet_jax.inference.forward import run_rounds
from knet_jax.model import init_variables, make_model, variable_shapes
from knet_jax.structs import EMPTY, Batch, InstanceTargets, PanopticTargets, SemanticTargets, Stage

SCENES = ("random", "objects")
"""What the results are made of. The time of a panoptic map depends on it: masks that cannot win a
pixel are never resampled.

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


def batch(
    count: int, size: tuple[int, int], config: ConfigDict, seed: int, things: int = THINGS
) -> Batch:
    """`count` pictures that fill the canvas, with discs as things on regions of stuff."""
    rng = np.random.default_rng(seed)
    images, targets = [], []
    for _ in range(count):
        image = 128 + 40 * np.moveaxis(_fields(rng, 3, *size), 0, -1)
        images.append(np.clip(image, 0, 255).astype(np.uint8))
        targets.append(TARGETS[config.task](rng, size, config, things))
    targets = jax.tree.map(lambda *each: np.stack(each), *targets)
    sizes = np.array([size] * count, np.int32)
    return Batch(np.stack(images), targets, sizes, sizes, np.arange(count, dtype=np.int32))


def _panoptic(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict, things: int):
    """Of one picture, as the two that follow."""
    num_stuff, max_things = config.model.num_stuff, config.data.max_things
    height, width = size[0] // 2, size[1] // 2
    labels, stuff_labels = (np.full(n, EMPTY, np.int32) for n in (max_things, num_stuff))
    kinds = rng.choice(num_stuff, min(STUFF, num_stuff), replace=False)
    stuff_labels[kinds] = config.model.num_things + kinds
    regions = _fields(rng, len(kinds), height, width).argmax(0)
    segments = 1 + max_things + kinds[regions]
    for thing, disc in enumerate(_discs(rng, min(things, max_things), height, width)):
        segments[disc > 0] = 1 + thing
        labels[thing] = rng.integers(config.model.num_things)
    dtype = np.uint8 if max_things + num_stuff < 256 else np.uint16
    return PanopticTargets(segments.astype(dtype), labels, stuff_labels)


def _instances(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict, things: int):
    max_things = config.data.max_things
    discs = _discs(rng, min(things, max_things), size[0] // 2, size[1] // 2)
    masks = np.zeros((max_things, *discs.shape[1:]), bool)
    masks[: len(discs)] = discs > 0
    labels = np.full(max_things, EMPTY, np.int32)
    labels[: len(discs)] = rng.integers(config.model.num_things, size=len(discs))
    return InstanceTargets(np.packbits(masks, axis=2), labels)


def _labels(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict, things: int):
    num_classes = config.model.num_stuff
    kinds = rng.choice(num_classes, min(STUFF, num_classes), replace=False)
    label_map = 1 + kinds[_fields(rng, len(kinds), *size).argmax(0)]
    for disc in _discs(rng, things, *size):
        label_map[disc > 0] = 1 + rng.integers(num_classes)
    return SemanticTargets(label_map.astype(np.uint8 if num_classes < 255 else np.uint16))


TARGETS = {"panoptic": _panoptic, "instance": _instances, "semantic": _labels}


def stage(
    scene: str, count: int, size: tuple[int, int], config: ConfigDict, things: int = THINGS
) -> Stage:
    """Masks [count, n, h, w] and class logits [count, n, k] (if any) of one of `SCENES`."""
    if scene == "random":
        return _random(count, size, config)
    # As large as the network makes them.
    model = make_model(**config.model)
    [shapes] = jax.eval_shape(
        partial(run_rounds, model=model), variable_shapes(model), batch(1, size, config, 0)
    )
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    masks, logits = zip(*(_objects(rng, shapes.masks.shape[2:], config, things) for rng in rngs))
    return Stage(None, np.stack(masks), None if shapes.logits is None else np.stack(logits))


def _random(count: int, size: tuple[int, int], config: ConfigDict) -> Stage:
    model = make_model(**config.model)
    run = jax.jit(partial(run_rounds, model=model))
    variables = init_variables(model, config.seed)
    stages = [run(variables, batch(1, size, config, seed))[0] for seed in range(count)]
    _, masks, logits = jax.tree.map(
        lambda *each: np.concatenate(each).astype(np.float32), *jax.device_get(stages)
    )
    masks = MASK_STD * (masks - masks.mean()) / masks.std()
    if logits is not None:
        logits = LABEL_MEAN + LABEL_STD * (logits - logits.mean()) / logits.std()
    return Stage(None, masks, logits)


def _objects(rng: np.random.Generator, size: tuple[int, int], config: ConfigDict, things: int):
    """One picture as a trained network sees it; `size` is that of the masks."""
    num_proposals, num_things, num_stuff = (
        config.model[key] for key in ("num_proposals", "num_things", "num_stuff")
    )
    n = num_proposals + num_stuff
    # Proposals that nobody believes still claim pixels, here and there.
    masks = 3 * _fields(rng, n, *size) + NO
    labels = rng.normal(NO, 1, (n, num_things + num_stuff))

    discs = np.clip(_discs(rng, min(things, num_proposals // 3), *size), -12, 12)
    for i, disc in enumerate(discs):
        label = rng.integers(num_things)
        for copy in range(3):  # a thing, and two proposals that see it less clearly
            masks[i + copy * len(discs)] = disc + rng.normal(0, 0.3, disc.shape)
            labels[i + copy * len(discs), label] = rng.uniform(1, 3) - 2 * copy

    kinds = rng.choice(num_stuff, min(STUFF, num_stuff), replace=False)
    fields = 8 * _fields(rng, len(kinds), *size)
    best = np.sort(fields, axis=0)
    for field, kind in zip(fields, kinds):
        others = np.where(field == best[-1], best[-2], best[-1]) if len(kinds) > 1 else NO
        region = np.minimum(field - others, -discs.max(0, initial=-12))
        masks[num_proposals + kind] = np.clip(region, -12, 12)
        labels[num_proposals + kind, num_things + kind] = rng.uniform(0, 2)
    return masks.astype(np.float32), labels.astype(np.float32)


def _fields(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Smooth noise of about unit variance, [count, height, width]."""
    coarse = rng.normal(0, 1.3, (count, 5, 7))
    fine = [cv2.resize(c, (width, height), interpolation=cv2.INTER_CUBIC) for c in coarse]
    return np.reshape(fine, (count, height, width))


def _discs(rng: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Distances to the rim of discs, positive inside, in pixels. [count, height, width]."""
    y, x = np.mgrid[:height, :width]
    side = min(height, width)
    shape = (count, 1, 1)
    cy, cx = rng.uniform(0, height, shape), rng.uniform(0, width, shape)
    return rng.uniform(0.06, 0.25, shape) * side - np.hypot(y - cy, x - cx)
