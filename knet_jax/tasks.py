"""A task is what is asked of the kernels: how they are judged, and how they are read.

The network is the same for all tasks. `TASKS` at the end holds everything in which they differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import jax

from knet_jax import objectives
from knet_jax.inference import any_size, fusion, postprocess, windows
from knet_jax.losses import Counts
from knet_jax.metrics import instance, panoptic, semantic
from knet_jax.objectives import Judgement
from knet_jax.segmentation.coco_files import InstanceResults, PanopticResults
from knet_jax.segmentation.semantic_files import SemanticResults
from knet_jax.structs import Sizes


class Task(NamedTuple):
    """One row: everything in which a task differs from the others."""

    unpack: Callable[..., Any]
    """(targets of a `Batch`) -> what `count` and `loss` read, on the device."""
    count: Callable[..., Counts]
    """(unpacked targets) -> counts of a part of a batch."""
    loss: Callable[..., Judgement]
    """(output, unpacked targets, counts of the step, weights) -> `Judgement`."""
    predict: Callable[..., Any]
    """(passes, original_size, *, canvas, options by name) -> results of a batch, on the device; more
    than one `Pass` where the config of the task has scales and flips."""
    predict_any_size: Callable[..., dict[str, jax.Array]]
    """(one `Pass`, original_size, *, shape, options by name) -> results of a batch as named arrays,
    at the pixels of pictures of any size: what an exported model computes."""
    options: tuple[str, ...]
    """Names of the keyword arguments that `predict` and `predict_any_size` take, but for `thresholds`;
    their values come from `config.eval`, or from the `Sizes` of the network."""
    thresholds: tuple[str, ...]
    """Names of further ones that `predict` takes, which may change from call to call without compiling
    it anew."""
    read: Callable[..., Any]
    """(results of one picture, original_size) -> the same as people and metrics take it."""
    join: Callable[..., Any] | None
    """(segments of windows, their spans, size of the picture, num_things, overlap_threshold) -> the
    result of the picture; None where windows are joined inside the program."""
    metric: ModuleType
    """Counts pictures and summarizes the counts."""
    result_files: Callable[..., Any]
    """(path, categories) -> a writer of the files that the test servers take."""

    def choose_options(self, sizes: Sizes, options: Mapping[str, Any]) -> dict[str, Any]:
        """The values of `options`, of a network and a `config.eval`."""
        given = sizes._asdict() | dict(options)
        return {name: given[name] for name in self.options}

    def place_windows(self, options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """`window` and `step` of a `config.eval`: inside the program, and for pictures of their own."""
        given = {"window": options.get("window", ()), "step": options.get("window_step", ())}
        none = {"window": (), "step": ()}
        return (none, given) if self.join else (given, none)


TASKS = {
    "panoptic": Task(
        unpack=objectives.unpack_panoptic,
        count=objectives.count_segments,
        loss=objectives.kernel_loss,
        predict=fusion.predict_panoptic,
        predict_any_size=any_size.predict_panoptic,
        options=("num_things", "instance_threshold", "overlap_threshold"),
        thresholds=("instance_threshold", "overlap_threshold"),
        read=fusion.read_panoptic,
        join=windows.join_panoptic,
        metric=panoptic,
        result_files=PanopticResults,
    ),
    "instance": Task(
        unpack=objectives.unpack_instances,
        count=objectives.count_segments,
        loss=objectives.kernel_loss,
        predict=postprocess.predict_instances,
        predict_any_size=any_size.predict_instances,
        options=("num_results",),
        thresholds=("instance_threshold",),
        read=postprocess.read_instances,
        join=windows.join_instances,
        metric=instance,
        result_files=InstanceResults,
    ),
    "semantic": Task(
        unpack=objectives.unpack_semantic,
        count=objectives.count_labels,
        loss=objectives.semantic_loss,
        predict=postprocess.predict_labels,
        predict_any_size=any_size.predict_labels,
        options=(),
        thresholds=(),
        read=postprocess.read_labels,
        join=None,
        metric=semantic,
        result_files=SemanticResults,
    ),
}
