"""Necks: backbone levels -> the feature maps that the kernels work on.

`SemanticFPN` serves instance and panoptic segmentation. `FCN`, `PSP`, `ASPP` and `UPer` are the
decoders of semantic segmentation, without their classifier.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.nn.layers import (
    ConvNormRelu,
    conv,
    he_init,
    make_norm,
    repeat2x,
    resize,
    sine_encoding,
    upsample2x,
    wide,
)
from knet_jax.structs import Features


class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017), nearest upsampling, no norm, no extra level.

    (C2, C3, C4, C5) -> the same number of maps [b, h, w, channels] of the same sizes.
    """

    channels: int
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        conv_ = partial(conv, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        maps = [conv_(self.channels, 1, name=f"lateral{i}")(x) for i, x in enumerate(levels)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + repeat2x(maps[i + 1])
        return tuple(conv_(self.channels, 3, name=f"output{i}")(x) for i, x in enumerate(maps))


class SemanticFPN(nn.Module):
    """FPN whose levels are brought to stride 8 and summed (Kirillov et al., 2019), as in K-Net.

    The coarsest level first gets its position, as a sine encoding that is added and, on request, as
    coordinates in [-1, 1] that are appended. Levels of strides 4, 8, 16, 32 -> `Features`, both
    maps [b, h, w, channels] at stride 8.
    """

    channels: int
    sine: bool
    coordinates: bool
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> Features:
        levels = FPN(self.channels, self.dtype, name="fpn")(levels)
        norm = make_norm("group", self.dtype, train)
        block = partial(ConvNormRelu, self.channels, norm=norm, dtype=self.dtype)

        x = block(3, 2, name="level0_conv0")(levels[0])
        x = x + block(3, name="level1_conv0")(levels[1])
        for i in range(2, len(levels)):
            y = levels[i]
            if i == len(levels) - 1:
                if self.sine:
                    y = y + sine_encoding(y.shape[1], y.shape[2], self.channels, y.dtype)
                if self.coordinates:
                    y = append_coordinates(y)
            for j in range(i):
                y = block(3, name=f"level{i}_conv{j}")(y)
                if j < i - 1:
                    y = upsample2x(y, axes=(1, 2))
            x = x + y

        return Features(
            localization=block(1, name="localization")(x),
            semantic=block(1, name="semantic")(x),
        )


def append_coordinates(x: jax.Array) -> jax.Array:
    """Two more channels: column and row of every pixel, from -1 to 1 (Liu et al., 2018)."""
    b, h, w, _ = x.shape
    rows, columns = jnp.linspace(-1, 1, h, dtype=x.dtype), jnp.linspace(-1, 1, w, dtype=x.dtype)
    columns = jnp.broadcast_to(columns[None, None, :, None], (b, h, w, 1))
    rows = jnp.broadcast_to(rows[None, :, None, None], (b, h, w, 1))
    return jnp.concatenate([x, columns, rows], axis=-1)


class FCN(nn.Module):
    """Two convolutions beside a shortcut (Long et al., 2015).

    (C2, …, C5) -> [b, h, w, channels] at the size of C5.
    """

    channels: int
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        block = decoder_block(self, train)
        x = block(3, name="conv0")(levels[-1])
        x = block(3, name="conv1")(x)
        return block(3, name="fuse")(jnp.concatenate([levels[-1], x], axis=-1))


class PSP(nn.Module):
    """Pyramid pooling (Zhao et al., 2017).

    (C2, …, C5) -> [b, h, w, channels] at the size of C5.
    """

    channels: int
    scales: tuple[int, ...]
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        block = decoder_block(self, train)
        x = levels[-1]
        maps = [x]
        for i, scale in enumerate(self.scales):
            pooled = block(1, name=f"pool{i}")(average_pool(x, scale))
            maps.append(resize(pooled, x.shape[1:3]))
        return block(3, name="bottleneck")(jnp.concatenate(maps, axis=-1))


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling of DeepLabV3 (Chen et al., 2017).

    (C2, …, C5) -> [b, h, w, channels] at the size of C5.
    """

    channels: int
    dilations: tuple[int, ...]
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        block = decoder_block(self, train)
        x = levels[-1]
        pooled = block(1, name="image_pool")(average_pool(x, 1))
        maps = [resize(pooled, x.shape[1:3])]
        for i, dilation in enumerate(self.dilations):
            size = 1 if dilation == 1 else 3
            maps.append(block(size, dilation=dilation, name=f"atrous{i}")(x))
        return block(3, name="bottleneck")(jnp.concatenate(maps, axis=-1))


class UPer(nn.Module):
    """UPerNet: pyramid pooling on the coarsest level of a feature pyramid (Xiao et al., 2018).

    (C2, …, C5) -> [b, h, w, channels] at the size of C2.
    """

    channels: int
    scales: tuple[int, ...]
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...], train: bool) -> jax.Array:
        block = decoder_block(self, train)
        maps = [block(1, name=f"lateral{i}")(x) for i, x in enumerate(levels[:-1])]
        maps.append(
            PSP(self.channels, self.scales, self.norm, self.dtype, name="psp")(levels, train)
        )
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + resize(maps[i + 1], maps[i].shape[1:3])
        maps[:-1] = [block(3, name=f"output{i}")(x) for i, x in enumerate(maps[:-1])]
        maps = [resize(x, maps[0].shape[1:3]) for x in maps]
        return block(3, name="pyramid")(jnp.concatenate(maps, axis=-1))


class AuxiliaryHead(nn.Module):
    """A classifier of pixels on an inner level, a training signal only.

    [b, h, w, c'] -> class logits [b, num_classes, h, w].
    """

    num_classes: int
    channels: int
    dropout: float
    norm: str
    dtype: str

    @nn.compact
    def __call__(self, level: jax.Array, train: bool) -> jax.Array:
        x = decoder_block(self, train)(3, name="conv")(level)
        x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
        init = nn.initializers.normal(0.01)
        dtype = wide(self.dtype)  # of logits, whatever the type of the maps
        x = conv(self.num_classes, 1, kernel_init=init, dtype=dtype, name="classifier")(x)
        return x.transpose(0, 3, 1, 2)


def decoder_block(module: nn.Module, train: bool) -> partial:
    """Makes the convolution blocks of a decoder, by its fields `channels`, `norm` and `dtype`."""
    norm = make_norm(module.norm, module.dtype, train)
    return partial(
        ConvNormRelu, module.channels, norm=norm, kernel_init=he_init, dtype=module.dtype
    )


def average_pool(x: jax.Array, size: int) -> jax.Array:
    """Means over a grid of size x size cells, which overlap where the map cannot be divided.

    Cell i covers the pixels from floor(i·n / size) to ceil((i + 1)·n / size), as PyTorch's adaptive
    pooling does. [b, h, w, c] -> [b, size, size, c].
    """

    def cells(n: int) -> np.ndarray:
        first = np.arange(size) * n // size
        last = -(-(np.arange(size) + 1) * n // size)
        inside = (np.arange(n) >= first[:, None]) & (np.arange(n) < last[:, None])
        return inside / (last - first)[:, None]

    rows, columns = (jnp.asarray(cells(n), x.dtype) for n in x.shape[1:3])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, x, columns)
