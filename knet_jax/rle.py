"""Binary masks as COCO's compressed run lengths: {"size": [height, width], "counts": bytes}.

A mask of a million pixels takes some hundred bytes, and areas, intersections and unions are taken
without unpacking it (https://cocodataset.org/#format-data).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from knet_jax.structs import EMPTY, Instance


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths of a mask: bool or uint8 [H, W], 0 or 1."""
    # Runs go down the columns, so that the transpose of a row-major array is what is read.
    return coco_mask.encode(cv2.transpose(np.asarray(mask, np.uint8)).T)


def decode(rle: dict[str, Any]) -> np.ndarray:
    """The mask of run lengths, uint8 [H, W], 0 or 1."""
    return coco_mask.decode(rle)


def area(rle: dict[str, Any]) -> int:
    """How many pixels a mask has."""
    return int(coco_mask.area(rle))


def from_annotation(segmentation: Any, size: tuple[int, int]) -> dict[str, Any]:
    """Run lengths of what a COCO annotation calls its segmentation, in any of its three forms.

    Args:
        segmentation: a list of polygons [x, y, x, y, …], or a dict of run lengths, compressed or
            a list of numbers.
        size: height and width of the picture.

    Raises:
        ValueError: it is none of these, or of another size.
    """
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        if tuple(segmentation["size"]) != tuple(size):
            theirs = " x ".join(map(str, segmentation["size"]))
            raise ValueError(f"segmentation of {theirs} pixels, expected {size[0]} x {size[1]}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            if sum(counts) != size[0] * size[1] or min(counts) < 0:
                raise ValueError(f"run lengths add up to {sum(counts)}, not {size[0] * size[1]}")
            return coco_mask.frPyObjects(segmentation, *size)
        if is_compressed(segmentation):
            counts = counts.encode() if isinstance(counts, str) else counts
            return {"size": list(size), "counts": counts}
    if _are_polygons(segmentation):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
    raise ValueError(
        f"segmentation {str(segmentation)[:60]}; accepted: polygons of at least three points, or "
        "run lengths with size and counts"
    )


def is_compressed(rle: Any) -> bool:
    """Whether something has the form of compressed run lengths; JSON turns their bytes to text."""
    return isinstance(rle, dict) and "size" in rle and isinstance(rle.get("counts"), bytes | str)


def _are_polygons(segmentation: Any) -> bool:
    return (
        isinstance(segmentation, list)
        and bool(segmentation)
        and all(isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 for p in segmentation)
    )


def instances(
    masks: Sequence[np.ndarray] | np.ndarray,
    kernels: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray,
    scores: Sequence[float] | np.ndarray,
) -> tuple[Instance, ...]:
    """Predictions of one picture, from the masks of its kernels.

    A kernel may be predicted under several labels; its mask is encoded once, and a kernel that is
    not predicted costs nothing. Empty masks are kept, as the reference does.

    Args:
        masks: bool or uint8 [n, H, W], 0 or 1, at the size of the picture.
        kernels: int [p], whose mask each prediction has.
        labels: int [p], its class; `EMPTY` where there is no prediction.
        scores: float [p].
    """
    encoded: dict[int, tuple[dict[str, Any], float]] = {}
    predictions = []
    for kernel, label, score in zip(kernels, labels, scores, strict=True):
        if label == EMPTY:
            continue
        if int(kernel) not in encoded:
            rle = encode(masks[kernel])
            encoded[int(kernel)] = rle, float(area(rle))
        rle, pixels = encoded[int(kernel)]
        predictions.append(Instance(rle, int(label), float(score), area=pixels))
    return tuple(predictions)
