"""What training asks of the kernels: targets as they are unpacked on the device, and their losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax import losses
from knet_jax.matching import LossWeights, match, matching_cost
from knet_jax.nn.layers import argmax, resize, upsample2x
from knet_jax.structs import (
    EMPTY,
    InstanceTargets,
    Output,
    PanopticTargets,
    Segments,
    SemanticTargets,
    Sizes,
    Stage,
)


class Judgement(NamedTuple):
    """Loss terms and measures of a batch, or of a part of it: those of all parts are added."""

    terms: dict[str, jax.Array]
    """Every weighted term, named as it is plotted (`loss/stage2/mask`)."""
    measures: dict[str, jax.Array]
    """Numbers to be logged that are not minimized: `matched` (share of things found) or `accuracy` (share
    of pixels that are right)."""


# Things and stuff: instance and panoptic segmentation.

SHARE = jnp.bfloat16
"""Holds the quarters of which masks of targets consist exactly, in half of the memory."""


class KernelTargets(NamedTuple):
    """Segments of a batch, unpacked on the device."""

    things: Segments
    """m slots at stride 4."""
    stuff: Segments
    """One slot a stuff class."""


def unpack_panoptic(targets: PanopticTargets) -> KernelTargets:
    """Makes the masks of segments from the map of the sampled pixels."""
    b, rows, columns = targets.segment_map.shape
    m, num_stuff = targets.labels.shape[1], targets.stuff_labels.shape[1]
    index = jnp.arange(1, m + num_stuff + 1, dtype=targets.segment_map.dtype)
    sampled = targets.segment_map.reshape(b, 1, rows // 2, 2, columns // 2, 2)
    own = [sampled[:, :, :, i, :, j] == index[:, None, None] for i in (0, 1) for j in (0, 1)]
    masks = sum(x.astype(SHARE) for x in own) / 4
    return KernelTargets(
        Segments(masks[:, :m], targets.labels), Segments(masks[:, m:], targets.stuff_labels)
    )


def unpack_instances(targets: InstanceTargets) -> KernelTargets:
    """Makes the masks of things from the bits of the sampled pixels; there is no stuff."""
    b, m, rows, _ = targets.masks.shape
    bits = jnp.unpackbits(targets.masks, axis=3)
    masks = bits.reshape(b, m, rows // 2, 2, -1, 2).mean((3, 5)).astype(SHARE)
    nothing = Segments(masks[:, :0], targets.labels[:, :0])
    return KernelTargets(Segments(masks, targets.labels), nothing)


def count_segments(targets: KernelTargets) -> losses.Counts:
    """Counts the segments of a batch, or of a part of it: counts of several parts are added."""
    things, stuff = targets
    num_things = (things.labels != EMPTY).sum()
    covered = losses.touched(things).any(1) | losses.touched(stuff).any(1)
    return losses.Counts(
        images=jnp.asarray(len(things.labels)),
        things=num_things,
        segments=num_things + (stuff.labels != EMPTY).sum(),
        pixels=covered.sum(),
    )


def sizes_of(output: Output, targets: KernelTargets) -> Sizes:
    """The counts of a network for things and stuff, by the shapes of its output."""
    num_stuff = targets.stuff.labels.shape[1]
    num_kernels, num_classes = output.stages[0].masks.shape[1], output.dense.shape[1]
    return Sizes(num_kernels - num_stuff, num_classes - num_stuff, num_stuff)


def match_stages(output: Output, targets: KernelTargets, weights: LossWeights) -> jax.Array:
    """Which thing each proposal answers for.

    Stage s is matched by the predictions of stage s - 1, so that all matchings are known once the
    forward pass is; the initial masks are matched by themselves.

    Returns:
        int32 [max(S, 1), b, num_proposals]: thing slot or `EMPTY`.
    """
    num_proposals, num_things, _ = sizes_of(output, targets)

    costs = []
    for stage in jax.lax.stop_gradient(output.stages[:-1] or output.stages):
        stage, costs = in_turn((stage, costs))
        logits = stage.logits
        if logits is not None:
            logits = logits[:, :num_proposals, :num_things]
        masks = upsample2x(stage.masks[:, :num_proposals], axes=(2, 3))
        costs.append(matching_cost(masks, logits, targets.things, weights))
    return match(jnp.stack(costs), targets.things.labels)


in_turn = jax.lax.optimization_barrier
"""Puts computations in order. (next input, results so far) -> the same, where whatever uses the next
input is computed after the results; their gradients are in the opposite order.

