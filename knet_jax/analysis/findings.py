"""What is right and wrong in a picture, and sums of that over many: numpy, no picture but its segments.

A predicted segment is, in descending order of score, the first of these that it fits, where IoU is that
with a true segment that is no crowd:

- right: IoU above 0.5 with one of its class, which no other has found;
- left out, if more than half of it lies on void or on a crowd of its class;
- duplicate: IoU above 0.5 with one of its class, which another has found;
- confused: IoU above 0.5 with one of another class;
- badly outlined: IoU of at least 0.1 with one of its class;
- invented: nothing of the above.

A true segment, no crowd, that none is right about, confused with or a bad outline of is missed. (Bolya et
al., TIDE, ECCV 2020, arXiv 2008.08115, tell apart what average precision loses in the same spirit.)
In semantic segmentation a segment is all that a picture has of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from knet_jax.inference.activity import SIDE, Activity
from knet_jax.metrics import panoptic, semantic
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import MIN_SCORE, Categories, PanopticMap, segment_index

FOUND, TOUCHED = 0.5, 0.1
"""IoU above which a segment is found, and from which on it is one badly outlined."""
RIGHT, CONFUSED, OUTLINE, DUPLICATE, INVENTED, MISSED = range(6)
KINDS = ("right", "confused", "badly outlined", "duplicate", "invented", "missed")
SIDES = (0, 8, 16, 32, 64, 128, 256, 512)
"""Ranges of size begin at these sides of a square of the same area, in pixels."""
NUM_BINS = 10
"""Ranges of score, of equal width."""


class Overlaps(NamedTuple):
    """How the t true and p predicted segments of a picture lie upon each other."""

    true_labels: np.ndarray
    """int [t]."""
    true_areas: np.ndarray
    """int [t]: in pixels."""
    is_crowd: np.ndarray
    """bool [t]."""
    labels: np.ndarray
    """int [p]."""
    scores: np.ndarray
    """float [p]."""
    iou: np.ndarray
    """[t, p], 0 with a crowd."""
    spared: np.ndarray
    """bool [p]: lies for more than half on void or on a crowd of its class."""
    is_shown: np.ndarray
    """bool [p]: all but instances that score less than `MIN_SCORE`; networks predict many of these."""
    has_scores: bool
    """Whether scores say anything: a map of labels has none."""

    def objects(self, categories: Categories) -> np.ndarray:
        """Which true segments are things, or of any class where there are no things. bool [t]."""
        is_thing = self.true_labels < (categories.num_things or len(categories.names))
        return is_thing & ~self.is_crowd


class Verdict(NamedTuple):
    """What a predicted segment is, or that a true one is missed."""

    kind: int
    """Position in `KINDS`."""
    iou: float
    """Of the two segments, or the largest of the one with any of another kind."""
    truth: int | None
    """Which true segment it is about; None of an invention."""
    prediction: int | None
    """Which predicted segment it is about; None of what is missed."""
    true_label: int | None
    label: int | None
    """The classes of the two."""


class Findings(NamedTuple):
    """Sums over pictures, arrays that add up; k classes, n kernels."""

    pictures: np.ndarray
    """int []."""
    kinds: np.ndarray
    """int [k, 6]: verdicts of each kind, by the class that was true, or that was invented."""
    confusion: np.ndarray
    """int [k + 1, k + 1]: what is there (rows) and what it is taken for (columns), the last being nothing.
    Of segments, where right and confused ones are a pair, all others with nothing; in semantic
    segmentation of pixels."""
    sizes: np.ndarray
    """float [8, 3]: objects by size, how many are found, and the sum of their best IoU."""
    calibration: np.ndarray
    """float [10, 3]: predictions by score, the sum of scores and that of their best IoU."""
    activity: np.ndarray
    """int [n, SIDE, SIDE]: sum of the kernels' maps, in 255ths."""
    serves: np.ndarray
    """int [n, k]: pictures in which the kernel's best class scores at least `MIN_SCORE`."""


def no_findings(num_classes: int, num_kernels: int) -> Findings:
    """The sums over no picture at all."""
    return Findings(
        pictures=np.zeros((), np.int64),
        kinds=np.zeros((num_classes, len(KINDS)), np.int64),
        confusion=np.zeros((num_classes + 1,) * 2, np.int64),
        sizes=np.zeros((len(SIDES), 3)),
        calibration=np.zeros((NUM_BINS, 3)),
        activity=np.zeros((num_kernels, SIDE, SIDE), np.int64),
        serves=np.zeros((num_kernels, num_classes), np.int64),
    )


def compare(truth: Any, prediction: Any) -> Overlaps:
    """Lays the segments of a picture upon each other, as the metrics do.

    Args:
        truth: a `PanopticMap`, a sequence of `Instance`, or a map of labels.
        prediction: of the same kind; of instances all count, however many a picture has.
    """
    has_scores = not isinstance(truth, np.ndarray)
    if not has_scores:
        truth, prediction = map(PanopticMap.of_labels, (truth, prediction))
    has_map = isinstance(truth, PanopticMap)
    true, found = (each.segments if has_map else each for each in (truth, prediction))
    true_labels, labels = (
        np.array([one.label for one in each], np.int64) for each in (true, found)
    )
    crowd = np.array([one.iscrowd for one in true], bool)
    own_crowd = crowd[:, None] & (true_labels[:, None] == labels)
    if has_map:
        areas = np.bincount(segment_index(truth).ravel(), minlength=len(true) + 1)[1:]
        iou, spared = panoptic.compare(truth, prediction, own_crowd)
    else:
        masks, true_masks = ([one.rle for one in each] for each in (found, true))
        areas = np.array([rle.area(mask) for mask in true_masks], np.int64)
        iou = rle.iou(masks, true_masks, crowd).T
        spared = (np.where(own_crowd, iou, 0) > 0.5).any(0)
    scores = np.array([one.score for one in found], np.float64)
    iou = np.where(crowd[:, None], 0, iou)
    is_shown = (scores >= MIN_SCORE) | has_map
    return Overlaps(true_labels, areas, crowd, labels, scores, iou, spared, is_shown, has_scores)


