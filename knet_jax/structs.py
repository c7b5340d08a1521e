"""The types that flow through K-Net, in the order in which the data meets them.

Axis letters, here and everywhere: b images, n kernels, m ground-truth slots, k classes, c channels;
h w is a feature map (stride 8 for masks, stride 4 for targets), H W is the image. Features are NHWC;
masks are [b, n, h, w], because a mask belongs to a kernel. Classes are numbered things first:
0 … num_things - 1 are things, the rest are stuff.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray

EMPTY = -1
"""The label of a ground-truth slot that holds nothing, and the id of a padding image."""


class Sizes(NamedTuple):
    """The three counts that choose the task.

    Panoptic segmentation has all three; instance segmentation has no stuff; semantic segmentation has
    no proposals and no things, all its classes count as stuff.
    """

    num_proposals: int
    """Kernels that look for things; 0 in semantic segmentation."""
    num_things: int
    num_stuff: int


class PanopticTargets(NamedTuple):
    """Segments that share no pixel, as they cross to the device."""

    segment_map: Array
    """uint8, uint16 or uint32 [b, H/2, W/2]: the segment at the pixels that stride-4 targets average.

    Row 2i + a and column 2j + e hold the image pixel (4i + 1 + a, 4j + 1 + e), a and e in {0, 1}.
    0 is nothing (void, crowd, padding) and 1 + s is segment s: first the m thing slots, then one
    segment for every stuff class, in the order of the classes.
    """
    labels: Array
    """int32 [b, m]: class of each thing, `EMPTY` for an empty slot."""
    stuff_labels: Array
    """int32 [b, num_stuff]: the stuff classes in their order, `EMPTY` where a picture has none."""


class InstanceTargets(NamedTuple):
    """Things, which may overlap, as they cross to the device."""

    masks: Array
    """uint8 [b, m, H/2, W/16]: the same pixels as in a `segment_map`, eight columns a byte, the
    first in the highest bit."""
    labels: Array
    """int32 [b, m]: class of each thing, `EMPTY` for an empty slot."""


class SemanticTargets(NamedTuple):
    """Classes of pixels, as they cross to the device."""

    label_map: Array
    """uint8 (uint16 above 255 classes) [b, H, W]: 0 is ignored (void, padding), 1 + k is class k."""


class Batch(NamedTuple):
    """Images and targets as they cross to the device: small, and padded to static shapes."""

    image: Array
    """uint8 [b, H, W, 3], RGB, zero beyond `size`."""
    targets: PanopticTargets | InstanceTargets | SemanticTargets | None
    """None in evaluation."""
    size: Array
    """int32 [b, 2]: height and width of the picture (or the part of it) inside the canvas."""
    original_size: Array
    """int32 [b, 2]: height and width of the picture on disk."""
    id: Array
    """int32 [b]: position of the example in its split, `EMPTY` for a padding image."""


class Segments(NamedTuple):
    """Ground-truth segments of a batch at stride 4."""

    masks: Array
    """[b, m, h, w] in [0, 1]: the share of a pixel that the segment covers, in quarters."""
    labels: Array
    """int32 [b, m]: class, `EMPTY` for an empty slot."""


class Features(NamedTuple):
    """What a neck hands to the kernels: two maps of the same size, NHWC, stride 8."""

    localization: Array
    semantic: Array


class Stage(NamedTuple):
    """The state of the recurrence after one round."""

    kernels: Array
    """[b, n, c]."""
    masks: Array
    """[b, n, h, w] logits at the stride of the features."""
    logits: Array | None
    """[b, n, k] class logits; None before the first update and where kernel n is class n."""


class Output(NamedTuple):
    """Everything the network computes, in training and in inference alike."""

    stages: tuple[Stage, ...]
    """The initial stage followed by one for every update."""
    dense: Array | None
    """[b, k, h, w]: class logits of every pixel, a training signal only; None without such a head."""


class Pass(NamedTuple):
    """What the network made of a batch at one scale, with the pictures as they are or mirrored."""

    stage: Stage
    size: Array
    """int32 [b, 2]: height and width of the pictures as the network saw them."""
    canvas: Array
    """int32 [b, 2]: height and width of the network's input, padding included."""
    mirrored: Array
    """bool [b]: whether the network saw a picture mirrored, left for right."""
