"""A picture of any size to results as one program of plain formulas: what is exported.

Evaluation resizes pictures on the host, and compiles its results for the sizes of a batch. A program
that leaves the project has neither: here everything from the pixels on disk to the pixels of the
result is computed by matrices and plain loops, whose sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.inference import postprocess
from knet_jax.inference.postprocess import ROWS, best_pairs
from knet_jax.inference.resampling import ResultCanvas, both_to_original, taps
from knet_jax.inference.segment_ranking import best_classes, find_eligible, rank_segments
from knet_jax.nn.layers import upsample2x
from knet_jax.structs import EMPTY, Pass

Results = dict[str, jax.Array]

TILE, COLUMNS = 64, 8
"""Masks compete in tiles of 64 rows of pixels, of which 8 share the width of a picture."""

ROUNDING = 1e-5
"""Relative slack of the bounds, far above the rounding of float32."""


class Framing(NamedTuple):
    """How the network sees pictures."""

    canvas: tuple[int, int]
    """Height and width of its input, multiples of 32."""
    short_side: int
    """What the short side of a picture becomes, unless the canvas or the long side is too small."""
    long_side: int


# Before the network.


def size_in_canvas(size: jax.Array, framing: Framing) -> jax.Array:
    """Height and width of pictures after the largest resize within all limits of a framing.

    As `transforms.resized_size`, in whole numbers. int32 [b, 2] -> int32 [b, 2].
    """
    height, width = size[:, 0], size[:, 1]
    over, under = jnp.int32(framing.long_side), jnp.maximum(height, width)
    for limit, side in (
        (framing.short_side, jnp.minimum(height, width)),
        (framing.canvas[0], height),
        (framing.canvas[1], width),
    ):
        smaller = limit * under < over * side
        over, under = jnp.where(smaller, limit, over), jnp.where(smaller, side, under)
    over, under = over[:, None], under[:, None]
    return jnp.maximum(jax.lax.div(2 * size * over + under, 2 * under), 1)


def resize_into_canvas(
    image: jax.Array, size: jax.Array, framing: Framing
) -> tuple[jax.Array, jax.Array]:
    """Resizes pictures bilinearly into the top left corner of a canvas, as cv2 does for evaluation.

    In whole numbers: weights are 2048ths, and so are the colors in between.

    Args:
        image: uint8 [b, H, W, 3], of which pictures fill the top left corner.
        size: int32 [b, 2], their heights and widths.
        framing: of the network.

    Returns:
        uint8 [b, h, w, 3], of no meaning beyond the pictures, and their sizes there, int32 [b, 2].
    """
    shown = size_in_canvas(size, framing)

    def one(image: jax.Array, size: jax.Array, shown: jax.Array) -> jax.Array:
        def pairs(x: jax.Array, axis: int) -> list[tuple[jax.Array, jax.Array]]:
            """For the rows (or columns) of the canvas the two that they read of x, and their weights."""
            scale = size[axis] / shown[axis].astype(jnp.float32)
            lower, share = taps(jnp.arange(framing.canvas[axis]), scale, size[axis])
            share = jnp.where(lower < size[axis] - 1, share, 0)
            at = (lower, jnp.minimum(lower + 1, size[axis] - 1))
            shape = (-1, 1, 1) if axis == 0 else (-1, 1)
            return [
                (
                    jnp.take(x, places, axis=axis, mode="clip").astype(jnp.int32),
                    jnp.round(2048 * weight).astype(jnp.int32).reshape(shape),
                )
                for places, weight in zip(at, (1 - share, share))
            ]

        x = sum(weight * column for column, weight in pairs(image, axis=1))
        div = jax.lax.div  # of numbers that are not negative
        x = sum(div(weight * div(row, 16), 65536) for row, weight in pairs(x, axis=0))
        return div(x + 2, 4)

    return jax.vmap(one)(image, size, shown).astype(jnp.uint8), shown


# After the network.


def inside_pictures(original_size: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Which pixels of a canvas belong to the pictures of some sizes [b, 2]. bool [b, H, W]."""
    rows, columns = (jnp.arange(side) < original_size[:, i, None] for i, side in enumerate(shape))
    return rows[:, :, None] & columns[:, None, :]


