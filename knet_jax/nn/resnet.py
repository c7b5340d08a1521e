"""ResNet with bottleneck blocks (He et al., 2016), stride in the 3x3 convolution as in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from knet_jax.nn.deformable import DeformConv
from knet_jax.nn.layers import conv, he_init, make_norm, sparing

EXPANSION = 4


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions beside a shortcut. [b, h, w, c'] -> [b, h/s, w/s, 4 width]."""

    width: int
    stride: int
    dilation: int
    conv3x3: Callable[..., nn.Module]
    """Called with channels, size, stride, dilation and a name."""
    norm: Callable[..., nn.Module]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        conv1x1 = partial(conv, size=1, use_bias=False, kernel_init=he_init, dtype=self.dtype)
        out = EXPANSION * self.width

        y = conv1x1(self.width, name="conv1")(x)
        y = nn.relu(self.norm(self.width, name="norm1")(y))
        y = self.conv3x3(self.width, 3, self.stride, self.dilation, name="conv2")(y)
        y = nn.relu(self.norm(self.width, name="norm2")(y))
        y = conv1x1(out, name="conv3")(y)
        y = self.norm(out, name="norm3")(y)

        if x.shape[-1] != out or self.stride != 1:
            x = conv1x1(out, stride=self.stride, name="shortcut_conv")(x)
            x = self.norm(out, name="shortcut_norm")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """ResNet without its classifier. Image [b, H, W, 3] -> (C2, C3, C4, C5) at strides 4, 8, 16, 32
    (at most `output_stride`).

    `depths` and `width` of (3, 4, 6, 3) and 64 are ResNet-50, (3, 4, 23, 3) ResNet-101. The first
    `frozen_stages` stages, and the stem if there are any, get no gradient.
    """

    depths: tuple[int, ...]
    width: int
    norm: str
    frozen_stages: int
    deep_stem: bool
    """Three 3x3 convolutions instead of one 7x7 (ResNet-C of He et al., 2019)."""
    output_stride: int
    """Where it is reached, stages dilate instead of shrinking (DeepLab; Chen et al., 2017)."""
    num_deformable: int
    """The last so many stages have deformable 3x3 convolutions."""
    remat: bool
    """Blocks are computed anew for the gradient: slower, in less memory."""
    dtype: str

    @property
    def frozen(self) -> tuple[str, ...]:
        """How the names of modules begin whose parameters get no gradient."""
        stages = [f"layer{i + 1}_" for i in range(self.frozen_stages)]
        return ("stem_", *stages) if stages else ()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        norm = make_norm(self.norm, self.dtype, train)
        conv_ = partial(conv, use_bias=False, kernel_init=he_init, dtype=self.dtype)
        deform_conv = partial(DeformConv, kernel_init=he_init, dtype=self.dtype)

        half = self.width // 2
        stem = {"": (self.width, 7, 2)}
        if self.deep_stem:
            stem = {"1": (half, 3, 2), "2": (half, 3, 1), "3": (self.width, 3, 1)}
        x = image
        for number, (channels, size, stride) in stem.items():
            x = conv_(channels, size, stride, name=f"stem_conv{number}")(x)
            x = nn.relu(norm(channels, name=f"stem_norm{number}")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

        levels = []
        reached, dilation = 4, 1
        for i, depth in enumerate(self.depths):
            width = self.width * 2**i
            deformable = i >= len(self.depths) - self.num_deformable
            # What a deformable convolution has sampled is too costly to be made anew unasked.
            block = Bottleneck if deformable else sparing(Bottleneck)
            if self.remat:
                block = nn.remat(Bottleneck)
            stride = 2 if i > 0 and reached < self.output_stride else 1
            # Without its stride a stage sees what it would have seen by twice the dilation, but for
            # the 3x3 convolution that had the stride.
            first_dilation = dilation
            if i > 0 and stride == 1:
                dilation *= 2
            reached *= stride
            for j in range(depth):
                x = block(
                    width,
                    stride if j == 0 else 1,
                    first_dilation if j == 0 else dilation,
                    deform_conv if deformable else conv_,
                    norm,
                    self.dtype,
                    name=f"layer{i + 1}_block{j}",
                )(x)
            if i < self.frozen_stages:
                x = jax.lax.stop_gradient(x)
            levels.append(x)
        return tuple(levels)
