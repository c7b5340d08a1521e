"""The kernels of K-Net (Zhang et al., NeurIPS 2021): where they start and how they are updated.

A kernel is c numbers; convolved with a feature map (1x1) it draws a mask. `InitialKernels` makes
stage 0 of things and stuff, `ClassKernels` that of classes alone; `KernelUpdate` turns a stage into
the next one: gather the pixels that each mask claims, update each kernel with them, let the kernels
attend to each other, draw the masks anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from knet_jax.nn.layers import PRIOR_BIAS, ConvNormRelu, LayerNorm, make_norm, wide
from knet_jax.structs import Features, Stage

xavier = nn.initializers.xavier_uniform()


def claim_hard(masks: jax.Array) -> jax.Array:
    """1 where the probability of a mask is above one half. The choice has no gradient."""
    return jax.lax.stop_gradient(masks > 0)


def claim_soft(masks: jax.Array) -> jax.Array:
    """Each pixel is shared among all kernels, by the softmax of its logits."""
    return nn.softmax(masks, axis=1)


def gather(claims: jax.Array, feats: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the features of the pixels that each mask claims.

    Sums are not divided by the area, so they are kept wide.

    Args:
        claims: the share of each pixel, [b, n, h, w].
        feats: [b, h, w, c].

    Returns:
        pooled features [b, n, c] and areas in pixels [b, n, 1], float32 or wider.
    """
    claims, dtype = claims.astype(feats.dtype), wide(feats.dtype)
    pooled = jnp.einsum("bnhw,bhwc->bnc", claims, feats, preferred_element_type=dtype)
    return pooled, claims.sum((2, 3), dtype=dtype)[..., None]


def draw(kernels: jax.Array, feats: jax.Array) -> jax.Array:
    """Convolves feats [b, h, w, c] with kernels [b, n, c] or [n, c] -> mask logits [b, n, h, w]."""
    spec = "nc,bhwc->bnhw" if kernels.ndim == 2 else "bnc,bhwc->bnhw"
    dtype = wide(feats.dtype)
    return jnp.einsum(spec, kernels.astype(feats.dtype), feats, preferred_element_type=dtype)


class InitialKernels(nn.Module):
    """Stage 0 of things and stuff.

    Proposals are learned vectors: each draws a first mask, and the sum of the features under it is
    added to it. Stuff kernels are the stuff rows of a classifier of pixels, whose logits are their first
    masks. `Features` -> (feats [b, h, w, c], stage 0 with n = num_proposals + num_stuff kernels, dense
    class logits [b, k, h, w] of all classes).
    """

    num_proposals: int
    num_things: int
    num_stuff: int
    channels: int = 256
    dtype: str = "float32"

    @nn.compact
    def __call__(self, features: Features, train: bool) -> tuple[jax.Array, Stage, jax.Array]:
        norm = make_norm("group", self.dtype, train)
        block = partial(ConvNormRelu, self.channels, 1, norm=norm, dtype=self.dtype)
        localization = block(name="localization")(features.localization)
        semantic = block(name="semantic")(features.semantic)
        feats = localization + semantic

        num_classes = self.num_things + self.num_stuff
        normal = nn.initializers.normal
        proposals = self.param("proposals", normal(1.0), (self.num_proposals, self.channels))
        class_kernels = self.param("class_kernels", normal(0.01), (num_classes, self.channels))
        class_bias = self.param("class_bias", nn.initializers.constant(PRIOR_BIAS), (num_classes,))

        proposal_masks = draw(proposals, localization)
        dense = draw(class_kernels, semantic)
        dense = dense + class_bias[:, None, None].astype(dense.dtype)
        masks = jnp.concatenate([proposal_masks, dense[:, self.num_things :]], axis=1)

        pooled, _ = gather(claim_hard(proposal_masks), feats)
        stuff_kernels = class_kernels[self.num_things :].astype(pooled.dtype)
        stuff_kernels = jnp.broadcast_to(stuff_kernels, (pooled.shape[0], *stuff_kernels.shape))
        kernels = jnp.concatenate([proposals + pooled, stuff_kernels], axis=1)
        return feats, Stage(kernels, masks, None), dense


class ClassKernels(nn.Module):
    """The rows of a pixel classifier: kernel n is class n.

    feats [b, h, w, c] -> (feats, stage 0 with n = num_classes kernels, None: no other logits).
    """

    num_classes: int
    dropout: float = 0.1
    """Share of the channels that the classifier does not see in training."""

    @nn.compact
    def __call__(self, feats: jax.Array, train: bool) -> tuple[jax.Array, Stage, None]:
        shape = (self.num_classes, feats.shape[-1])
        kernels = self.param("class_kernels", nn.initializers.normal(0.01), shape)
        bias = self.param("class_bias", nn.initializers.zeros, shape[:1])
        seen = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(feats)
        masks = draw(kernels, seen)
        masks = masks + bias[:, None, None].astype(masks.dtype)
        kernels = jnp.broadcast_to(kernels, (feats.shape[0], *shape))
        return feats, Stage(kernels, masks, None), None


