import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import to_picture

from knet_jax.resampling import Canvas, to_original

# The matrix of one axis.


def matrix(size, original_size, num_rows, num_pixels, stride):
    return np.asarray(
        jax.jit(to_original, static_argnums=(2, 3, 4, 5))(
            jnp.asarray(size), jnp.asarray(original_size), num_rows, num_pixels, stride, "float32"
        )
    )


SIZES = [(40, 40), (33, 50), (40, 13), (1, 30), (40, 1), (7, 128), (39, 41)]


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("size, original_size", SIZES)
def test_every_pixel_is_a_mean_of_at_most_four_rows(size, original_size, stride):
    weights = matrix(size, original_size, 40 // stride, 128, stride)
    assert weights.shape == (128, 40 // stride)
    assert (weights >= 0).all() and ((weights > 0).sum(1) <= 4).all()
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 4, 8])
@pytest.mark.parametrize("size, original_size", SIZES)
def test_both_resizings_are_one_matrix(size, original_size, stride):
    weights = matrix(size, original_size, 40 // stride, 128, stride)
    x = np.random.default_rng(0).standard_normal(40 // stride)
    wanted = to_picture(x[None, :, None], stride, (size, stride), (original_size, stride))
    np.testing.assert_allclose(weights[:original_size] @ x, wanted[0, :, 0], atol=1e-5)
    # Beyond the picture the last pixel is repeated.
    rest = np.broadcast_to(weights[original_size - 1], (128 - original_size, len(x)))
    np.testing.assert_array_equal(weights[original_size:], rest)


def test_one_to_one_is_the_identity():
    np.testing.assert_allclose(matrix(5, 5, 5, 5, 1), np.eye(5), atol=1e-6)


# The canvas.


def test_canvas_holds_all_pictures_and_there_are_few():
    size = np.array([[800, 1216], [0, 0], [800, 1067]])
    original_size = np.array([[427, 640], [0, 0], [480, 640]])
    assert Canvas.of(size, original_size) == Canvas(512, 640, 2)
    assert Canvas.of(size[:1], original_size[:1]) == Canvas(512, 640, 2)
    assert Canvas.of(np.array([[100, 100]]), np.array([[128, 129]])) == Canvas(128, 256, 1)
    assert Canvas.of(np.array([[256, 256]]), np.array([[128, 128]])) == Canvas(128, 128, 2)
    assert Canvas.of(np.array([[257, 257]]), np.array([[128, 128]])) == Canvas(128, 128, 4)
