"""Vision transformers as DINOv2 and DINOv3 have them, with a pyramid of their last map.

Dosovitskiy et al., ICLR 2021; Oquab et al., 2023; Darcet et al., ICLR 2024 (registers); Siméoni et
al., 2025; the pyramid is that of Li et al., ECCV 2022.
"""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.nn.layers import resize
from knet_jax.nn.swin import FFN_RATIO, bicubic, gelu, trunc_normal
from knet_jax.system.errors import UserError

STRIDE = 16
"""Of the map of patches: pictures are resized where patches have another side."""
EPSILON = {"learned": 1e-6, "rotary": 1e-5}
"""Of the norms, by the kind of positions: DINOv2 and DINOv3."""
LAYER_SCALE = 1e-5
"""By how much each channel of a block counts at first."""
PERIOD = 100.0
"""Longest period of rotary positions, in units of half a picture."""


def rotary_angles(height: int, width: int, channels: int) -> np.ndarray:
    """Angles by which the channels of a head are turned at each patch, row by row. [h·w, channels].

    Positions run from -1 to 1 on both axes. A quarter of the channels turns with the rows, a quarter
    with the columns, at falling speeds, and the second half like the first.
    """
    quarter = channels // 4
    speeds = 2 * math.pi / PERIOD ** (np.arange(quarter) / quarter)
    rows, columns = ((2 * np.arange(n) + 1) / n - 1 for n in (height, width))
    at = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2, 1)
    half = (at * speeds).reshape(-1, 2 * quarter)
    return np.concatenate([half, half], 1)


def rotate(x: jax.Array, angles: np.ndarray) -> jax.Array:
    """Turns pairs of channels, one of each half, of the last patches of [b, t, heads, channels]."""
    first = x.shape[1] - len(angles)  # tokens without a place
    cos, sin = (jnp.asarray(f(angles), x.dtype)[:, None] for f in (np.cos, np.sin))
    seen = x[:, first:]
    half = x.shape[3] // 2
    turned = jnp.concatenate([-seen[..., half:], seen[..., :half]], -1)
    return jnp.concatenate([x[:, :first], seen * cos + turned * sin], 1)


class Block(nn.Module):
    """Attention of all tokens, then a network for each, both residual. [b, t, c]."""

    num_heads: int
    epsilon: float
    drop_path: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, angles: np.ndarray | None, train: bool) -> jax.Array:
        b, t, c = x.shape
        norm = partial(
            nn.LayerNorm, epsilon=self.epsilon, use_fast_variance=False, dtype=self.dtype
        )
        dense = partial(nn.Dense, kernel_init=trunc_normal, dtype=self.dtype)
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not train)

        def add(x: jax.Array, y: jax.Array, name: str) -> jax.Array:
            scale = self.param(name, nn.initializers.constant(LAYER_SCALE), (c,))
            return x + drop(scale.astype(y.dtype) * y.reshape(x.shape))

        y = norm(name="norm1")(x).reshape(-1, c)
        qkv = dense(3 * c, name="qkv")(y).reshape(b, t, 3, self.num_heads, -1)
        query, key, value = jnp.moveaxis(qkv, 2, 0)
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        is_narrow = self.dtype == "bfloat16"
        y = nn.dot_product_attention(query, key, value, force_fp32_for_softmax=is_narrow)
        y = y.reshape(-1, c)
        x = add(x, dense(c, name="output")(y), "attention_scale")

        y = norm(name="norm2")(x).reshape(-1, c)
        y = dense(FFN_RATIO * c, name="ffn_hidden")(y)
        return add(x, dense(c, name="ffn_output")(gelu(y)), "ffn_scale")


