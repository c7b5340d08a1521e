"""Panoptic annotations: stored as a PNG of segment ids, learned as one map of segments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import transforms
from knet_jax.data.recipes import WholePicture
from knet_jax.data.transforms import View
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY, PanopticTargets

ENCODED = ("panoptic",)
"""Which of the features are pictures."""


class StoredSegment(NamedTuple):
    """One segment of a stored picture."""

    id: int
    """What the PNG holds at its pixels: R + 256 G + 65536 B, never 0."""
    label: int
    """Class, things first."""
    iscrowd: bool
    area: int
    """Number of its pixels, always positive."""


class Annotation(NamedTuple):
    """What is stored of a picture's segments."""

    png: bytes
    """Pixels hold segment ids in COCO's way: R + 256 G + 65536 B, 0 = void."""
    segments: Sequence[StoredSegment]


class Loaded(NamedTuple):
    """A decoded annotation."""

    rgb: np.ndarray
    """uint8 [H, W, 3]."""
    segments: Sequence[StoredSegment]


def features() -> dict[str, Any]:
    """What TFDS stores of an annotation."""
    return {
        "panoptic": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
        "segments": tfds.features.Sequence(
            {"id": np.int64, "label": np.int64, "iscrowd": np.bool_, "area": np.int64}
        ),
    }


def encode(annotation: Annotation) -> dict[str, Any]:
    """An annotation as TFDS takes it."""
    segments = [segment._asdict() for segment in annotation.segments]
    return {"panoptic": annotation.png, "segments": segments}


def decode(stored: Mapping[str, Any]) -> Annotation:
    """An annotation as TFDS gives it back."""
    columns = (stored["segments"][field] for field in StoredSegment._fields)
    segments = [
        StoredSegment(int(id), int(label), bool(crowd), int(area))
        for id, label, crowd, area in zip(*columns)
    ]
    return Annotation(stored["panoptic"], segments)


def tally(
    annotation: Annotation, size: tuple[int, int], categories: Categories
) -> tuple[int, dict[str, np.ndarray]]:
    """How many things an annotation has, and its segments and crowds by class."""
    del size
    return count_by_class(annotation.segments, categories)


def count_by_class(
    segments: Sequence[Any], categories: Categories
) -> tuple[int, dict[str, np.ndarray]]:
    """How many of some segments are things and no crowds, and all and crowds by class."""
    counts = np.zeros((2, len(categories.names)), np.int64)
    for segment in segments:
        counts[int(segment.iscrowd), segment.label] += 1
    num_things = int(counts[0, : categories.num_things].sum())
    return num_things, {"segments": counts[0], "crowds": counts[1]}


def describe(columns: Mapping[str, Sequence[int]], num_pixels: int) -> tuple[str, Sequence[str]]:
    """A headline for the tallies of a split, and a text for each class."""
    del num_pixels
    segments, crowds = columns["segments"], columns["crowds"]
    texts = [
        f"{count:>8}" + (f" + {crowd} crowd" if crowd else "")
        for count, crowd in zip(segments, crowds)
    ]
    return f"{sum(segments)} segments, {sum(crowds)} crowds", texts


def load(annotation: Annotation, size: tuple[int, int], categories: Categories) -> Loaded:
    """Decodes an annotation. Raises ValueError where its PNG is broken."""
    del categories
    return Loaded(image_files.load_panoptic(annotation.png, size), annotation.segments)


def train_view(
    recipe: WholePicture, loaded: Any, size: tuple[int, int], rng: np.random.Generator
) -> View:
    """Draws what training sees of a picture."""
    del loaded
    return recipe.train_view(size, rng)


def empty(
    recipe: WholePicture, categories: Categories, count: int, canvas: tuple[int, int]
) -> PanopticTargets:
    """The targets of pictures that show nothing."""
    num_values = 1 + recipe.max_things + categories.num_stuff
    dtype = np.uint8 if num_values <= 256 else np.uint16
    return PanopticTargets(
        np.zeros((count, canvas[0] // 2, canvas[1] // 2), dtype),
        np.full((count, num_values - 1), EMPTY, np.int32),
    )


def fill(
    targets: PanopticTargets,
    place: int,
    loaded: Loaded,
    view: View,
    canvas: tuple[int, int],
    categories: Categories,
) -> None:
    """Writes what a view shows of an annotation into a place of the targets."""
    max_things = targets.labels.shape[1] - categories.num_stuff
    shown = [segment for segment in loaded.segments if not segment.iscrowd]
    stuff = [segment for segment in shown if segment.label >= categories.num_things]
    things = [segment for segment in shown if segment.label < categories.num_things]
    things = largest(things, max_things)
    values = [1 + slot for slot in range(len(things))]
    values += [1 + max_things + segment.label - categories.num_things for segment in stuff]
    ids = [segment.id for segment in things + stuff]
    targets.segment_map[place] = transforms.sample_segments(
        loaded.rgb, view, canvas, ids, values, targets.segment_map.dtype
    )
    for segment, value in zip(things + stuff, values):
        targets.labels[place, value - 1] = segment.label


def largest(segments: Sequence[Any], count: int) -> list[Any]:
    """The largest of some segments, in descending order of their area."""
    return sorted(segments, key=lambda segment: -segment.area)[:count]


def truth(loaded: Loaded, categories: Categories) -> PanopticMap:
    """The annotation at original size; ids that it does not list become void (0)."""
    del categories
    ids = image_files.segment_ids(loaded.rgb)
    listed = np.array([segment.id for segment in loaded.segments], np.int32)
    infos = tuple(SegmentInfo(s.id, s.label, s.iscrowd) for s in loaded.segments)
    return PanopticMap(transforms.lookup(ids, listed, listed), infos)
