"""Layers shared by backbones, necks and kernels, with the reference's padding, epsilon and inits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import field
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from knet_jax.nn.convolution import convolve

EPSILON = 1e-5
"""What every norm in K-Net adds to a variance."""

AXIS = "batch"
"""Name of the axis over devices."""

BATCH_NORM_STEP = 0.1
"""How far the running statistics of BatchNorm go towards those of a batch."""

PRIOR_BIAS = -math.log(99)
"""Bias under which a sigmoid classifier starts at a probability of 0.01."""

# The two-pass variance: the one-pass form loses digits that the hard gathering then amplifies.
LayerNorm = partial(nn.LayerNorm, epsilon=EPSILON, use_fast_variance=False)


def wide(dtype) -> jnp.dtype:
    """float32, or float64 where the network runs in it: the type of what must not be rounded."""
    return jnp.promote_types(jnp.float32, dtype)


@jax.custom_vjp
def sum_over_devices(tree: Any) -> Any:
    """The sums of all arrays of a tree over the devices that `jax.pmap` maps over, the same on each.

    Where several processes share their CPUs they are taken in the order of the devices, as one process
    takes them, since gloo's order depends on how many processes there are.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        return jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS).sum(0), tree)
    return jax.lax.psum(tree, AXIS)


sum_over_devices.defvjp(
    lambda tree: (sum_over_devices(tree), None), lambda _, grad: (sum_over_devices(grad),)
)


he_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal")

KEPT = "kept"


def keep(x: jax.Array) -> jax.Array:
    """Marks an array that `sparing` modules keep."""
    return checkpoint_name(x, KEPT)


sparing = partial(nn.remat, policy=jax.checkpoint_policies.save_only_these_names(KEPT))
"""`nn.remat` that saves for the gradient only what `keep` has marked, the results of convolutions and the
statistics of norms. Norms and activations are computed anew: a step takes as long, in less memory."""


