"""Which masks become segments of a panoptic map, once every pixel has its owner."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from knet_jax.structs import EMPTY


def best_classes(logits: jax.Array, num_things: int) -> tuple[jax.Array, jax.Array]:
    """Score and class of every kernel: the best thing of a proposal, the own class of stuff.

    Class logits [b, n, k], proposals before stuff -> [b, n] and int32 [b, n].
    """
    n, k = logits.shape[1:]
    num_proposals = n - (k - num_things)
    probs = jax.nn.sigmoid(logits)
    things = probs[:, :num_proposals, :num_things]
    stuff = probs[:, num_proposals:, num_things:]
    # The diagonal, in operators that other runtimes have.
    stuff = jnp.where(jnp.eye(k - num_things, dtype=bool), stuff, 0).sum(2)
    scores = jnp.concatenate([things.max(2), stuff], axis=1)
    stuff_labels = jnp.broadcast_to(jnp.arange(num_things, k), stuff.shape)
    return scores, jnp.concatenate([things.argmax(2), stuff_labels], axis=1).astype(jnp.int32)


def find_eligible(
    owned: jax.Array, scores: jax.Array, num_proposals: int, instance_threshold: float
) -> jax.Array:
    """Masks that may be kept: things of enough score, and stuff, that own any pixel. bool [b, n]."""
    is_stuff = jnp.arange(owned.shape[1]) >= num_proposals
    return (owned > 0) & (is_stuff | (scores >= instance_threshold))


def rank_segments(
    eligible: jax.Array,
    owned: jax.Array,
    area: jax.Array,
    labels: jax.Array,
    scores: jax.Array,
    overlap_threshold: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Decides which masks become segments, and numbers these, best score first.

    Args:
        eligible: bool [b, n].
        owned: int32 [b, n], pixels that each mask has won.
        area: int32 [b, n], pixels of probability one half or more, right where eligible.
        labels: int32 [b, n].
        scores: [b, n].
        overlap_threshold: least share of the area that must be owned.

    Returns:
        int16, or int32 from 2^15 masks on, [b, n + 1]: the id of each mask, 0 where it is not kept and
        for the owner n of nothing; and `labels`, `scores` and `kernels` of `Fused`.
    """
    n = eligible.shape[1]
    kept = eligible & (area > 0) & (owned / jnp.maximum(area, 1) >= overlap_threshold)
    order = jnp.argsort(jnp.where(kept, -scores, jnp.inf), axis=1)
    place = jnp.argsort(order, axis=1)
    ids = jnp.where(kept, 1 + place, 0).astype(jnp.int16 if n < 2**15 else jnp.int32)
    last = jnp.arange(n) < kept.sum(1)[:, None]
    take = partial(jnp.take_along_axis, indices=order, axis=1, mode="promise_in_bounds")
    return (
        jnp.pad(ids, ((0, 0), (0, 1))),
        jnp.where(last, take(labels), EMPTY),
        jnp.where(last, take(scores), 0),
        order.astype(jnp.int32),
    )
