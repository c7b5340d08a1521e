"""A task is what is asked of the kernels: how they are judged, and how they are read.

The network is the same for all tasks. `TASKS` at the end holds everything in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax import portable, rle
from knet_jax.fusion import Fused, fuse
from knet_jax.kernels import claim_hard
from knet_jax.losses import Counts
from knet_jax.metrics import instance, panoptic, semantic
from knet_jax.metrics.coco_files import InstanceResults, PanopticResults
from knet_jax.metrics.semantic_files import SemanticResults
from knet_jax.objectives import (
    Judgement,
    count_labels,
    count_segments,
    kernel_loss,
    semantic_loss,
    unpack_instances,
    unpack_panoptic,
    unpack_semantic,
)
from knet_jax.postprocess import Instances, best_instances, label_maps
from knet_jax.resampling import Canvas
from knet_jax.segments import Instance, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY, Output, Pass, Sizes, Stage


def stage_of(output: Output, index: int, sizes: Sizes) -> Stage:
    """A stage with class logits, where the task has any.

    Before the first update kernels have none: there a kernel gets the mean of the dense classes over
    the pixels that its mask claims.
    """
    stage = output.stages[index]
    if stage.logits is not None or not sizes.num_proposals:
        return stage
    classes = jax.nn.sigmoid(output.dense)
    claims = claim_hard(stage.masks).astype(classes.dtype)
    area = claims.sum((2, 3))[:, :, None]
    probs = jnp.einsum("bnhw,bkhw->bnk", claims, classes) / jnp.maximum(area, 1)
    tiny = jnp.finfo(probs.dtype).tiny
    return stage._replace(logits=jnp.log(probs + tiny) - jnp.log1p(-probs))


def predict_panoptic(
    passes: Sequence[Pass],
    original_size: jax.Array,
    *,
    sizes: Sizes,
    canvas: Canvas,
    options: Mapping[str, Any],
) -> Fused:
    """Panoptic maps of a batch."""
    [seen] = passes
    return fuse(
        seen.stage.masks,
        seen.stage.logits,
        seen.size,
        original_size,
        num_things=sizes.num_things,
        canvas=canvas,
        instance_threshold=options["instance_threshold"],
        overlap_threshold=options["overlap_threshold"],
    )


def read_panoptic(fused: Fused, original_size: np.ndarray, threshold: float = 0.0) -> PanopticMap:
    """A panoptic map without its padding; its things were chosen when it was fused."""
    del threshold
    height, width = original_size
    infos = tuple(
        SegmentInfo(number + 1, int(label), score=float(score))
        for number, (label, score) in enumerate(zip(fused.labels, fused.scores))
        if label != EMPTY
    )
    return PanopticMap(fused.ids[:height, :width].astype(np.int32), infos)


def predict_instances(
    passes: Sequence[Pass],
    original_size: jax.Array,
    *,
    sizes: Sizes,
    canvas: Canvas,
    options: Mapping[str, Any],
) -> Instances:
    """The best instances of each picture of a batch."""
    del sizes
    [seen] = passes
    return best_instances(
        seen.stage.masks,
        seen.stage.logits,
        seen.size,
        original_size,
        canvas=canvas,
        num_results=options["num_results"],
        threshold=options.get("instance_threshold", 0.0),
    )


def read_instances(
    best: Instances, original_size: np.ndarray, threshold: float = 0.0
) -> tuple[Instance, ...]:
    """Instances with their masks as run lengths; a kernel's mask is encoded once."""
    height, width = original_size
    good = best.scores >= threshold
    best = jax.tree.map(lambda x: x[good], best)
    encoded = {}
    for kernel, bits in zip(best.kernels.tolist(), best.bits):
        if kernel not in encoded:
            columns = np.unpackbits(bits[:width], axis=1, count=height)
            encoded[kernel] = rle.encode(columns.T)
    return tuple(
        Instance(encoded[kernel], label, score, area=float(rle.area(encoded[kernel])))
        for kernel, label, score in zip(
            best.kernels.tolist(), best.labels.tolist(), best.scores.tolist()
        )
    )


def predict_labels(
    passes: Sequence[Pass],
    original_size: jax.Array,
    *,
    sizes: Sizes,
    canvas: Canvas,
    options: Mapping[str, Any],
) -> jax.Array:
    """Label maps of a batch, by the mean of all passes."""
    del sizes, options
    return label_maps(passes, original_size, canvas=canvas)


def read_labels(
    labels: np.ndarray, original_size: np.ndarray, threshold: float = 0.0
) -> np.ndarray:
    """A label map without its padding; there are no things in it."""
    del threshold
    height, width = original_size
    return labels[:height, :width]


# The table.


class Task(NamedTuple):
    """One row: everything in which a task differs from the others."""

    unpack: Callable[..., Any]
    """(targets of a `Batch`, sizes, dtype) -> what `count` and `loss` read, on the device."""
    count: Callable[..., Counts]
    """(targets, sizes) -> counts of a part of a batch."""
    loss: Callable[..., Judgement]
    """(output, targets, counts of the step, sizes, weights) -> `Judgement`."""
    predict: Callable[..., Any]
    """(passes, original_size, and what is static) -> results of a batch, on the device; more than
    one `Pass` where the config of the task has scales and flips."""
    read: Callable[..., Any]
    """(results of one picture, original_size, least score of a thing) -> the same as people and
    metrics take it."""
    portable: Callable[..., dict[str, jax.Array]]
    """(one `Pass`, original_size, and what is static) -> results as named arrays, at the pixels of
    pictures of any size."""
    metric: ModuleType
    """Counts pictures and summarizes the counts."""
    results: Callable[..., Any]
    """(path, categories) -> a writer of the files that the test servers take."""


TASKS = {
    "panoptic": Task(
        unpack_panoptic,
        count_segments,
        kernel_loss,
        predict_panoptic,
        read_panoptic,
        portable.panoptic,
        panoptic,
        PanopticResults,
    ),
    "instance": Task(
        unpack_instances,
        count_segments,
        kernel_loss,
        predict_instances,
        read_instances,
        portable.instances,
        instance,
        InstanceResults,
    ),
    "semantic": Task(
        unpack_semantic,
        count_labels,
        semantic_loss,
        predict_labels,
        read_labels,
        portable.labels,
        semantic,
        SemanticResults,
    ),
}
