"""From the masks of the kernels to one panoptic map at the picture's own size.

The reference brings every mask to the size of the picture and takes the best score x probability
at each pixel. Here the picture is cut into tiles, and within a tile a mask is resampled only
while it can still win a pixel: bilinear resampling never leaves the range of its inputs, so the
largest logit around a tile bounds every probability in it. The result is the same map.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.inference.resampling import Reads, ResultCanvas, matrix, taps
from knet_jax.inference.segment_ranking import best_classes, find_eligible, rank_segments
from knet_jax.segmentation.segments import PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY, Pass

MASK_STRIDE = 4
"""Pixels of the input from one logit of a mask to the next, once masks are doubled in size."""

TILE = 32
"""Height and width of a tile of the map, in pixels."""

GROUP = 16
"""Masks of a tile that are resampled together."""

WORK = 32
"""Tiles that are visited together."""

SLACK = 1e-5
"""Relative slack of the bounds, above what rounding can move a probability."""


class Fused(NamedTuple):
    """Panoptic maps of a batch, padded to one canvas."""

    ids: jax.Array
    """int16, or int32 from 2^15 masks on, [b, H, W]: 0 = void, 1 + i = the i-th kept segment, best
    score first."""
    labels: jax.Array
    """int32 [b, n]: class of each kept segment, `EMPTY` after the last."""
    scores: jax.Array
    """[b, n]: score of each kept segment, 0 after the last."""
    kernels: jax.Array
    """int32 [b, n]: which kernel each kept segment is, of no meaning after the last."""


class TileAxis(NamedTuple):
    """How the tiles of one axis are resampled from mask logits, for one picture, t tiles of p pixels."""

    columns: jax.Array
    """int32 [t, c]: the logits that a tile needs (stride 8), one after the other."""
    double: jax.Array
    """[t, d, c]: from them to logits at stride 4."""
    resample: jax.Array
    """[t, p, d]: from probabilities at stride 4 to the pixels of the tile."""
    inside: jax.Array
    """bool [t, p]: pixels of the picture."""

    @classmethod
    def of(
        cls, pixels, inside, size, original_size, num_logits: int, span: float, dtype
    ) -> TileAxis:
        """Resampling along one axis: logits -> x2 -> sigmoid -> input size, cropped -> original.

        Args:
            pixels: int32 [t, p], those of each tile in ascending order.
            inside: bool [t, p], which of them are of the picture.
            size: [] of the resized picture within the input.
            original_size: [] of the picture.
            num_logits: of a mask.
            span: pixels of the input, at most, from the first to the last that is inside of a tile.
            dtype: of the weights.
        """
        num_rows = 2 * num_logits
        # On top of what a tile spans come the taps at both ends.
        d = min(int(span) // MASK_STRIDE + 4, num_rows)
        c = min(d // 2 + 2, num_logits)

        def tile(pixels: jax.Array, inside: jax.Array) -> TileAxis:
            reads = Reads.of(pixels, size, original_size, num_rows, 1 / MASK_STRIDE, dtype)
            first, _ = reads.lower
            rows = jnp.minimum(first.min(), num_rows - d) + jnp.arange(d)

            above, above_fraction = taps(rows.astype(dtype), 0.5, num_logits)
            columns = jnp.minimum(above[0], num_logits - c) + jnp.arange(c)
            double = matrix(above, above_fraction, num_logits, columns)
            return cls(columns, double, reads.weights(rows), inside)

        return jax.vmap(tile)(pixels, inside)


class _Tiles(NamedTuple):
    """All tiles of a batch, t of them, and the logits around them."""

    image: jax.Array
    """int32 [t]."""
    logits: jax.Array
    """[t, n, c, c'] the part of every mask that the tile is resampled from."""
    y: TileAxis
    """[t, …]."""
    x: TileAxis
    inside: jax.Array
    """bool [t, TILE, TILE]."""

    def probabilities(self, tile: jax.Array, kernel: jax.Array) -> jax.Array:
        """Masks `kernel` [p, g] at the pixels of tiles `tile` [p]. -> [p, TILE, g, TILE].

        In this order of the axes every product is one of matrices, and nothing is transposed.
        """
        y, x = jax.tree.map(lambda array: array[tile], (self.y, self.x))
        logits = self.logits[tile[:, None], kernel]
        # The bounds on which tiles rely hold in full precision only, whatever the network runs in.
        einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        logits = einsum("pdc,pgce->pdge", y.double, logits)
        probs = jax.nn.sigmoid(einsum("pdge,pfe->pdgf", logits, x.double))
        probs = einsum("pid,pdgf->pigf", y.resample, probs)
        return einsum("pigf,pjf->pigj", probs, x.resample)


def _cut(masks, size, original_size, canvas: ResultCanvas) -> _Tiles:
    b, n, h, w = masks.shape
    ty, tx = canvas.height // TILE, canvas.width // TILE

    def one(logits, size, original_size):
        def axis(i: int, num_logits: int, num_pixels: int) -> TileAxis:
            pixels = jnp.arange(num_pixels).reshape(-1, TILE)
            return TileAxis.of(
                pixels,
                pixels < original_size[i],
                size[i],
                original_size[i],
                num_logits,
                TILE * canvas.shrink,
                masks.dtype,
            )

        y, x = axis(0, h, canvas.height), axis(1, w, canvas.width)
        near = jnp.take(jnp.take(logits, y.columns, axis=1), x.columns, axis=3)
        near = near.transpose(1, 3, 0, 2, 4).reshape(ty * tx, n, *near.shape[2::2])
        y = jax.tree.map(lambda array: jnp.repeat(array, tx, axis=0), y)
        x = jax.tree.map(lambda array: jnp.tile(array, (ty, *[1] * (array.ndim - 1))), x)
        return near, y, x

    near, y, x = jax.vmap(one)(masks, size, original_size)
    near, y, x = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), (near, y, x))
    inside = y.inside[:, :, None] & x.inside[:, None, :]
    return _Tiles(jnp.repeat(jnp.arange(b), ty * tx), near, y, x, inside)


