"""The network: backbone, neck, initial kernels, and rounds of kernel updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from knet_jax.backbones.resnet import ResNet
from knet_jax.backbones.swin import Swin
from knet_jax.kernels import InitialKernels, KernelUpdate
from knet_jax.necks import SemanticFPN
from knet_jax.structs import Output

# RGB, the ImageNet statistics of the reference.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)

BACKBONES = {"resnet": ResNet, "swin": Swin}


def normalize(image: jax.Array, size: jax.Array, dtype) -> jax.Array:
    """Standardizes colors and sets what lies beyond `size` to zero.

    uint8 [b, H, W, 3] and [b, 2] (height, width) -> [b, H, W, 3] of `dtype`.
    """
    x = (image.astype(jnp.float32) - jnp.array(MEAN)) / jnp.array(STD)
    rows = jnp.arange(image.shape[1]) < size[:, 0, None]
    columns = jnp.arange(image.shape[2]) < size[:, 1, None]
    return jnp.where((rows[:, :, None] & columns[:, None, :])[..., None], x, 0).astype(dtype)


class KNet(nn.Module):
    """K-Net. Normalized image [b, H, W, 3], sides multiples of 32 -> `Output` at stride 8."""

    backbone: nn.Module
    neck: nn.Module
    initial: nn.Module
    update: Callable[..., nn.Module]
    """Makes the `KernelUpdate` of a stage, given its name."""
    num_stages: int = 3

    @nn.compact
    def __call__(self, image: jax.Array, train: bool = False) -> Output:
        levels = self.backbone(image, train)
        features = self.neck(levels)
        feats, stage, dense = self.initial(features)
        stages = [stage]
        for i in range(self.num_stages):
            stage = self.update(name=f"stage{i + 1}")(feats, stage)
            stages.append(stage)
        return Output(tuple(stages), dense)


def make_backbone(backbone: Mapping[str, Any], dtype: str) -> nn.Module:
    """Builds a backbone from `config.model.backbone`: a name of `BACKBONES` and its arguments.

    Raises:
      ValueError: there is no backbone of that name.
    """
    arguments = dict(backbone)
    name = arguments.pop("name", "resnet")
    if name not in BACKBONES:
        raise ValueError(
            f"config.model.backbone.name is {name!r}; accepted: {', '.join(BACKBONES)}"
        )
    return BACKBONES[name](**arguments, dtype=dtype)


def make_model(
    num_proposals: int,
    num_things: int,
    num_stuff: int,
    backbone: Mapping[str, Any],
    num_stages: int = 3,
    channels: int = 256,
    num_heads: int = 8,
    ffn_channels: int = 2048,
    dtype: str = "float32",
) -> KNet:
    """Builds the network from `config.model`, whose keys are these arguments.

    Args:
      num_proposals: kernels that look for things (N in the paper).
      num_things: thing classes.
      num_stuff: stuff classes, each with a kernel of its own.
      backbone: a name, `resnet` or `swin`, and arguments of `ResNet` or `Swin`.
      num_stages: kernel updates (S in the paper).
      channels: of features and kernels.
      num_heads: of the attention between kernels.
      ffn_channels: hidden width of the network after it.
      dtype: of the feature maps, `float32` or `bfloat16`; parameters stay float32.
    """
    return KNet(
        backbone=make_backbone(backbone, dtype),
        neck=SemanticFPN(channels, dtype),
        initial=InitialKernels(num_proposals, num_things, num_stuff, channels, dtype),
        update=partial(KernelUpdate, num_things + num_stuff, channels, num_heads, ffn_channels),
        num_stages=num_stages,
    )
