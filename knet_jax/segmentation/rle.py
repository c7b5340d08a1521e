"""Binary masks as COCO's compressed run lengths: {"size": [height, width], "counts": bytes}.

A mask of a million pixels takes some hundred bytes, and areas, intersections and unions are taken
without unpacking it (https://cocodataset.org/#format-data).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as coco_mask

from knet_jax.system.errors import UserError

FAR = 100
"""Coordinates of a polygon are at most so many times the longer side of the picture."""


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


def box(rle: dict[str, Any]) -> tuple[int, int, int, int]:
    """Left, top, width and height of the smallest box around a mask; all 0 without a pixel."""
    return tuple(map(int, coco_mask.toBbox(rle)))


def to_json(rle: dict[str, Any]) -> dict[str, Any]:
    """The same as JSON holds it: counts as text."""
    counts = rle["counts"]
    return {
        "size": [int(side) for side in rle["size"]],
        "counts": counts.decode() if isinstance(counts, bytes) else counts,
    }


def from_annotation(segmentation: Any, size: tuple[int, int]) -> tuple[dict, list[str]]:
    """COCO's compressed run lengths of polygons, of plain or of compressed run lengths.

    A bad polygon is left out where there are good ones beside it.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, …], or {"size": [h, w], "counts": …}.
        size: height and width of the picture.

    Returns:
        {"size": [h, w], "counts": bytes}, and what is wrong with the polygons that were left out.

    Raises:
        ValueError: it is no such thing, or one of another size, or no polygon is good.
    """
    if isinstance(segmentation, Mapping):
        return _encode_runs(segmentation, size), []
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not segmentation:
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
    """The lengths in COCO's compressed form: five bits a character, from 48 on, the sixth says that
    more follow; from the fourth run on they are differences to the one before the last.

    Raises:
        ValueError: there is a character that cannot occur, or the last number is cut off.
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


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a finite number."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer of hundreds of digits
        return False


def is_compressed(rle: Any) -> bool:
    """Whether something has the form of compressed run lengths; JSON turns their bytes to text."""
    return isinstance(rle, dict) and "size" in rle and isinstance(rle.get("counts"), bytes | str)
