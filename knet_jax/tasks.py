"""A task is what is asked of the kernels: how they are judged, and how they are read."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax import losses
from knet_jax.layers import upsample2x
from knet_jax.matching import Weights, match, matching_cost
from knet_jax.structs import Batch, Output, Segments


class Matching(NamedTuple):
    """Which thing each proposal answered for, and how well that went."""

    slots: jax.Array
    """int32 [max(S, 1), b, num_proposals]: thing slot or `EMPTY`, of every matching."""
    found: jax.Array
    """[]: how many things their kernel draws with an IoU above one half in the end."""


def segments(batch: Batch, num_stuff: int, dtype="float32") -> tuple[Segments, Segments]:
    """The segments that a batch carries, things and stuff, unpacked on the device."""
    b, rows, columns = batch.targets.segment_map.shape
    count = batch.targets.labels.shape[1]
    index = jnp.arange(1, count + 1, dtype=batch.targets.segment_map.dtype)[
        :, None, None, None, None
    ]
    sampled = batch.targets.segment_map.reshape(b, 1, rows // 2, 2, columns // 2, 2)
    masks = (sampled == index).mean((3, 5), dtype=dtype)
    m = count - num_stuff
    return (
        Segments(masks[:, :m], batch.targets.labels[:, :m]),
        Segments(masks[:, m:], batch.targets.labels[:, m:]),
    )


def panoptic_loss(
    output: Output,
    things: Segments,
    stuff: Segments,
    counts: losses.Counts,
    weights: Weights,
) -> tuple[dict[str, jax.Array], Matching]:
    """Every weighted loss term of K-Net on the masks of things and stuff.

    Stage s is matched by the predictions of stage s - 1, so that all matchings are known once the
    forward pass is; the initial masks are matched by themselves.

    Args:
      output: of the network.
      things: m slots at stride 4.
      stuff: one slot a stuff class at stride 4.
      counts: of the whole step.
      weights: of the terms.

    Returns:
      the terms, named as they are plotted (`loss/stage2/mask`), and the matching.
    """
    num_stuff = stuff.labels.shape[1]
    num_proposals = output.stages[0].masks.shape[1] - num_stuff
    num_things = output.dense.shape[1] - num_stuff
    masks = [upsample2x(stage.masks, axes=(2, 3)) for stage in output.stages]

    def cost(stage: int) -> jax.Array:
        logits = output.stages[stage].logits
        if logits is not None:
            logits = jax.lax.stop_gradient(logits[:, :num_proposals, :num_things])
        proposals = jax.lax.stop_gradient(masks[stage][:, :num_proposals])
        return matching_cost(proposals, logits, things, weights)

    costs = jnp.stack([cost(s) for s in range(max(len(masks) - 1, 1))])
    slots = match(costs, things.labels)

    targets = losses.kernel_targets(things, stuff, slots[0])
    proposals = jax.tree.map(lambda x: x[:, :num_proposals], targets)
    initial = masks[0][:, :num_proposals]
    dense = upsample2x(output.dense, axes=(2, 3))
    terms = {
        "initial/mask": losses.mask_loss(initial, proposals, counts.things),
        "initial/dice": losses.dice_loss(initial, proposals, counts.things),
        "initial/rank": losses.rank_loss(initial, proposals, counts.images),
        "initial/dense": losses.dense_loss(dense, targets, num_proposals, counts.pixels),
    }
    for s in range(1, len(masks)):
        targets = losses.kernel_targets(things, stuff, slots[s - 1])
        logits, labels = output.stages[s].logits, targets.labels
        terms |= {
            f"stage{s}/label": losses.label_loss(logits, labels, num_things, counts.segments),
            f"stage{s}/mask": losses.mask_loss(masks[s], targets, counts.segments),
            f"stage{s}/dice": losses.dice_loss(masks[s], targets, counts.segments),
            f"stage{s}/rank": losses.rank_loss(masks[s], targets, counts.images),
        }
    weighted = {
        f"loss/{name}": getattr(weights, name.partition("/")[2]) * term
        for name, term in terms.items()
    }
    proposals = jax.tree.map(lambda x: x[:, :num_proposals], targets)
    return weighted, Matching(slots, losses.num_found(masks[-1][:, :num_proposals], proposals))
