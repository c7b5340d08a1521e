"""What each kernel of a network does in a picture: where it is active, and what it takes that for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.inference.resampling import both_to_original
from knet_jax.inference.segment_ranking import best_classes
from knet_jax.structs import Pass

SIDE = 48
"""Height and width of a map of activity; pictures of all shapes are stretched to it."""


class Activity(NamedTuple):
    """What n kernels do in b pictures. Of one picture all arrays lack the first axis."""

    maps: jax.Array
    """uint8 [b, n, SIDE, SIDE]: the probability of the mask over the picture, in 255ths."""
    labels: jax.Array
    """int32 [b, n]: the class that each kernel finds most likely."""
    scores: jax.Array
    """[b, n]: how likely; 1 where kernel n is class n."""


def observe(seen: Pass, *, num_things: int) -> Activity:
    """Watches the kernels of a pass at work.

    Where kernels have class logits a mask's probability is its own; where kernel n is class n, all
    kernels share a pixel.

    Args:
        seen: masks [b, n, h, w], and class logits [b, n, k] or None.
        num_things: how many classes are things; they come first.
    """
    masks, logits = seen.stage.masks, seen.stage.logits
    b, n = masks.shape[:2]
    if logits is None:
        probs, labels = jax.nn.softmax(masks, axis=1), jnp.tile(jnp.arange(n), (b, 1))
        scores = jnp.ones((b, n), masks.dtype)
    else:
        probs, (scores, labels) = jax.nn.sigmoid(masks), best_classes(logits, num_things)
    square = (SIDE, SIDE)
    sizes = jnp.full((b, 2), SIDE, jnp.int32)
    y, x = both_to_original(seen, sizes, masks.shape[2:], square, masks.dtype)
    maps = jnp.einsum("bih,bnhw,bjw->bnij", y, probs, x)
    return Activity(jnp.round(255 * maps).astype(jnp.uint8), labels.astype(jnp.int32), scores)


def average(parts: Sequence[Activity]) -> Activity:
    """Joins what kernels do in the windows of one picture: the mean map, and the class of best score."""
    maps, labels, scores = map(np.stack, zip(*parts))
    best = scores.argmax(0)[None]
    labels, scores = (np.take_along_axis(each, best, axis=0)[0] for each in (labels, scores))
    return Activity(maps.mean(0).round().astype(np.uint8), labels, scores)
