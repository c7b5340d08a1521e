"""Necks: backbone levels -> the two feature maps at stride 8 that the kernels work on."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax

from knet_jax.layers import ConvNormRelu, conv, nearest2x, sine_encoding, upsample2x
from knet_jax.structs import Features


class FPN(nn.Module):
    """Feature pyramid (Lin et al., 2017), nearest upsampling, no norm, no extra level.

    (C2, C3, C4, C5) -> the same number of maps [b, h, w, channels] of the same sizes.
    """

    channels: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        conv_ = partial(conv, kernel_init=nn.initializers.xavier_uniform(), dtype=self.dtype)
        maps = [conv_(self.channels, 1, name=f"lateral{i}")(x) for i, x in enumerate(levels)]
        for i in reversed(range(len(maps) - 1)):
            maps[i] = maps[i] + nearest2x(maps[i + 1])
        return tuple(conv_(self.channels, 3, name=f"output{i}")(x) for i, x in enumerate(maps))


class SemanticFPN(nn.Module):
    """FPN whose levels are brought to stride 8 and summed (Kirillov et al., 2019), as in K-Net.

    The coarsest level first gets a sine encoding of its position. Levels of strides 4, 8, 16, 32
    -> `Features`, both maps [b, h, w, channels] at stride 8.
    """

    channels: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, levels: tuple[jax.Array, ...]) -> Features:
        levels = FPN(self.channels, self.dtype, name="fpn")(levels)
        block = partial(ConvNormRelu, self.channels, dtype=self.dtype)

        x = block(3, 2, name="level0_conv0")(levels[0])
        x = x + block(3, name="level1_conv0")(levels[1])
        for i in range(2, len(levels)):
            y = levels[i]
            if i == len(levels) - 1:
                y = y + sine_encoding(y.shape[1], y.shape[2], self.channels, y.dtype)
            for j in range(i):
                y = block(3, name=f"level{i}_conv{j}")(y)
                if j < i - 1:
                    y = upsample2x(y, axes=(1, 2))
            x = x + y

        return Features(
            localization=block(1, name="localization")(x),
            semantic=block(1, name="semantic")(x),
        )
