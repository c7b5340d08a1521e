"""Pixels on the host: decoding, resizing, cropping, flipping, and sampling of annotations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from knet_jax.data import photometric
from knet_jax.segmentation.image_files import NUM_IDS

TARGET_STRIDE = 4
"""Pixels of a canvas for one of the masks that are learned, along each axis."""


def resized_size(size: tuple[int, int], short_side: float, long_side: float) -> tuple[int, int]:
    """The size of a picture after the largest resize that keeps its ratio and both limits.

    As the reference rounds: `int(side · factor + 0.5)`; a side never gets shorter than a pixel.

    Args:
        size: height and width of the picture.
        short_side: the most that its short side becomes.
        long_side: the most that its long side becomes.

    Returns:
        height and width.
    """
    factor = min(long_side / max(size), short_side / min(size))
    return max(1, int(size[0] * factor + 0.5)), max(1, int(size[1] * factor + 0.5))


class View(NamedTuple):
    """What a network is shown of a picture: a window of it, after a resize."""

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
        """The rows of the picture, which has `length`, nearest to rows of the window."""
        return _nearest(self.corner[0] + positions, self.size[0], length)

    def columns(self, positions: np.ndarray, length: int) -> np.ndarray:
        """The columns of the picture, which has `length`, nearest to columns of the window."""
        unflipped = self.shown[1] - 1 - positions if self.flip else positions
        return _nearest(self.corner[1] + unflipped, self.size[1], length)


def whole(size: tuple[int, int], flip: bool = False) -> View:
    """The view of a whole picture, resized to `size` = (height, width)."""
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


def sampled_positions(count: int, limit: int) -> np.ndarray:
    """Rows (or columns) of a canvas that targets of a quarter of its size average.

    Shrinking to a quarter by bilinear interpolation without antialiasing takes the mean of the
    pixels 4i + 1 and 4i + 2 along each axis.

    Args:
        count: how many such rows the canvas has, half of all its rows.
        limit: rows of the picture on the canvas.

    Returns:
        int [p], p <= count: 1, 2, 5, 6, 9, 10, … below `limit`.
    """
    positions = np.arange(count)
    positions = positions // 2 * TARGET_STRIDE + 1 + positions % 2
    return positions[positions < limit]


def sampled_source(
    view: View, shape: tuple[int, int], size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Where the sampled pixels of a canvas come from.

    Args:
        view: what the canvas shows of a picture.
        shape: rows and columns that are sampled, half of the canvas's.
        size: height and width of the picture.

    Returns:
        rows and columns of the picture, int [p] and int [q], nearest to those of
        `sampled_positions`.
    """
    return (
        view.rows(sampled_positions(shape[0], view.shown[0]), size[0]),
        view.columns(sampled_positions(shape[1], view.shown[1]), size[1]),
    )


def lookup(id_map: np.ndarray, ids: Sequence[int], values: np.ndarray) -> np.ndarray:
    """Replaces each of `ids` in a map by its value, every other id by 0; dtype as `values`."""
    # A table of all ids costs nothing: only those of its pages that are touched ever exist.
    table = np.zeros(NUM_IDS, values.dtype)
    table[np.asarray(ids, np.int64)] = values
    return table[id_map]


def _nearest(positions: np.ndarray, resized: int, original: int) -> np.ndarray:
    """floor((x + 1/2) · original / resized) in whole numbers."""
    return (2 * positions + 1) * original // (2 * resized)
