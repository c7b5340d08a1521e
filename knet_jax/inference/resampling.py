"""Bilinear resampling between the network's input and pictures of any size, inside one program.

The reference resizes twice, to the size of the input and, cropped, to that of the picture. Here
both are one matrix an axis, made on the device from sizes that the program does not know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.structs import Pass


class ResultCanvas(NamedTuple):
    """Size of the arrays that hold the results of a batch; a program is compiled for each."""

    height: int
    width: int
    shrink: float
    """Upper bound of resized over original side, a power of two."""

    @classmethod
    def of(cls, sizes, original_sizes) -> ResultCanvas:
        """The smallest canvas that holds all of these pictures, from a coarse grid of canvases.

        Args:
            sizes: [b, 2], heights and widths as the network saw them.
            original_sizes: [b, 2], heights and widths to return to.
        """
        original_sizes = np.maximum(original_sizes, 1)  # padding images have no size
        height, width = (_round_up(int(side)) for side in original_sizes.max(axis=0))
        return cls(height, width, _shrink(sizes, original_sizes))

    @classmethod
    def scaled(cls, inside: tuple[int, int], size, original_size) -> ResultCanvas:
        """One of few canvases that hold a picture: that of the network's input, enlarged or reduced.

        Pictures of all aspects share it where they are resized by about the same factor; only one
        that would leave almost all of it empty has a canvas of its own.

        Args:
            inside: height and width of the network's input.
            size: [2], height and width of the picture within it.
            original_size: [2], height and width to return to.
        """
        size, original_size = np.asarray(size), np.asarray(original_size)
        scale = _coarse(float((original_size / size).max()))
        height, width = (_round_up(math.ceil(scale * side)) for side in inside)
        if height * width > WASTE * original_size.prod(dtype=float):
            height, width = (int(128 * _coarse(max(1.0, side / 128))) for side in original_size)
        return cls(height, width, _shrink(size, original_size))


WASTE = 8
"""How many times as large as its picture a shared canvas may be."""

LEAST_SHRINK = 1 / 8
"""Least value of `ResultCanvas.shrink`: below it the part of a mask that a tile reads gets no smaller."""


def _round_up(side: int) -> int:
    return 128 * math.ceil(side / 128)


def _coarse(scale: float) -> float:
    """The next larger number among ... 1/4, 1/2, 1, 1.5, 2, 3, 4, 6, ...; small pictures cost so
    little that they need no steps between."""
    power = 2.0 ** math.ceil(math.log2(scale))
    return 0.75 * power if 1 < scale <= 0.75 * power else power


def _shrink(sizes, original_sizes) -> float:
    """`ResultCanvas.shrink` of a canvas for these pictures."""
    ratio = max(LEAST_SHRINK, float((sizes / original_sizes).max()))
    return 2.0 ** math.ceil(math.log2(ratio))


def taps(position: jax.Array, scale: jax.Array | float, size) -> tuple[jax.Array, jax.Array]:
    """Where bilinear resampling reads for integer positions: (lower index, weight of the upper).

    Half-pixel centers, clamped at both ends; the upper index is min(lower + 1, size - 1).
    """
    source = jnp.maximum((position + 0.5) * scale - 0.5, 0)
    lower = jnp.minimum(jnp.floor(source).astype(jnp.int32), size - 1)
    return lower, source - lower


def matrix(lower: jax.Array, fraction: jax.Array, size, columns: jax.Array) -> jax.Array:
    """Bilinear weights as rows over `columns`, all different."""
    is_lower = lower[:, None] == columns
    is_upper = jnp.minimum(lower + 1, size - 1)[:, None] == columns
    return jnp.where(is_lower, 1 - fraction[:, None], 0) + jnp.where(is_upper, fraction[:, None], 0)


class Reads(NamedTuple):
    """Where pixels of a picture read the rows of a map of the input, p of them along one axis.

    A pixel is made of two of the input (cropped to `size`), each of which is made of two rows.
    """

    lower: tuple[jax.Array, jax.Array]
    """The taps of the lower pixel of the input, as `taps` gives them."""
    upper: tuple[jax.Array, jax.Array]
    fraction: jax.Array
    """[p]: weight of the upper pixel."""
    num_rows: int

    @classmethod
    def of(
        cls,
        pixels: jax.Array,
        size: jax.Array,
        original_size: jax.Array,
        num_rows: int,
        scale: jax.Array | float,
        dtype,
    ) -> Reads:
        """What integer pixels [p] read; those beyond the original size read as the last one.

        Args:
            pixels: of the picture.
            size: [] of the resized picture within the input.
            original_size: [] of the picture.
            num_rows: of the map.
            scale: rows of the map for a pixel of the input.
            dtype: of the weights.
        """
        pixels = jnp.minimum(pixels, original_size - 1).astype(dtype)
        lower, fraction = taps(pixels, size / original_size.astype(dtype), size)
        upper = jnp.minimum(lower + 1, size - 1)
        lower, upper = (taps(each.astype(dtype), scale, num_rows) for each in (lower, upper))
        return cls(lower, upper, fraction, num_rows)

    def weights(self, rows: jax.Array) -> jax.Array:
        """[p, r]: of some rows [r] of the map in ascending order, which hold all that are read."""
        lower, upper = (matrix(*each, self.num_rows, rows) for each in (self.lower, self.upper))
        return (1 - self.fraction[:, None]) * lower + self.fraction[:, None] * upper


def to_original(
    size: jax.Array,
    original_size: jax.Array,
    num_rows: int,
    num_pixels: int,
    scale: jax.Array | float,
    dtype,
    mirrored: jax.Array | bool = False,
) -> jax.Array:
    """One axis from a map of the input to the picture: to the input's size, cropped, resized.

    Args:
        size, original_size, num_rows, scale: as of `Reads.of`.
        num_pixels: at least the original size; what lies beyond repeats the last pixel.
        mirrored: [] whether the map shows the picture from its other end.

    Returns:
        [num_pixels, num_rows]: weights of the map's rows for every pixel.
    """
    pixels = jnp.arange(num_pixels)
    pixels = jnp.where(mirrored, original_size - 1 - pixels, pixels)
    reads = Reads.of(pixels, size, original_size, num_rows, scale, dtype)
    return reads.weights(jnp.arange(num_rows))


def both_to_original(
    seen: Pass, original_size: jax.Array, num_rows: Sequence[int], num_pixels: Sequence[int], dtype
) -> tuple[jax.Array, jax.Array]:
    """Both axes from the maps of a pass to the pictures of a batch, as `to_original`.

    Args:
        seen: the pass; only its sizes are read.
        original_size: int32 [b, 2], heights and widths of the pictures.
        num_rows: height and width of the maps.
        num_pixels: height and width of the result.

    Returns:
        weights [b, H, rows] and [b, W, columns].
    """
    scale = jnp.array(num_rows, dtype) / seen.canvas

    def axis(i: int, **mirrored: jax.Array) -> jax.Array:
        one = partial(to_original, num_rows=num_rows[i], num_pixels=num_pixels[i], dtype=dtype)
        return jax.vmap(one)(seen.size[:, i], original_size[:, i], scale=scale[:, i], **mirrored)

    return axis(0), axis(1, mirrored=seen.mirrored)
