"""The network: backbone, neck, initial kernels, and rounds of kernel updates."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from knet_jax.structs import Output, Sizes

# RGB, the ImageNet statistics of the reference.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def normalize(image: jax.Array, size: jax.Array, dtype) -> jax.Array:
    """Standardizes colors and sets what lies beyond `size` to zero.

    uint8 [b, H, W, 3] and [b, 2] (height, width) -> [b, H, W, 3] of `dtype`.
    """
    x = (image.astype(jnp.float32) - jnp.array(MEAN)) / jnp.array(STD)
    rows = jnp.arange(image.shape[1]) < size[:, 0, None]
    columns = jnp.arange(image.shape[2]) < size[:, 1, None]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0).astype(dtype)


class KNet(nn.Module):
    """K-Net. Normalized image [b, H, W, 3], sides multiples of 32 -> `Output`."""

    backbone: nn.Module
    neck: nn.Module
    initial: nn.Module
    update: Callable[..., nn.Module]
    """Makes the `KernelUpdate` of a stage, given its name."""
    sizes: Sizes
    num_stages: int = 3
    auxiliary: nn.Module | None = None
    """Dense class logits of the second coarsest level, where `initial` has none."""

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> Output:
        levels = self.backbone(image, train)
        feats, stage, dense = self.initial(self.neck(levels, train), train)
        if self.auxiliary:
            dense = self.auxiliary(levels[-2], train)
        stages = [stage]
        for i in range(self.num_stages):
            stage = self.update(name=f"stage{i + 1}")(feats, stage)
            stages.append(stage)
        return Output(tuple(stages), dense)
