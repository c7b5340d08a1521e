"""Instance annotations: stored as run lengths, learned as masks that may overlap, a bit a pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import transforms
from knet_jax.data.annotations.kind import Kind, Record
from knet_jax.data.annotations.panoptic import count_by_class, describe_counts, largest
from knet_jax.data.recipes import WholePicture
from knet_jax.data.transforms import View
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance
from knet_jax.structs import EMPTY, InstanceTargets


class StoredInstance(NamedTuple):
    """One thing of a stored picture."""

    counts: bytes
    """The mask, as COCO's compressed run lengths; never empty."""
    label: int
    iscrowd: bool
    area: float
    """As annotated."""


class InstanceKind(Kind):
    """Things with masks that may overlap, which stay run lengths until one is needed."""

    @staticmethod
    def features() -> dict[str, Any]:
        return {
            "instances": tfds.features.Sequence(
                {
                    "counts": tfds.features.Text(),
                    "label": np.int64,
                    "iscrowd": np.bool_,
                    "area": np.float64,
                }
            )
        }

    def encode(self, annotation: Sequence[StoredInstance]) -> dict[str, Any]:
        return {"instances": [instance._asdict() for instance in annotation]}

    def decode(self, stored: Mapping[str, Any]) -> list[StoredInstance]:
        columns = (stored["instances"][field] for field in StoredInstance._fields)
        return [
            StoredInstance(bytes(counts), int(label), bool(crowd), float(area))
            for counts, label, crowd, area in zip(*columns)
        ]

    def tally(self, record: Record) -> tuple[int, dict[str, np.ndarray]]:
        return count_by_class(record.annotation, self.categories)

    def describe(
        self, counts: Mapping[str, Sequence[int]], num_pixels: int
    ) -> tuple[str, Sequence[str]]:
        return describe_counts(**counts)

    def load(self, record: Record) -> Record:
        return record

    def train_view(self, recipe: WholePicture, loaded: Record, rng: np.random.Generator) -> View:
        return recipe.train_view(loaded.size, rng)

    def empty(self, recipe: WholePicture, group: int, count: int) -> InstanceTargets:
        height, width = recipe.train_canvases[group]
        return InstanceTargets(
            np.zeros((count, recipe.max_things, height // 2, width // 16), np.uint8),
            np.full((count, recipe.max_things), EMPTY, np.int32),
        )

    def fill(self, targets: InstanceTargets, place: int, loaded: Record, view: View) -> None:
        num_slots, height, packed_width = targets.masks.shape[1:]
        bits = np.zeros((height, 8 * packed_width), np.uint8)
        rows, columns = transforms.sampled_source(view, bits.shape, loaded.size)
        shown = [instance for instance in loaded.annotation if not instance.iscrowd]
        for slot, instance in enumerate(largest(shown, num_slots)):
            # Run lengths go down the columns, and so does the memory of a decoded mask.
            mask = rle.decode(_run_lengths(instance, loaded.size))
            bits[: len(rows), : len(columns)] = mask.T[columns].take(rows, axis=1).T
            targets.masks[place, slot] = np.packbits(bits, axis=-1)
            targets.labels[place, slot] = instance.label

    def truth(self, loaded: Record) -> tuple[Instance, ...]:
        return tuple(
            Instance(_run_lengths(one, loaded.size), one.label, iscrowd=one.iscrowd, area=one.area)
            for one in loaded.annotation
        )


def _run_lengths(instance: StoredInstance, size: tuple[int, int]) -> dict[str, Any]:
    """The mask of a thing in a picture of a size, in COCO's form."""
    return {"size": list(size), "counts": instance.counts}