def at_stride_4(masks: jax.Array) -> jax.Array:
    """Probabilities of mask logits at stride 8, doubled. [b, n, h, w] -> [n, b, 2h, 2w]."""
    return jax.nn.sigmoid(upsample2x(masks, axes=(2, 3))).swapaxes(0, 1)


def at_pixels(probs: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """One mask at some rows and columns of pixels, by the weights of both axes.

    [b, h, w], [b, H, h], [b, w, W] -> [b, H, W]: plain products of matrices, which all runtimes have.
    """
    matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    return matmul(matmul(y, probs), x)


def predict_panoptic(
    seen: Pass,
    original_size: jax.Array,
    *,
    shape: Sequence[int],
    num_things: int,
    instance_threshold: float,
    overlap_threshold: float,
) -> Results:
    """The map of `fusion.predict_panoptic`: in each tile, of the masks that may win a pixel there.

    Returns:
        ids int32 [b, H, W]: 0 = void, 1 + i = segment i; labels int32 [b, n] and scores [b, n] of
        the segments, best first, `EMPTY` and 0 after the last.
    """
    b, n, k = seen.stage.logits.shape
    scores, labels = best_classes(seen.stage.logits, num_things)
    probs = at_stride_4(seen.stage.masks)
    nothing = jnp.zeros((n, b), jnp.int32)

    # Tiles: weights of their rows [rows, b, TILE, 2h] and columns [columns, b, 2w, side].
    rows, side = (shape[0] + TILE - 1) // TILE, (shape[1] + COLUMNS - 1) // COLUMNS
    num_pixels = rows * TILE, COLUMNS * side
    y, x = both_to_original(seen, original_size, probs.shape[2:], num_pixels, probs.dtype)
    x, inside = x.swapaxes(1, 2), inside_pictures(original_size, num_pixels)
    y_tiles = y.reshape(b, rows, TILE, -1).swapaxes(0, 1)
    x_tiles = x.reshape(b, -1, COLUMNS, side).transpose(2, 0, 1, 3)
    inside_tiles = inside.reshape(b, rows, TILE, COLUMNS, side).transpose(1, 3, 0, 2, 4)
    rivals = find_rivals(scores.T[:, :, None, None] * probs, y_tiles, x_tiles)

    def fuse(y: jax.Array, tile: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """The owner of each pixel of a tile [b, TILE, side], n for nobody; what each owns [n, b]."""
        x, inside, rivals = tile

        def compete(i: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            best, owner = state
            value = choose(scores.T, i)[:, None, None] * at_pixels(choose(probs, i), y, x)
            return jnp.maximum(value, best), jnp.where(value > best, i, owner)

        def count(i: jax.Array, owned: jax.Array) -> jax.Array:
            return put(owned, i, (owner == i).sum((1, 2)))

        nobody = (
            jnp.where(inside, -1, jnp.inf).astype(probs.dtype),
            jnp.full(inside.shape, n, jnp.int32),
        )
        _, owner = for_each(rivals, compete, nobody)
        return owner, for_each(rivals, count, nothing)

    def fuse_row(row: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        y, *tiles = row
        return jax.lax.map(partial(fuse, y), (x_tiles, *tiles))

    def measure(i: jax.Array, area: jax.Array) -> jax.Array:
        mask = (at_pixels(choose(probs, i), y, x) >= 0.5) & inside
        return put(area, i, mask.sum((1, 2)))

    owner, owned = jax.lax.map(fuse_row, (y_tiles, inside_tiles, rivals))
    owner = owner.transpose(2, 0, 3, 1, 4).reshape(b, *num_pixels)[:, : shape[0], : shape[1]]
    owned = owned.sum((0, 1)).T
    eligible = find_eligible(owned, scores, n - (k - num_things), instance_threshold)
    area = for_each(eligible.sum(0) > 0, measure, nothing).T
    ids, labels, scores, _ = rank_segments(eligible, owned, area, labels, scores, overlap_threshold)
    ids = jax.vmap(partial(jnp.take, mode="clip"))(ids, owner)
    return {"ids": ids.astype(jnp.int32), "labels": labels, "scores": scores}


def choose(arrays: jax.Array, i: jax.Array) -> jax.Array:
    """The i-th of some arrays [n, …]."""
    return jnp.take(arrays, i, axis=0, mode="clip")


def put(numbers: jax.Array, i: jax.Array, new: jax.Array) -> jax.Array:
    """Numbers [n, b], with new ones [b] in row i."""
    return jnp.where(jnp.arange(numbers.shape[0])[:, None] == i, new, numbers)


def for_each(chosen: jax.Array, visit: Callable[[jax.Array, Any], Any], state: Any) -> Any:
    """The last state of `visit(i, state) -> state` for every i that is chosen, bool [n], in order."""
    numbers = jnp.arange(len(chosen), dtype=jnp.int32)
    order = jnp.argsort(jnp.where(chosen, numbers, len(chosen)))
    count = chosen.sum(dtype=jnp.int32)
    return jax.lax.fori_loop(0, count, lambda i, s: visit(choose(order, i), s), state)


def find_rivals(values: jax.Array, y: jax.Array, x: jax.Array) -> jax.Array:
    """Which masks may be the highest at a pixel of each tile.

    A pixel is a mean of at most three neighbours at stride 4, in both directions. So none of a mask's
    is higher than the highest of nine, and the winner is no lower than the lowest of another's nine.

    Args:
        values: [n, b, h, w] at stride 4, not negative.
        y: weights of the rows of tiles, [r, b, H, h].
        x: weights of their columns, [c, b, w, W].

    Returns:
        bool [r, c, n].
    """

    def highest(x: jax.Array, *window: int) -> jax.Array:
        window = (1, 1, *window)
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, (1,) * 4, "VALID")

    def read(weights: jax.Array) -> jax.Array:
        """Which threes have a part in tiles, by the largest weights. [t, b, h] -> [t, b, h - 2]"""
        return (highest(weights[:, :, None], 1, 3)[:, :, 0] > 0).astype(weights.dtype)

    lowest = -highest(-values, 3, 3)
    may_win = (highest(values, 3, 3) >= (1 - ROUNDING) * lowest.max(0)).swapaxes(0, 1)
    b, n, h, w = may_win.shape
    may_win = may_win.astype(y.dtype).reshape(b, n * h, w)  # one product of matrices a picture
    may_win = jnp.matmul(may_win, read(x.max(3)).transpose(1, 2, 0)).reshape(b, n, h, -1) > 0
    return jnp.einsum("bnhc,rbh->rcn", may_win.astype(y.dtype), read(y.max(2))) > 0


def predict_instances(
    seen: Pass, original_size: jax.Array, *, shape: Sequence[int], num_results: int
) -> Results:
    """The results of `postprocess.predict_instances`, with masks that are not packed.

    Returns:
        masks bool [b, r, H, W], labels int32 [b, r] and scores [b, r], best first.
    """
    scores, kernels, labels = best_pairs(seen.stage.logits, num_results)
    masks = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(seen.stage.masks, kernels)
    probs = at_stride_4(masks)
    y, x = both_to_original(seen, original_size, probs.shape[2:], shape, probs.dtype)
    x, inside = x.swapaxes(1, 2), inside_pictures(original_size, shape)
    masks = jax.lax.map(lambda probs: (at_pixels(probs, y, x) > 0.5) & inside, probs)
    return {"masks": masks.swapaxes(0, 1), "labels": labels, "scores": scores}


def predict_labels(seen: Pass, original_size: jax.Array, *, shape: Sequence[int]) -> Results:
    """The classes of `postprocess.predict_labels`, from 0 on.

    Returns:
        labels int32 [b, H, W], `EMPTY` beyond the pictures.
    """
    height, width = shape
    canvas = ResultCanvas((height + ROWS - 1) // ROWS * ROWS, width, shrink=1)
    maps = postprocess.predict_labels([seen], original_size, canvas=canvas)
    labels = maps[:, :height].astype(jnp.int32) - 1
    return {"labels": jnp.where(inside_pictures(original_size, shape), labels, EMPTY)}
