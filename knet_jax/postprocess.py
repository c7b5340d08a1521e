"""From the masks of the kernels to instances and label maps at the picture's own size.

Panoptic maps: `fusion.py`.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from knet_jax.layers import upsample2x
from knet_jax.resampling import MASK_STRIDE, Canvas, to_original

MASKS = 8
"""Masks of a picture that are resampled together."""

ROWS = 128
"""Rows of a label map that are computed together; divides the height of every canvas."""


class Instances(NamedTuple):
    """The best instances of each picture, best score first."""

    scores: jax.Array
    """[b, r]."""
    labels: jax.Array
    """int32 [b, r]."""
    kernels: jax.Array
    """int32 [b, r]: whose mask it is; a kernel may stand for several classes."""
    bits: jax.Array
    """uint8 [b, r, W, H/8]: the mask at original size, column by column, eight pixels a byte."""


def best_instances(
    masks: jax.Array,
    logits: jax.Array,
    size: jax.Array,
    original_size: jax.Array,
    *,
    canvas: Canvas,
    num_results: int = 100,
) -> Instances:
    """The best (kernel, class) pairs of each picture, and their masks.

    Masks are doubled as logits; their probabilities are brought to the size of the input, cropped
    and brought to the original size, where they must be above one half.

    Args:
      masks: logits [b, n, h, w] at stride 8.
      logits: class logits [b, n, k].
      size: int32 [b, 2], height and width of the resized picture within the input.
      original_size: int32 [b, 2], height and width of the picture, at most those of the canvas.
      canvas: static, from `Canvas.of`.
      num_results: r, at most n·k.
    """
    k = logits.shape[2]
    num_results = min(num_results, logits.shape[1] * k)
    scores, pairs = jax.lax.top_k(jax.nn.sigmoid(logits).reshape(len(logits), -1), num_results)
    kernels, labels = pairs // k, pairs % k
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def one(masks, kernels, size, original_size):
        probs = jax.nn.sigmoid(upsample2x(masks, axes=(1, 2)))
        y, x = (
            to_original(size[i], original_size[i], rows, pixels, MASK_STRIDE, probs.dtype)
            for i, (rows, pixels) in enumerate(zip(probs.shape[1:], (canvas.height, canvas.width)))
        )
        above = einsum("jw,nhw->njh", x, probs)

        def bits(kernel: jax.Array) -> jax.Array:
            return jnp.packbits(einsum("ih,jh->ji", y, above[kernel]) > 0.5, axis=1)

        return jax.lax.map(bits, kernels, batch_size=MASKS)

    bits = jax.vmap(one)(masks, kernels, size, original_size)
    return Instances(scores, labels.astype(jnp.int32), kernels.astype(jnp.int32), bits)


def label_maps(
    masks: jax.Array, size: jax.Array, original_size: jax.Array, *, canvas: Canvas, stride: int
) -> jax.Array:
    """The class of every pixel: that of the largest logit, 1 + k for class k.

    Args:
      masks: logits [b, k, h, w].
      size: int32 [b, 2], height and width of the resized picture within the input.
      original_size: int32 [b, 2], height and width of the picture, at most those of the canvas.
      canvas: static, from `Canvas.of`.
      stride: of the masks.

    Returns:
      uint8 (uint16 above 255 classes) [b, H, W]; beyond the picture it has no meaning.
    """
    dtype = jnp.uint8 if masks.shape[1] <= 255 else jnp.uint16
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def one(masks, size, original_size):
        y, x = (
            to_original(size[i], original_size[i], rows, pixels, stride, masks.dtype)
            for i, (rows, pixels) in enumerate(zip(masks.shape[1:], (canvas.height, canvas.width)))
        )

        def block(y: jax.Array) -> jax.Array:
            logits = einsum("kiw,jw->kij", einsum("ih,khw->kiw", y, masks), x)
            return (1 + logits.argmax(0)).astype(dtype)

        rows = jax.lax.map(block, y.reshape(-1, ROWS, y.shape[1]))
        return rows.reshape(canvas.height, canvas.width)

    return jax.vmap(one)(masks, size, original_size)
