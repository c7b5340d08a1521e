"""Losses: pure functions of logits and targets.

Things and stuff are judged at stride 4, one target a kernel; classes of pixels at full size.

Every term is a sum over images divided by a count of the whole step, so that the losses (and
gradients) of several devices, or of slices of a batch, add up to those of the batch.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.matching import DICE_EPSILON, FOCAL_ALPHA, FOCAL_GAMMA
from knet_jax.nn.layers import wide
from knet_jax.structs import EMPTY, Segments


class Counts(NamedTuple):
    """Denominators of the loss terms, counted over all images of a step, on all devices.

    None of them depends on a prediction.
    """

    images: jax.Array
    things: jax.Array
    """Thing segments; a config may not have more slots for them than proposals."""
    segments: jax.Array
    """Thing and stuff segments."""
    pixels: jax.Array
    """Pixels that belong to a segment or have a class."""


def kernel_targets(things: Segments, stuff: Segments, slots: jax.Array) -> Segments:
    """The segment that each kernel must draw: things as matched, then the stuff classes.

    Args:
        things: m slots.
        stuff: one slot a stuff class, `EMPTY` where the class is absent.
        slots: [b, num_proposals], a thing slot or `EMPTY`.

    Returns:
        one slot a kernel, [b, num_proposals + num_stuff, h, w]; unmatched kernels get zero masks.
    """
    matched = slots != EMPTY
    index = jnp.maximum(slots, 0)
    labels = jnp.take_along_axis(things.labels, index, axis=1)
    masks = jnp.take_along_axis(things.masks, index[:, :, None, None], axis=1)
    return Segments(
        jnp.concatenate([masks * matched[:, :, None, None], stuff.masks], axis=1),
        jnp.concatenate([jnp.where(matched, labels, EMPTY), stuff.labels], axis=1),
    )


@jax.custom_jvp
def softplus(x: jax.Array) -> jax.Array:
    """log(1 + exp(x)), whose gradient is the sigmoid that the other terms compute as well: that of
    `jax.nn.softplus` keeps two arrays of its own."""
    return jax.nn.softplus(x)


softplus.defjvps(lambda tangent, _, x: tangent * jax.nn.sigmoid(x))


def focal(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Sigmoid focal loss (Lin et al., 2017), element by element; targets are 0 or 1."""
    p = jax.nn.sigmoid(logits)
    cross_entropy = softplus(logits) - logits * targets
    wrong = jnp.where(targets, 1 - p, p)
    return jnp.where(targets, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong**FOCAL_GAMMA * cross_entropy


def mask_loss(masks: jax.Array, targets: Segments, total: jax.Array) -> jax.Array:
    """Binary cross-entropy, mean over the pixels of the `total` kernels that have a target.

    Logits [b, n, h, w] and one target for each.
    """
    masks = masks.astype(wide(masks.dtype))
    each = (softplus(masks) - masks * targets.masks).mean((2, 3))
    return (each * (targets.labels != EMPTY)).sum() / jnp.maximum(total, 1)


def dice_loss(masks: jax.Array, targets: Segments, total: jax.Array) -> jax.Array:
    """One minus the dice coefficient with squared areas, mean over the `total` kernels that have
    a target (Milletari et al., 2016)."""
    p = jax.nn.sigmoid(masks.astype(wide(masks.dtype)))
    t = targets.masks.astype(p.dtype)
    overlap = 2 * (p * t).sum((2, 3))
    each = 1 - overlap / ((p**2).sum((2, 3)) + (t**2).sum((2, 3)) + 2 * DICE_EPSILON)
    return (each * (targets.labels != EMPTY)).sum() / jnp.maximum(total, 1)


def touched(targets: Segments) -> jax.Array:
    """Which pixels each target covers, if only in part. bool [b, n, h, w]."""
    return (targets.masks > 0) & (targets.labels != EMPTY)[:, :, None, None]


def last_true(mask: jax.Array) -> jax.Array:
    """The highest index on axis 1 at which the mask holds, `EMPTY` where none does."""
    dtype = jnp.int16 if mask.shape[1] <= 2**15 else jnp.int32
    index = jnp.arange(mask.shape[1], dtype=dtype).reshape(1, -1, *[1] * (mask.ndim - 2))
    return jnp.where(mask, index, EMPTY).max(axis=1, initial=EMPTY).astype(jnp.int32)


def rank_loss(masks: jax.Array, targets: Segments, num_images: jax.Array) -> jax.Array:
    """Cross-entropy over the kernels at each pixel, so that its owner ranks first.

    A pixel belongs to the last kernel whose target touches it.
    """
    return pixel_loss(masks, last_true(touched(targets)), num_images)


def pixel_loss(logits: jax.Array, owner: jax.Array, num_images: jax.Array) -> jax.Array:
    """Cross-entropy over kernels at each pixel, mean over all pixels.

    Pixels of nobody give zero but count in the mean
    (`tests/test_losses.py::test_pixel_loss`).

    Args:
        logits: [b, n, h, w].
        owner: int32 [b, h, w], the right kernel or `EMPTY`.
        num_images: of the whole step.
    """
    logits = logits.astype(wide(logits.dtype))
    index = jnp.arange(logits.shape[1])[:, None, None]
    chosen = jnp.where(index == owner[:, None], logits, 0).sum(1)
    each = jnp.where(owner != EMPTY, jax.nn.logsumexp(logits, axis=1) - chosen, 0)
    return each.mean((1, 2)).sum() / num_images


def label_loss(
    logits: jax.Array, labels: jax.Array, num_things: int, total: jax.Array
) -> jax.Array:
    """Focal loss of the kernels' classes, divided by the `total` kernels that have a target.

    A proposal pays for every thing class and for no stuff class; a stuff kernel pays for its own class
    only, which it should predict where that class is in the picture.

    Args:
        logits: [b, n, k].
        labels: [b, n], `EMPTY` where every class is wrong.
        num_things: the first classes; kernel n - (k - num_things) + q stands for stuff class q.
        total: of the whole step.
    """
    n, k = logits.shape[1:]
    classes = jnp.arange(k)
    own = classes == (jnp.arange(n) - n + k)[:, None]
    is_proposal = (jnp.arange(n) < n - (k - num_things))[:, None]
    judged = jnp.where(is_proposal, classes < num_things, own)
    each = focal(logits, labels[:, :, None] == classes)
    return (each * judged).sum() / jnp.maximum(total, 1)


def dense_loss(
    dense: jax.Array, targets: Segments, num_proposals: int, total: jax.Array
) -> jax.Array:
    """Focal loss of every pixel's class, divided by the `total` pixels that have one.

    Args:
        dense: class logits [b, k, h, w].
        targets: one slot a kernel; things lie above stuff, later slots above earlier ones.
        num_proposals: how many of the slots are things.
        total: of the whole step.
    """
    covered = touched(targets)
    thing = last_true(covered[:, :num_proposals])
    rest = last_true(covered[:, num_proposals:])
    owner = jnp.where(thing != EMPTY, thing, jnp.where(rest != EMPTY, rest + num_proposals, EMPTY))
    b, h, w = owner.shape
    labels = jnp.take_along_axis(targets.labels, jnp.maximum(owner, 0).reshape(b, h * w), axis=1)
    label = jnp.where(owner != EMPTY, labels.reshape(b, h, w), EMPTY)
    dense = dense.astype(wide(dense.dtype))
    each = focal(dense, label[:, None] == jnp.arange(dense.shape[1])[:, None, None])
    return each.sum() / jnp.maximum(total, 1)


def num_found(masks: jax.Array, targets: Segments) -> jax.Array:
    """How many targets are drawn with an IoU above one half; a measure, not a loss."""
    drawn, wanted = masks > 0, targets.masks >= 0.5
    intersection = (drawn & wanted).sum((2, 3))
    union = (drawn | wanted).sum((2, 3))
    return ((2 * intersection > union) & (targets.labels != EMPTY)).sum()
