import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain import to_picture

from knet_jax.data.recipes import WholePicture
from knet_jax.inference.resampling import ResultCanvas, to_original

# The matrix of one axis.


def matrix(size, original_size, num_rows, num_pixels, stride):
    return np.asarray(
        jax.jit(to_original, static_argnums=(2, 3, 4, 5))(
            jnp.asarray(size),
            jnp.asarray(original_size),
            num_rows,
            num_pixels,
            1 / stride,
            "float32",
        )
    )


SIZES = [(40, 40), (33, 50), (40, 13), (1, 30), (40, 1), (7, 128), (39, 41)]


@pytest.mark.parametrize("stride", [1, 4, 8])
def test_both_resizings_are_one_matrix(stride):
    for size, original_size in SIZES:
        weights = matrix(size, original_size, 40 // stride, 128, stride)
        assert (weights >= 0).all() and ((weights > 0).sum(1) <= 4).all()
        x = np.random.default_rng(0).standard_normal(40 // stride)
        wanted = to_picture(x[None, :, None], (40, stride), (size, stride), (original_size, stride))
        np.testing.assert_allclose(weights[:original_size] @ x, wanted[0, :, 0], atol=1e-5)
        # Beyond the picture the last pixel is repeated.
        rest = np.broadcast_to(weights[original_size - 1], (128 - original_size, len(x)))
        np.testing.assert_array_equal(weights[original_size:], rest)


# The canvas.


def test_canvas_holds_all_pictures_and_there_are_few():
    for size, original_size, canvas in (
        ([(800, 1216), (0, 0), (800, 1067)], [(427, 640), (0, 0), (480, 640)], (512, 640, 2)),
        ([(800, 1216)], [(427, 640)], (512, 640, 2)),
        ([(100, 100)], [(128, 129)], (128, 256, 1)),
        ([(256, 256)], [(128, 128)], (128, 128, 2)),
        ([(257, 257)], [(128, 128)], (128, 128, 4)),
        ([(300, 100)], [(600, 200)], (640, 256, 1 / 2)),
        ([(8, 8)], [(900, 800)], (1024, 896, 1 / 8)),
    ):
        assert ResultCanvas.of(np.array(size), np.array(original_size)) == canvas


RECIPE = WholePicture((800, 1344), (800, 800), 1333, 0.0, 100, 0, 0.0, 0, 0)


def scaled(original_size):
    size, inside = RECIPE.eval_size(original_size), RECIPE.eval_canvas(original_size)
    return ResultCanvas.scaled(inside, size, original_size), size


@pytest.mark.parametrize("limit, count", [(1000, 16), (10_000, 40)])
def test_pictures_of_all_sizes_share_few_canvases(limit, count):
    """Of ordinary aspects, and both orientations."""
    rng = np.random.default_rng(0)
    canvases = set()
    for _ in range(5000):
        side = np.exp(rng.uniform(np.log(100), np.log(limit)))
        height, width = int(side), int(side * rng.uniform(1, 2))
        for original_size in ((height, width), (width, height)):
            canvas, _ = scaled(original_size)
            assert canvas.height >= original_size[0] and canvas.width >= original_size[1]
            canvases.add(canvas)
    assert len(canvases) <= count


@pytest.mark.parametrize(
    "original_size",
    [(1, 1), (1, 5000), (5000, 1), (3, 70_000), (6120, 8160), (800, 1333), (2, 700), (1, 1333)],
)
def test_a_canvas_holds_any_picture_and_wastes_little(original_size):
    canvas, size = scaled(original_size)
    assert canvas.height >= original_size[0] and canvas.width >= original_size[1]
    assert all(side % 128 == 0 for side in canvas[:2])
    assert np.max(np.array(size) / original_size) <= canvas.shrink
    least = np.prod([max(128, side) for side in original_size])
    assert canvas.height * canvas.width <= 8 * least


def test_pictures_of_one_camera_share_a_canvas():
    """By hand: 4032 / 1067 = 3.78, up to 4; 640 / 1067 = 0.6, up to 1."""
    assert scaled((3024, 4032))[0] == ResultCanvas(3200, 5376, 1 / 2)
    assert scaled((2268, 4032))[0] == scaled((3024, 4032))[0] != scaled((4032, 3024))[0]
    assert scaled((480, 640))[0] == scaled((427, 640))[0] == scaled((500, 500))[0]
