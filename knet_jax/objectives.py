"""What training asks of the kernels: targets as they are unpacked on the device, and their losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax import losses
from knet_jax.matching import LossWeights, match, matching_cost
from knet_jax.nn.layers import resize, upsample2x
from knet_jax.structs import (
    EMPTY,
    InstanceTargets,
    Output,
    PanopticTargets,
    Segments,
    SemanticTargets,
    Sizes,
)


class Judgement(NamedTuple):
    """What a loss says of (a part of) a batch. Those of all parts and devices are added."""

    terms: dict[str, jax.Array]
    """Every weighted term, named as it is plotted (`loss/stage2/mask`)."""
    measures: dict[str, jax.Array]
    """Shares that are no losses, such as of the things that were found."""


# Things and stuff: instance and panoptic segmentation.


class KernelTargets(NamedTuple):
    """Segments of a batch, unpacked on the device."""

    things: Segments
    """m slots at stride 4."""
    stuff: Segments
    """One slot a stuff class."""


def unpack_panoptic(targets: PanopticTargets, sizes: Sizes, dtype="float32") -> KernelTargets:
    """Masks from the map of the sampled pixels."""
    b, rows, columns = targets.segment_map.shape
    count = targets.labels.shape[1]
    index = jnp.arange(1, count + 1, dtype=targets.segment_map.dtype)[:, None, None, None, None]
    sampled = targets.segment_map.reshape(b, 1, rows // 2, 2, columns // 2, 2)
    masks = (sampled == index).mean((3, 5), dtype=dtype)
    m = count - sizes.num_stuff
    return KernelTargets(
        Segments(masks[:, :m], targets.labels[:, :m]),
        Segments(masks[:, m:], targets.labels[:, m:]),
    )


def unpack_instances(targets: InstanceTargets, sizes: Sizes, dtype="float32") -> KernelTargets:
    """Masks from the bits of the sampled pixels; no stuff."""
    del sizes
    b, m, rows, _ = targets.masks.shape
    bits = jnp.unpackbits(targets.masks, axis=3)
    masks = bits.reshape(b, m, rows // 2, 2, -1, 2).mean((3, 5), dtype=dtype)
    nothing = Segments(masks[:, :0], targets.labels[:, :0])
    return KernelTargets(Segments(masks, targets.labels), nothing)


def count_segments(targets: KernelTargets, sizes: Sizes) -> losses.Counts:
    """What the loss terms of things and stuff are divided by."""
    return losses.count(targets.things, targets.stuff, sizes.num_proposals)


def match_stages(output: Output, things: Segments, sizes: Sizes, weights: LossWeights) -> jax.Array:
    """Which thing each proposal answers for.

    Stage s is matched by the predictions of stage s - 1, so that all matchings are known once the
    forward pass is; the initial masks are matched by themselves.

    Returns:
      int32 [max(S, 1), b, num_proposals]: thing slot or `EMPTY`.
    """

    def cost(stage: int) -> jax.Array:
        masks, logits = output.stages[stage].masks, output.stages[stage].logits
        masks = upsample2x(masks[:, : sizes.num_proposals], axes=(2, 3))
        if logits is not None:
            logits = logits[:, : sizes.num_proposals, : sizes.num_things]
        return matching_cost(masks, logits, things, weights)

    output = jax.lax.stop_gradient(output)
    costs = jnp.stack([cost(s) for s in range(max(len(output.stages) - 1, 1))])
    return match(costs, things.labels)


def kernel_loss(
    output: Output,
    targets: KernelTargets,
    counts: losses.Counts,
    sizes: Sizes,
    weights: LossWeights,
) -> Judgement:
    """Every loss term of K-Net on the masks of things and stuff.

    Args:
      output: of the network.
      targets: of the same images.
      counts: of the whole step.
      sizes: of the network.
      weights: of the terms; without weight there is no rank loss.
    """
    things, stuff = targets
    slots = match_stages(output, things, sizes, weights)
    masks = [upsample2x(stage.masks, axes=(2, 3)) for stage in output.stages]

    targets = losses.kernel_targets(things, stuff, slots[0])
    proposals = jax.tree.map(lambda x: x[:, : sizes.num_proposals], targets)
    initial = masks[0][:, : sizes.num_proposals]
    dense = upsample2x(output.dense, axes=(2, 3))
    terms = {
        "initial/mask": losses.mask_loss(initial, proposals, counts.things),
        "initial/dice": losses.dice_loss(initial, proposals, counts.things),
        "initial/dense": losses.dense_loss(dense, targets, sizes.num_proposals, counts.pixels),
    }
    if weights.rank:
        terms["initial/rank"] = losses.rank_loss(initial, proposals, counts.images)
    for s in range(1, len(masks)):
        targets = losses.kernel_targets(things, stuff, slots[s - 1])
        logits, labels = output.stages[s].logits, targets.labels
        terms |= {
            f"stage{s}/label": losses.label_loss(logits, labels, sizes.num_things, counts.segments),
            f"stage{s}/mask": losses.mask_loss(masks[s], targets, counts.segments),
            f"stage{s}/dice": losses.dice_loss(masks[s], targets, counts.segments),
        }
        if weights.rank:
            terms[f"stage{s}/rank"] = losses.rank_loss(masks[s], targets, counts.images)

    proposals = jax.tree.map(lambda x: x[:, : sizes.num_proposals], targets)
    found = losses.num_found(masks[-1][:, : sizes.num_proposals], proposals)
    return Judgement(weigh(terms, weights), {"matched": found / jnp.maximum(counts.things, 1)})


def weigh(terms: dict[str, jax.Array], weights: LossWeights) -> dict[str, jax.Array]:
    """Terms by their weights, under the names of the plots."""
    return {
        f"loss/{name}": getattr(weights, name.rpartition("/")[2]) * term
        for name, term in terms.items()
    }


# Classes: semantic segmentation.


def unpack_semantic(targets: SemanticTargets, sizes: Sizes, dtype="float32") -> jax.Array:
    """int32 [b, H, W]: the class of every pixel, `EMPTY` where it is ignored."""
    del sizes, dtype
    return targets.label_map.astype(jnp.int32) - 1


def count_labels(labels: jax.Array, sizes: Sizes) -> losses.Counts:
    """What the loss terms of pixels are divided by."""
    del sizes
    nothing = jnp.zeros((), jnp.int32)
    return losses.Counts(jnp.asarray(len(labels)), nothing, nothing, (labels != EMPTY).sum())


def semantic_loss(
    output: Output, labels: jax.Array, counts: losses.Counts, sizes: Sizes, weights: LossWeights
) -> Judgement:
    """Cross-entropy of the masks of every stage, and of the dense logits if there are any.

    Args:
      output: of the network.
      labels: int32 [b, H, W], `EMPTY` where ignored.
      counts: of the whole step.
      sizes: of the network.
      weights: of the terms.
    """
    del sizes

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
    right = (resize(last, labels.shape[1:], axes=(2, 3)).argmax(1) == labels).sum()
    return Judgement(weigh(terms, weights), {"accuracy": right / jnp.maximum(counts.pixels, 1)})
