"""A task is what is asked of the kernels: how they are judged, and how they are read.

The network is the same for all tasks. `TASKS` at the end holds everything in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import jax

from knet_jax.inference import any_size
from knet_jax.inference.fusion import predict_panoptic, read_panoptic
from knet_jax.inference.postprocess import (
    predict_instances,
    predict_labels,
    read_instances,
    read_labels,
)
from knet_jax.losses import Counts
from knet_jax.metrics import instance, panoptic, semantic
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
from knet_jax.segmentation.coco_files import InstanceResults, PanopticResults
from knet_jax.segmentation.semantic_files import SemanticResults

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
        any_size.panoptic,
        panoptic,
        PanopticResults,
    ),
    "instance": Task(
        unpack_instances,
        count_segments,
        kernel_loss,
        predict_instances,
        read_instances,
        any_size.instances,
        instance,
        InstanceResults,
    ),
    "semantic": Task(
        unpack_semantic,
        count_labels,
        semantic_loss,
        predict_labels,
        read_labels,
        any_size.labels,
        semantic,
        SemanticResults,
    ),
}