Without it a compiler may compute all stages at once, whose upsampled masks and targets take more
memory than the network.
"""


def kernel_loss(
    output: Output, targets: KernelTargets, counts: losses.Counts, weights: LossWeights
) -> Judgement:
    """Every loss term of K-Net on the masks of things and stuff.

    Args:
        output: of the network.
        targets: of the same images.
        counts: of the whole step.
        weights: of the terms; without weight there is no rank loss.
    """
    things, stuff = targets
    num_proposals, num_things, _ = sizes_of(output, targets)
    slots = match_stages(output, targets, weights)

    def mask_terms(masks: jax.Array, wanted: Segments, total: jax.Array) -> dict[str, jax.Array]:
        masks = in_turn(upsample2x(masks, axes=(2, 3)))  # one array for all terms
        terms = {
            "mask": losses.mask_loss(masks, wanted, total),
            "dice": losses.dice_loss(masks, wanted, total),
        }
        if weights.rank:
            masks, terms = in_turn((masks, terms))
            terms["rank"] = losses.rank_loss(masks, wanted, counts.images)
        return terms

    def initial_terms(masks: jax.Array, slots: jax.Array) -> dict[str, jax.Array]:
        wanted = losses.kernel_targets(things, stuff, slots)
        masks, wanted = jax.tree.map(lambda x: x[:, :num_proposals], (masks, wanted))
        return mask_terms(masks, wanted, counts.things)

    def dense_terms(dense: jax.Array, slots: jax.Array) -> dict[str, jax.Array]:
        wanted = losses.kernel_targets(things, stuff, slots)
        dense = upsample2x(dense, axes=(2, 3))
        return {"dense": losses.dense_loss(dense, wanted, num_proposals, counts.pixels)}

    def stage_terms(stage: Stage, slots: jax.Array) -> dict[str, jax.Array]:
        wanted = losses.kernel_targets(things, stuff, slots)
        label = losses.label_loss(stage.logits, wanted.labels, num_things, counts.segments)
        return {"label": label} | mask_terms(stage.masks, wanted, counts.segments)

    first, *updated = output.stages
    judged = [
        ("initial", initial_terms, first.masks, slots[0]),
        ("initial", dense_terms, output.dense, slots[0]),
        *((f"stage{s}", stage_terms, *of) for s, of in enumerate(zip(updated, slots), 1)),
    ]
    terms = {}
    for name, judge, predicted, matched in judged:
        (predicted, matched), terms = in_turn(((predicted, matched), terms))
        if name != judged[-1][0]:  # whose gradient comes first
            judge = jax.checkpoint(judge)  # what its gradient needs is made anew, not kept
        terms |= {f"{name}/{key}": term for key, term in judge(predicted, matched).items()}

    (last, matched), terms = in_turn(((output.stages[-1].masks, slots[-1]), terms))
    wanted = losses.kernel_targets(things, stuff, matched)
    proposals = jax.tree.map(lambda x: x[:, :num_proposals], wanted)
    last = upsample2x(jax.lax.stop_gradient(last[:, :num_proposals]), axes=(2, 3))
    found = losses.num_found(last, proposals)
    return Judgement(weigh(terms, weights), {"matched": found / jnp.maximum(counts.things, 1)})


def weigh(terms: dict[str, jax.Array], weights: LossWeights) -> dict[str, jax.Array]:
    """Terms by their weights, under the names of the plots."""
    return {
        f"loss/{name}": getattr(weights, name.rpartition("/")[2]) * term
        for name, term in terms.items()
    }


# Classes: semantic segmentation.


def unpack_semantic(targets: SemanticTargets) -> jax.Array:
    """int32 [b, H, W]: the class of every pixel, `EMPTY` where it is ignored."""
    return targets.label_map.astype(jnp.int32) - 1


def count_labels(labels: jax.Array) -> losses.Counts:
    """Counts the labelled pixels of a batch, or of a part of it, as `count_segments`."""
    nothing = jnp.zeros((), jnp.int32)
    return losses.Counts(jnp.asarray(len(labels)), nothing, nothing, (labels != EMPTY).sum())


def semantic_loss(
    output: Output, labels: jax.Array, counts: losses.Counts, weights: LossWeights
) -> Judgement:
    """Cross-entropy of the masks of every stage, and of the dense logits if there are any.

    Args:
        output: of the network.
        labels: int32 [b, H, W], `EMPTY` where ignored.
        counts: of the whole step.
        weights: of the terms.
    """

    # Logits at full size are large: they are made anew for the gradient instead of being kept.
    @jax.checkpoint
    def loss(logits: jax.Array) -> jax.Array:
        full = resize(logits, labels.shape[1:], axes=(2, 3))
        return losses.pixel_loss(full, labels, counts.images)

    names = ["initial", *(f"stage{s}" for s in range(1, len(output.stages)))]
    terms = {f"{name}/mask": loss(stage.masks) for name, stage in zip(names, output.stages)}
    if output.dense is not None:
        terms["dense"] = loss(output.dense)
    last = jax.lax.stop_gradient(output.stages[-1].masks)
    right = (argmax(resize(last, labels.shape[1:], axes=(2, 3)), axis=1) == labels).sum()
    return Judgement(weigh(terms, weights), {"accuracy": right / jnp.maximum(counts.pixels, 1)})
