"""Deformable convolution (Dai et al., ICCV 2017): every point of the kernel looks where it wants.

y(p) = sum_k W_k x(p + p_k + o_k(p)): the offsets o_k in pixels are predicted for each place p, and x
is read between pixels by bilinear interpolation. This is the first version, without modulation, with
one group of offsets.

The points of the kernel are computed one after the other, and a gradient reads the pixels again
instead of keeping them. So with maps of n = b·h·w·c numbers the work space is about 3n forward and
11n backward, whatever the size of the kernel, and nothing but the inputs is kept in between.

On two CPU cores a layer of 50 x 76 x 256 takes 26 ms, and 185 ms with gradients: 1.2 and 2.7 times as
long as an ordinary convolution. Interpolation as a product with matrices [h'·w', h·w] took 421 ms and
3.4 s (`benchmarks/README.md`).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from knet_jax.nn.layers import conv, wide


def deform_conv(
    x: jax.Array,
    offsets: jax.Array,
    kernel: jax.Array,
    stride: int,
    dilation: int,
    padding: int,
) -> jax.Array:
    """Convolves x with a kernel whose points are moved by offsets.

    Pixels beyond the border are zero. A point that lies a whole pixel or more beyond it reads zero
    and has no gradient, also if it lies there exactly.

    Args:
        x: [b, h, w, c].
        offsets: [b, h', w', 2·size·size], pixels (down, right) for each point of the kernel, row by
          row.
        kernel: [size, size, c, c'].
        stride: of rows and columns.
        dilation: of the kernel.
        padding: rows and columns of zeros at each border.

    Returns:
        [b, h', w', c'], h' and w' those of an ordinary convolution.
    """
    (b, height, width, _), size = x.shape, kernel.shape[0]
    reach = dilation * (size - 1) + 1 - 2 * padding
    h, w = ((side - reach) // stride + 1 for side in (height, width))
    assert offsets.shape == (b, h, w, 2 * size * size), (offsets.shape, x.shape, kernel.shape)

    # Positions are kept wide: bfloat16 does not even tell the columns of a map apart.
    offsets = offsets.astype(wide(offsets.dtype)).reshape(b, h, w, size * size, 2)
    taps = np.arange(size) * dilation - padding
    rows = np.arange(h)[:, None, None] * stride + np.repeat(taps, size) + offsets[..., 0]
    columns = np.arange(w)[:, None] * stride + np.tile(taps, size) + offsets[..., 1]
    inside = (rows > -1) & (rows < height) & (columns > -1) & (columns < width)
    rows, columns = (jnp.where(inside, at, -1) for at in (rows, columns))

    points = [jnp.moveaxis(at, -1, 0) for at in (rows, columns)]
    return _convolve_at(x, *points, kernel.reshape(size * size, *kernel.shape[2:]))


@jax.custom_vjp
def _convolve_at(
    x: jax.Array, rows: jax.Array, columns: jax.Array, kernels: jax.Array
) -> jax.Array:
    """Reads x at k positions for each place, each multiplied with a matrix of its own, and adds up.

    x [b, h, w, c], rows and columns [k, b, h', w'] of at least -1 and less than h and w, kernels
    [k, c, c'] -> [b, h', w', c'].
    """
    pixels = _with_border(x)

    def add_point(total, point):
        rows, columns, kernel = point
        corners, down, right = _read(pixels, x.shape, rows, columns)
        sample = _interpolate(corners, down, right).astype(x.dtype)
        return total + jnp.matmul(sample, kernel, preferred_element_type=total.dtype), None

    total = jnp.zeros((*rows.shape[1:], kernels.shape[-1]), wide(x.dtype))
    total, _ = jax.lax.scan(add_point, total, (rows, columns, kernels))
    return total.astype(x.dtype)


def _forward(*inputs):
    return _convolve_at(*inputs), inputs


def _backward(inputs, grad):
    x, rows, columns, kernels = inputs
    pixels = _with_border(x)
    dtype = wide(x.dtype)
    ones = jnp.ones(x.shape[-1:], dtype)

    def add_point(grad_pixels, point):
        rows, columns, kernel = point
        corners, down, right = _read(pixels, x.shape, rows, columns)
        sample = _interpolate(corners, down, right).astype(x.dtype)
        grad_kernel = jnp.einsum("bhwc,bhwd->cd", sample, grad, preferred_element_type=dtype)
        grad_sample = jnp.matmul(grad, kernel.T, preferred_element_type=dtype)

        # Sums over channels as products with ones: XLA's own are twice as slow on the CPU.
        a, b, c, d = corners
        lower, upper = _mix(c, d, right), _mix(a, b, right)
        grad_rows = (grad_sample * (lower - upper)) @ ones
        grad_columns = (grad_sample * _mix(b - a, d - c, down)) @ ones

        upper, lower = (1 - down) * grad_sample, down * grad_sample
        shares = (1 - right) * upper, right * upper, (1 - right) * lower, right * lower
        for index, share in zip(_corner_indices(x.shape, rows, columns), shares):
            grad_pixels = grad_pixels.at[index].add(share, mode="promise_in_bounds")
        return grad_pixels, (grad_rows, grad_columns, grad_kernel.astype(kernel.dtype))

    grad_pixels = jnp.zeros(pixels.shape, dtype)
    grad_pixels, grads = jax.lax.scan(add_point, grad_pixels, (rows, columns, kernels))
    b, h, w, c = x.shape
    grad_x = grad_pixels.reshape(b, h + 2, w + 2, c)[:, 1:-1, 1:-1].astype(x.dtype)
    return grad_x, *grads


_convolve_at.defvjp(_forward, _backward)


def _with_border(x: jax.Array) -> jax.Array:
    """The pixels of a map in a border of zeros, row by row. [b, h, w, c] -> [b·(h+2)·(w+2), c]."""
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(-1, x.shape[-1])


def _corner_indices(
    shape: tuple[int, ...], rows: jax.Array, columns: jax.Array
) -> tuple[jax.Array, ...]:
    """Where the four pixels around each position [b, h', w'] stand among those `_with_border`."""
    b, h, w, _ = shape
    row, column = (jnp.floor(at).astype(jnp.int32) + 1 for at in (rows, columns))
    first = (jnp.arange(b, dtype=jnp.int32)[:, None, None] * (h + 2) + row) * (w + 2) + column
    return first, first + 1, first + w + 2, first + w + 3


def _read(
    pixels: jax.Array, shape: tuple[int, ...], rows: jax.Array, columns: jax.Array
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """The four pixels [b, h', w', c] around each position, and how far it is from the first."""
    indices = _corner_indices(shape, rows, columns)
    corners = [pixels.at[index].get(mode="promise_in_bounds") for index in indices]
    down, right = ((at - jnp.floor(at))[..., None] for at in (rows, columns))
    return corners, down, right


def _mix(first: jax.Array, second: jax.Array, share: jax.Array) -> jax.Array:
    return (1 - share) * first + share * second


def _interpolate(corners: list[jax.Array], down: jax.Array, right: jax.Array) -> jax.Array:
    a, b, c, d = corners
    return _mix(_mix(a, b, right), _mix(c, d, right), down)


class DeformConv(nn.Module):
    """A convolution that predicts its own offsets. [b, h, w, c'] -> [b, h/stride, w/stride, c].

    `conv_offset`, a convolution of the same size, starts from zero: as an ordinary convolution.
    """

    channels: int
    size: int
    stride: int = 1
    dilation: int = 1
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        offsets = conv(
            2 * self.size**2,
            self.size,
            self.stride,
            self.dilation,
            kernel_init=nn.initializers.zeros,
            dtype=self.dtype,
            name="conv_offset",
        )(x)
        shape = (self.size, self.size, x.shape[-1], self.channels)
        kernel = self.param("kernel", self.kernel_init, shape).astype(self.dtype)
        padding = self.dilation * (self.size - 1) // 2
        return deform_conv(
            x.astype(self.dtype), offsets, kernel, self.stride, self.dilation, padding
        )