class ViT(nn.Module):
    """A vision transformer without its classifier. Image [b, H, W, 3] -> (C2, C3, C4, C5).

    The map of the last block's patches, at stride 16, is enlarged four and two times, and halved: levels
    of c / 4, c / 2, c and c channels, sizes rounded up. `channels`, `depth` and `num_heads` of 384, 12
    and 6 are ViT-S; 768, 12 and 12 are -B, 1024, 24 and 16 -L.

    Raises:
        UserError: the heads do not fit the channels.
    """

    channels: int
    depth: int
    num_heads: int
    patch: int
    """Side of patches; pictures are resized by a sixteenth of it."""
    registers: int
    """Tokens without a place, besides that of the class."""
    positions: str
    """`learned` or `rotary`."""
    grid: int
    """Side of the square of patches for which positions are learned; others are interpolated."""
    frozen_trunk: bool
    """Whether all before the pyramid gets no gradient, so that nothing of it is kept for that."""
    drop_path: float
    """Of the last block; it grows linearly from zero at the first."""
    remat: bool
    """Whether blocks are computed again for the gradient, so that only their inputs are kept."""
    dtype: str

    @property
    def frozen(self) -> tuple[str, ...]:
        """How the names of modules begin whose parameters get no gradient."""
        trunk = ("patches", "block", "norm", "class_token", "register_tokens", "position_table")
        return trunk if self.frozen_trunk else ()

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        if self.channels % (4 * self.num_heads):
            raise UserError(
                f"config.model.backbone.num_heads is {self.num_heads}; accepted: divisors of "
                f"a quarter of the channels, {self.channels // 4}"
            )
        x = self._see(image, train)
        if self.frozen_trunk:
            x = jax.lax.stop_gradient(x)
        sizes = [tuple(-(-side // stride) for side in image.shape[1:3]) for stride in (4, 8)]
        return (*self._enlarge(x, *sizes), x, self._halve(x))

    def _see(self, image: jax.Array, train: bool) -> jax.Array:
        """The map of patches [b, h, w, c] after the last block and norm."""
        c, epsilon = self.channels, EPSILON[self.positions]
        image = jnp.pad(image, ((0, 0), *((0, -n % STRIDE) for n in image.shape[1:3]), (0, 0)))
        h, w = (side // STRIDE for side in image.shape[1:3])
        image = resize(image, (h * self.patch, w * self.patch))
        side = (self.patch, self.patch)
        embed = nn.Conv(
            c, side, side, padding=0, kernel_init=trunc_normal, dtype=self.dtype, name="patches"
        )
        x = embed(image).reshape(-1, h * w, c)

        tiny = nn.initializers.normal(1e-6)
        token = self.param("class_token", tiny, (1, 1, c))
        angles = None
        if self.positions == "learned":
            table = self.param("position_table", trunc_normal, (1, 1 + self.grid**2, c))
            token, table = token + table[:, :1], table[0, 1:].reshape(self.grid, self.grid, c)
            rows, columns = (jnp.asarray(bicubic(self.grid, n), table.dtype) for n in (h, w))
            places = jnp.einsum("ia,jb,abc->ijc", rows, columns, table)
            x = x + places.reshape(-1, c).astype(x.dtype)
        else:
            angles = rotary_angles(h, w, c // self.num_heads)
        before = [token]
        if self.registers:
            before.append(self.param("register_tokens", tiny, (1, self.registers, c)))
        before = jnp.concatenate(before, 1).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(before, (x.shape[0], *before.shape[1:])), x], 1)

        block = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for i, rate in enumerate(np.linspace(0, self.drop_path, self.depth).tolist()):
            x = block(self.num_heads, epsilon, rate, self.dtype, name=f"block{i}")(x, angles, train)
        x = nn.LayerNorm(epsilon=epsilon, use_fast_variance=False, dtype=self.dtype, name="norm")(x)
        return x[:, before.shape[1] :].reshape(-1, h, w, c)

    def _enlarge(self, x: jax.Array, c2: tuple[int, int], c3: tuple[int, int]) -> list[jax.Array]:
        """The maps at strides 4 and 8, of the sizes `c2` and `c3`."""

        def double(x: jax.Array, name: str) -> jax.Array:
            """A transposed convolution of 2x2: four pixels for each, of half the channels."""
            b, h, w, c = x.shape
            x = nn.Dense(2 * c, kernel_init=trunc_normal, dtype=self.dtype, name=name)(x)
            return x.reshape(b, h, w, 2, 2, c // 2).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, -1)

        norm = nn.LayerNorm(
            epsilon=1e-6, use_fast_variance=False, dtype=self.dtype, name="pyramid_norm"
        )
        y = double(gelu(norm(double(x, "pyramid_quarter1"))), "pyramid_quarter2")
        half = double(x, "pyramid_half")
        return [y[:, : c2[0], : c2[1]], half[:, : c3[0], : c3[1]]]

    def _halve(self, x: jax.Array) -> jax.Array:
        padding = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
        return nn.max_pool(x, (2, 2), (2, 2), padding)