def _half(tiles: _Tiles, tile: jax.Array, probs: jax.Array) -> jax.Array:
    """Pixels of the picture with a probability of at least one half. -> [p, g]."""
    half = (probs >= 0.5) & tiles.inside[tile][:, :, None]
    # Written as a sum of rows, which takes one pass over them: a reduction takes several times that.
    return sum(half[:, i].astype(jnp.int32) for i in range(TILE)).sum(2)


def _descending(bound: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The order of bounds [t, n], none below zero, and themselves in that order, rounded up.

    The index takes the place of the last digits: one array of integers is sorted several times
    faster than numbers with their indices.
    """
    n = bound.shape[1]
    integer = jnp.dtype(f"int{8 * bound.dtype.itemsize}")
    digits = (1 << (n - 1).bit_length()) - 1
    index = jnp.arange(n, dtype=integer)
    keys = jax.lax.bitcast_convert_type(bound, integer) | digits
    keys = -jnp.sort(-(keys - index), axis=1, stable=False)
    order = (digits - (keys & digits)).astype(jnp.int32)
    return order, jax.lax.bitcast_convert_type(keys | digits, bound.dtype)


def _owners(tiles: _Tiles, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mask of the largest score x probability at every pixel, the first of equals.

    Each tile visits its masks in the order of what they can reach at most, and stops when that is
    less than what every pixel of the tile already has.

    Args:
        tiles: t of them, and n masks.
        scores: [b, n].

    Returns:
        owners [t, TILE, TILE], n where the picture ends; and the area [t, n] of what was visited
        (pixels of probability one half or more), `EMPTY` for the rest.
    """
    t, n = tiles.logits.shape[:2]
    scores = scores[tiles.image]
    bound = scores * jax.nn.sigmoid(tiles.logits.max((2, 3))) * (1 + SLACK)
    order, bound = _descending(bound)
    # Padded so that a tile can always read a whole group and one bound beyond it.
    rest = ((0, 0), (0, -n % GROUP + 1 + GROUP))
    order = jnp.pad(order, rest, constant_values=n)
    bound = jnp.pad(bound, rest, constant_values=-jnp.inf)

    def is_open(cursor, least):
        return bound[jnp.arange(t), cursor] >= least

    def visit(state):
        cursor, least, best, owner, area = state
        (tile,) = jnp.nonzero(is_open(cursor, least), size=min(t, WORK), fill_value=t)
        kernel = order[tile[:, None], cursor[tile, None] + jnp.arange(GROUP)]
        probs = tiles.probabilities(tile, jnp.minimum(kernel, n - 1))
        score = jnp.where(kernel < n, scores[tile[:, None], kernel], -1)
        value = score[:, None, :, None] * probs
        top = value.max(2)
        who = jnp.where(value == top[:, :, None], kernel[:, None, :, None], n).min(2)
        wins = (top > best[tile]) | ((top == best[tile]) & (who < owner[tile]))
        top = jnp.where(wins, top, best[tile])
        return (
            cursor.at[tile].add(GROUP, mode="drop"),
            least.at[tile].set(top.min((1, 2)), mode="drop"),
            best.at[tile].set(top, mode="drop"),
            owner.at[tile].set(jnp.where(wins, who, owner[tile]), mode="drop"),
            area.at[tile[:, None], kernel].set(_half(tiles, tile, probs), mode="drop"),
        )

    best = jnp.where(tiles.inside, jnp.asarray(-1, bound.dtype), jnp.inf)
    owner = jnp.full(best.shape, n, jnp.int32)
    state = (jnp.zeros(t, jnp.int32), best.min((1, 2)), best, owner, jnp.full((t, n), EMPTY))
    return jax.lax.while_loop(lambda s: is_open(*s[:2]).any(), visit, state)[3:]


def _areas(tiles: _Tiles, known: jax.Array, wanted: jax.Array) -> jax.Array:
    """Pixels of probability one half or more of the wanted masks, in the whole picture.

    Where all logits around a tile have one sign, nothing needs to be resampled.

    Args:
        tiles: t of them, and n masks.
        known: areas within the tiles [t, n], `EMPTY` where not known yet.
        wanted: bool [b, n].

    Returns:
        int32 [b, n], right where wanted.
    """
    t, n = tiles.logits.shape[:2]
    pixels = tiles.inside.sum((1, 2))
    whole = tiles.logits.min((2, 3)) > SLACK
    mixed = ~whole & (tiles.logits.max((2, 3)) > -SLACK)
    unknown = (known == EMPTY) & wanted[tiles.image] & (pixels > 0)[:, None]
    area = jnp.where(known != EMPTY, known, jnp.where(whole, pixels[:, None], 0))

    def count(state):
        area, rest = state
        (pair,) = jnp.nonzero(rest, size=min(t * n, WORK * GROUP), fill_value=t * n)
        tile, kernel = pair // n, pair % n
        probs = tiles.probabilities(tile, kernel[:, None])
        area = area.at[tile, kernel].set(_half(tiles, tile, probs)[:, 0], mode="drop")
        return area, rest.at[pair].set(False, mode="drop")

    state = (area, (unknown & mixed).reshape(-1))
    area, _ = jax.lax.while_loop(lambda s: s[1].any(), count, state)
    return area.reshape(len(wanted), -1, n).sum(1)


def predict_panoptic(
    passes: Sequence[Pass],
    original_size: jax.Array,
    *,
    canvas: ResultCanvas,
    num_things: int,
    instance_threshold: jax.Array | float,
    overlap_threshold: jax.Array | float,
) -> Fused:
    """Fuses the masks of all kernels into one map, as the reference does.

    Every pixel goes to the mask of the largest score x probability. A mask keeps its pixels if it
    is a thing of at least `instance_threshold` or stuff, and if they are at least a share of
    `overlap_threshold` of the pixels on which its probability is one half or more.

    Args:
        passes: one pass, with masks at stride 8 and class logits, proposals before stuff.
        original_size: int32 [b, 2], height and width of the maps, at most those of the canvas.
        canvas: static, from `ResultCanvas.of`.
        num_things: how many classes are things; they come first.
        instance_threshold: least score of a thing.
        overlap_threshold: least share of a mask that must remain.

    Returns:
        Panoptic maps and their segments.
    """
    [seen] = passes
    b, n, k = seen.stage.logits.shape
    scores, labels = best_classes(seen.stage.logits, num_things)

    tiles = _cut(seen.stage.masks, seen.size, original_size, canvas)
    owner, area = _owners(tiles, scores)
    owned = jnp.zeros((b, n), jnp.int32)
    owned = owned.at[tiles.image[:, None, None], owner].add(tiles.inside, mode="drop")
    eligible = find_eligible(owned, scores, n - (k - num_things), instance_threshold)
    area = _areas(tiles, area, eligible)
    ids, *segments = rank_segments(eligible, owned, area, labels, scores, overlap_threshold)

    ids = ids[tiles.image[:, None, None], owner]
    ids = ids.reshape(b, canvas.height // TILE, canvas.width // TILE, TILE, TILE)
    ids = ids.transpose(0, 1, 3, 2, 4).reshape(b, canvas.height, canvas.width)
    return Fused(ids, *segments)


def read_panoptic(fused: Fused, original_size: np.ndarray) -> PanopticMap:
    """The panoptic map of one picture, without its padding. On the host."""
    height, width = original_size
    infos = tuple(
        SegmentInfo(number + 1, int(label), score=float(score))
        for number, (label, score) in enumerate(zip(fused.labels, fused.scores))
        if label != EMPTY
    )
    return PanopticMap(fused.ids[:height, :width].astype(np.int32), infos)
