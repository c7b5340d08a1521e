"""Instance annotations: stored as run lengths, learned as masks that may overlap, a bit a pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from pycocotools import mask as run_lengths

from knet_jax.data import transforms
from knet_jax.data.annotations import panoptic
from knet_jax.data.recipes import WholePicture
from knet_jax.data.transforms import View
from knet_jax.segmentation.segments import Categories, Instance
from knet_jax.structs import EMPTY, InstanceTargets

ENCODED = ()
"""Which of the features are pictures."""


class StoredInstance(NamedTuple):
    """One thing of a stored picture."""

    counts: bytes
    """The mask, as COCO's compressed run lengths; never empty."""
    label: int
    iscrowd: bool
    area: float
    """As annotated."""


class Loaded(NamedTuple):
    """The things of a picture, and its height and width."""

    instances: Sequence[StoredInstance]
    size: tuple[int, int]

    def rle(self, instance: StoredInstance) -> dict:
        """The mask of one of them in COCO's form."""
        return {"size": list(self.size), "counts": instance.counts}


def features() -> dict[str, Any]:
    """What TFDS stores of an annotation."""
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


def encode(annotation: Sequence[StoredInstance]) -> dict[str, Any]:
    """An annotation as TFDS takes it."""
    return {"instances": [instance._asdict() for instance in annotation]}


def decode(stored: Mapping[str, Any]) -> list[StoredInstance]:
    """An annotation as TFDS gives it back."""
    columns = (stored["instances"][field] for field in StoredInstance._fields)
    return [
        StoredInstance(bytes(counts), int(label), bool(crowd), float(area))
        for counts, label, crowd, area in zip(*columns)
    ]


def tally(
    annotation: Sequence[StoredInstance], size: tuple[int, int], categories: Categories
) -> tuple[int, dict[str, np.ndarray]]:
    """How many things an annotation has, and its things and crowds by class."""
    del size
    return panoptic.count_by_class(annotation, categories)


def load(
    annotation: Sequence[StoredInstance], size: tuple[int, int], categories: Categories
) -> Loaded:
    """An annotation with what is needed to read it; masks are decoded one by one."""
    del categories
    return Loaded(annotation, size)


def empty(
    recipe: WholePicture, categories: Categories, count: int, canvas: tuple[int, int]
) -> InstanceTargets:
    """The targets of pictures that show nothing."""
    del categories
    return InstanceTargets(
        np.zeros((count, recipe.max_things, canvas[0] // 2, canvas[1] // 16), np.uint8),
        np.full((count, recipe.max_things), EMPTY, np.int32),
    )


def fill(
    targets: InstanceTargets,
    place: int,
    loaded: Loaded,
    view: View,
    canvas: tuple[int, int],
    categories: Categories,
) -> None:
    """Writes what a view shows of the largest things into a place of the targets."""
    del categories
    rows, columns = transforms.sampled_source(view, canvas, loaded.size)
    bits = np.zeros((canvas[0] // 2, canvas[1] // 2), np.uint8)
    shown = [instance for instance in loaded.instances if not instance.iscrowd]
    for slot, instance in enumerate(panoptic.largest(shown, targets.labels.shape[1])):
        # Run lengths go down the columns, and so does the memory of a decoded mask.
        mask = run_lengths.decode(loaded.rle(instance))
        bits[: len(rows), : len(columns)] = mask.T[columns].take(rows, axis=1).T
        targets.masks[place, slot] = np.packbits(bits, axis=-1)
        targets.labels[place, slot] = instance.label


def truth(loaded: Loaded, categories: Categories) -> tuple[Instance, ...]:
    """The annotation at original size, crowds included."""
    del categories
    return tuple(
        Instance(loaded.rle(one), one.label, iscrowd=one.iscrowd, area=one.area)
        for one in loaded.instances
    )
