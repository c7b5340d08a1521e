"""Bilinear resampling between the network's input and pictures of any size, inside one program.

The reference resizes twice, to the size of the input and, cropped, to that of the picture. Here
both are one matrix an axis, made on the device from sizes that the program does not know.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MASK_STRIDE = 4
"""Of the masks of things and stuff, once doubled."""


class Canvas(NamedTuple):
    """The static part of the sizes: one compiled program for each."""

    height: int
    width: int
    shrink: int
    """Upper bound of resized over original side, a power of two."""

    @classmethod
    def of(cls, sizes, original_sizes) -> Canvas:
        """The smallest canvas that holds all of these pictures, from a coarse grid of canvases.

        Args:
          sizes: [b, 2], heights and widths as the network saw them.
          original_sizes: [b, 2], heights and widths to return to.
        """
        original_sizes = np.maximum(original_sizes, 1)  # padding images have no size
        height, width = (128 * math.ceil(int(side) / 128) for side in original_sizes.max(axis=0))
        ratio = max(1.0, float((sizes / original_sizes).max()))
        return cls(height, width, 2 ** math.ceil(math.log2(ratio)))


def taps(position: jax.Array, scale: jax.Array | float, size) -> tuple[jax.Array, jax.Array]:
    """Where bilinear resampling reads for integer positions: (lower index, weight of the upper).

    Half-pixel centers, clamped at both ends; the upper index is min(lower + 1, size - 1).
    """
    source = jnp.maximum((position + 0.5) * scale - 0.5, 0)
    lower = jnp.minimum(jnp.floor(source).astype(jnp.int32), size - 1)
    return lower, source - lower


def matrix(lower: jax.Array, fraction: jax.Array, size, columns: jax.Array) -> jax.Array:
    """Bilinear weights as rows over `columns`; columns that repeat an index count once."""
    first = jnp.concatenate([jnp.ones_like(columns[:1], bool), columns[1:] != columns[:-1]])
    is_lower = (lower[:, None] == columns) & first
    is_upper = (jnp.minimum(lower + 1, size - 1)[:, None] == columns) & first
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
        stride: int,
        dtype,
    ) -> Reads:
        """What integer pixels [p] read; those beyond the original size read as the last one.

        Args:
          pixels: of the picture.
          size: [] of the resized picture within the input.
          original_size: [] of the picture.
          num_rows: of the map.
          stride: of the map.
          dtype: of the weights.
        """
        pixels = jnp.minimum(pixels, original_size - 1).astype(dtype)
        lower, fraction = taps(pixels, size / original_size.astype(dtype), size)
        upper = jnp.minimum(lower + 1, size - 1)
        lower, upper = (taps(each.astype(dtype), 1 / stride, num_rows) for each in (lower, upper))
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
    stride: int,
    dtype,
    mirrored: jax.Array | bool = False,
) -> jax.Array:
    """One axis from a map of the input to the picture: to the input's size, cropped, resized.

    Args:
      size: [] of the resized picture within the input.
      original_size: [] of the picture.
      num_rows: of the map.
      num_pixels: at least the original size; what lies beyond repeats the last pixel.
      stride: of the map.
      dtype: of the result.
      mirrored: [] whether the map shows the picture from its other end.

    Returns:
      [num_pixels, num_rows]: weights of the map's rows for every pixel.
    """
    pixels = jnp.arange(num_pixels)
    pixels = jnp.where(mirrored, original_size - 1 - pixels, pixels)
    reads = Reads.of(pixels, size, original_size, num_rows, stride, dtype)
    return reads.weights(jnp.arange(num_rows))
