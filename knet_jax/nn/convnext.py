"""ConvNeXt (Liu et al., CVPR 2022): a convolution of each channel, then a network for each pixel."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.nn.layers import conv
from knet_jax.nn.swin import FFN_RATIO, gelu, trunc_normal

SIZE = 7
"""Side of the convolutions in blocks."""
LAYER_SCALE = 1e-6
"""Initial factor of every channel of what a block adds."""

LayerNorm = partial(nn.LayerNorm, epsilon=1e-6, use_fast_variance=False)


class Block(nn.Module):
    """7x7 convolution of each channel, norm, and a network for each pixel, residual. [b, h, w, c].

    In training it is left out of a picture with the probability `drop_path` (stochastic depth; Huang
    et al., 2016), and made larger for the others.
    """

    drop_path: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        c = x.shape[-1]
        dense = partial(nn.Dense, kernel_init=trunc_normal, dtype=self.dtype)
        scale = self.param("layer_scale", nn.initializers.constant(LAYER_SCALE), (c,))
        y = conv(
            c,
            SIZE,
            feature_group_count=c,
            kernel_init=trunc_normal,
            dtype=self.dtype,
            name="depthwise",
        )(x)
        y = LayerNorm(dtype=self.dtype, name="norm")(y).reshape(-1, c)
        y = dense(FFN_RATIO * c, name="pixel_hidden")(y)
        y = dense(c, name="pixel_output")(gelu(y)).reshape(x.shape)
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)
        return x + drop(scale.astype(y.dtype) * y)


class ConvNeXt(nn.Module):
    """ConvNeXt without its classifier. Image [b, H, W, 3] -> (C2, C3, C4, C5).

    Level i has `channels` · 2^i channels at stride 4 · 2^i, sizes rounded up, and a LayerNorm of its
    own. `channels` of 96 and `depths` of (3, 3, 9, 3) are ConvNeXt-T, 96 and (3, 3, 27, 3) are -S, 128
    and 192 of these depths -B and -L.
    """

    channels: int
    depths: tuple[int, ...]
    drop_path: float
    """Probability that the last block is left out; it grows linearly from zero at the first."""
    remat: bool
    """Whether blocks are computed again for the gradient, so that only their inputs are kept."""
    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        norm = partial(LayerNorm, dtype=self.dtype)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())

        x, levels = image, []
        for i, depth in enumerate(self.depths):
            side = 2 if i else 4
            reduce = nn.Conv(
                self.channels * 2**i,
                (side, side),
                (side, side),
                padding=0,
                kernel_init=trunc_normal,
                dtype=self.dtype,
                name=f"downsample{i}_conv",
            )
            reduce_norm = norm(name=f"downsample{i}_norm")
            if i:
                x = reduce_norm(x)
            x = reduce(jnp.pad(x, ((0, 0), *((0, -n % side) for n in x.shape[1:3]), (0, 0))))
            if not i:
                x = reduce_norm(x)
            for j in range(depth):
                name = f"stage{i}_block{j}"
                x = block(next(rates), self.dtype, name=name)(x, train)
            levels.append(norm(name=f"norm{i}")(x))
        return tuple(levels)
