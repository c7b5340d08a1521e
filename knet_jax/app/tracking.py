"""Identities through a video: which thing of a frame is which of those before it.

A kernel that was updated with the pixels of a thing describes this thing, and is nearly the same in the
next frame. Video K-Net (Li et al., CVPR 2022, arXiv 2204.04656) starts from that, and trains kernels for
it; here they are taken as they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np

from knet_jax.config.rules import MOST_STEPS, is_number, is_whole
from knet_jax.segmentation import rle
from knet_jax.segmentation.result import Result
from knet_jax.system.errors import UserError

TWICE = 0.6
"""IoU above which two masks of a frame are of one thing."""


@dataclass(frozen=True)
class Track:
    """A thing as it was when it was last seen."""

    label: int
    kernel: np.ndarray
    """[c], of length 1."""
    mask: dict[str, Any]
    """Run lengths."""
    unseen: int = 0
    """In how many frames since it was not seen."""


class Tracker:
    """Gives the things of frame after frame their identities, whole numbers from 1 on.

    The similarity of two things is `by_kernels` · the cosine of their kernels + (1 - `by_kernels`) · the
    IoU of their masks. Things of a frame are assigned to those of before so that the sum of the
    similarities is as large as can be. What is assigned to nothing is new.

    Args:
        memory: for how many frames a thing that is not seen is remembered, as it was last seen.
        by_kernels: weight of the kernels, from 0 to 1; 0 is matching by overlap alone.
        least: similarity of two that may be the same, from 0 to 1.
        same_class: whether a thing keeps its class. Networks waver between some, so that a thing would
            change its identity with its class; and kernels tell most of them apart.

    Raises:
        UserError: an argument is not accepted.
    """

    def __init__(
        self,
        memory: int = 50,
        by_kernels: float = 0.6,
        least: float = 0.5,
        same_class: bool = False,
    ):
        if not is_whole(memory, 0, MOST_STEPS):
            raise UserError(f"memory is {memory!r}; accepted: a whole number of frames, 0 or more")
        for name, value in {"by_kernels": by_kernels, "least": least}.items():
            if not (is_number(value) and 0 <= value <= 1):
                raise UserError(f"{name} is {value!r}; accepted: a number from 0 to 1")
        self.memory, self.by_kernels, self.least = memory, by_kernels, least
        self.same_class = same_class
        self._tracks: dict[int, Track] = {}  # what is remembered, by its identity
        self._new = count(1)

    def update(self, result: Result, kernels: np.ndarray) -> Result:
        """Takes the next frame.

        Args:
            result: of a panoptic or an instance network.
            kernels: [segments, c], of all segments of `result.prediction`, in their order.

        Returns:
            The same result, in which every thing has its `track`; what is drawn twice shares it.
        """
        panoptic, num_things = result.panoptic, result.categories.num_things
        segments = list(panoptic.segments if panoptic else result.prediction)
        places = [i for i, segment in enumerate(segments) if segment.label < num_things]
        lengths = np.linalg.norm(kernels, axis=1, keepdims=True)
        kernels = kernels / np.maximum(lengths, np.finfo(np.float32).tiny)
        things = [segments[i] for i in places]
        masks = [rle.encode(panoptic.ids == s.id) if panoptic else s.rle for s in things]
        drawn = [Track(s.label, kernels[i], mask) for s, i, mask in zip(things, places, masks)]

        firsts = self._first_of_same(drawn)
        seen = {i: drawn[i] for i in firsts}
        ids = dict(zip(seen, self._identify(list(seen.values()))))
        for i, first in zip(places, firsts):
            segments[i] = segments[i]._replace(track=ids[first])
        found = {ids[i]: thing for i, thing in seen.items()}
        lost = {
            id: replace(track, unseen=track.unseen + 1)
            for id, track in self._tracks.items()
            if id not in found and track.unseen < self.memory
        }
        self._tracks = found | lost
        segments = tuple(segments)
        prediction = panoptic._replace(segments=segments) if panoptic else segments
        return replace(result, prediction=prediction)

    def _first_of_same(self, drawn: list[Track]) -> list[int]:
        """The place of every thing, or of the first one that is the same, drawn twice."""
        same = (_iou(drawn, drawn) > TWICE) & self._may_be(drawn, drawn)
        firsts: list[int] = []
        for i in range(len(drawn)):
            firsts.append(next((j for j in firsts if same[j, i]), i))
        return firsts

    def _identify(self, seen: list[Track]) -> list[int]:
        """The identity of every thing of a frame."""
        # It takes half a second to import, which others need not wait.
        from scipy.optimize import linear_sum_assignment

        ids, before = list(self._tracks), list(self._tracks.values())
        matched = {}
        if before and seen:
            cosine = np.array([t.kernel for t in before]) @ np.array([t.kernel for t in seen]).T
            similarity = self.by_kernels * cosine + (1 - self.by_kernels) * _iou(before, seen)
            similarity[(similarity < self.least) | ~self._may_be(before, seen)] = 0
            pairs = zip(*linear_sum_assignment(similarity, maximize=True))
            matched = {column: ids[row] for row, column in pairs if similarity[row, column] > 0}
        return [matched.get(column) or next(self._new) for column in range(len(seen))]

    def _may_be(self, some: list[Track], others: list[Track]) -> np.ndarray:
        """bool [m, n]: which of some and others may be the same thing, by their classes."""
        labels = np.array([thing.label for thing in some])
        return (labels[:, None] == [thing.label for thing in others]) | (not self.same_class)


def _iou(some: list[Track], others: list[Track]) -> np.ndarray:
    """[m, n], 0 where frames differ in size."""
    masks = ([thing.mask for thing in each] for each in (some, others))
    return rle.iou(*masks).clip(0)
