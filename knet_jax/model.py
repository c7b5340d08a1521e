"""The network that a config describes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from knet_jax.kernels import (
    AdaptiveUpdate,
    ClassKernels,
    InitialKernels,
    Interaction,
    KernelUpdate,
    claim_hard,
    claim_soft,
    sum_update,
)
from knet_jax.knet import KNet
from knet_jax.nn.necks import ASPP, FCN, PSP, AuxiliaryHead, SemanticFPN, UPer
from knet_jax.nn.resnet import ResNet
from knet_jax.nn.swin import Swin
from knet_jax.structs import Sizes
from knet_jax.system.errors import UserError

UPDATE_CHANNELS = 256
"""Of the adaptive update. Kernels of a multiple of it are updated in parts, as the published networks
do, others as a whole."""

# The first is the default.
BACKBONES = {"resnet": ResNet, "swin": Swin}
NECKS = {"semantic_fpn": SemanticFPN, "fcn": FCN, "psp": PSP, "aspp": ASPP, "uper": UPer}


def find_part(
    kind: str, table: Mapping[str, type[nn.Module]], part: Mapping[str, Any]
) -> tuple[type[nn.Module], dict[str, Any]]:
    """The class of a backbone or neck, and its arguments: `part` has these and its name.

    Raises:
      ValueError: there is none of that name.
    """
    arguments = dict(part)
    name = arguments.pop("name", next(iter(table)))
    if name not in table:
        raise UserError(f"config.model.{kind}.name is {name!r}; accepted: {', '.join(table)}")
    return table[name], arguments


def make_model(
    num_proposals: int,
    num_things: int,
    num_stuff: int,
    backbone: Mapping[str, Any],
    neck: Mapping[str, Any] = MappingProxyType({}),
    num_stages: int = 3,
    channels: int = 256,
    num_heads: int = 8,
    ffn_channels: int = 2048,
    auxiliary_channels: int = 0,
    dropout: float = 0.1,
    adaptive_update: bool = True,
    kernel_interaction: bool = True,
    dtype: str = "float32",
) -> KNet:
    """Builds the network from `config.model`, whose keys are these arguments.

    Args:
      num_proposals: kernels that look for things (N in the paper); 0 is semantic segmentation.
      num_things: thing classes.
      num_stuff: stuff classes, each with a kernel of its own.
      backbone: its name in `BACKBONES`, and the arguments of the class.
      neck: its name in `NECKS`, and the arguments of the class.
      num_stages: kernel updates (S in the paper).
      channels: of features and kernels.
      num_heads: of the attention between kernels.
      ffn_channels: hidden width of the network after it.
      auxiliary_channels: of the auxiliary classifier on C4; 0 is none.
      dropout: before the classifiers of semantic segmentation.
      adaptive_update: without it, kernels and their pixels are added (Table 4a).
      kernel_interaction: without it, kernels do not attend to each other (Table 4a).
      dtype: of the feature maps, `float32` or `bfloat16`; parameters stay float32.
    """
    num_classes = num_things + num_stuff
    in_parts = channels % UPDATE_CHANNELS == 0
    interaction = partial(Interaction, num_heads, ffn_channels) if kernel_interaction else None
    update = partial(
        KernelUpdate,
        claim=claim_hard if num_proposals else claim_soft,
        num_classes=num_classes if num_proposals else 0,
        update=partial(AdaptiveUpdate, UPDATE_CHANNELS if in_parts else channels)
        if adaptive_update
        else sum_update,
        interaction=interaction,
    )
    make_backbone, backbone = find_part("backbone", BACKBONES, backbone)
    make_neck, neck = find_part("neck", NECKS, neck)
    norm = {"norm": neck["norm"]} if "norm" in neck else {}
    return KNet(
        backbone=make_backbone(**backbone, dtype=dtype),
        neck=make_neck(**neck, channels=channels, dtype=dtype),
        initial=InitialKernels(num_proposals, num_things, num_stuff, channels, dtype)
        if num_proposals
        else ClassKernels(num_classes, dropout),
        update=update,
        sizes=Sizes(num_proposals, num_things, num_stuff),
        num_stages=num_stages,
        auxiliary=AuxiliaryHead(num_classes, auxiliary_channels, dropout, **norm, dtype=dtype)
        if auxiliary_channels
        else None,
    )


def init_variables(model: KNet, seed: int) -> dict[str, Any]:
    """New parameters (and running statistics)."""
    shape = (1, 64, 64, 3)  # any multiple of 32: no parameter depends on it
    return jax.jit(model.init)(jax.random.key(seed), jnp.zeros(shape))
