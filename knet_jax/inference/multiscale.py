"""Batches seen in other ways: at several scales, mirrored, and window by window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.structs import Batch, Stage

Pair = tuple[int, int]
"""(height, width), or (row, column)."""


def both_ways(scales: Sequence[Batch], flip: bool) -> Iterator[tuple[Batch, np.ndarray]]:
    """The batches of all passes, each with bool [b]: whether it shows its pictures mirrored.

    `scales` has the same pictures at every scale, on the host; with `flip` each is also mirrored.
    """
    for batch in scales:
        for mirrored in (False, True) if flip else (False,):
            yield mirror(batch) if mirrored else batch, np.full(len(batch.id), mirrored)


def canvas_of(batch: Batch) -> jax.Array:
    """int32 [b, 2]: height and width of a batch's images, padding included."""
    return jnp.broadcast_to(np.int32(batch.image.shape[1:3]), batch.size.shape)


def mirror(batch: Batch) -> Batch:
    """Mirrors pictures, left for right, each within its own size. On the host."""
    image = batch.image.copy()
    for picture, (_, width) in zip(image, batch.size):
        picture[:, :width] = picture[:, :width][:, ::-1]
    return batch._replace(image=image)


def corners(canvas: Pair, window: Pair, step: Pair) -> list[Pair]:
    """The upper left corners of windows that cover a canvas, every `step`; the last ones end with it.

    All are pairs of an axis each; a window is cut to the canvas.
    """
    axes = (
        sorted({min(start, max(side - length, 0)) for start in range(0, side, move)})
        for side, length, move in zip(canvas, window, step)
    )
    return list(product(*axes))


def cut(batch: Batch, window: Pair, step: Pair) -> Iterator[Batch]:
    """What each window shows of a batch, in the order of `corners`."""
    for row, column in corners(batch.image.shape[1:3], window, step):
        image = batch.image[:, row : row + window[0], column : column + window[1]]
        size = (batch.size - np.int32([row, column])).clip(0, np.int32(image.shape[1:3]))
        yield batch._replace(image=image, size=size)


def join(stages: Sequence[Stage], *, canvas: Pair, window: Pair, step: Pair) -> Stage:
    """The masks of a canvas from those of its windows: their mean where windows overlap.

    Args:
        stages: of the windows, in the order of `corners`; masks [b, n, h, w].
        canvas: like the window and the step, of multiples of the masks' stride.

    Returns:
        a stage with masks [b, n, H/stride, W/stride]; kernels and class logits, which every window
        has its own of, are left out.
    """
    height, width = stages[0].masks.shape[2:]
    stride = min(window[0], canvas[0]) // height
    total = jnp.zeros((*stages[0].masks.shape[:2], *(side // stride for side in canvas)))
    count = np.zeros(total.shape[2:], np.float32)
    for (row, column), stage in zip(corners(canvas, window, step), stages):
        top, left = row // stride, column // stride
        here = np.s_[..., top : top + height, left : left + width]
        total = total.at[here].add(stage.masks)
        count[here] += 1
    return Stage(None, total / count, None)
