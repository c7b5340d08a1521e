"""Average precision of instance masks, by the rules of COCO's detection challenge.

The predictions of a class are taken in descending order of score, and at each of ten IoU thresholds
the first to reach an instance with that IoU finds it. Precision, made non-increasing, is read at 101
values of recall; AP is its mean over these, the thresholds 0.50, 0.55 … 0.95, and the classes. AR is
the recall at the end. All numbers equal pycocotools' COCOeval
(https://cocodataset.org/#detection-eval), which matches the same way but keeps every mask until the
end: here a picture is matched when it is seen, and only the outcome is kept.

A crowd may be found any number of times, which is neither right nor wrong, as is an instance outside
the range of sizes in question; so is a prediction outside of it that finds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from knet_jax.metrics.counts import mean_of_defined, rows_of_classes, without_nan
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Categories, Instance

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""The IoU from which on an instance counts as found."""
RECALLS = np.linspace(0, 1, 101)
"""The values of recall at which precision is read."""
SIZES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
"""Ranges of area in pixels, both ends included, by the suffix of their names."""
MAX_PREDICTIONS = 100
"""How many predictions of a class in a picture count by default, those of the highest scores."""

RIGHT, WRONG, IGNORED = 1, 0, -1
NUMBERS = (
    *("AP", "AP50", "AP75", "APs", "APm", "APl"),
    *("AR1", "AR10", "AR100", "ARs", "ARm", "ARl"),
)

HEADLINE = ("AP", "AP50", "AP75")
"""The numbers that are logged in short; the first one decides which step of a run is the best."""

Overlap = Callable[[list[dict], list[dict], np.ndarray], np.ndarray]
"""(p predicted masks, i true masks, whether each of these is a crowd, bool [i]) -> IoU [p, i]."""


class InstanceCounts(NamedTuple):
    """What average precision needs to know of any number of pictures, with p predictions in total.

    To merge counts, `objects` is summed and the other arrays are concatenated.
    """

    objects: np.ndarray
    """int64 [k, 4]: number of true instances to be found, by class and range of sizes."""
    label: np.ndarray
    """int32 [p]: class of each prediction."""
    score: np.ndarray
    """float64 [p]."""
    image: np.ndarray
    """int64 [p]: id of its picture, which orders predictions of equal score."""
    rank: np.ndarray
    """int32 [p]: how many predictions of its class in its picture come before it."""
    outcome: np.ndarray
    """int8 [p, 4, 10]: `RIGHT`, `WRONG` or `IGNORED`, by range of sizes and threshold."""


def no_counts(num_classes: int) -> InstanceCounts:
    """Returns the counts of no picture at all."""
    return InstanceCounts(
        objects=np.zeros((num_classes, len(SIZES)), np.int64),
        label=np.zeros(0, np.int32),
        score=np.zeros(0),
        image=np.zeros(0, np.int64),
        rank=np.zeros(0, np.int32),
        outcome=np.zeros((0, len(SIZES), len(THRESHOLDS)), np.int8),
    )


def merge(*counts: InstanceCounts) -> InstanceCounts:
    """Merges counts of different pictures, many at once much faster than one by one."""
    objects, *others = zip(*counts)
    return InstanceCounts(sum(objects), *(np.concatenate(arrays) for arrays in others))


def boundary_iou(predicted: list[dict], true: list[dict], iscrowd: np.ndarray) -> np.ndarray:
    """Computes the smaller of `rle.iou` and the IoU of the boundaries of the masks.

    With it, AP becomes boundary AP (Cheng et al., CVPR 2021, arXiv 2103.16562), where a wrong
    outline of a large mask costs as much as that of a small one. The boundary of a mask is its part
    within 2 % of the picture's diagonal of its outline. Crowds are compared whole.
    """
    boundaries = [[_boundary(mask) for mask in masks] for masks in (predicted, true)]
    whole = rle.iou(predicted, true, iscrowd)
    return np.where(iscrowd, whole, np.minimum(whole, rle.iou(*boundaries, iscrowd)))


