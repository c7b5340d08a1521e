"""Pictures cut into segments, predicted or true: what files, metrics and drawings share, on the host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from knet_jax.system.errors import UserError

MIN_SCORE = 0.3
"""Least score of a thing that is shown, where nothing else is said: networks predict many more."""


class Categories(NamedTuple):
    """The classes of a dataset, things first."""

    names: tuple[str, ...]
    dataset_ids: tuple[int, ...]
    """The id that the dataset's own files use for each class."""
    num_things: int

    @staticmethod
    def of(saved: Mapping[str, Any]) -> Categories:
        """From `_asdict()`, as JSON gives it back."""
        return Categories(tuple(saved["names"]), tuple(saved["dataset_ids"]), saved["num_things"])

    @property
    def num_stuff(self) -> int:
        """How many of the classes are stuff."""
        return len(self.names) - self.num_things


class SegmentInfo(NamedTuple):
    """One segment of a panoptic map."""

    id: int
    label: int
    iscrowd: bool = False
    score: float = 1.0


class PanopticMap(NamedTuple):
    """A picture cut into segments, predicted or true, on the host."""

    ids: np.ndarray
    """int32 [H, W]: the id of the segment that owns each pixel, 0 = void."""
    segments: tuple[SegmentInfo, ...]

    @classmethod
    def of_labels(cls, labels: np.ndarray) -> PanopticMap:
        """A segment for every class in labels [H, W]: 1 + class, 0 = none."""
        present = np.unique(labels[labels > 0]).tolist()
        return cls(labels.astype(np.int32), tuple(SegmentInfo(id, id - 1) for id in present))


class Instance(NamedTuple):
    """One instance of a picture, predicted or true, on the host. Instances may overlap."""

    rle: dict[str, Any]
    """COCO's compressed run lengths of the mask: {"size": [height, width], "counts": bytes}."""
    label: int
    score: float = 1.0
    iscrowd: bool = False
    area: float = 0.0
    """Pixels as annotated, which may differ from the mask's; 0 = not annotated."""


def segment_index(panoptic: PanopticMap) -> np.ndarray:
    """The map by position instead of id, intp [H, W]: 0 is void, 1 + i is `segments[i]`.

    Raises ValueError where an id is 0, belongs to two segments, or is in the map alone.
    """
    ids = np.array([0, *(segment.id for segment in panoptic.segments)])
    order = np.argsort(ids, kind="stable")
    known = ids[order]
    for id in known[1:][known[1:] == known[:-1]]:
        raise UserError(
            f"segment id {id} stands for void" if id == 0 else f"segment id {id} is used twice"
        )
    # The last id is left out of the search, so that an id beyond it still gets a place to compare.
    rank = np.searchsorted(known[:-1], panoptic.ids)
    unknown = known[rank] != panoptic.ids
    if unknown.any():
        raise UserError(f"the map has id {panoptic.ids[unknown][0]}, which no segment has")
    return order[rank]
