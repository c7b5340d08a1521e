"""Identities through a video: which thing of a frame is which of those before it.

The kernel that draws a thing has gathered the pixels of it, three times over; it describes what it
drew, and so is nearly the same in the next frame (as Video K-Net, Li et al., CVPR 2022, arXiv
2204.04656, sees, which goes on to train it for that). Nothing is trained here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from knet_jax.metrics.instance import mask_iou
from knet_jax.segmentation import rle
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Instance, PanopticMap, SegmentInfo

MEMORY = 50
"""Frames after which a thing that was not seen is forgotten, two seconds of most videos."""


@dataclass
class Track:
    """A thing as it was when it was last seen."""

    id: int
    label: int
    kernel: np.ndarray
    """[c], of length 1."""
    mask: dict
    """Run lengths."""
    unseen: int = 0
    """For how many frames it has not been seen."""


class Tracker:
    """Gives the things of frame after frame their identities, whole numbers from 1 on.

    The things of a frame are assigned to those of before, of the same class, so that the sum of their
    similarities, `by_kernels` · cosine of the kernels + (1 - `by_kernels`) · IoU of the masks, is as
    large as can be. Pairs that are less alike than `least` are none: such a thing is a new one. What
    is not seen is remembered as it was last seen, for `memory` frames.

    Args:
        memory: in frames; 0 is none but the frame before.
        by_kernels: weight of the kernels, from 0 to 1; 0 is matching by overlap alone.
        least: similarity.
    """

    def __init__(self, memory: int = MEMORY, by_kernels: float = 0.5, least: float = 0.5):
        self.memory, self.by_kernels, self.least = memory, by_kernels, least
        self._tracks: list[Track] = []
        self._count = 0

    def update(self, result: Result, kernels: np.ndarray) -> Result:
        """Takes the next frame.

        Args:
            result: of a panoptic or an instance network.
            kernels: [segments, c], of all segments of `result.prediction`, in their order.

        Returns:
            The same result, in which every thing has its `track`.
        """
        panoptic = result.panoptic
        segments = panoptic.segments if panoptic else result.prediction
        things = [i for i, s in enumerate(segments) if s.label < result.categories.num_things]
        kernels = kernels[things] / np.linalg.norm(kernels[things], axis=1, keepdims=True)
        seen = [
            Track(0, segments[i].label, kernel, _mask(panoptic, segments[i]))
            for i, kernel in zip(things, kernels)
        ]
        for row, column in self._match(seen):
            seen[column].id = self._tracks[row].id
        for track in seen:
            if not track.id:
                self._count += 1
                track.id = self._count
        found = {track.id for track in seen}
        lost = [
            replace(track, unseen=track.unseen + 1)
            for track in self._tracks
            if track.id not in found and track.unseen < self.memory
        ]
        self._tracks = seen + lost
        tracked = list(segments)
        for i, track in zip(things, seen):
            tracked[i] = segments[i]._replace(track=track.id)
        tracked = tuple(tracked)
        return replace(
            result, prediction=panoptic._replace(segments=tracked) if panoptic else tracked
        )

    def _match(self, seen: list[Track]) -> list[tuple[int, int]]:
        """Pairs of a track and a thing of this frame, by their places in `_tracks` and `seen`."""
        if not self._tracks or not seen:
            return []
        before = self._tracks
        cosine = np.stack([t.kernel for t in before]) @ np.stack([t.kernel for t in seen]).T
        iou = mask_iou([t.mask for t in before], [t.mask for t in seen], np.zeros(len(seen)))
        alike = self.by_kernels * cosine + (1 - self.by_kernels) * iou
        same = np.array([t.label for t in before])[:, None] == [t.label for t in seen]
        alike = np.where(same & (alike >= self.least), alike, -1)
        return [(i, j) for i, j in zip(*linear_sum_assignment(alike, maximize=True)) if alike[i, j] >= 0]


def _mask(panoptic: PanopticMap | None, segment: SegmentInfo | Instance) -> dict:
    return rle.encode(panoptic.ids == segment.id) if panoptic else segment.rle
