"""Pixels on the host: decoding, resizing, cropping, flipping, and sampling of annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from knet_jax.data import photometric
from knet_jax.segmentation.image_files import NUM_IDS, segment_ids

TARGET_STRIDE = 4


def resized_size(size: tuple[int, int], short_side: float, long_side: float) -> tuple[int, int]:
    """Height and width after the largest resize that keeps the aspect and both limits.

    As the reference: `int(side · factor + 0.5)`; a side never gets shorter than a pixel.
    """
    factor = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


class View(NamedTuple):
    """What is seen of a picture: a window of it after a resize."""

    size: tuple[int, int]
    """Height and width of the whole picture after the resize."""
    corner: tuple[int, int]
    """Top row and left column of the window."""
    shown: tuple[int, int]
    """Height and width of the window, which lies inside the picture."""
    flip: bool = False
    """Whether the window is mirrored left and right."""
    distortion: photometric.Distortion = photometric.Distortion()

    def rows(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The rows of a picture of `length` rows that are nearest to those of the window."""
        return _nearest(self.corner[0] + positions, self.size[0], length)

    def columns(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The columns of a picture that are nearest to those of the window, mirrored or not."""
        unflipped = self.shown[1] - 1 - positions if self.flip else positions
        return _nearest(self.corner[1] + unflipped, self.size[1], length)


def whole(size: tuple[int, int], flip: bool = False) -> View:
    """The view of all of a picture, resized to a height and width."""
    return View(size, (0, 0), size, flip)


def place_image(image: np.ndarray, view: View, canvas: np.ndarray) -> None:
    """Puts a view of a picture into the top left corner of a canvas; the resize is bilinear.

    Args:
        image: uint8 [h, w, 3].
        view: what is seen of it.
        canvas: uint8 [H, W, 3], written in place; beyond the view it stays as it is.
    """
    (top, left), (height, width) = view.corner, view.shown
    resized = cv2.resize(image, view.size[::-1])[top : top + height, left : left + width]
    target = canvas[:height, :width]
    target[:] = resized[:, ::-1] if view.flip else resized
    if view.distortion != photometric.Distortion():
        target[:] = photometric.apply(np.ascontiguousarray(target), view.distortion)


def sampled_positions(length: int, limit: int) -> np.ndarray:
    """Rows (or columns) of a canvas that stride-4 targets average, cut off at a limit.

    Shrinking to a quarter by bilinear interpolation without antialiasing takes the mean of the
    pixels 4i + 1 and 4i + 2 along each axis.

    Args:
        length: rows of the canvas, a multiple of 4.
        limit: rows of the picture in it.

    Returns:
        int [p], p <= length / 2: 1, 2, 5, 6, 9, 10, … below `limit`.
    """
    positions = np.arange(length // 2)
    positions = positions // 2 * TARGET_STRIDE + 1 + positions % 2
    return positions[positions < limit]


def sample_segments(
    panoptic: np.ndarray,
    view: View,
    canvas: tuple[int, int],
    ids: Sequence[int],
    values: Sequence[int],
    dtype: np.dtype,
) -> np.ndarray:
    """The segments at the pixels that stride-4 targets average, without resizing any map.

    Equals a centre-aligned nearest resize of the whole map, a crop and a flip as the view says, a
    padding to `canvas` and a choice of rows and columns {4i + 1, 4i + 2}, but reads only the pixels
    that are chosen (test_sampling_equals_resizing_everything).

    Args:
        panoptic: uint8 [h, w, 3], ids as colors.
        view: what is seen of the picture.
        canvas: height and width of the padded picture, multiples of 4.
        ids: ids of the segments to keep.
        values: what stands for each of them in the result.
        dtype: of the result.

    Returns:
        [canvas height / 2, canvas width / 2]: `values`, 0 for everything else.
    """
    rows, columns = sampled_source(view, canvas, panoptic.shape[:2])
    sampled = segment_ids(panoptic[rows].take(columns, axis=1))
    segments = np.zeros((canvas[0] // 2, canvas[1] // 2), dtype)
    segments[: len(rows), : len(columns)] = lookup(sampled, ids, np.asarray(values, dtype))
    return segments


def sampled_source(
    view: View, canvas: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a picture of some size that stride-4 targets of a canvas average."""
    return (
        view.rows(sampled_positions(canvas[0], view.shown[0]), size[0]),
        view.columns(sampled_positions(canvas[1], view.shown[1]), size[1]),
    )


def lookup(id_map: np.ndarray, ids: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Replaces ids by values, and every other id by 0; the result has the type of `values`."""
    # A table of all ids costs nothing: only those of its pages that are touched ever exist.
    table = np.zeros(NUM_IDS, values.dtype)
    table[np.asarray(ids, np.int64)] = values
    return table[id_map]


def _nearest(positions: np.ndarray, resized: int, original: int) -> np.ndarray:
    """floor((x + 1/2) · original / resized) in whole numbers."""
    return (2 * positions + 1) * original // (2 * resized)
