"""Binary masks as COCO's compressed run lengths: {"size": [height, width], "counts": bytes}.

A mask of a million pixels takes some hundred bytes, and areas, intersections and unions are taken
without unpacking it (https://cocodataset.org/#format-data).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from knet_jax.config.rules import is_number
from knet_jax.system.errors import UserError

FAR = 100
"""Largest coordinate of a polygon, in longer sides of the picture."""


def encode(mask: np.ndarray) -> dict[str, Any]:
    """Compresses a mask, bool or uint8 [H, W] of 0 and 1, to run lengths."""
    # Runs go down the columns, so that the transpose of a row-major array is what is read.
    return coco_mask.encode(cv2.transpose(np.asarray(mask, np.uint8)).T)


def decode(rle: dict[str, Any]) -> np.ndarray:
    """Expands run lengths to a mask, uint8 [H, W] of 0 and 1."""
    return coco_mask.decode(rle)


def area(rle: dict[str, Any]) -> int:
    """Counts the pixels of a mask."""
    return int(coco_mask.area(rle))


def box(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Finds left, top, width and height of the smallest box around a mask; all 0 without a pixel."""
    return tuple(map(int, coco_mask.toBbox(rle)))


def move(rle: dict[str, Any], corner: tuple[int, int], size: tuple[int, int]) -> dict[str, Any]:
    """Places a mask into a larger picture, without a pixel of which that is larger than the mask.

    Args:
        rle: of a mask [h, w].
        corner: the picture's row and column at which the mask begins.
        size: height and width of the picture.
    """
    # A run begins or ends where a pixel differs from the one above it.
    changes = np.diff(decode(rle).astype(np.int8), axis=0, prepend=0, append=0)
    columns, rows = np.nonzero(changes.T)
    at = (corner[1] + columns) * size[0] + corner[0] + rows
    # One that ends at the bottom goes on where another one begins, at the top of the next column.
    at, times = np.unique(at, return_counts=True)
    ends = np.union1d(at[times == 1], size[0] * size[1])
    counts = np.diff(ends, prepend=0).tolist()
    return coco_mask.frPyObjects({"size": [*size], "counts": counts}, *size)


def merge(masks: Sequence[dict[str, Any]], intersect: bool = False) -> dict[str, Any]:
    """Merges masks of one size: their union, or their intersection."""
    return coco_mask.merge(masks, intersect)


def iou(
    masks: Sequence[dict[str, Any]],
    others: Sequence[dict[str, Any]],
    iscrowd: np.ndarray | None = None,
) -> np.ndarray:
    """Computes the intersection over union of masks of one size, [m, n].

    Args:
        iscrowd: bool [n], of which others the share of the mask that lies on it is taken instead.
    """
    iscrowd = np.zeros(len(others), bool) if iscrowd is None else iscrowd
    found = coco_mask.iou(masks, others, iscrowd.astype(np.uint8))
    return np.reshape(found, (len(masks), len(others)))


def to_json(rle: dict[str, Any]) -> dict[str, Any]:
    """Converts run lengths to what JSON can hold: counts as text."""
    return rle | {"counts": rle["counts"].decode()}


def from_annotation(segmentation: Any, size: tuple[int, int]) -> tuple[dict, list[str]]:
    """Converts the `segmentation` of a COCO annotation to compressed run lengths.

    A bad polygon is left out where there are good ones beside it.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, …], or {"size": [h, w], "counts": …} with
            plain or compressed run lengths.
        size: height and width of the picture.

    Returns:
        {"size": [h, w], "counts": bytes}, and what is wrong with the polygons that were left out.

    Raises:
        UserError: it is neither, or of another size, or no polygon is good.
    """
    if not segmentation:
        raise UserError("it has no mask ('segmentation')")
    if isinstance(segmentation, Mapping):
        return _encode_runs(segmentation, size), []
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str):
        raise UserError(f"segmentation {str(segmentation)[:40]!r} is neither polygons nor RLE")
    good, problems = [], []
    for polygon in segmentation:
        try:
            _check_polygon(polygon, size)
        except ValueError as error:
            problems.append(str(error))
        else:
            good.append(list(map(float, polygon)))
    if not good:
        raise UserError(problems[0])
    return coco_mask.merge(coco_mask.frPyObjects(good, *size)), problems


def _check_polygon(polygon: Any, size: tuple[int, int]) -> None:
    # Four numbers would be taken for a box, an odd one left over for nothing.
    if not isinstance(polygon, Sequence) or not all(map(is_number, polygon)):
        raise UserError("a polygon must be a list of numbers x0, y0, x1, y1, …")
    if len(polygon) < 6 or len(polygon) % 2:
        raise UserError(f"a polygon has {len(polygon) / 2:g} points, it must have three or more")
    # The library walks along every edge, and holds each step of it.
    if max(map(abs, polygon)) > FAR * max(size):
        raise UserError(f"a polygon goes beyond {FAR} times the sides of the picture")


def _encode_runs(rle: Mapping, size: tuple[int, int]) -> dict:
    height, width = size
    listed, counts = rle.get("size"), rle.get("counts")
    if not isinstance(listed, Sequence) or tuple(listed) != size:
        raise UserError(f"its RLE has size {listed}, the picture [{height}, {width}]")
    if isinstance(counts, str):
        counts = counts.encode()
    # The library takes any bytes; only a mask whose runs fill the picture is one.
    runs = _runs(counts) if isinstance(counts, bytes) else counts
    are_runs = isinstance(runs, Sequence) and all(isinstance(r, int) and r >= 0 for r in runs)
    if not are_runs or sum(runs) != height * width:
        raise UserError(f"the runs of its RLE do not fill the {height * width} pixels")
    return coco_mask.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)


def _runs(data: bytes) -> list[int]:
    """Decodes the counts of compressed run lengths.

    Each character holds five bits, counted from "0"; a sixth says that more follow. From the fourth
    run on, numbers are differences to the run before the last.

    Raises:
        UserError: a character cannot occur, or the last number is cut off.
    """
    runs, value, shift = [], 0, 0
    for byte in data:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise UserError(f"its RLE has a character {chr(byte)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise UserError("its RLE is cut off")
    return runs