def sum_update(**_: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Each kernel plus its own pixels, without gates or parameters (Table 4a)."""
    return jnp.add


class AdaptiveUpdate(nn.Module):
    """Each kernel is mixed with its own pixels, by gates that see both (equations 4 to 6).

    Kernels [b, n, c] and pooled features [b, n, c] -> kernels [b, n, c]. Kernels of more channels
    than the module's are updated in parts, as if these were kernels of their own.
    """

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, kernels: jax.Array, pooled: jax.Array) -> jax.Array:
        b, n, c = kernels.shape
        kernels, pooled = (x.reshape(b, -1, self.channels) for x in (kernels, pooled))
        dense = partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
        norm = partial(LayerNorm, dtype=self.dtype)

        pixel = dense(2 * self.channels, name="from_pixels")(pooled)
        kernel = dense(2 * self.channels, name="from_kernel")(kernels)
        pixel_in, pixel_out = jnp.split(pixel, 2, axis=-1)
        kernel_in, kernel_out = jnp.split(kernel, 2, axis=-1)

        gate = kernel_in * pixel_in
        kernel_gate = dense(self.channels, name="kernel_gate")(gate)
        kernel_gate = nn.sigmoid(norm(name="kernel_gate_norm")(kernel_gate))
        pixel_gate = dense(self.channels, name="pixel_gate")(gate)
        pixel_gate = nn.sigmoid(norm(name="pixel_gate_norm")(pixel_gate))

        updated = pixel_gate * norm(name="pixel_norm")(pixel_out)
        updated = updated + kernel_gate * norm(name="kernel_norm")(kernel_out)
        updated = dense(self.channels, name="output")(updated)
        return nn.relu(norm(name="output_norm")(updated)).reshape(b, n, c)


class Interaction(nn.Module):
    """Kernels attend to each other: self-attention, then a feed-forward network. [b, n, c]."""

    num_heads: int
    ffn_channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, kernels: jax.Array) -> jax.Array:
        attended = nn.MultiHeadDotProductAttention(
            self.num_heads, kernel_init=xavier, dtype=self.dtype, name="attention"
        )(kernels)
        kernels = LayerNorm(dtype=self.dtype, name="attention_norm")(kernels + attended)

        dense = partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
        hidden = nn.relu(dense(self.ffn_channels, name="ffn_hidden")(kernels))
        fed = dense(kernels.shape[-1], name="ffn_output")(hidden)
        return LayerNorm(dtype=self.dtype, name="ffn_norm")(kernels + fed)


class Head(nn.Module):
    """Linear layer, LayerNorm, ReLU, linear layer. [b, n, c] -> [b, n, features]."""

    features: int
    bias_init: nn.initializers.Initializer
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, kernels: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, kernel_init=xavier, dtype=self.dtype)
        x = dense(kernels.shape[-1], use_bias=False, name="hidden")(kernels)
        x = nn.relu(LayerNorm(dtype=self.dtype, name="norm")(x))
        return dense(self.features, bias_init=self.bias_init, name="output")(x)


class KernelUpdate(nn.Module):
    """One round of K-Net. feats [b, h, w, c] and a stage -> the next stage.

    The n vectors are computed in float32 (or wider) whatever the type of the maps: they are few,
    and sums over thousands of pixels would drown in bfloat16.
    """

    num_classes: int
    """0 where kernel n is class n."""
    claim: Callable[[jax.Array], jax.Array]
    """`claim_hard` or `claim_soft`."""
    update: Callable[..., nn.Module]
    """Makes `AdaptiveUpdate` or `sum_update`, given a type and a name."""
    interaction: Callable[..., nn.Module] | None
    """Makes `Interaction`, given a type and a name; None leaves every kernel to itself."""

    @nn.compact
    def __call__(self, feats: jax.Array, stage: Stage) -> Stage:
        dtype = wide(feats.dtype)
        # Every stage has a 1x1 convolution of feats of its own. It is linear, so it is applied to
        # the n pooled vectors and (transposed) to the n drawn kernels instead of to h·w pixels.
        channels = feats.shape[-1]
        weight = self.param("transform_kernel", xavier, (channels, channels)).astype(dtype)
        bias = self.param("transform_bias", nn.initializers.zeros, (channels,)).astype(dtype)

        pooled, area = gather(self.claim(stage.masks), feats)
        pooled = pooled @ weight + area * bias
        kernels = self.update(dtype=dtype, name="update")(stage.kernels.astype(dtype), pooled)
        if self.interaction:
            kernels = self.interaction(dtype=dtype, name="interaction")(kernels)

        logits = None
        if self.num_classes:
            class_bias = nn.initializers.constant(PRIOR_BIAS)
            logits = Head(self.num_classes, class_bias, dtype, name="class_head")(kernels)
        mask_bias = nn.initializers.zeros
        mask_kernels = Head(channels, mask_bias, dtype, name="mask_head")(kernels)
        masks = draw(mask_kernels @ weight.T, feats) + (mask_kernels @ bias)[..., None, None]
        return Stage(kernels, masks, logits)
