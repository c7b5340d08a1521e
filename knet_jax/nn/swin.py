"""Swin Transformer (Liu et al., ICCV 2021): attention in windows that shift from block to block."""

from __future__ import annotations

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.nn.layers import LayerNorm, wide
from knet_jax.system.errors import UserError

FFN_RATIO = 4
"""Hidden width of a block's feed-forward network over its channels."""

FORBIDDEN = -100.0
"""Added to the logits of attention between regions that the shift brought into one window."""

trunc_normal = nn.initializers.truncated_normal(0.02)


def gelu(x: jax.Array) -> jax.Array:
    """x times the probability of a normal variable below x.

    By erf, as PyTorch: `nn.gelu` goes through erfc, which takes four times as long on the CPU.
    """
    return 0.5 * x * (1 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


def split_windows(x: jax.Array, window: int) -> jax.Array:
    """[b, h, w, c], sides multiples of the window -> [b, windows, window·window, c], row by row."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // window, window, w // window, window, c).swapaxes(2, 3)
    return x.reshape(b, -1, window * window, c)


def join_windows(x: jax.Array, height: int, width: int) -> jax.Array:
    """The inverse of `split_windows`: [b, windows, window·window, c] -> [b, height, width, c]."""
    b, _, tokens, c = x.shape
    window = math.isqrt(tokens)
    x = x.reshape(b, height // window, width // window, window, window, c).swapaxes(2, 3)
    return x.reshape(b, height, width, c)


def shift_regions(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Which pixels of a map that was rolled by `shift` belong together, window by window.

    The roll moves the grid of windows and cuts it off at the borders: what it brings into a window
    from the opposite border is another region. int32 [windows, window·window].
    """

    def bands(side: int) -> np.ndarray:
        at = np.arange(side)
        return (at >= side - window).astype(np.int32) + (at >= side - shift)

    regions = 3 * bands(height)[:, None] + bands(width)
    return split_windows(regions[None, :, :, None], window)[0, :, :, 0]


def relative_positions(window: int) -> np.ndarray:
    """Rows of the table of position biases for each pair of a window's pixels, [t, t] of int."""
    y, x = np.divmod(np.arange(window * window), window)
    down, right = (at[:, None] - at + window - 1 for at in (y, x))
    return down * (2 * window - 1) + right


def resize_position_bias(table: np.ndarray, window: int) -> np.ndarray:
    """A table of position biases for another window, by bicubic interpolation.

    As the authors of Swin do it, which is PyTorch's: cubic convolution with a = -0.75, half-pixel
    centers, borders repeated (`tests/test_swin.py::test_position_biases_are_resized_bicubically`).

    Args:
        table: [(2v - 1)², heads] for a window of v.
        window: the new one, w.

    Returns:
        [(2w - 1)², heads].

    Raises:
        UserError: the table belongs to no window.
    """
    old, new = math.isqrt(len(table)), 2 * window - 1
    if old * old != len(table) or old % 2 == 0:
        raise UserError(f"a table of {len(table)} position biases belongs to no window")
    if old == new:
        return table
    matrix = bicubic(old, new)
    square = table.reshape(old, old, -1).astype(np.float64)
    square = np.einsum("ia,jb,abh->ijh", matrix, matrix, square)
    return square.reshape(new * new, -1).astype(table.dtype)


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix [new, old] of bicubic interpolation on one axis."""
    a = -0.75
    center = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for step in (-1, 0, 1, 2):
        at = np.floor(center) + step
        d = abs(center - at)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        index = np.clip(at, 0, old - 1).astype(int)
        matrix[np.arange(new), index] += np.where(d <= 1, near, far)
    return matrix


class WindowAttention(nn.Module):
    """Multi-head self-attention in each window, with a learned bias for every relative position.

    Windows [b, n, t, c], and which region each pixel belongs to, [n, t], if there are several ->
    [b, n, t, c].
    """

    num_heads: int
    window: int
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, regions: np.ndarray | None) -> jax.Array:
        b, n, t, c = x.shape
        dense = partial(nn.Dense, kernel_init=trunc_normal, dtype=self.dtype)
        # Flat: the gradient of a matrix product of one axis of places is up to twice as fast.
        qkv = dense(3 * c, name="qkv")(x.reshape(-1, c))
        qkv = qkv.reshape(b, n, t, 3, self.num_heads, c // self.num_heads)
        query, key, value = jnp.moveaxis(qkv, 3, 0)
        query = query * (c // self.num_heads) ** -0.5

        dtype = wide(x.dtype)
        shape = ((2 * self.window - 1) ** 2, self.num_heads)
        table = self.param("position_bias", trunc_normal, shape).astype(dtype)
        logits = jnp.einsum("bnqhd,bnkhd->bnhqk", query, key, preferred_element_type=dtype)
        logits += table[relative_positions(self.window)].transpose(2, 0, 1)
        if regions is not None:
            # Compared by the program: as a constant the mask would be t times as large.
            regions = jnp.asarray(regions)
            same = regions[:, None, :, None] == regions[:, None, None, :]
            logits = jnp.where(same, logits, logits + FORBIDDEN)
        weights = nn.softmax(logits).astype(value.dtype)
        out = jnp.einsum("bnhqk,bnkhd->bnqhd", weights, value)
        return dense(c, name="output")(out.reshape(-1, c)).reshape(b, n, t, c)


class Block(nn.Module):
    """Attention in shifted windows, then a feed-forward network, both residual. [b, h, w, c].

    In training each of the two is left out of a picture with the probability `drop_path`
    (stochastic depth; Huang et al., 2016), and made larger for the others.
    """

    num_heads: int
    window: int
    shift: int
    drop_path: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        _, h, w, c = x.shape
        norm = partial(LayerNorm, dtype=self.dtype)
        dense = partial(nn.Dense, kernel_init=trunc_normal, dtype=self.dtype)
        drop = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), deterministic=not train)

        # Padded after the norm: what is added is zero, and attended to like any other pixel.
        y = norm(name="norm1")(x)
        y = jnp.pad(y, ((0, 0), (0, -h % self.window), (0, -w % self.window), (0, 0)))
        height, width = y.shape[1:3]
        regions = None
        if self.shift:
            y = jnp.roll(y, (-self.shift, -self.shift), (1, 2))
            regions = shift_regions(height, width, self.window, self.shift)
        y = split_windows(y, self.window)
        y = WindowAttention(self.num_heads, self.window, self.dtype, name="attention")(y, regions)
        y = join_windows(y, height, width)
        y = jnp.roll(y, (self.shift, self.shift), (1, 2))[:, :h, :w]
        x = x + drop(y)

        y = norm(name="norm2")(x).reshape(-1, c)
        y = dense(FFN_RATIO * c, name="ffn_hidden")(y)
        y = dense(c, name="ffn_output")(gelu(y))
        return x + drop(y.reshape(x.shape))


class Merge(nn.Module):
    """Four pixels become one of twice the channels. [b, h, w, c] -> [b, ⌈h/2⌉, ⌈w/2⌉, 2c].

    The numbers of the four stand beside each other channel by channel, in the order of the
    reference's weights.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
        b, h, w, c = x.shape
        x = x.reshape(b, h // 2, 2, w // 2, 2, c).transpose(0, 1, 3, 5, 2, 4)
        x = LayerNorm(dtype=self.dtype, name="norm")(x.reshape(b, h // 2, w // 2, 4 * c))
        return nn.Dense(
            2 * c, use_bias=False, kernel_init=trunc_normal, dtype=self.dtype, name="reduction"
        )(x)


class Swin(nn.Module):
    """Swin Transformer without its classifier. Image [b, H, W, 3] -> (C2, C3, C4, C5).

    Level i has `channels` · 2^i channels at stride 4 · 2^i, sizes rounded up, and a LayerNorm of its
    own. `channels` of 96, `depths` of (2, 2, 6, 2) and `num_heads` of (3, 6, 12, 24) are Swin-T; 192,
    (2, 2, 18, 2) and (6, 12, 24, 48) are Swin-L.

    Raises:
        UserError: the heads do not fit the depths or the channels.
    """

    channels: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window: int
    drop_path: float
    """Probability that the last block is left out; it grows linearly from zero at the first."""
    remat: bool
    """Whether blocks are computed again for the gradient, so that only their inputs are kept."""
    dtype: str

    @nn.compact
    def __call__(self, image: jax.Array, train: bool) -> tuple[jax.Array, ...]:
        self._check()
        norm = partial(LayerNorm, dtype=self.dtype)
        block = nn.remat(Block, static_argnums=(2,)) if self.remat else Block
        rates = iter(np.linspace(0, self.drop_path, sum(self.depths)).tolist())

        x = jnp.pad(image, ((0, 0), (0, -image.shape[1] % 4), (0, -image.shape[2] % 4), (0, 0)))
        x = nn.Conv(
            self.channels,
            (4, 4),
            (4, 4),
            padding=0,
            kernel_init=trunc_normal,
            dtype=self.dtype,
            name="patches",
        )(x)
        x = norm(name="patches_norm")(x)

        levels = []
        for i, (depth, num_heads) in enumerate(zip(self.depths, self.num_heads)):
            if i > 0:
                x = Merge(self.dtype, name=f"stage{i - 1}_merge")(x)
            for j in range(depth):
                shift = self.window // 2 if j % 2 else 0
                name = f"stage{i}_block{j}"
                x = block(num_heads, self.window, shift, next(rates), self.dtype, name=name)(
                    x, train
                )
            levels.append(norm(name=f"norm{i}")(x))
        return tuple(levels)

    def _check(self) -> None:
        where = f"config.model.backbone.num_heads is {self.num_heads}"
        if len(self.num_heads) != len(self.depths):
            raise UserError(f"{where}; accepted: one number for each of depths {self.depths}")
        for i, num_heads in enumerate(self.num_heads):
            if self.channels * 2**i % num_heads:
                raise UserError(
                    f"{where}; accepted: divisors of the channels of a level, but "
                    f"{num_heads} does not divide {self.channels * 2**i}"
                )
