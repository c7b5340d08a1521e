"""ResNet with bottleneck blocks (He et al., 2016), stride in the 3x3 convolution as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from knet_jax.layers import conv, he_init, make_norm

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut. [b, h, w, c'] -> [b, h/s, w/s, 4 width]."""

    width: int
    stride: int
    norm: Callable[..., nn.Module]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv_ = partial(conv, use_bias=False, kernel_init=he_init, dtype=self.dtype)
        out = EXPANSION * self.width

        y = conv_(self.width, 1, name="conv1")(x)
        y = nn.relu(self.norm(self.width, name="norm1")(y))
        y = conv_(self.width, 3, self.stride, name="conv2")(y)
        y = nn.relu(self.norm(self.width, name="norm2")(y))
        y = conv_(out, 1, name="conv3")(y)
        y = self.norm(out, name="norm3")(y)

        if x.shape[-1] != out or self.stride != 1:
            x = conv_(out, 1, self.stride, name="shortcut_conv")(x)
            x = self.norm(out, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet without its classifier. Image [b, H, W, 3] -> (C2, C3, C4, C5), strides 4 to 32.

    `depths` and `width` of (3, 4, 6, 3) and 64 are ResNet-50, (3, 4, 23, 3) ResNet-101. The first
    `frozen_stages` stages, and the stem if there are any, get no gradient.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    norm: str = "frozen_batch"
    frozen_stages: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        norm = make_norm(self.norm, self.dtype, train)
        x = conv(
            self.width,
            7,
            2,
            use_bias=False,
            kernel_init=he_init,
            dtype=self.dtype,
            name="stem_conv",
        )(image)
        x = nn.relu(norm(self.width, name="stem_norm")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

        levels = []
        for i, depth in enumerate(self.depths):
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_block{j}"
                x = Bottleneck(self.width * 2**i, stride, norm, self.dtype, name=name)(x)
            if i < self.frozen_stages:
                x = jax.lax.stop_gradient(x)
            levels.append(x)
        return tuple(levels)