def count(
    truth: Sequence[Instance],
    prediction: Sequence[Instance],
    num_classes: int,
    image_id: int = 0,
    overlap: Overlap = rle.iou,
    max_predictions: int = MAX_PREDICTIONS,
) -> InstanceCounts:
    """Matches the instances of one picture.

    Args:
        truth: crowds included.
        prediction: in any order; of equal scores, the first comes first.
        num_classes: k.
        image_id: of predictions of equal score, those of the smaller id come first, as in COCOeval;
            of equal ids, those that are merged first.
        overlap: `rle.iou` or `boundary_iou`.
        max_predictions: how many of a class count; COCO's numbers are of 100, too few for a picture with
            more things.
    """
    instances, where = (*truth, *prediction), f"picture {image_id}"
    sizes = {tuple(one.rle["size"]) for one in instances}
    assert len(sizes) <= 1, f"{where}: masks of {sizes}"
    for one in instances:
        assert 0 <= one.label < num_classes, f"{where}: label {one.label}"
        assert np.isfinite(one.score), f"{where}: score {one.score}"
    counts = [no_counts(num_classes)]
    for label in sorted({instance.label for instance in (*truth, *prediction)}):
        true = [instance for instance in truth if instance.label == label]
        found = [instance for instance in prediction if instance.label == label]
        found = sorted(found, key=lambda instance: -instance.score)[:max_predictions]
        crowd = np.array([instance.iscrowd for instance in true], bool)
        masks, true_masks = ([instance.rle for instance in each] for each in (found, true))
        # One by one: pycocotools takes no list of more than 255.
        areas, true_areas = (
            np.array([rle.area(mask) for mask in each]) for each in (masks, true_masks)
        )
        # As COCOeval does: a truth is as large as annotated, a prediction as its mask.
        annotated = np.array([instance.area for instance in true])
        ignored = _is_outside(np.where(annotated > 0, annotated, true_areas)) | crowd[:, None]
        outside = _is_outside(areas)
        objects = np.zeros((num_classes, len(SIZES)), np.int64)
        objects[label] = (~ignored).sum(0)
        counts.append(
            InstanceCounts(
                objects=objects,
                label=np.full(len(found), label, np.int32),
                score=np.array([instance.score for instance in found], np.float64),
                image=np.full(len(found), image_id, np.int64),
                rank=np.arange(len(found), dtype=np.int32),
                outcome=_match(overlap(masks, true_masks, crowd), crowd, ignored, outside),
            )
        )
    return merge(*counts)


def summarize(counts: InstanceCounts, categories: Categories) -> dict[str, float]:
    """Computes COCO's twelve numbers, in percent, under the names of `NUMBERS`.

    AP50 and AP75 are at one IoU threshold; s, m and l are instances of an area up to 32², from
    there to 96², and beyond; AR1, AR10 and AR100 take so many predictions of a class in a picture.
    Classes without an instance stay out of a mean. Without any instance AP and AR are 0, and those of
    a range of sizes NaN where it has none.
    """
    means = {name: mean_of_defined(values) for name, values in _quality(counts).items()}
    for size, letter in enumerate("sml", 1):
        if not counts.objects[:, size].any():
            means |= {f"AP{letter}": np.nan, f"AR{letter}": np.nan}
    return means


def per_class(counts: InstanceCounts, categories: Categories) -> list[dict]:
    """Lists every class: name, the dataset's id, the twelve numbers in percent, and two counts.

    A number is None where the class has no instance; `objects` counts true instances except crowds,
    `predictions` those that were taken into account.
    """
    predictions = np.bincount(counts.label, minlength=len(counts.objects))
    sizes = {"objects": counts.objects[:, 0], "predictions": predictions}
    return rows_of_classes(categories, _quality(counts) | sizes)


def table(counts: InstanceCounts, categories: Categories) -> str:
    """Formats the classes that occur, and the means over those with an instance."""
    precision, recall = NUMBERS[:6], NUMBERS[6:]
    rows = [row for row in per_class(counts, categories) if row["objects"] or row["predictions"]]
    width = max(len(name) for name in ("All", *categories.names))

    def line(title: str, values: dict, names: Sequence[str]) -> str:
        cells = ("     -" if values[name] is None else f"{values[name]:6.1f}" for name in names)
        return f"{title:{width}} {' '.join(cells)}"

    def head(names: Sequence[str]) -> str:
        return f"{'':{width}} {' '.join(f'{name:>6}' for name in names)}"

    lines = [f"{head(precision)}  objects predicted"]
    for row in rows:
        lines.append(
            f"{line(row['name'], row, precision)}  {row['objects']:7} {row['predictions']:9}"
        )
    means = without_nan(summarize(counts, categories))
    with_objects = sum(row["objects"] > 0 for row in rows)
    lines += [
        "",
        f"{head(precision)}  classes",
        f"{line('All', means, precision)}  {with_objects:7}",
    ]
    lines += ["", head(recall), line("All", means, recall)]
    return "\n".join(lines)


