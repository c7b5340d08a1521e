"""The network that a config describes."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from knet_jax.config.schema import complete_model
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
from knet_jax.nn.convnext import ConvNeXt
from knet_jax.nn.necks import ASPP, FCN, PSP, AuxiliaryHead, SemanticFPN, UPer
from knet_jax.nn.resnet import ResNet
from knet_jax.nn.swin import Swin
from knet_jax.nn.vit import ViT
from knet_jax.structs import Sizes
from knet_jax.system.errors import UserError

UPDATE_CHANNELS = 256
"""Channels that the adaptive update works on. Kernels of a multiple of it are updated in parts, as the
published networks do, others as a whole."""

BACKBONES = {"resnet": ResNet, "swin": Swin, "convnext": ConvNeXt, "vit": ViT}
NECKS = {"semantic_fpn": SemanticFPN, "fcn": FCN, "psp": PSP, "aspp": ASPP, "uper": UPer}


def make_model(**model: Any) -> KNet:
    """Builds the network that `config.model` describes.

    Args:
        **model: keys of `config.model`, which are listed in `knet_jax/config/schema.py`; those not
            given have their defaults. `backbone` and `neck` are dicts: `name` is that of a class in
            `BACKBONES` or `NECKS`, the rest are its arguments.

    Raises:
        UserError: a key is missing or unknown, or the neck has no norm for an auxiliary head.
    """
    model = complete_model(model)
    num_proposals, num_things = model["num_proposals"], model["num_things"]
    num_classes = num_things + model["num_stuff"]
    channels, dropout, dtype = model["channels"], model["dropout"], model["dtype"]
    in_parts = channels % UPDATE_CHANNELS == 0
    update = partial(
        KernelUpdate,
        claim=claim_hard if num_proposals else claim_soft,
        num_classes=num_classes if num_proposals else 0,
        update=partial(AdaptiveUpdate, UPDATE_CHANNELS if in_parts else channels)
        if model["adaptive_update"]
        else sum_update,
        interaction=partial(Interaction, model["num_heads"], model["ffn_channels"])
        if model["kernel_interaction"]
        else None,
    )
    backbone, neck = model["backbone"], model["neck"]
    make_backbone, make_neck = BACKBONES[backbone.pop("name")], NECKS[neck.pop("name")]
    neck = make_neck(**neck, channels=channels, dtype=dtype)
    auxiliary = model["auxiliary_channels"]
    if auxiliary and not hasattr(neck, "norm"):
        raise UserError(
            f"config.model.auxiliary_channels is {auxiliary}; accepted: 0 with a neck without a norm"
        )
    sizes = Sizes(num_proposals, num_things, model["num_stuff"])
    return KNet(
        backbone=make_backbone(**backbone, dtype=dtype),
        neck=neck,
        initial=InitialKernels(*sizes, channels, dtype)
        if num_proposals
        else ClassKernels(num_classes, dropout),
        update=update,
        sizes=sizes,
        num_stages=model["num_stages"],
        auxiliary=AuxiliaryHead(num_classes, auxiliary, dropout, neck.norm, dtype)
        if auxiliary
        else None,
    )


SAMPLE = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
"""A picture for tracing; no parameter depends on its size."""


def variable_shapes(model: KNet) -> dict[str, Any]:
    """Shapes and types of what `init_variables` gives; nothing is compiled."""
    return jax.eval_shape(model.init, jax.random.key(0), SAMPLE)


def init_variables(model: KNet, seed: int) -> dict[str, Any]:
    """New parameters (and running statistics)."""
    # Hundreds of draws of random numbers: to compile them well takes minutes and changes no number.
    init = jax.jit(model.init, compiler_options={"xla_backend_optimization_level": "1"})
    return init(jax.random.key(seed), jnp.zeros(SAMPLE.shape))
