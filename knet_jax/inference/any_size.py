"""A picture of any size to results as one program of plain formulas: what is exported.

Evaluation resizes pictures on the host, and compiles its results for the sizes of a batch. A program
that leaves the project has neither: here everything from the pixels on disk to the pixels of the
result is computed by matrices and loops of a fixed number of rounds, whose sizes may be symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.inference import postprocess
from knet_jax.inference.postprocess import ROWS, best_pairs
from knet_jax.inference.resampling import Canvas, both_to_original, taps
from knet_jax.inference.segment_ranking import best_classes, find_eligible, rank_segments
from knet_jax.nn.layers import upsample2x
from knet_jax.structs import EMPTY, Pass

Results = dict[str, jax.Array]

ROUNDING = 1e-5
"""More than what products of probabilities in single precision lose."""


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
            """What the rows (or columns) of the canvas read of x, and the weights."""
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


def each_mask(
    masks: jax.Array, seen: Pass, original_size: jax.Array, shape: Sequence[int]
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Probabilities of masks at stride 4, and a function that brings one of them to the pictures.

    Args:
        masks: logits [b, n, h, w] at stride 8.
        seen: the pass that the masks are of.
        original_size: int32 [b, 2], heights and widths of the pictures.
        shape: H and W of the result.

    Returns:
        [n, b, 2h, 2w], and a function [b, 2h, 2w] -> [b, H, W].
    """
    probs = jax.nn.sigmoid(upsample2x(masks, axes=(2, 3))).swapaxes(0, 1)
    y, x = both_to_original(seen, original_size, probs.shape[2:], shape, probs.dtype)
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return probs, lambda probs: einsum("bih,bhj->bij", y, einsum("bhw,bjw->bhj", probs, x))


def predict_panoptic(
    seen: Pass,
    original_size: jax.Array,
    *,
    shape: Sequence[int],
    num_things: int,
    instance_threshold: float,
    overlap_threshold: float,
) -> Results:
    """The map of `fusion.predict_panoptic`, with every mask that may win a pixel at every pixel.

    Returns:
        ids int32 [b, H, W]: 0 = void, 1 + i = segment i; labels int32 [b, n] and scores [b, n] of
        the segments, best first, `EMPTY` and 0 after the last.
    """
    _, n, k = seen.stage.logits.shape
    scores, labels = best_classes(seen.stage.logits, num_things)
    probs, at_pixels = each_mask(seen.stage.masks, seen, original_size, shape)
    inside = inside_pictures(original_size, shape)

    def where_it_may_win(visit):
        """`visit` of a state and a mask, but for the masks that cannot win: nothing is theirs."""
        nothing = jnp.zeros(inside.shape[0], jnp.int32)

        def skip(state, *_):
            return state, nothing

        return lambda state, mask: jax.lax.cond(mask[0], visit, skip, state, *mask[1:])

    def compete(state, number, probs, score):
        best, owner = state
        probs = at_pixels(probs)
        value = score[:, None, None] * probs
        wins = inside & (value > best)
        state = jnp.where(wins, value, best), jnp.where(wins, number, owner)
        return state, ((probs >= 0.5) & inside).sum((1, 2))

    def count(owner, number):
        return owner, (owner == number).sum((1, 2))

    chosen = may_win(scores.T[:, :, None, None] * probs)
    numbers = jnp.arange(n, dtype=jnp.int32)
    nobody = jnp.full(inside.shape, -1, probs.dtype), jnp.full(inside.shape, n, jnp.int32)
    masks = chosen, numbers, probs, scores.T
    (_, owner), area = jax.lax.scan(where_it_may_win(compete), nobody, masks)
    _, owned = jax.lax.scan(where_it_may_win(count), owner, (chosen, numbers))
    eligible = find_eligible(owned.T, scores, n - (k - num_things), instance_threshold)
    ids, labels, scores = rank_segments(
        eligible, owned.T, area.T, labels, scores, overlap_threshold
    )
    ids = jax.vmap(partial(jnp.take, mode="clip"))(ids, owner)
    return {"ids": ids.astype(jnp.int32), "labels": labels, "scores": scores}


def may_win(values: jax.Array) -> jax.Array:
    """Which masks may be the highest at a pixel of one of the pictures.

    A pixel is a mean of at most three neighbours at stride 4, in both directions. So none of a mask's
    is higher than the highest of nine, and the winner is no lower than the lowest of another's nine.

    Args:
        values: [n, b, h, w] at stride 4, not negative.

    Returns:
        bool [n].
    """

    def of_nine(choose: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
        x = values
        for axis in (2, 3):
            size = x.shape[axis] - 2
            parts = [jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i in range(3)]
            x = choose(choose(*parts[:2]), parts[2])
        return x

    least = of_nine(jnp.minimum).max(0)
    return (of_nine(jnp.maximum) - (1 - ROUNDING) * least).max((1, 2, 3)) >= 0


def predict_instances(
    seen: Pass, original_size: jax.Array, *, shape: Sequence[int], num_results: int
) -> Results:
    """The results of `postprocess.predict_instances`, with masks that are not packed.

    Returns:
        masks bool [b, r, H, W], labels int32 [b, r] and scores [b, r], best first.
    """
    scores, kernels, labels = best_pairs(seen.stage.logits, num_results)
    masks = jax.vmap(partial(jnp.take, axis=0, mode="clip"))(seen.stage.masks, kernels)
    probs, at_pixels = each_mask(masks, seen, original_size, shape)
    inside = inside_pictures(original_size, shape)
    masks = jax.lax.map(lambda probs: (at_pixels(probs) > 0.5) & inside, probs)
    return {"masks": masks.swapaxes(0, 1), "labels": labels, "scores": scores}


def predict_labels(seen: Pass, original_size: jax.Array, *, shape: Sequence[int]) -> Results:
    """The classes of `postprocess.predict_labels`, from 0 on.

    Returns:
        labels int32 [b, H, W], `EMPTY` beyond the pictures.
    """
    height, width = shape
    canvas = Canvas((height + ROWS - 1) // ROWS * ROWS, width, shrink=1)
    maps = postprocess.predict_labels([seen], original_size, canvas=canvas)
    labels = maps[:, :height].astype(jnp.int32) - 1
    return {"labels": jnp.where(inside_pictures(original_size, shape), labels, EMPTY)}
