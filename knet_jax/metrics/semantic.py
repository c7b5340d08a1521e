"""Intersection over union of classes, the measure of semantic segmentation.

For each class, over all pixels of all pictures that the truth labels,

    IoU = |truth ∩ prediction| / |truth ∪ prediction|,   Acc = |truth ∩ prediction| / |truth|;

mIoU and mAcc are means over the classes for which they are defined, aAcc is the share of pixels that
are right. Pixels that the truth leaves unlabelled count for nobody.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from knet_jax.metrics.counts import mean_of_defined, rows_of_classes
from knet_jax.segmentation.segments import Categories

HEADLINE = ("mIoU", "mAcc", "aAcc")
"""The numbers that are logged in short; the first one decides which step of a run is the best."""


class PixelCounts(NamedTuple):
    """What IoU needs to know of any number of pictures: three arrays int64 [k] to be summed."""

    intersection: np.ndarray
    """Pixels of a class that are predicted as that class."""
    truth: np.ndarray
    """Pixels of a class."""
    prediction: np.ndarray
    """Pixels that are predicted as a class, where the truth has any."""


def no_counts(num_classes: int) -> PixelCounts:
    """Returns the counts of no picture at all."""
    return PixelCounts(*np.zeros((3, num_classes), np.int64))


def merge(*counts: PixelCounts) -> PixelCounts:
    """Adds up counts of different pictures."""
    return PixelCounts(*(sum(arrays) for arrays in zip(*counts)))


def count(
    truth: np.ndarray, prediction: np.ndarray, num_classes: int, image_id: int = 0
) -> PixelCounts:
    """Compares the label maps of one picture.

    Args:
        truth: integers [H, W], 1 + class, 0 = unlabelled.
        prediction: integers [H, W], 1 + class, 0 = none, which is right nowhere.
        num_classes: k.
        image_id: for messages.
    """
    pixels = confusion(truth, prediction, num_classes, image_id)
    return PixelCounts(
        intersection=pixels[:, 1:].diagonal().copy(),
        truth=pixels.sum(1),
        prediction=pixels[:, 1:].sum(0),
    )


def confusion(
    truth: np.ndarray, prediction: np.ndarray, num_classes: int, image_id: int = 0
) -> np.ndarray:
    """Counts the pixels of each class k by what they are taken for, int64 [k, 1 + k]: none, then the
    classes. Arguments are those of `count`."""
    sizes = (truth.shape, prediction.shape)
    assert sizes[0] == sizes[1], f"picture {image_id}: maps of {sizes}"
    for labels in (truth, prediction):
        wrong = labels[(labels < 0) | (labels > num_classes)]
        assert not wrong.size, f"picture {image_id}: labels {np.unique(wrong)}"
    side = num_classes + 1
    pairs = truth.astype(np.int64) * side + prediction
    return np.bincount(pairs.ravel(), minlength=side * side).reshape(side, side)[1:]


def summarize(counts: PixelCounts, categories: Categories) -> dict[str, float]:
    """Computes mIoU, mAcc and aAcc, in percent.

    Classes that occur neither in the truth nor in a prediction stay out of mIoU, classes without a
    pixel of truth out of mAcc; the mean of nothing is 0.
    """
    means = {f"m{name}": mean_of_defined(values) for name, values in _quality(counts).items()}
    right, pixels = counts.intersection.sum(), counts.truth.sum()
    return means | {"aAcc": float(100 * right / max(pixels, 1))}


def per_class(counts: PixelCounts, categories: Categories) -> list[dict]:
    """Lists every class: name, the dataset's id, IoU and Acc in percent, and its pixels.

    IoU and Acc are None where they are not defined.
    """
    return rows_of_classes(categories, _quality(counts) | counts._asdict())


def table(counts: PixelCounts, categories: Categories) -> str:
    """Formats the classes that occur, and the means; pixels in thousands."""
    rows = [row for row in per_class(counts, categories) if row["truth"] or row["prediction"]]
    width = max(len(name) for name in ("All", *categories.names))
    lines = [f"{'':{width}}    IoU    Acc   truth k  predicted k"]
    for row in rows:
        accuracy = "     -" if row["Acc"] is None else f"{row['Acc']:6.1f}"
        lines.append(
            f"{row['name']:{width}} {row['IoU']:6.1f} {accuracy}"
            f" {row['truth'] / 1000:9.1f} {row['prediction'] / 1000:12.1f}"
        )
    means = summarize(counts, categories)
    lines += ["", f"{'':{width}}   mIoU   mAcc   aAcc classes"]
    values = " ".join(f"{means[name]:6.1f}" for name in ("mIoU", "mAcc", "aAcc"))
    lines.append(f"{'All':{width}} {values}  {len(rows):6}")
    return "\n".join(lines)


def _quality(counts: PixelCounts) -> dict[str, np.ndarray]:
    """Computes IoU and Acc of every class, in percent, [k]; NaN where not defined."""
    union = counts.truth + counts.prediction - counts.intersection
    with np.errstate(invalid="ignore"):
        return {
            "IoU": 100 * (counts.intersection / union),
            "Acc": 100 * (counts.intersection / counts.truth),
        }
