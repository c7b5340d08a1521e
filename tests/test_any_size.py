"""Results that leave the project: the same as those of evaluation, for pictures of any size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.data import transforms
from knet_jax.inference.any_size import (
    Framing,
    find_rivals,
    resize_into_canvas,
    size_in_canvas,
)
from knet_jax.inference.resampling import ResultCanvas, both_to_original
from knet_jax.structs import EMPTY, Pass, Sizes, Stage
from knet_jax.tasks import TASKS

OPTIONS = {"instance_threshold": 0.3, "overlap_threshold": 0.2, "num_results": 12}


def shown(sizes, view):
    return np.asarray(size_in_canvas(jnp.asarray(sizes, jnp.int32), view)).tolist()


@pytest.mark.parametrize("limits", [(800, 1333), (512, 2048), (128, 128), (640, 640)])
def test_pictures_are_shown_as_large_as_in_evaluation(limits):
    rng = np.random.default_rng(0)
    common = [(480, 640), (427, 640), (640, 427), (375, 500), (1, 1), (3000, 4000), (720, 1280)]
    sizes = common + rng.integers(1, 2000, (300, 2)).tolist()
    view = Framing((1 << 13, 1 << 13), *limits)
    assert max(map(max, sizes)) * 1333 < 1 << 31
    expected = [list(transforms.resized_size(tuple(size), *limits)) for size in sizes]
    # Very long pictures are larger than any canvas of a recipe; halves may be rounded otherwise.
    inside = [i for i, size in enumerate(expected) if max(size) <= 1 << 13]
    assert len(inside) > 250
    actual = shown(sizes, view)
    differ = [sizes[i] for i in inside if actual[i] != expected[i]]
    assert len(differ) <= 1, differ


def test_a_canvas_limits_what_is_shown():
    view = Framing((64, 96), 64, 1000)
    assert shown([(50, 100), (100, 50), (100, 150), (32, 32)], view) == [
        [48, 96],
        [64, 32],
        [64, 96],
        [64, 64],
    ]


@pytest.mark.parametrize("size", [(48, 64), (31, 90), (100, 60), (301, 402)])
def test_pictures_are_resized_as_in_evaluation(size):
    """But where a weight is rounded otherwise: cv2 computes positions in double precision."""
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    padded = np.full((1, size[0] + 7, size[1] + 3, 3), 99, np.uint8)
    padded[0, : size[0], : size[1]] = image
    view = Framing((64, 96), 64, 96)
    result, shown = resize_into_canvas(padded, jnp.asarray([size], jnp.int32), view)
    (height, width) = np.asarray(shown)[0]
    canvas = np.zeros((64, 96, 3), np.uint8)
    transforms.place_image(image, transforms.whole((int(height), int(width))), canvas)
    difference = np.abs(np.asarray(result)[0].astype(int) - canvas)[:height, :width]
    assert height > 20 and difference.max() <= 1 and difference.mean() < 0.02


def scene(task, seed=0, b=2, h=12, w=16):
    """A pass of smooth random masks, and pictures of two sizes."""
    rng = np.random.default_rng(seed)
    sizes = {"panoptic": Sizes(9, 4, 3), "instance": Sizes(9, 4, 0), "semantic": Sizes(0, 0, 7)}
    sizes = sizes[task]
    k = sizes.num_things + sizes.num_stuff
    n = sizes.num_proposals + sizes.num_stuff
    masks = jax.image.resize(rng.normal(0, 6, (b, n, 4, 5)), (b, n, h, w), "cubic")
    logits = jnp.asarray(rng.normal(0, 2, (b, n, k)), jnp.float32) if sizes.num_proposals else None
    stage = Stage(None, jnp.asarray(masks, jnp.float32), logits)
    size, canvas = np.int32([(90, 128), (96, 110)]), np.int32([(96, 128)] * b)
    original_size = np.int32([(60, 85), (150, 172)])
    return Pass(stage, size, canvas, np.zeros(b, bool)), original_size, sizes


@pytest.mark.parametrize("task", ["panoptic", "instance", "semantic"])
def test_results_are_those_of_evaluation(task):
    seen, original_size, sizes = scene(task)
    row = TASKS[task]
    options = row.choose_options(sizes, OPTIONS)
    canvas = ResultCanvas.of(seen.size, original_size)
    predict = jax.jit(partial(row.predict, canvas=canvas, **options))
    expected = jax.tree.map(np.asarray, predict((seen,), original_size))
    shape = (160, 181)
    predict_any_size = jax.jit(partial(row.predict_any_size, shape=shape, **options))
    results = jax.tree.map(np.asarray, predict_any_size(seen, original_size))
    for i, (height, width) in enumerate(original_size):
        one = {name: array[i] for name, array in results.items()}
        truth = row.read(jax.tree.map(lambda x, i=i: x[i], expected), original_size[i])
        beyond = np.ones(shape, bool)
        beyond[:height, :width] = False
        if task == "panoptic":
            found = one["labels"] != EMPTY
            assert [s.label for s in truth.segments] == one["labels"][found].tolist()
            np.testing.assert_allclose(
                [s.score for s in truth.segments], one["scores"][found], rtol=1e-6
            )
            assert len(truth.segments) > 2 and np.all(one["scores"][~found] == 0)
            same = one["ids"][:height, :width] == truth.ids
            assert same.mean() > 0.999 and not one["ids"][beyond].any()
        elif task == "instance":
            assert [instance.label for instance in truth] == one["labels"].tolist()
            np.testing.assert_allclose([s.score for s in truth], one["scores"], rtol=1e-6)
            areas = one["masks"].sum((1, 2))
            np.testing.assert_allclose([s.area for s in truth], areas, atol=3)
            assert areas.min() < areas.max() and not one["masks"][:, beyond].any()
        else:
            same = one["labels"][:height, :width] == truth.astype(int) - 1
            assert same.mean() > 0.999 and len(np.unique(truth)) > 2
            assert np.all(one["labels"][beyond] == EMPTY)


def test_nobody_who_wins_a_pixel_of_a_tile_is_left_out():
    values = np.random.default_rng(0).uniform(0.9, 1, (9, 2, 12, 16)).astype(np.float32)
    values *= np.linspace(0.8, 1, 9)[:, None, None, None]
    values[8, :, :, 8:] = 0
    size = np.int32([(40, 60), (48, 51)])
    seen = Pass(None, size, np.int32([(48, 64)] * 2), np.array([False, True]))
    y, x = both_to_original(seen, 2 * size, (12, 16), (96, 120), np.float32)
    y_tiles, x_tiles = (jnp.stack(jnp.split(w, 4, axis=1)) for w in (y, x))
    rivals = np.array(find_rivals(jnp.asarray(values), y_tiles, x_tiles.swapaxes(2, 3)))
    assert rivals.any((0, 1))[8] and rivals.any(2).all() and rivals.mean() < 0.8
    best = np.einsum("bhi,nbij,bwj->nbhw", y, values, x).argmax(0)
    for i, row in enumerate(np.split(best, 4, axis=1)):
        for j, tile in enumerate(np.split(row, 4, axis=2)):
            assert rivals[i, j, np.unique(tile)].all()