class GroupNorm(nn.Module):
    """GroupNorm of 32 groups, or of as many as narrow networks allow. [b, h, w, c] -> [b, h, w, c].

    As `flax.linen.GroupNorm` in two passes.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        return group_norm(x, scale, bias, math.gcd(32, channels), self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array, groups: int, dtype: str
) -> jax.Array:
    """Normalizes groups of channels of each image, then scales and shifts channels.

    For the gradient x and the statistics of its groups are kept.

    Args:
        x: [b, h, w, c].
        scale: [c].
        bias: [c].
        groups: divides c.
        dtype: of the result and of the gradient that reaches it; everything is computed in `wide`.
    """
    return _group_norm(x, scale, bias, groups, dtype)[0]


def _group_norm(x, scale, bias, groups, dtype):
    values = x.astype(wide(x.dtype))
    mean = keep(_group_mean(values.mean((1, 2)), groups))
    deviation = values - mean
    variance = _group_mean((deviation * deviation).mean((1, 2)), groups)
    factor = keep(jax.lax.rsqrt(variance + EPSILON))
    return (deviation * (factor * scale) + bias).astype(dtype), (x, mean, factor, scale)


def _group_norm_gradient(groups, dtype, residuals, grad):
    x, mean, factor, scale = residuals
    size = x.shape[1] * x.shape[2]
    x, grad = jax.lax.optimization_barrier((x, grad))  # as in `convolve`
    grad = grad.astype(factor.dtype)
    normal = (x.astype(grad.dtype) - mean) * factor
    sums, products = grad.sum((1, 2)), (grad * normal).sum((1, 2))
    along_bias = _group_mean(sums * scale / size, groups)
    along_factor = _group_mean(products * scale / size, groups)
    grad_x = factor * (grad * scale - along_bias - normal * along_factor)
    return grad_x.astype(x.dtype), products.sum(0), sums.sum(0)


def _group_mean(channels: jax.Array, groups: int) -> jax.Array:
    """The mean over the channels of a group, at each of them: [b, c] -> [b, 1, 1, c].

    Pixels are summed channel by channel before: XLA on the CPU takes several times as long to sum
    pixels and channels at once.
    """
    b, c = channels.shape
    means = channels.reshape(b, groups, c // groups).mean(2)
    return means.repeat(c // groups, axis=1)[:, None, None]


group_norm.defvjp(_group_norm, _group_norm_gradient)


class BatchNorm(nn.Module):
    """Normalizes channels by the statistics of the images of all devices, or by running ones.

    The running variance is the unbiased one, as PyTorch keeps it. [b, h, w, c] -> [b, h, w, c].
    """

    use_running_average: bool
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)

        if self.use_running_average or self.is_initializing():
            mean, var = running_mean.value, running_var.value
        else:
            x = x.astype(wide(x.dtype))
            devices = jax.lax.axis_size(AXIS)
            count = devices * (x.size // x.shape[-1])
            mean = keep(sum_over_devices(x.mean((0, 1, 2))) / devices)
            var = keep(sum_over_devices(((x - mean) ** 2).mean((0, 1, 2))) / devices)
            unbiased = var * (count / max(count - 1, 1))
            running_mean.value += BATCH_NORM_STEP * (mean - running_mean.value)
            running_var.value += BATCH_NORM_STEP * (unbiased - running_var.value)
        factor = jax.lax.rsqrt(var + EPSILON) * scale
        return scale_and_shift(x, factor, bias - mean * factor, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def scale_and_shift(x: jax.Array, factor: jax.Array, shift: jax.Array, dtype: str) -> jax.Array:
    """x * factor + shift by channels, computed in their type. `dtype` is that of the result and of the
    gradient that reaches it, for which x is kept as it is, and factor."""
    return (x.astype(factor.dtype) * factor + shift).astype(dtype)


def _scale_and_shift_gradient(dtype, residuals, grad):
    x, factor = residuals
    x, grad = jax.lax.optimization_barrier((x, grad))  # as in `convolve`
    grad = grad.astype(factor.dtype)
    pixels = tuple(range(x.ndim - 1))
    return (grad * factor).astype(x.dtype), (grad * x).sum(pixels), grad.sum(pixels)


scale_and_shift.defvjp(
    lambda x, factor, shift, dtype: (scale_and_shift(x, factor, shift, dtype), (x, factor)),
    _scale_and_shift_gradient,
)


def make_norm(norm: str, dtype: str, train: bool) -> Callable[..., nn.Module]:
    """A norm by its name in configs, called with the number of channels and a name.

    `frozen_batch` uses the running statistics in training too (scale and bias are trained);
    `batch` uses those of the global batch in training; `group` has none.
    """
    if norm == "group":
        return lambda channels, name: GroupNorm(dtype, name=name)
    running = norm == "frozen_batch" or not train
    return lambda channels, name: BatchNorm(running, dtype, name=name)


def conv(channels: int, size: int, stride: int = 1, dilation: int = 1, **keywords) -> nn.Conv:
    """A square convolution padded symmetrically, as PyTorch pads to keep the size at stride 1."""
    return nn.Conv(
        channels,
        (size, size),
        (stride, stride),
        padding=dilation * (size - 1) // 2,
        kernel_dilation=dilation,
        conv_general_dilated=_convolve_and_keep,
        **keywords,
    )


def _convolve_and_keep(*args, **keywords) -> jax.Array:
    return keep(convolve(*args, **keywords))


@sparing
class ConvNormRelu(nn.Module):
    """Convolution without bias, norm, ReLU. [b, h, w, c'] -> [b, h/stride, w/stride, c]."""

    channels: int
    size: int
    stride: int = 1
    dilation: int = 1
    norm: Callable[..., nn.Module] = field(kw_only=True)
    """Called with the number of channels and a name."""
    kernel_init: nn.initializers.Initializer = nn.initializers.normal(0.01)
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = conv(
            self.channels,
            self.size,
            self.stride,
            self.dilation,
            use_bias=False,
            kernel_init=self.kernel_init,
            dtype=self.dtype,
            name="conv",
        )(x)
        return nn.relu(self.norm(self.channels, name="norm")(x))


def resize(x: jax.Array, size: tuple[int, int], axes: tuple[int, int] = (1, 2)) -> jax.Array:
    """Resizes two axes bilinearly (half-pixel centers, no antialiasing), as the reference does."""
    shape = list(x.shape)
    shape[axes[0]], shape[axes[1]] = size
    return jax.image.resize(x, shape, "bilinear", antialias=False)


def argmax(x: jax.Array, axis: int) -> jax.Array:
    """`jnp.argmax`, the first index of the largest; where there is a NaN, any index. XLA on the CPU takes
    ten times as long for it as for the largest, and then the least index that has it."""

    def on_cpu(x: jax.Array) -> jax.Array:
        last = x.shape[axis] - 1
        index = jnp.expand_dims(
            jnp.arange(last + 1), [i for i in range(x.ndim) if i != axis % x.ndim]
        )
        return jnp.where(x == x.max(axis, keepdims=True), index, last).min(axis)

    return jax.lax.platform_dependent(x, cpu=on_cpu, default=partial(jnp.argmax, axis=axis))


def repeat2x(x: jax.Array) -> jax.Array:
    """Repeats every row and column, [b, h, w, c] -> [b, 2h, 2w, c].

    As `jnp.repeat`, but the gradient is a sum of slices, which XLA on the CPU computes faster.
    """
    b, h, w, c = x.shape
    x = jnp.stack((x, x), axis=2).reshape(b, 2 * h, w, c)
    return jnp.stack((x, x), axis=3).reshape(b, 2 * h, 2 * w, c)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def upsample2x(x: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Doubles two axes bilinearly (half-pixel centers, edges repeated).

    The same as a bilinear resize without corner alignment, in two multiplications an element
    (`tests/test_layers.py::test_upsample2x_equals_resize`). Its gradient is written out, since XLA on
    the CPU is slow at the sums of padded arrays that JAX would make of it.
    """
    for axis in axes:
        before, after = _neighbours(x, x, axis)
        pairs = jnp.stack([0.25 * before + 0.75 * x, 0.75 * x + 0.25 * after], axis % x.ndim + 1)
        x = pairs.reshape(*x.shape[: axis % x.ndim], -1, *x.shape[axis % x.ndim + 1 :])
    return x


def _upsample2x_gradient(axes, _, grad):
    for axis in axes:
        axis %= grad.ndim
        pairs = grad.reshape(*grad.shape[:axis], -1, 2, *grad.shape[axis + 1 :])
        even, odd = (jax.lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
        before, after = _neighbours(odd, even, axis)
        grad = 0.75 * (even + odd) + 0.25 * (before + after)
    return (grad,)


def _neighbours(x, y, axis):
    """Element i - 1 of x and i + 1 of y, for every i; where there is none, 0 of y and the last of x."""
    part = partial(jax.lax.slice_in_dim, axis=axis)
    size = x.shape[axis]
    before = jnp.concatenate([part(y, 0, 1), part(x, 0, size - 1)], axis)
    after = jnp.concatenate([part(y, 1, size), part(x, size - 1, size)], axis)
    return before, after


upsample2x.defvjp(lambda x, axes: (upsample2x(x, axes), None), _upsample2x_gradient)


def sine_encoding(height: int, width: int, channels: int, dtype) -> jax.Array:
    """Sine and cosine of normalized positions (DETR), the first half for y. [h, w, channels].

    Positions run from 1 to n, divided by n + 1e-6 and scaled to 2 pi; even channels are sines and
    odd ones cosines, at wavelengths that grow by 10000^(2 / channels-per-axis). Computed in float32
    like the reference's, whatever the type of the network.
    """
    features = channels // 2
    wavelength = np.float32(10000) ** (
        2 * (np.arange(features) // 2).astype(np.float32) / np.float32(features)
    )

    def encode(size: int) -> np.ndarray:
        position = np.arange(1, size + 1, dtype=np.float32)
        position = position / (position[-1] + np.float32(1e-6)) * np.float32(2 * math.pi)
        angle = position[:, None] / wavelength
        return np.where(np.arange(features) % 2 == 0, np.sin(angle), np.cos(angle))

    y = np.broadcast_to(encode(height)[:, None], (height, width, features))
    x = np.broadcast_to(encode(width)[None, :], (height, width, features))
    return jnp.asarray(np.concatenate([y, x], axis=-1), dtype)
