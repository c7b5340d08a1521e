"""Panoptic quality (Kirillov et al., CVPR 2019, arXiv 1801.00868), with COCO's rules for crowds.

A true and a predicted segment of the same class match when their IoU exceeds one half, so that a
segment has at most one partner. For each class

    PQ = sum of matched IoU / (TP + FP/2 + FN/2) = SQ · RQ,
    SQ = sum of matched IoU / TP,   RQ = TP / (TP + FP/2 + FN/2).

What the truth leaves void counts for nobody: it is taken out of the union, and a prediction that lies
for more than half on void and on crowds of its own class is no false positive. A crowd never matches
and is never a false negative.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knet_jax.metrics.counts import rows_of_classes
from knet_jax.segmentation.segments import Categories, PanopticMap, segment_index

HEADLINE = ("PQ", "PQ_things", "PQ_stuff")
"""The numbers that are logged in short; the first one decides which step of a run is the best."""


class PQCounts(NamedTuple):
    """What panoptic quality needs to know of any number of pictures: four arrays [k] to be summed."""

    iou_sum: np.ndarray
    """float64: sum of the IoU of matched segments."""
    tp: np.ndarray
    """int64: matched segments; `fp` and `fn` are predicted and true segments without a match."""
    fp: np.ndarray
    fn: np.ndarray


def no_counts(num_classes: int) -> PQCounts:
    """Returns the counts of no picture at all."""
    tp, fp, fn = np.zeros((3, num_classes), np.int64)
    return PQCounts(np.zeros(num_classes), tp, fp, fn)


def merge(*counts: PQCounts) -> PQCounts:
    """Adds up counts of different pictures."""
    return PQCounts(*(sum(arrays) for arrays in zip(*counts)))


def count(
    truth: PanopticMap, prediction: PanopticMap, num_classes: int, image_id: int = 0
) -> PQCounts:
    """Matches the segments of one picture.

    A true segment without pixels is a false negative. The id of the picture is for messages.
    """
    where, sizes = f"picture {image_id}", (truth.ids.shape, prediction.ids.shape)
    assert sizes[0] == sizes[1], f"{where}: maps of {sizes}"
    true_labels, labels = (
        np.array([segment.label for segment in each.segments], np.int64)
        for each in (truth, prediction)
    )
    for each in (true_labels, labels):
        assert ((0 <= each) & (each < num_classes)).all(), f"{where}: labels {each}"
    crowd = np.array([segment.iscrowd for segment in truth.segments], bool)[:, None]
    same_label = true_labels[:, None] == labels
    iou, spared = compare(truth, prediction, same_label & crowd)
    matches = same_label & ~crowd & (iou > 0.5)
    wrong = ~matches.any(0) & ~spared
    missed = ~matches.any(1) & ~crowd[:, 0]
    rows, columns = np.nonzero(matches)
    return PQCounts(
        iou_sum=np.bincount(labels[columns], iou[rows, columns], num_classes),
        tp=np.bincount(labels[columns], minlength=num_classes),
        fp=np.bincount(labels[wrong], minlength=num_classes),
        fn=np.bincount(true_labels[missed], minlength=num_classes),
    )


def compare(
    truth: PanopticMap, prediction: PanopticMap, is_own_crowd: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compares each of the t true segments of a picture with each of its p predicted ones.

    Args:
        prediction: the predicted map, whose segments all have pixels.
        is_own_crowd: bool [t, p], whether the one is a crowd of the other's class.

    Returns:
        IoU [t, p], without the void of the truth; and bool [p], which predictions lie for more than half
        on void and on crowds of their own class.
    """
    overlap = overlaps(truth, prediction)
    true_areas, areas = overlap[1:].sum(1, keepdims=True), overlap[:, 1:].sum(0)
    assert areas.all(), "a predicted segment has no pixel"
    on_void, overlap = overlap[0, 1:], overlap[1:, 1:]

    # A true segment without pixels and a prediction on void alone have an empty union.
    iou = overlap / np.maximum(true_areas + areas - on_void - overlap, 1)
    on_crowd = (overlap * is_own_crowd).sum(0)
    return iou, (on_void + on_crowd) / areas > 0.5


def summarize(counts: PQCounts, categories: Categories) -> dict[str, float]:
    """Averages PQ, SQ and RQ, in percent, over all classes, over things and over stuff.

    The keys are PQ, SQ, RQ, PQ_things, …, RQ_stuff. Classes that occur neither in the truth nor in
    a prediction stay out of a mean; the mean of no class is 0.
    """
    summary = {}
    for suffix, classes in _groups(counts, categories).items():
        for name, values in _quality(counts).items():
            summary[name + suffix] = float(values[classes].mean()) if classes.size else 0.0
    return summary


def per_class(counts: PQCounts, categories: Categories) -> list[dict]:
    """Lists every class: name, the dataset's id, PQ, SQ and RQ in percent, and its counts."""
    return rows_of_classes(categories, _quality(counts) | counts._asdict())


def table(counts: PQCounts, categories: Categories) -> str:
    """Formats the classes that occur, and the means over all classes, things and stuff."""
    groups, rows = _groups(counts, categories), per_class(counts, categories)
    width = max(len(name) for name in ("Things", *categories.names))
    quality = "{PQ:6.1f} {SQ:6.1f} {RQ:6.1f}"
    lines = [f"{'':{width}}     PQ     SQ     RQ      TP     FP     FN"]
    for row in (rows[i] for i in groups[""]):
        lines.append(
            f"{row['name']:{width}} {quality.format(**row)}  {row['tp']:6} {row['fp']:6} {row['fn']:6}"
        )
    lines += ["", f"{'':{width}}     PQ     SQ     RQ classes"]
    summary = summarize(counts, categories)
    for title, (suffix, classes) in zip(("All", "Things", "Stuff"), groups.items()):
        means = {name: summary[name + suffix] for name in ("PQ", "SQ", "RQ")}
        lines.append(f"{title:{width}} {quality.format(**means)}  {classes.size:6}")
    return "\n".join(lines)


def overlaps(truth: PanopticMap, prediction: PanopticMap) -> np.ndarray:
    """Counts the pixels that two segments share, int64 [1 + true, 1 + predicted]; row and column 0 are void."""
    rows, columns = 1 + len(truth.segments), 1 + len(prediction.segments)
    pairs = segment_index(truth) * columns + segment_index(prediction)
    return np.bincount(pairs.ravel(), minlength=rows * columns).reshape(rows, columns)


def _quality(counts: PQCounts) -> dict[str, np.ndarray]:
    """Computes PQ, SQ and RQ of every class, in percent, [k]; 0 for a class that does not occur."""
    sq = counts.iou_sum / np.maximum(counts.tp, 1)
    rq = counts.tp / np.maximum(counts.tp + counts.fp / 2 + counts.fn / 2, 0.5)
    return {"PQ": 100 * sq * rq, "SQ": 100 * sq, "RQ": 100 * rq}


def _groups(counts: PQCounts, categories: Categories) -> dict[str, np.ndarray]:
    """Groups the classes that occur, all, things and stuff, by the suffix of a number's name."""
    (occurring,) = np.nonzero(counts.tp + counts.fp + counts.fn)
    is_thing = occurring < categories.num_things
    return {"": occurring, "_things": occurring[is_thing], "_stuff": occurring[~is_thing]}