def judge(overlaps: Overlaps) -> list[Verdict]:
    """What every predicted segment that is shown is, and which true ones are missed."""
    true_labels, _, crowd, labels, scores, iou, spared, is_shown, _ = overlaps
    same = true_labels[:, None] == labels
    found, met = np.zeros((2, len(crowd)), bool)
    verdicts = []

    def add(kind: int, iou: float, truth: int | None, prediction: int | None) -> None:
        true_label = None if truth is None else int(true_labels[truth])
        label = None if prediction is None else int(labels[prediction])
        verdicts.append(Verdict(kind, iou, truth, prediction, true_label, label))

    def best(among: np.ndarray) -> tuple[int, float]:
        """The largest IoU of the prediction p, and with which of some true segments."""
        values = np.where(among, iou[:, p], 0)
        return (int(values.argmax()), float(values.max())) if values.size else (-1, 0.0)

    for p in np.argsort(-scores, kind="stable")[: is_shown.sum()].tolist():
        (free, iou_free), (own, iou_own), (other, iou_other) = (
            best(among) for among in (same[:, p] & ~found, same[:, p], ~same[:, p])
        )
        if iou_free > FOUND:
            add(RIGHT, iou_free, free, p)
            found[free] = True
        elif spared[p]:
            continue
        elif iou_own > FOUND:
            add(DUPLICATE, iou_own, own, p)
        elif iou_other > FOUND:
            add(CONFUSED, iou_other, other, p)
            met[other] = True
        elif iou_own >= TOUCHED:
            add(OUTLINE, iou_own, own, p)
            met[own] = True
        else:
            add(INVENTED, max(iou_own, iou_other), None, p)
    best_iou = iou.max(1, initial=0)
    for t in np.flatnonzero(~(found | met | crowd)).tolist():
        add(MISSED, float(best_iou[t]), t, None)
    return verdicts


def quality(overlaps: Overlaps, verdicts: Sequence[Verdict]) -> float:
    """How good a picture is, 0 to 1: panoptic quality of all its segments as if of one class, 1 where
    there is nothing and nothing was found."""
    right = [verdict.iou for verdict in verdicts if verdict.kind == RIGHT]
    predictions = sum(verdict.prediction is not None for verdict in verdicts)
    total = predictions + int((~overlaps.is_crowd).sum())
    return sum(right) / (total / 2) if total else 1.0


def find(
    overlaps: Overlaps,
    verdicts: Sequence[Verdict],
    categories: Categories,
    activity: Activity,
    maps: tuple[np.ndarray, np.ndarray] | None = None,
) -> Findings:
    """The findings of one picture.

    Args:
        categories: the classes. Objects, whose sizes count, are things, or all where there are none.
        maps: true and predicted labels, whose pixels are the confusion; None takes the verdicts.
    """
    num_classes, nothing = len(categories.names), len(categories.names)
    found = no_findings(num_classes, len(activity.maps))
    found.pictures[...] = 1
    for kind, _, _, _, true_label, label in verdicts:
        found.kinds[label if true_label is None else true_label, kind] += 1
        if kind != MISSED:
            found.confusion[true_label if kind in (RIGHT, CONFUSED) else nothing, label] += 1
    taken = [verdict.truth for verdict in verdicts if verdict.kind in (RIGHT, CONFUSED)]
    is_left = ~overlaps.is_crowd & ~np.isin(np.arange(len(overlaps.is_crowd)), taken)
    np.add.at(found.confusion[:, nothing], overlaps.true_labels[is_left], 1)
    if maps is not None:
        pixels = semantic.confusion(*maps, num_classes)
        found.confusion[:] = 0
        found.confusion[:-1] = np.roll(pixels, -1, axis=1)

    same = overlaps.true_labels[:, None] == overlaps.labels
    own = np.where(same, overlaps.iou, 0)
    is_object = overlaps.objects(categories)
    best = own.max(1, initial=0)[is_object]
    bins = np.searchsorted(SIDES, np.sqrt(overlaps.true_areas[is_object]), side="right") - 1
    np.add.at(found.sizes, bins, np.stack([np.ones_like(best), best > FOUND, best], 1))
    if overlaps.has_scores:
        scores, best = overlaps.scores[~overlaps.spared], own.max(0, initial=0)[~overlaps.spared]
        bins = np.minimum((scores * NUM_BINS).astype(int), NUM_BINS - 1)
        np.add.at(found.calibration, bins, np.stack([np.ones_like(scores), scores, best], 1))

    found.activity[:] = activity.maps
    (kernels,) = np.nonzero(activity.scores >= MIN_SCORE)
    found.serves[kernels, activity.labels[kernels]] = 1
    return found
