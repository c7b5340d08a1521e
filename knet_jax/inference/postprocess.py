"""From the masks of the kernels to instances and label maps at the picture's own size.

Panoptic maps: `fusion.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.inference.resampling import ResultCanvas, both_to_original
from knet_jax.nn.layers import argmax, upsample2x
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance
from knet_jax.structs import EMPTY, Pass

MASKS = 8
"""Masks of a picture that are resampled together."""

ROWS = 128
"""Rows of a label map that are computed together; divides the height of every canvas."""


class Instances(NamedTuple):
    """The best instances of each picture, best score first."""

    scores: jax.Array
    """[b, r]."""
    labels: jax.Array
    """int32 [b, r], `EMPTY` where the score is below the threshold."""
    kernels: jax.Array
    """int32 [b, r]: whose mask it is; a kernel may stand for several classes."""
    bits: jax.Array
    """uint8 [b, r, W, H/8]: the mask at original size, column by column, eight pixels a byte."""


def predict_instances(
    passes: Sequence[Pass],
    original_size: jax.Array,
    *,
    canvas: ResultCanvas,
    num_results: int,
    instance_threshold: jax.Array | float = 0.0,
) -> Instances:
    """The best (kernel, class) pairs of each picture, and their masks.

    Masks are doubled as logits; their probabilities are brought to the size of the input, cropped
    and brought to the original size, where they must be above one half.

    Args:
        passes: one pass, with masks at stride 8 and class logits.
        original_size: int32 [b, 2], height and width of the picture, at most those of the canvas.
        canvas: static, from `ResultCanvas.of`.
        num_results: r, at most n·k.
        instance_threshold: least score; pairs below it have the label `EMPTY`, and no mask that
            may be read.

    Returns:
        The pairs, best score first.
    """
    [seen] = passes
    scores, kernels, labels = best_pairs(seen.stage.logits, num_results)
    b, num_results = scores.shape
    labels = jnp.where(scores >= instance_threshold, labels, EMPTY)
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    probs = jax.nn.sigmoid(upsample2x(seen.stage.masks, axes=(2, 3)))
    y, x = both_to_original(
        seen, original_size, probs.shape[2:], (canvas.height, canvas.width), probs.dtype
    )

    # Pairs are sorted by their score: only the groups that reach the threshold are resampled.
    group = min(MASKS, num_results)
    padded = jnp.pad(kernels, ((0, 0), (0, -num_results % group)))

    def add_group(i: jax.Array, bits: jax.Array) -> jax.Array:
        chosen = jax.lax.dynamic_slice_in_dim(padded, i * group, group, axis=1)
        some = jnp.take_along_axis(probs, chosen[:, :, None, None], axis=1)
        above = einsum("bjw,bnhw->bnjh", x, some)
        packed = jnp.packbits(einsum("bih,bnjh->bnji", y, above) > 0.5, axis=3)
        return jax.lax.dynamic_update_slice_in_dim(bits, packed, i * group, axis=1)

    bits = jnp.zeros((b, padded.shape[1], canvas.width, canvas.height // 8), jnp.uint8)
    wanted = (labels != EMPTY).sum(1).max()
    bits = jax.lax.fori_loop(0, -(-wanted // group), add_group, bits)[:, :num_results]
    return Instances(scores, labels, kernels, bits)


def best_pairs(logits: jax.Array, num_results: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best pairs of a kernel and a class: class logits [b, n, k] -> scores, kernels, labels [b, r]
    of at most `num_results`, best first."""
    b, n, k = logits.shape
    scores, pairs = jax.lax.top_k(jax.nn.sigmoid(logits).reshape(b, n * k), min(num_results, n * k))
    return scores, (pairs // k).astype(jnp.int32), (pairs % k).astype(jnp.int32)


def predict_labels(
    passes: Sequence[Pass], original_size: jax.Array, *, canvas: ResultCanvas
) -> jax.Array:
    """The class of every pixel: the most probable one by the mean of all passes, 1 + k for class k.

    Args:
        passes: of the same pictures; masks are logits [b, k, h, w].
        original_size: int32 [b, 2], height and width of the picture, at most those of the canvas.
        canvas: static, from `ResultCanvas.of`.

    Returns:
        uint8 (uint16 above 255 classes) [b, H, W]; beyond the picture it has no meaning.
    """
    dtype = jnp.uint8 if passes[0].stage.masks.shape[1] <= 255 else jnp.uint16
    shape = canvas.height, canvas.width
    einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)

    def one(all_masks: Sequence[jax.Array], all_axes: Sequence[tuple[jax.Array, jax.Array]]):
        def block(all_y: Sequence[jax.Array]) -> jax.Array:
            total = 0
            for masks, y, (_, x) in zip(all_masks, all_y, all_axes):
                above = einsum("ih,khw->kiw", y, masks)
                logits = einsum("kiw,jw->kij", above, x)
                # The largest logit of a single pass is its largest probability.
                total += jax.nn.softmax(logits, axis=0) if len(passes) > 1 else logits
            return (1 + argmax(total, axis=0)).astype(dtype)

        blocks = [y.reshape(-1, ROWS, y.shape[1]) for y, _ in all_axes]
        return jax.lax.map(block, blocks).reshape(shape)

    all_masks = [seen.stage.masks for seen in passes]
    all_axes = [
        both_to_original(seen, original_size, masks.shape[2:], shape, masks.dtype)
        for seen, masks in zip(passes, all_masks)
    ]
    return jax.vmap(one)(all_masks, all_axes)


def read_instances(best: Instances, original_size: np.ndarray) -> tuple[Instance, ...]:
    """The instances of one picture, their masks as run lengths; a kernel's is encoded once. On the
    host."""
    height, width = original_size
    best = jax.tree.map(lambda x: x[best.labels != EMPTY], best)
    encoded = {}
    for kernel, bits in zip(best.kernels.tolist(), best.bits):
        if kernel not in encoded:
            columns = np.unpackbits(bits[:width], axis=1, count=height)
            encoded[kernel] = rle.encode(columns.T)
    return tuple(
        Instance(encoded[kernel], label, score, area=float(rle.area(encoded[kernel])))
        for kernel, label, score in zip(
            best.kernels.tolist(), best.labels.tolist(), best.scores.tolist()
        )
    )


def read_labels(labels: np.ndarray, original_size: np.ndarray) -> np.ndarray:
    """The label map of one picture, without its padding. On the host."""
    height, width = original_size
    return labels[:height, :width]
