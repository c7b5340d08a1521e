"""Layers shared by backbones, necks and kernels, with the reference's padding, epsilon and inits."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.convolution import convolve

EPSILON = 1e-5
"""Of every norm in K-Net."""

AXIS = "batch"
"""Name of the axis over devices."""

PRIOR_BIAS = -math.log(99)
"""Bias under which a sigmoid classifier starts at a probability of 0.01."""

# The two-pass variance: the one-pass form loses digits that the hard gathering then amplifies.
LayerNorm = partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False)


def wide(dtype) -> jnp.dtype:
    """float32, or float64 where the network runs in it: the type of what must not be rounded."""
    return jnp.promote_types(jnp.float32, dtype)


def group_norm(channels: int, dtype, name: str) -> nn.GroupNorm:
    """GroupNorm of 32 groups, or of as many as narrow networks allow."""
    groups = math.gcd(32, channels)
    return nn.GroupNorm(groups, epsilon=EPSILON, use_fast_variance=False, dtype=dtype, name=name)


def conv(channels: int, size: int, stride: int = 1, **keywords) -> nn.Conv:
    """A square convolution padded symmetrically by (size - 1) / 2, as PyTorch pads."""
    return nn.Conv(
        channels,
        (size, size),
        (stride, stride),
        padding=(size - 1) // 2,
        conv_general_dilated=convolve,
        **keywords,
    )


class ConvNormRelu(nn.Module):
    """Convolution without bias, GroupNorm, ReLU. [b, h, w, c'] -> [b, h/stride, w/stride, c]."""

    channels: int
    size: int
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.normal(0.01)
        x = conv(
            self.channels,
            self.size,
            self.stride,
            use_bias=False,
            kernel_init=init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return nn.relu(group_norm(self.channels, self.dtype, name="norm")(x))


def upsample2x(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Doubles two axes bilinearly (half-pixel centers, edges repeated).

    The same as a bilinear resize without corner alignment, in two multiplications an element
    (`tests/test_layers.py::test_upsample2x_equals_resize`).
    """
    for axis in axes:
        axis %= x.ndim
        size = x.shape[axis]
        pad = [(0, 0)] * x.ndim
        pad[axis] = (1, 1)
        padded = jnp.pad(x, pad, mode="edge")
        before = jax.lax.slice_in_dim(padded, 0, size, axis=axis)
        after = jax.lax.slice_in_dim(padded, 2, size + 2, axis=axis)
        pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis + 1)
        x = pairs.reshape(x.shape[:axis] + (2 * size,) + x.shape[axis + 1 :])
    return x


def nearest2x(x: jax.Array) -> jax.Array:
    """Doubles both axes of a feature map by repeating pixels. [b, h, w, c] -> [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)


def sine_encoding(height: int, width: int, channels: int, dtype) -> jax.Array:
    """Sine and cosine of normalized positions (DETR), the first half for y. [h, w, channels].

    Positions run from 1 to n, divided by n + 1e-6 and scaled to 2 pi; even channels are sines and
    odd ones cosines, at wavelengths that grow by 10000^(2 / channels-per-axis). Computed in float32
    like the reference's, whatever the type of the network.
    """
    features = channels // 2
    wavelength = np.float32(10000) ** (
        2 * (np.arange(features) // 2).astype(np.float32) / np.float32(features)
    )

    def encode(size: int) -> np.ndarray:
        position = np.arange(1, size + 1, dtype=np.float32)
        position = position / (position[-1] + np.float32(1e-6)) * np.float32(2 * math.pi)
        angle = position[:, None] / wavelength
        return np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(encode(height)[:, None], (height, width, features))
    x = np.broadcast_to(encode(width)[None, :], (height, width, features))
    return jnp.asarray(np.concatenate([y, x], axis=-1), dtype)
