"""Results that leave the project: the same as those of evaluation, for pictures of any size."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.data import transforms
from knet_jax.inference import any_size
from knet_jax.inference.any_size import (
    Framing,
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


def test_owners_and_areas_of_tiles_are_those_of_whole_masks():
    """In nine tiles of a padded picture; half of the masks are there twice, one covers everything."""
    n, canvas, size, original_size = 48, (288, 320), (250, 300), (150, 170)
    rng = np.random.default_rng(2)
    masks = np.array(jax.image.resize(rng.normal(0, 5, (n, 5, 6)), (n, 36, 40), "cubic"))
    scores = rng.uniform(0.2, 0.9, n).astype(np.float32)
    masks[n // 2 :], scores[n // 2 :] = masks[: n // 2], scores[: n // 2]
    masks[0], scores[0] = 9, 0.05
    masks = jnp.asarray(masks, jnp.float32)
    wanted = jnp.arange(n) % 3 < 2

    sizes = jnp.asarray([size]), jnp.asarray([original_size])
    seen = Pass(None, sizes[0], jnp.asarray([canvas]), jnp.zeros(1, bool))
    [y], [x] = both_to_original(seen, sizes[1], (72, 80), original_size, jnp.float32)
    probs = y @ any_size.at_stride_4(masks[None])[:, 0] @ x.T
    owners = (scores[:, None, None] * probs).argmax(0)
    areas = jnp.where(wanted, (probs >= 0.5).sum((1, 2)), 0)

    @jax.jit
    def fuse(masks):
        tiles = any_size._Tiles.of(masks, sizes[0][0], sizes[1][0], (160, 181))
        find = partial(any_size._find_owners, jnp.asarray(scores))
        areas = tiles.map(partial(any_size._count_half, wanted)).sum((0, 1))
        return tiles.merge(tiles.map(find)), areas

    found, counted = fuse(masks)
    assert (found[:150, :170] == owners).mean() > 0.999 and len(np.unique(owners)) > 9
    np.testing.assert_allclose(counted, areas, atol=3)
    assert counted[0] == 150 * 170
    found, _ = fuse(jnp.full_like(masks, 30.0))
    assert np.unique(found[:150, :170]).tolist() == [scores.argmax()]


def test_maps_of_any_size_are_those_of_evaluation():
    """Of one pixel, one row or column, the whole array; smaller and larger than what was shown."""
    stage, sizes, shape = scene("panoptic", seed=2, b=6)[0].stage, scene("panoptic")[2], (160, 181)
    original_size = np.int32([(1, 1), (2, 170), (150, 3), (160, 181), (37, 90), (159, 64)])
    size = np.int32([(96, 128), (9, 128), (96, 5), (96, 128), (96, 120), (80, 33)])
    seen = Pass(stage, size, np.int32([(96, 128)] * 6), np.zeros(6, bool))
    row = TASKS["panoptic"]
    options = row.choose_options(sizes, OPTIONS)
    canvas = ResultCanvas.of(size, original_size)
    expected = jax.jit(partial(row.predict, canvas=canvas, **options))((seen,), original_size)
    ids = jax.jit(partial(row.predict_any_size, shape=shape, **options))(seen, original_size)["ids"]
    for i, (height, width) in enumerate(original_size):
        ours, theirs = np.asarray(ids[i]), np.asarray(expected.ids[i])
        assert (ours[:height, :width] == theirs[:height, :width]).mean() > 0.999, original_size[i]
        assert ours.any() and not ours[height:].any() and not ours[:, width:].any()
