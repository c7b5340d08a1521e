"""Against `jax.lax` itself, whose arithmetic it rearranges."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.nn import convolution
from knet_jax.nn.convolution import LAYOUT, convolve

# size of the kernel, stride, dilation, padding
CASES = [
    (1, 2, 1, 0),
    (3, 1, 1, 0),
    (3, 2, 1, 1),
    (3, 1, 2, 2),
    (7, 2, 1, 3),
]
FORMS = (
    convolution._kernel_gradient_as_products,
    convolution._kernel_gradient,
    convolution._kernel_gradient_in_tiles,
)


@pytest.mark.parametrize("size,stride,dilation,padding", CASES)
def test_values_and_gradients_are_those_of_lax(monkeypatch, size, stride, dilation, padding):
    monkeypatch.setattr(convolution, "TILE", 10)  # so that there are several, and the last smaller
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 13, 18, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((size, size, 3, 5)), jnp.float32)
    padding = [(padding, padding)] * 2

    def ours(x, kernel):
        return convolve(x, kernel, (stride, stride), padding, rhs_dilation=(dilation, dilation))

    def theirs(x, kernel):
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            padding,
            rhs_dilation=(dilation, dilation),
            dimension_numbers=LAYOUT,
        )

    y = theirs(x, kernel)
    np.testing.assert_allclose(jax.jit(ours)(x, kernel), y, rtol=1e-5, atol=1e-5)
    grad = jnp.asarray(rng.standard_normal(y.shape), jnp.float32)
    wanted = jax.vjp(theirs, x, kernel)[1](grad)
    for form in FORMS:
        monkeypatch.setattr(convolution, "_fastest_on_cpu", lambda *_, form=form, **__: form)
        got = jax.jit(lambda x, kernel: jax.vjp(ours, x, kernel)[1](grad))(x, kernel)
        for a, b in zip(got, wanted):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4, err_msg=str(form))


def test_the_form_follows_the_measured_table():
    def form(channels, pixels, size=3):
        return convolution._fastest_on_cpu((size, size, 256, channels), pixels)

    assert form(256, 10**5) == form(64, 256) == form(16, 10**5, size=1) == FORMS[0]
    assert form(3, 4096) == FORMS[1]
    assert form(64, 128 * 128) == FORMS[2]


def test_products_copy_what_they_read_one_after_the_other():
    x, kernel = jnp.ones((2, 32, 32, 64)), jnp.ones((3, 3, 64, 64))
    how = {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "dilation": (1, 1)}
    form = jax.jit(lambda *given: convolution._kernel_gradient_as_products(*given, **how))
    memory = form.lower(x, kernel, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * x.nbytes  # padded, copied and transposed; not for each


def test_types_stay():
    x, kernel = jnp.ones((1, 4, 4, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    y, pull = jax.vjp(lambda x, k: convolve(x, k, (1, 1), [(1, 1)] * 2), x, kernel)
    assert {a.dtype for a in (y, *pull(y))} == {jnp.dtype(jnp.bfloat16)}
