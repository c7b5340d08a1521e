"""Whether an exported file finds in a picture what the network finds that it was made of."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
from ml_collections import ConfigDict

from knet_jax.app.segmenter import Segmenter
from knet_jax.saved.models import Model
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import PanopticMap
from knet_jax.structs import EMPTY

SEVERAL_VIEWS = ("scales", "flip", "window", "window_step")
"""Keys of `config.eval` that a file does not follow: it looks at a picture once, and whole."""

Results = dict[str, np.ndarray]
"""Arrays of one picture, by the names of an exported file's outputs."""
Masks = tuple[np.ndarray, np.ndarray]
"""Classes [s] and pixels, float32 [s, H·W], of the segments of a picture."""


def draw_picture(size: tuple[int, int]) -> np.ndarray:
    """Patches of random colors that run into each other. uint8 [H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (9, 9, 3)).astype(np.uint8)
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)


def segment(model: Model, image: np.ndarray) -> Results:
    """What a model makes of a picture, uint8 [H, W, 3], seen once and whole, as a file sees it.

    Thresholds are those of the config, as in a file; but of instances a file gives the best ones
    whatever their score.
    """
    config = model.config.to_dict()
    for key in SEVERAL_VIEWS:
        config["eval"].pop(key, None)
    threshold = 0.0 if config["task"] == "instance" else None
    result = Segmenter(replace(model, config=ConfigDict(config)))(image, threshold)
    prediction = result.prediction
    if isinstance(prediction, np.ndarray):
        return {"labels": prediction.astype(np.int32) - 1}
    parts = prediction.segments if isinstance(prediction, PanopticMap) else prediction
    results = {
        "labels": np.array([part.label for part in parts], np.int32),
        "scores": np.array([part.score for part in parts], np.float32),
    }
    if isinstance(prediction, PanopticMap):
        return results | {"ids": prediction.ids}
    return results | {"masks": np.array([rle.decode(part.rle) for part in parts], bool)}


def agreement(ours: Results, theirs: Results) -> float:
    """How far two results say the same about a picture, from 0 to 1.

    Every segment is compared with the segment of the other result that has its class and overlaps it
    most, whatever their ranks. Of these overlaps (intersection over union) the mean by area is taken,
    once for the segments of either result; the smaller of the two is the agreement.
    """
    ours, theirs = find_masks(ours), find_masks(theirs)
    return min(mean_overlap(ours, theirs), mean_overlap(theirs, ours))


def find_masks(results: Results) -> Masks:
    """The segments, instances or classes of a picture."""
    labels = results["labels"]
    if "masks" in results:
        masks = results["masks"]
    elif "ids" in results:
        masks = results["ids"] == np.arange(1, len(labels) + 1)[:, None, None]
    else:
        classes = np.unique(labels[labels != EMPTY])
        masks, labels = labels == classes[:, None, None], classes
    return labels, masks.reshape(len(labels), np.prod(masks.shape[1:])).astype(np.float32)


def mean_overlap(ours: Masks, theirs: Masks) -> float:
    """The mean overlap of our segments with the best of theirs, by area; 1 where we have no pixel."""
    (labels, masks), (their_labels, their_masks) = ours, theirs
    areas, their_areas = masks.sum(1), their_masks.sum(1)
    if not areas.sum():
        return 1.0
    common = masks @ their_masks.T
    overlaps = common / np.maximum(areas[:, None] + their_areas - common, 1)
    overlaps = np.where(labels[:, None] == their_labels, overlaps, 0).max(1, initial=0)
    return float((overlaps * areas).sum() / areas.sum())
