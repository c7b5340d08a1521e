"""The convolution of `jax.lax`, computed the fast way where the compiler does not find it.

Measured with XLA on two CPU cores (`benchmarks/README.md`): a 1x1 convolution takes up to 1.6 times
as long as the matrix product that it is; and the gradient of a large 3x3 convolution by its weights
two to eight times as long as a product of matrices for each of the nine, or, where channels are few,
as the sum of the gradients of parts of the map. A convolution of each channel for itself takes twenty
times as long as the sum of its shifted products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

LAYOUT = ("NHWC", "HWIO", "NHWC")
TILE = 96
"""Rows and columns of a part. From 32 to 100 the time is about the same, above it grows."""

Padding = tuple[tuple[int, int], tuple[int, int]]


def convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: jax.lax.ConvDimensionNumbers | None = None,
    feature_group_count: int = 1,
    precision: object = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with the arguments that `flax.linen.Conv` gives to it.

    Args:
        x: [b, h, w, c'].
        kernel: [size, size, c', c], or [size, size, 1, c] where each channel is convolved for itself.
        strides: of rows and columns.
        padding: (before, after) of rows and columns.
        lhs_dilation: must be 1.
        rhs_dilation: of the kernel.
        dimension_numbers: must be those of NHWC.
        feature_group_count: 1, or c' = c; then the map keeps its size.
        precision: must be the default, that of the whole program.

    Returns:
        [b, h', w', c].
    """
    assert set(lhs_dilation or (1,)) == {1} and precision is None
    nhwc = jax.lax.conv_dimension_numbers(x.shape, kernel.shape, LAYOUT)
    assert dimension_numbers in (None, nhwc)
    padding = tuple(map(tuple, padding))
    strides, dilation = tuple(strides), tuple(rhs_dilation or (1, 1))
    if feature_group_count > 1:
        around = len(kernel) // 2
        assert padding == ((around, around),) * 2 and {*strides, *dilation} == {1}
        return _depthwise(x, kernel)
    return _convolve(x, kernel, strides, padding, dilation)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(
    x: jax.Array,
    kernel: jax.Array,
    strides: tuple[int, int],
    padding: Padding,
    dilation: tuple[int, int],
) -> jax.Array:
    if kernel.shape[:2] == (1, 1) and padding == ((0, 0), (0, 0)):
        x = jax.lax.slice(x, (0,) * 4, x.shape, (1, *strides, 1))
        # Pixels in one axis: XLA transposes a copy of every map whose gradient sums over several.
        return (x.reshape(-1, x.shape[3]) @ kernel[0, 0]).reshape(*x.shape[:3], kernel.shape[3])
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, rhs_dilation=dilation, dimension_numbers=LAYOUT
    )


def _forward(x, kernel, strides, padding, dilation):
    return _convolve(x, kernel, strides, padding, dilation), (x, kernel)


def _backward(strides, padding, dilation, residuals, grad):
    x, kernel = residuals
    # What the gradient reads is made when it is there; XLA would make it as soon as it can.
    x, grad = jax.lax.optimization_barrier((x, grad))
    arguments = {"strides": strides, "padding": padding, "dilation": dilation}
    (grad_x,) = jax.linear_transpose(lambda x: _convolve.fun(x, kernel, **arguments), x)(grad)
    form = _fastest_on_cpu(kernel.shape, pixels=grad.shape[1] * grad.shape[2])
    grad_kernel = jax.lax.platform_dependent(
        x,
        kernel,
        grad,
        cpu=partial(form, **arguments),
        default=partial(_kernel_gradient, **arguments),
    )
    return grad_x, grad_kernel


_convolve.defvjp(_forward, _backward)


def _fastest_on_cpu(kernel_shape: Sequence[int], pixels: int) -> Callable[..., jax.Array]:
    """The form of the gradient by the weights that takes the least time: products where channels are
    many, tiles where a map is large, else XLA's own.

    Args:
        kernel_shape: (size, size, c', c).
        pixels: of a map of the output.
    """
    channels = min(kernel_shape[2:])
    if kernel_shape[0] == 1 or channels >= 128 or (channels >= 64 and pixels <= 32 * 32):
        return _kernel_gradient_as_products
    return _kernel_gradient if pixels <= 64 * 64 else _kernel_gradient_in_tiles


