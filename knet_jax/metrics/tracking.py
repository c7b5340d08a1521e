"""How well identities stay through videos: STQ (Weber et al., NeurIPS 2021, arXiv 2102.11859).

A tube is all pixels of an identity, in all frames of a video. Of true tubes g and predicted ones p,

    AQ = mean over g of  sum over p of  |p ∩ g| · |p ∩ g| / |p ∪ g|,  divided by |g|,
    SQ = mean IoU of the classes of pixels,  STQ = √(AQ · SQ).

AQ asks for no class: that is what SQ is for. As in the authors' code, a prediction on a crowd counts
for nobody in AQ, and one on void counts for nobody in SQ.

Switches are counted besides, as for MOTA: how often the prediction that covers a thing (with an IoU
above one half) has another identity than the one that covered it last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from knet_jax.metrics.counts import mean_of_defined
from knet_jax.metrics.panoptic import overlaps
from knet_jax.segmentation.segments import PanopticMap


class TrackingCounts(NamedTuple):
    """What the numbers need to know of any number of videos, to be summed."""

    association: float
    """Sum over the true tubes of what AQ is the mean of."""
    tubes: int
    """How many true tubes there are."""
    tracks: int
    """How many predicted ones."""
    confusion: np.ndarray
    """int64 [k + 1, k + 1]: pixels of each true and predicted class; row and column 0 are void."""
    switches: int


def merge(*counts: TrackingCounts) -> TrackingCounts:
    """Adds up counts of different videos."""
    return TrackingCounts(*(sum(parts) for parts in zip(*counts)))


def count(frames: Iterable[tuple[PanopticMap, PanopticMap]], num_classes: int) -> TrackingCounts:
    """Compares the truth of a video and what was predicted, frame by frame.

    Args:
        frames: pairs of a true and a predicted map, whose things have their identity as `track`.
        num_classes: k.
    """
    true, predicted, both = Counter(), Counter(), Counter()  # pixels
    confusion = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    last: dict[int, int] = {}
    switches = 0
    for truth, prediction in frames:
        rows, columns = (
            [(0, 0, False)] + [(s.track, 1 + s.label, s.iscrowd) for s in each.segments]
            for each in (truth, prediction)
        )
        overlap = overlaps(truth, prediction)
        unions = overlap.sum(1)[:, None] + overlap.sum(0) - overlap
        for i, j in np.argwhere(overlap):
            (tube, label, is_crowd), (track, seen, _) = rows[i], columns[j]
            pixels = int(overlap[i, j])
            confusion[label, seen] += pixels
            if is_crowd:
                continue
            true[tube] += pixels
            predicted[track] += pixels
            both[tube, track] += pixels
            if tube and track and pixels > unions[i, j] / 2:
                switches += last.setdefault(tube, track) != track
                last[tube] = track
    del true[0], predicted[0]
    association = sum(
        pixels * pixels / (true[tube] + predicted[track] - pixels) / true[tube]
        for (tube, track), pixels in both.items()
        if tube and track
    )
    return TrackingCounts(association, len(true), len(predicted), confusion, switches)


def summarize(counts: TrackingCounts) -> dict[str, float]:
    """Computes STQ, AQ and SQ in percent, and the number of switches.

    Classes that occur neither in the truth nor in a prediction stay out of SQ.
    """
    known = counts.confusion[1:, 1:]  # what is void in the truth asks for nothing
    inside = known.diagonal()
    union = counts.confusion[1:].sum(1) + known.sum(0) - inside
    sq = mean_of_defined(np.divide(inside, union, out=np.full(len(union), np.nan), where=union > 0))
    aq = counts.association / max(counts.tubes, 1)
    numbers = {"STQ": np.sqrt(aq * sq), "AQ": aq, "SQ": sq}
    return {k: 100 * float(v) for k, v in numbers.items()} | {"switches": counts.switches}
