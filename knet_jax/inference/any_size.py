"""A picture of any size to results as one program of plain formulas: what is exported.

Evaluation resizes pictures on the host, and compiles its results for the sizes of a batch. A program
that leaves the project has neither: here everything from the pixels on disk to the pixels of the
result is computed by matrices and plain loops, whose sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.inference import postprocess
from knet_jax.inference.fusion import GROUP, MASK_STRIDE, SLACK, TileAxis
from knet_jax.inference.postprocess import ROWS, best_pairs
from knet_jax.inference.resampling import ResultCanvas, both_to_original, taps
from knet_jax.inference.segment_ranking import best_classes, find_eligible, rank_segments
from knet_jax.nn.layers import upsample2x
from knet_jax.structs import EMPTY, Pass

Results = dict[str, jax.Array]

TILE = 16
"""Logits along each side of the tiles in which masks compete."""

IN = {"mode": "promise_in_bounds", "wrap_negative_indices": False}
"""Of indices that there are: nothing needs to be done about others."""


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


def inside_picture(original_size: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Which pixels of a canvas belong to the picture of a size [2]. bool [H, W]."""
    rows, columns = (jnp.arange(side) < original_size[i] for i, side in enumerate(shape))
    return rows[:, None] & columns


def inside_pictures(original_size: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Which pixels of a canvas belong to the pictures of some sizes [b, 2]. bool [b, H, W]."""
    return jax.vmap(partial(inside_picture, shape=shape))(original_size)


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
    """The map of `fusion.predict_panoptic`, one tile of one picture after the other.

    Returns:
        ids int32 [b, H, W]: 0 = void, 1 + i = segment i; labels int32 [b, n] and scores [b, n] of
        the segments, best first, `EMPTY` and 0 after the last.
    """
    k = seen.stage.logits.shape[2]
    scores, labels = best_classes(seen.stage.logits, num_things)

    def fuse_one(picture: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """The owner of every pixel [H, W], n for nobody; and of each mask [n] whether it may be kept,
        and the pixels that it owns and has."""
        masks, scores, size, original_size = picture
        n = len(scores)
        tiles = _Tiles.of(masks, size, original_size, shape)
        owner = tiles.merge(tiles.map(partial(_find_owners, scores)))
        owner = jnp.where(inside_picture(original_size, shape), owner, n)
        owned = jnp.zeros(n + 1, jnp.int32).at[owner.reshape(-1)].add(1, **IN)[:n]
        num_proposals = n - (k - num_things)
        [eligible] = find_eligible(owned[None], scores[None], num_proposals, instance_threshold)
        area = tiles.map(partial(_count_half, eligible)).sum((0, 1))
        return owner, eligible, owned, area

    pictures = seen.stage.masks, scores, seen.size, original_size
    owner, *counts = jax.lax.map(fuse_one, pictures)
    ids, labels, scores, _ = rank_segments(*counts, labels, scores, overlap_threshold)
    ids = jax.vmap(choose)(ids, owner)
    return {"ids": ids.astype(jnp.int32), "labels": labels, "scores": scores}


class _Tile(NamedTuple):
    """A part of a picture, and the logits around it."""

    logits: jax.Array
    """[n, c, c']"""
    y: TileAxis
    """Its matrices `GROUP` times: `double` [g, d, c], `resample` [g, p, d]."""
    x: TileAxis
    """With `double` [c', d'] and `resample` [d', q]."""

    @property
    def inside(self) -> jax.Array:
        """Which pixels are of the tile and of the picture. bool [p, q]."""
        return self.y.inside[:, None] & self.x.inside

    def values(self, kernels: jax.Array, factors: jax.Array | float = 1) -> jax.Array:
        """Probabilities of `GROUP` masks at the pixels, by factors [g, 1, 1]. -> [g, p, q]."""
        # Products of two arrays of matrices, or of one with a matrix: ONNX has no others.
        matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        logits = matmul(self.y.double, choose(self.logits, kernels))
        probs = factors * jax.nn.sigmoid(matmul(logits, self.x.double))
        return matmul(self.y.resample, matmul(probs, self.x.resample))


class _Tiles(NamedTuple):
    """A picture in r x c tiles, whose sizes in pixels follow from its own."""

    logits: jax.Array
    """[n, h, w]"""
    y: TileAxis
    x: TileAxis
    """As `_Tile.x`."""
    places: tuple[jax.Array, jax.Array]
    """int32 [H] and [W]: at which row (column) of all tiles' those of the picture lie."""

    @classmethod
    def of(
        cls, masks: jax.Array, size: jax.Array, original_size: jax.Array, shape: Sequence[int]
    ) -> _Tiles:
        """Cuts a picture of masks [n, h, w], the size that the network saw, its own and its canvas'."""

        def cut(i: int) -> tuple[TileAxis, jax.Array]:
            num_logits = masks.shape[1 + i]
            count = -(-num_logits // TILE)
            offsets = jnp.arange((shape[i] + count - 1) // count)
            step = jax.lax.div(original_size[i] + (count - 1), jnp.int32(count))
            pixels = jnp.arange(count)[:, None] * step + offsets
            inside = (offsets < step) & (pixels < original_size[i])
            span = 2 * MASK_STRIDE * num_logits / count
            ends = size[i], original_size[i]
            axis = TileAxis.of(pixels, inside, *ends, num_logits, span, masks.dtype)
            # Pixels that do not count have no probability.
            axis = axis._replace(resample=axis.resample * inside[:, :, None])
            pixels = jnp.minimum(jnp.arange(shape[i]), original_size[i] - 1)
            return axis, jax.lax.div(pixels, step) * offsets.shape[0] + jax.lax.rem(pixels, step)

        (y, rows), (x, columns) = cut(0), cut(1)
        x = x._replace(double=x.double.swapaxes(1, 2), resample=x.resample.swapaxes(1, 2))
        return cls(masks, y, x, (rows, columns))

    def map(self, visit: Callable[[_Tile], jax.Array]) -> jax.Array:
        """`visit` of each tile, in an array [r, c, …]."""

        def visit_row(y: TileAxis) -> jax.Array:
            row = window(self.logits, y.columns, axis=1)
            double, resample = (
                jnp.broadcast_to(m, (GROUP, *m.shape)) for m in (y.double, y.resample)
            )
            y = y._replace(double=double, resample=resample)

            def visit_one(x: TileAxis) -> jax.Array:
                return visit(_Tile(window(row, x.columns, axis=2), y, x))

            return jax.lax.map(visit_one, self.x)

        return jax.lax.map(visit_row, self.y)

    def merge(self, tiles: jax.Array) -> jax.Array:
        """The picture [H, W] of tiles [r, c, p, q]."""
        r, c, p, q = tiles.shape
        rows, columns = self.places
        canvas = choose(tiles.transpose(0, 2, 1, 3).reshape(r * p, c * q), rows)
        return choose(canvas, columns, axis=1)


def _find_owners(scores: jax.Array, tile: _Tile) -> jax.Array:
    """The mask of the largest score x probability at every pixel, the first of equals. int32 [p, q].

    Masks compete in the order of what they can reach at most, until that is less than what every
    pixel already has.
    """
    n = len(scores)
    bound = scores * jax.nn.sigmoid(tile.logits.max((1, 2))) * (1 + SLACK)
    order = jnp.argsort(-bound).astype(jnp.int32)
    bound = choose(bound, order)

    def is_open(state: tuple[jax.Array, ...]) -> jax.Array:
        visited, best, _ = state
        return (visited < n) & (choose(bound, jnp.minimum(visited, n - 1)) >= best.min())

    def compete(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        visited, best, owner = state
        places = jnp.minimum(visited + jnp.arange(GROUP), n - 1)  # the last may repeat
        kernels = jnp.sort(choose(order, places))
        values = tile.values(kernels, choose(scores, kernels)[:, None, None])
        top, who = values.max(0), choose(kernels, values.argmax(0))
        wins = (top > best) | ((top == best) & (who < owner))
        return visited + GROUP, jnp.maximum(top, best), jnp.where(wins, who, owner)

    best = jnp.where(tile.inside, -1, jnp.inf).astype(scores.dtype)
    state = jnp.int32(0), best, jnp.full(best.shape, n, jnp.int32)
    return jax.lax.while_loop(is_open, compete, state)[2]


def _count_half(wanted: jax.Array, tile: _Tile) -> jax.Array:
    """Pixels of probability one half or more of the wanted masks, bool [n]. -> int32 [n], else 0."""
    n = len(wanted)
    everywhere = tile.logits.min((1, 2)) > SLACK
    nowhere = tile.logits.max((1, 2)) < -SLACK
    counted = wanted & ~everywhere & ~nowhere
    order = jnp.argsort(jnp.where(counted, 0, 1)).astype(jnp.int32)
    count = counted.sum(dtype=jnp.int32)

    def measure(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        visited, area = state
        places = visited + jnp.arange(GROUP)
        kernels = choose(order, jnp.minimum(places, n - 1))
        half = (tile.values(kernels) >= 0.5).sum((1, 2))
        return visited + GROUP, area.at[kernels].add(jnp.where(places < count, half, 0), **IN)

    area = jnp.where(wanted & everywhere, tile.inside.sum(), 0).astype(jnp.int32)
    return jax.lax.while_loop(lambda s: s[0] < count, measure, (jnp.int32(0), area))[1]


def choose(array: jax.Array, i: jax.Array, axis: int = 0) -> jax.Array:
    """What is at indices of an axis, all of which there are."""
    return array.at[(slice(None),) * axis + (i,)].get(**IN)


def window(array: jax.Array, i: jax.Array, axis: int) -> jax.Array:
    """What is at successive indices of an axis, all of which there are."""
    return jax.lax.dynamic_slice_in_dim(array, i[0], len(i), axis)


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
