"""Panoptic annotations: stored as a PNG of segment ids, learned as one map of segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import transforms
from knet_jax.data.annotations.kind import Kind, Record
from knet_jax.data.recipes import WholePicture
from knet_jax.data.transforms import View
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY, PanopticTargets


class StoredSegment(NamedTuple):
    """One segment of a stored picture."""

    id: int
    """The number that the PNG holds at its pixels, never 0."""
    label: int
    """Class, things first."""
    iscrowd: bool
    area: int
    """Number of its pixels, always positive."""


class PanopticAnnotation(NamedTuple):
    """The segments of a picture, as stored."""

    png: bytes
    """A pixel holds a segment's id as R + 256 G + 65536 B; 0 is void."""
    segments: Sequence[StoredSegment]


class LoadedPanoptic(NamedTuple):
    """The segments of a picture, decoded."""

    rgb: np.ndarray
    """uint8 [H, W, 3], the pixels of the PNG."""
    segments: Sequence[StoredSegment]


class PanopticKind(Kind):
    """Things and stuff; every pixel belongs to one segment or to none."""

    @staticmethod
    def features() -> dict[str, Any]:
        return {
            "panoptic": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
            "segments": tfds.features.Sequence(
                {"id": np.int64, "label": np.int64, "iscrowd": np.bool_, "area": np.int64}
            ),
        }

    def encode(self, annotation: PanopticAnnotation) -> dict[str, Any]:
        segments = [segment._asdict() for segment in annotation.segments]
        return {"panoptic": annotation.png, "segments": segments}

    def decode(self, stored: Mapping[str, Any]) -> PanopticAnnotation:
        columns = (stored["segments"][field] for field in StoredSegment._fields)
        segments = [
            StoredSegment(int(id), int(label), bool(crowd), int(area))
            for id, label, crowd, area in zip(*columns)
        ]
        return PanopticAnnotation(stored["panoptic"], segments)

    def tally(self, record: Record) -> tuple[int, dict[str, np.ndarray]]:
        return count_by_class(record.annotation.segments, self.categories)

    def describe(
        self, counts: Mapping[str, Sequence[int]], num_pixels: int
    ) -> tuple[str, Sequence[str]]:
        return describe_counts(**counts)

    def load(self, record: Record) -> LoadedPanoptic:
        rgb = image_files.load_panoptic(record.annotation.png, record.size)
        return LoadedPanoptic(rgb, record.annotation.segments)

    def train_view(
        self, recipe: WholePicture, loaded: LoadedPanoptic, rng: np.random.Generator
    ) -> View:
        return recipe.train_view(loaded.rgb.shape[:2], rng)

    def empty(self, recipe: WholePicture, group: int, count: int) -> PanopticTargets:
        height, width = recipe.train_canvases[group]
        num_stuff = self.categories.num_stuff
        dtype = np.min_scalar_type(recipe.max_things + num_stuff)
        return PanopticTargets(
            np.zeros((count, height // 2, width // 2), dtype),
            np.full((count, recipe.max_things), EMPTY, np.int32),
            np.full((count, num_stuff), EMPTY, np.int32),
        )

    def fill(
        self, targets: PanopticTargets, place: int, loaded: LoadedPanoptic, view: View
    ) -> None:
        num_things, max_things = self.categories.num_things, targets.labels.shape[1]
        shown = [segment for segment in loaded.segments if not segment.iscrowd]
        stuff = [segment for segment in shown if segment.label >= num_things]
        things = [segment for segment in shown if segment.label < num_things]
        things = largest(things, max_things)
        kinds = [segment.label - num_things for segment in stuff]
        values = [1 + slot for slot in range(len(things))]
        values += [1 + max_things + kind for kind in kinds]
        ids = [segment.id for segment in things + stuff]
        segment_map = targets.segment_map[place]
        rows, columns = transforms.sampled_source(view, segment_map.shape, loaded.rgb.shape[:2])
        sampled = image_files.segment_ids(loaded.rgb[rows].take(columns, axis=1))
        values = np.array(values, segment_map.dtype)
        segment_map[: len(rows), : len(columns)] = transforms.lookup(sampled, ids, values)
        targets.labels[place, : len(things)] = [segment.label for segment in things]
        targets.stuff_labels[place, kinds] = [segment.label for segment in stuff]

    def truth(self, loaded: LoadedPanoptic) -> PanopticMap:
        ids = image_files.segment_ids(loaded.rgb)
        listed = np.array([segment.id for segment in loaded.segments], np.int32)
        infos = tuple(SegmentInfo(s.id, s.label, s.iscrowd) for s in loaded.segments)
        # Ids that no segment has become void, 0.
        return PanopticMap(transforms.lookup(ids, listed, listed), infos)


def count_by_class(
    segments: Sequence[Any], categories: Categories
) -> tuple[int, dict[str, np.ndarray]]:
    """Counts segments or instances.

    Returns:
        the number of things that are no crowds, and by class, int [number of classes], the
        "segments" that are no crowds, and the "crowds".
    """
    counts = np.zeros((2, len(categories.names)), np.int64)
    for segment in segments:
        counts[int(segment.iscrowd), segment.label] += 1
    num_things = int(counts[0, : categories.num_things].sum())
    return num_things, {"segments": counts[0], "crowds": counts[1]}


def describe_counts(segments: Sequence[int], crowds: Sequence[int]) -> tuple[str, Sequence[str]]:
    """The sums of `count_by_class` as a summary in one line, and a text for each class."""
    texts = [
        f"{count:>8}" + (f" + {crowd} crowd" if crowd else "")
        for count, crowd in zip(segments, crowds)
    ]
    return f"{sum(segments)} segments, {sum(crowds)} crowds", texts


def largest(segments: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the segments, those of the largest area first."""
    return sorted(segments, key=lambda segment: -segment.area)[:count]