def _kernel_gradient(x, kernel, grad, *, strides, padding, dilation):
    def forward(kernel: jax.Array) -> jax.Array:
        return _convolve.fun(x, kernel, strides, padding, dilation)

    return jax.linear_transpose(forward, kernel)(grad)[0]


def _kernel_gradient_as_products(x, kernel, grad, *, strides, padding, dilation):
    """`_kernel_gradient`, for each weight of a channel the product of what it reads and the gradient."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    reach = [(n - 1) * stride + 1 for n, stride in zip(grad.shape[1:3], strides)]
    grad = grad.reshape(-1, grad.shape[3])

    def product(offset: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice(x, (0, *offset, 0), (len(x), *reach, x.shape[3]))
        reads = seen[:, :: strides[0], :: strides[1]]
        return reads.reshape(-1, x.shape[3]).T @ grad

    # In a loop: XLA would copy what each of them reads before the first.
    offsets = jnp.array([*np.ndindex(kernel.shape[:2])]) * jnp.array(dilation)
    return jax.lax.map(product, offsets).reshape(kernel.shape)


def _kernel_gradient_in_tiles(x, kernel, grad, *, strides, padding, dilation):
    """`_kernel_gradient`, summed over tiles of every image."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))

    def window(start: int, count: int, axis: int) -> slice:
        """What of the padded picture some rows (or columns) of the result read."""
        reach = (count - 1) * strides[axis] + (kernel.shape[axis] - 1) * dilation[axis] + 1
        return slice(start * strides[axis], start * strides[axis] + reach)

    total = jnp.zeros_like(kernel)
    for i in range(len(grad)):
        for top in range(0, grad.shape[1], TILE):
            for left in range(0, grad.shape[2], TILE):
                tile = grad[i : i + 1, top : top + TILE, left : left + TILE]
                rows, columns = window(top, tile.shape[1], 0), window(left, tile.shape[2], 1)
                total += _kernel_gradient(
                    x[i : i + 1, rows, columns],
                    kernel,
                    tile,
                    strides=strides,
                    padding=((0, 0), (0, 0)),
                    dilation=dilation,
                )
    return total


# Each channel for itself.


@jax.custom_vjp
def _depthwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolves each channel of [b, h, w, c] with its own [size, size, 1, c], and keeps the size."""
    return jax.lax.platform_dependent(
        x, kernel, cpu=_sum_of_shifted, default=_depthwise_convolution
    )


def _depthwise_convolution(x, kernel):
    padding, groups = ((len(kernel) // 2,) * 2,) * 2, x.shape[3]
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=LAYOUT, feature_group_count=groups
    )


def _sum_of_shifted(x, kernel):
    rows, columns = x.shape[1:3]
    padded = _pad_around(x, kernel)
    offsets = np.ndindex(kernel.shape[:2])
    wide = kernel.astype(jnp.promote_types(jnp.float32, kernel.dtype))  # as a sum of many must be
    total = sum(padded[:, i : i + rows, j : j + columns] * wide[i, j, 0] for i, j in offsets)
    return total.astype(x.dtype)


def _pad_around(x, kernel):
    around = (len(kernel) // 2,) * 2
    return jnp.pad(x, ((0, 0), around, around, (0, 0)))


def _depthwise_backward(residuals, grad):
    x, kernel = residuals
    x, grad = jax.lax.optimization_barrier((x, grad))  # as in `_backward`
    grad_kernel = jax.lax.platform_dependent(
        x, kernel, grad, cpu=_sums_of_products, default=_depthwise_kernel_gradient
    )
    return _depthwise(grad, kernel[::-1, ::-1]), grad_kernel


def _depthwise_kernel_gradient(x, kernel, grad):
    return jax.vjp(partial(_depthwise_convolution, x), kernel)[1](grad)[0]


def _sums_of_products(x, kernel, grad):
    """One pass over the map for each weight of a channel: all at once, XLA takes twenty times as long."""
    padded = _pad_around(x, kernel)

    def product(offset: jax.Array) -> jax.Array:
        seen = jax.lax.dynamic_slice(padded, (0, *offset, 0), x.shape)
        return (seen * grad).sum((0, 1, 2))

    offsets = jnp.array([*np.ndindex(kernel.shape[:2])])
    return jax.lax.map(product, offsets).reshape(kernel.shape)


_depthwise.defvjp(lambda x, kernel: (_depthwise(x, kernel), (x, kernel)), _depthwise_backward)
