"""The reference's way from masks to pictures: one picture, whole maps, double precision."""

import numpy as np


def resample(x, axis, size, scale):
    """Bilinear along one axis: half-pixel centers, clamped. `scale` is input over output pixels."""
    source = np.maximum((np.arange(size) + 0.5) * scale - 0.5, 0)
    lower = np.minimum(source.astype(int), x.shape[axis] - 1)
    upper = np.minimum(lower + 1, x.shape[axis] - 1)
    fraction = (source - lower).reshape(-1, *[1] * (x.ndim - 1 - axis))
    return x.take(lower, axis) * (1 - fraction) + x.take(upper, axis) * fraction


def to_picture(x, canvas, size, original_size):
    """[n, h, w] -> the canvas of the input, cropped to `size` -> [n, H, W]."""
    for axis, side in ((1, canvas[0]), (2, canvas[1])):
        x = resample(x, axis, side, x.shape[axis] / side)
    x = x[:, : size[0], : size[1]]
    for axis in (1, 2):
        original = original_size[axis - 1]
        x = resample(x, axis, original, size[axis - 1] / original)
    return x


def plain_probabilities(masks, size, original_size):
    """float64 [n, h, w] logits at stride 8 -> [n, H, W] probabilities at original size."""
    x = np.asarray(masks, float)
    for axis in (1, 2):
        x = resample(x, axis, 2 * x.shape[axis], 1 / 2)
    canvas = 4 * np.array(x.shape[1:])
    return to_picture(1 / (1 + np.exp(-x)), canvas, size, original_size)
