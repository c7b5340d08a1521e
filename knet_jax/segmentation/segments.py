"""Segments of pictures, predicted or true, in numpy: what files, metrics and drawings share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from knet_jax.config.rules import is_whole
from knet_jax.system.errors import UserError

MIN_SCORE = 0.3
"""Default of the least score of a thing that is shown; networks predict many more things."""
MAX_LENGTH = 200
"""The most letters that the name of a class may have."""
MAX_CLASSES = 65535
"""The most classes of a dataset: label maps are uint16, and 0 stands for none."""


class Categories(NamedTuple):
    """The classes of a dataset, things first."""

    names: tuple[str, ...]
    dataset_ids: tuple[int, ...]
    """The id that the dataset's own files use for each class."""
    num_things: int

    @staticmethod
    def of(given: Mapping[str, Any]) -> Categories:
        """Makes categories of what a file says, for example the JSON of their `_asdict()`.

        Args:
            given: the fields of this class by name. Names are made `printable`.

        Raises:
            UserError: a name is no text, empty or longer than `MAX_LENGTH`, an id is no whole number
                of 64 bits or occurs twice, or their numbers do not agree.
        """
        try:
            names, ids, num_things = (given[field] for field in Categories._fields)
            agree = len(names) == len(ids) and num_things in range(len(names) + 1)
            agree &= 0 < len(names) <= MAX_CLASSES
            whole = {id for id in ids if is_whole(id, -(2**63), 2**63 - 1)}
        except (TypeError, KeyError) as error:
            raise UserError(f"it lists no classes: {error!r:.100}") from error
        if not agree:
            raise UserError(
                f"it lists {len(names)} names and {len(ids)} ids of classes, {num_things!r:.20} of them "
                f"things; accepted: as many names as ids, 1 to {MAX_CLASSES}"
            )
        if len(whole) != len(ids):
            raise UserError(
                f"category ids are {ids!r:.80}; accepted: whole numbers of 64 bits, each once"
            )
        cleaned = [printable(name) if isinstance(name, str) else "" for name in names]
        for name, clean in zip(names, cleaned):
            if not 0 < len(clean) <= MAX_LENGTH:
                raise UserError(
                    f"a class is called {name!r:.40}; accepted: texts of 1 to {MAX_LENGTH} letters"
                )
        return Categories(tuple(cleaned), tuple(ids), int(num_things))

    @property
    def num_stuff(self) -> int:
        """Number of classes that are stuff."""
        return len(self.names) - self.num_things


def printable(text: str) -> str:
    """A text in one line: line breaks become spaces, and what has no shape is left out."""
    # Joiners have none either, but shape the letters of some scripts.
    shown = (c if c.isprintable() or c in "\u200c\u200d" else " " * c.isspace() for c in text)
    return " ".join("".join(shown).split())


class SegmentInfo(NamedTuple):
    """One segment of a panoptic map."""

    id: int
    label: int
    iscrowd: bool = False
    score: float = 1.0
    track: int = 0
    """Of a thing in a video: its identity, the same in every frame, from 1 on; 0 = not tracked."""


class PanopticMap(NamedTuple):
    """A picture cut into segments that do not overlap, predicted or true."""

    ids: np.ndarray
    """int32 [H, W]: the id of the segment that owns each pixel, 0 = void."""
    segments: tuple[SegmentInfo, ...]

    @classmethod
    def of_labels(cls, labels: np.ndarray) -> PanopticMap:
        """Makes one segment of every class in labels, integers [H, W]: 1 + class, 0 = none."""
        present = np.unique(labels[labels > 0]).tolist()
        return cls(labels.astype(np.int32), tuple(SegmentInfo(id, id - 1) for id in present))


class Instance(NamedTuple):
    """One instance in a picture, predicted or true. Instances may overlap."""

    rle: dict[str, Any]
    """COCO's compressed run lengths of the mask: {"size": [height, width], "counts": bytes}."""
    label: int
    score: float = 1.0
    iscrowd: bool = False
    area: float = 0.0
    """Number of pixels as annotated, which may differ from the mask's; 0 = not annotated."""
    track: int = 0
    """As that of `SegmentInfo`."""


def segment_index(panoptic: PanopticMap) -> np.ndarray:
    """Converts the ids of a map to positions, intp [H, W]: 0 is void, 1 + i is `segments[i]`."""
    ids = np.array([0, *(segment.id for segment in panoptic.segments)])
    order = np.argsort(ids, kind="stable")
    known = ids[order]
    assert (known[1:] > known[:-1]).all(), f"ids of segments, {known}, must differ, none be 0"
    rank = np.searchsorted(known[:-1], panoptic.ids)
    assert (known[rank] == panoptic.ids).all(), "the map has an id that no segment has"
    return order[rank]