def _is_outside(areas: np.ndarray) -> np.ndarray:
    """Tells whether areas [i] are outside of each range of sizes, bool [i, 4]."""
    low, high = np.array(list(SIZES.values())).T
    return (areas[:, None] < low) | (areas[:, None] > high)


def _match(
    iou: np.ndarray, iscrowd: np.ndarray, ignored: np.ndarray, outside: np.ndarray
) -> np.ndarray:
    """Matches the predictions of one class in one picture, the highest score first.

    Each takes, of the instances that are left and that it overlaps enough, the one of the largest
    IoU, the last of equals; one that is to be ignored only if there is no other.

    Args:
        iou: [p, i], predictions in descending order of score.
        iscrowd: bool [i].
        ignored: bool [i, 4], by range of sizes.
        outside: bool [p, 4], predictions whose own size is not in the range.

    Returns:
        `RIGHT`, `WRONG` or `IGNORED`, int8 [p, 4, 10].
    """
    shape = (len(iou), len(SIZES), len(THRESHOLDS))
    outcome = np.broadcast_to(np.where(outside, IGNORED, WRONG)[:, :, None], shape).astype(np.int8)
    taken = np.zeros((*shape[1:], len(iscrowd)), bool)
    preferred = len(iscrowd) * ~ignored.T[:, None, :]
    for p in np.flatnonzero(iou.max(1, initial=0) >= THRESHOLDS[0]):
        place = np.argsort(np.argsort(iou[p], kind="stable"))
        can_take = (iou[p] >= THRESHOLDS[:, None]) & ~taken
        value = np.where(can_take, 1 + place + preferred, 0)
        size, threshold = np.nonzero(value.any(-1))
        best = value.argmax(-1)[size, threshold]
        outcome[p, size, threshold] = np.where(ignored[best, size], IGNORED, RIGHT)
        taken[size, threshold, best] = ~iscrowd[best]
    return outcome


def _boundary(mask: dict) -> dict:
    """Cuts out the part of a mask near its outline; the picture's border is an outline too."""
    pixels = rle.decode(mask)
    width = max(1, round(0.02 * float(np.hypot(*pixels.shape))))
    inner = cv2.erode(
        pixels,
        np.ones((3, 3), np.uint8),
        iterations=width,
        borderType=cv2.BORDER_CONSTANT,
        borderValue=0,
    )
    return rle.encode(pixels - inner)


def _quality(counts: InstanceCounts) -> dict[str, np.ndarray]:
    """Computes the twelve numbers of every class, in percent, [k]; NaN where it has no instance."""
    k = len(counts.objects)
    precision = np.full((k, len(SIZES), len(THRESHOLDS)), np.nan)
    recall = {limit: precision.copy() for limit in (1, 10, MAX_PREDICTIONS)}
    order = np.lexsort((counts.image, -counts.score, counts.label))
    ends = np.searchsorted(counts.label[order], np.arange(k + 1))
    for label in range(k):
        of_class = order[ends[label] : ends[label + 1]]
        outcome, rank = counts.outcome[of_class], counts.rank[of_class]
        for size in np.flatnonzero(counts.objects[label]):
            num_objects = counts.objects[label, size]
            precision[label, size] = _average_precision(outcome[:, size], num_objects)
            for limit, values in recall.items():
                found = (outcome[rank < limit, size] == RIGHT).sum(0)
                values[label, size] = found / num_objects
    columns = (
        *(precision[:, 0].mean(1), precision[:, 0, 0], precision[:, 0, 5]),
        *(precision[:, size].mean(1) for size in (1, 2, 3)),
        *(values[:, 0].mean(1) for values in recall.values()),
        *(recall[MAX_PREDICTIONS][:, size].mean(1) for size in (1, 2, 3)),
    )
    return {name: 100 * column for name, column in zip(NUMBERS, columns, strict=True)}


def _average_precision(outcome: np.ndarray, num_objects: int) -> np.ndarray:
    """Computes AP at every threshold, [10], of predictions [p, 10] in descending order of score."""
    right, wrong = np.cumsum(outcome == RIGHT, 0), np.cumsum(outcome == WRONG, 0)
    recall = right / num_objects
    # The tiny summand is COCOeval's: nothing has been right or wrong yet.
    precision = right / (right + wrong + np.spacing(1))
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    # Recall that is never reached has no precision.
    precision = np.concatenate([precision, np.zeros((1, len(THRESHOLDS)))])
    index = [np.searchsorted(column, RECALLS) for column in recall.T]
    return np.array([column[i].mean() for column, i in zip(precision.T, index)])
