"""Which kernel answers for which thing: the loss seen pairwise, and the Hungarian assignment."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.nn.assignment import assign
from knet_jax.nn.layers import wide
from knet_jax.structs import EMPTY, Segments

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
DICE_EPSILON = 1e-3


class LossWeights(NamedTuple):
    """Weights of the loss terms, `config.loss`; the first three also weigh the matching cost.

    A new term's has the default 0.0.
    """

    mask: float
    dice: float
    label: float
    rank: float
    dense: float


def focal_cost(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Focal loss of kernel n if the class of slot m is right, less the loss if it is wrong.

    The lower, the better they match.

    Logits [b, n, k] and labels [b, m] (`EMPTY` is read as class 0) -> [b, n, m].
    """
    p = jax.nn.sigmoid(logits)
    positive = -FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA * jnp.log(p + 1e-12)
    negative = -(1 - FOCAL_ALPHA) * p**FOCAL_GAMMA * jnp.log(1 - p + 1e-12)
    index = jnp.maximum(labels, 0)[:, None, :]
    return jnp.take_along_axis(positive - negative, index, axis=2)


def matching_cost(
    masks: jax.Array, logits: jax.Array | None, targets: Segments, weights: LossWeights
) -> jax.Array:
    """Cost of every (kernel, slot) pair.

    Args:
        masks: logits at the resolution of the targets, [b, n, h, w].
        logits: class logits [b, n, k], or None where there are none yet.
        targets: slots [b, m, h, w] and labels [b, m].
        weights: of the loss.

    Returns:
        [b, n, m]; what stands in the columns of empty slots has no meaning.
    """
    b, n, h, w = masks.shape
    p = jax.nn.sigmoid(masks.astype(wide(masks.dtype))).reshape(b, n, h * w)
    t = targets.masks.reshape(b, -1, h * w).astype(p.dtype)
    overlap = jnp.einsum("bnp,bmp->bnm", p, t)
    p_area, t_area = p.sum(-1)[:, :, None], t.sum(-1)[:, None, :]
    # sum of p·t + (1 - p)·(1 - t): the share of pixels on which the two agree
    agreement = (2 * overlap - p_area - t_area + h * w) / (h * w)
    p_square, t_square = (p**2).sum(-1)[:, :, None], (t**2).sum(-1)[:, None, :]
    dice = 2 * overlap / (p_square + t_square + 2 * DICE_EPSILON)

    cost = -weights.mask * agreement - weights.dice * dice
    if logits is not None:
        cost = cost + weights.label * focal_cost(logits, targets.labels)
    return cost


def match(cost: jax.Array, labels: jax.Array) -> jax.Array:
    """Solves all assignments of a step.

    Args:
        cost: [r, b, n, m], r matchings of each image; m <= n.
        labels: [b, m], `EMPTY` for a slot that takes no part.

    Returns:
        int32 [r, b, n]: the slot that each kernel answers for, or `EMPTY`.
    """
    # A diverging run must reach the check of the loss with a cost that can be compared.
    cost = jnp.nan_to_num(jax.lax.stop_gradient(cost), nan=1e6, posinf=1e6, neginf=-1e6)
    return assign(jnp.swapaxes(cost, 2, 3), labels != EMPTY)
