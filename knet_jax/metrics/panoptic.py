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

from knet_jax.segmentation.segments import Categories, PanopticMap, segment_index
from knet_jax.system.errors import UserError

HEADLINE = ("PQ", "PQ_things", "PQ_stuff")
"""The numbers that say the most; the first one decides which step of a run is the best."""


class PQCounts(NamedTuple):
    """What panoptic quality needs of any number of pictures: four arrays [k] that add up."""

    iou_sum: np.ndarray
    """float64: sum of the IoU of matched segments."""
    tp: np.ndarray
    fp: np.ndarray
    fn: np.ndarray


def no_counts(num_classes: int) -> PQCounts:
    """The counts of no picture at all."""
    tp, fp, fn = np.zeros((3, num_classes), np.int64)
    return PQCounts(np.zeros(num_classes), tp, fp, fn)


def merge(*counts: PQCounts) -> PQCounts:
    """The counts of the pictures of all."""
    return PQCounts(*(sum(arrays) for arrays in zip(*counts)))


def count(
    truth: PanopticMap, prediction: PanopticMap, num_classes: int, image_id: int = 0
) -> PQCounts:
    """Match the segments of one picture, whose id does not matter here.

    A true segment without pixels is a false negative. Raises ValueError where the maps differ in
    size, a predicted segment has no pixel, a label is out of range, or as `segment_index`.
    """
    del image_id
    if truth.ids.shape != prediction.ids.shape:
        sizes = (" x ".join(map(str, panoptic.ids.shape)) for panoptic in (prediction, truth))
        raise UserError("the prediction has {} pixels and the truth {}".format(*sizes))
    true_labels, labels = _labels(truth, num_classes), _labels(prediction, num_classes)
    crowd = np.array([segment.iscrowd for segment in truth.segments], bool)[:, None]
    same_label = true_labels[:, None] == labels

    overlap = _overlaps(truth, prediction)
    true_areas, areas = overlap[1:].sum(1, keepdims=True), overlap[:, 1:].sum(0)
    for segment, area in zip(prediction.segments, areas):
        if area == 0:
            raise UserError(f"predicted segment {segment.id} has no pixel")
    on_void, overlap = overlap[0, 1:], overlap[1:, 1:]

    # A true segment without pixels and a prediction on void alone have an empty union.
    iou = overlap / np.maximum(true_areas + areas - on_void - overlap, 1)
    matches = same_label & ~crowd & (iou > 0.5)
    on_crowd = (overlap * (same_label & crowd)).sum(0)
    wrong = ~matches.any(0) & ((on_void + on_crowd) / areas <= 0.5)
    missed = ~matches.any(1) & ~crowd[:, 0]
    rows, columns = np.nonzero(matches)
    return PQCounts(
        iou_sum=np.bincount(labels[columns], iou[rows, columns], num_classes),
        tp=np.bincount(labels[columns], minlength=num_classes),
        fp=np.bincount(labels[wrong], minlength=num_classes),
        fn=np.bincount(true_labels[missed], minlength=num_classes),
    )


def summarize(counts: PQCounts, categories: Categories) -> dict[str, float]:
    """PQ, SQ and RQ in percent, the means over all classes, over things and over stuff.

    The keys are PQ, SQ, RQ, PQ_things, …, RQ_stuff. Classes that occur neither in the truth nor in
    a prediction stay out of a mean; the mean of no class is 0.
    """
    summary = {}
    for suffix, classes in _groups(counts, categories).items():
        for name, values in _quality(counts).items():
            summary[name + suffix] = float(values[classes].mean()) if classes.size else 0.0
    return summary


def per_class(counts: PQCounts, categories: Categories) -> list[dict]:
    """A row for every class: name, the dataset's id, PQ, SQ and RQ in percent, and its counts."""
    columns = _quality(counts) | counts._asdict()
    return [
        {"name": name, "id": id} | {key: column[i].item() for key, column in columns.items()}
        for i, (name, id) in enumerate(zip(categories.names, categories.dataset_ids, strict=True))
    ]


def table(counts: PQCounts, categories: Categories) -> str:
    """The classes that occur, and the means over all classes, things and stuff, as text."""
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


def _overlaps(truth: PanopticMap, prediction: PanopticMap) -> np.ndarray:
    """Pixels that two segments share, int64 [1 + true, 1 + predicted]; row and column 0 are void."""
    rows, columns = 1 + len(truth.segments), 1 + len(prediction.segments)
    pairs = segment_index(truth) * columns + segment_index(prediction)
    return np.bincount(pairs.ravel(), minlength=rows * columns).reshape(rows, columns)


def _labels(panoptic: PanopticMap, num_classes: int) -> np.ndarray:
    """int64 [num_segments]."""
    for segment in panoptic.segments:
        if not 0 <= segment.label < num_classes:
            raise UserError(
                f"segment {segment.id} has label {segment.label}, not one of 0 … {num_classes - 1}"
            )
    return np.array([segment.label for segment in panoptic.segments], np.int64)


def _quality(counts: PQCounts) -> dict[str, np.ndarray]:
    """PQ, SQ and RQ of every class in percent, [k]; 0 for a class that does not occur."""
    sq = counts.iou_sum / np.maximum(counts.tp, 1)
    rq = counts.tp / np.maximum(counts.tp + counts.fp / 2 + counts.fn / 2, 0.5)
    return {"PQ": 100 * sq * rq, "SQ": 100 * sq, "RQ": 100 * rq}


def _groups(counts: PQCounts, categories: Categories) -> dict[str, np.ndarray]:
    """The classes that occur: all, things and stuff, by the suffix of their names."""
    (occurring,) = np.nonzero(counts.tp + counts.fp + counts.fn)
    is_thing = occurring < categories.num_things
    return {"": occurring, "_things": occurring[is_thing], "_stuff": occurring[~is_thing]}
