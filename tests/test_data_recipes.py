import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_coco

from knet_jax.data import recipes
from knet_jax.data.transforms import View

ADE20K = {
    "scale": (2048, 512),
    "ratio": (0.5, 2.0),
    "crop": (512, 512),
    "max_class_share": 0.75,
    "flip": 0.5,
    "photometric": True,
    "eval_multiple": 32,
}


def crop(**changes):
    return recipes.find("semantic", tiny_coco.data_config("", **ADE20K | changes))


def whole_picture(**changes):
    return recipes.find("panoptic", tiny_coco.data_config("", **changes))


# Sizes.


def test_sizes_equal_the_reference(fixtures):
    """Of whole pictures, and of those that are cropped, in evaluation and in training."""
    cases = json.loads((fixtures / "transforms_resize.json").read_text())
    whole = whole_picture(canvas=(800, 1344), short_side=(640, 800), long_side=1333)
    for name, recipe_of in {
        "det_1333x800": lambda case: whole,
        "seg_test": lambda case: crop(scale=tuple(case["scale"])),
        "seg_2048x512_ratio": lambda case: crop().scaled(case["ratio"]),
    }.items():
        assert len(cases[name]) >= 30
        for case in cases[name]:
            size = recipe_of(case).eval_size((case["h"], case["w"]))
            assert size == (case["out_h"], case["out_w"]), name


def test_canvases_of_evaluation_are_the_least_multiple():
    for multiple, make in itertools.product((32, 128), (crop, whole_picture)):
        recipe = make(eval_multiple=multiple)
        for size in ((480, 640), (640, 480), (512, 512), (100, 3000)):
            for side, resized in zip(recipe.eval_canvas(size), recipe.eval_size(size)):
                assert side % multiple == 0 and 0 <= side - resized < multiple


def test_whole_pictures_may_be_evaluated_on_the_canvases_of_training():
    recipe = whole_picture(eval_multiple=0)
    for size in ((480, 640), (500, 500), (100, 3000)):
        assert recipe.eval_canvas(size) == recipe.canvas
        if size[0] != size[1]:
            assert recipe.eval_canvas(size[::-1]) == recipe.canvas[::-1]


# Crops.


def random_map(height, width, seed=0, classes=5):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes + 1, (6, 8)).astype(np.uint8)
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 8 // width
    return coarse[rows][:, columns]


def draws(recipe, label_map, count=200):
    return [recipe.train_view(label_map, np.random.default_rng(i)) for i in range(count)]


def test_windows_lie_everywhere_inside_the_picture():
    recipe = crop(scale=(128, 96), crop=(64, 96), max_class_share=1.0)
    views = draws(recipe, random_map(75, 100))
    ratios = [max(view.size) / 128 for view in views]
    assert 0.5 <= min(ratios) < 0.6 and 1.9 < max(ratios) <= 2.0
    assert abs(np.mean(ratios) - 1.25) < 0.1
    for view in views:
        assert view.shown == (min(64, view.size[0]), min(96, view.size[1]))
        for corner, side, part in zip(view.corner, view.size, view.shown):
            assert 0 <= corner <= side - part
    large = [view for view in views if view.size[0] > 150]
    places = np.array([view.corner[0] / (view.size[0] - 64) for view in large])
    assert places.min() < 0.1 and places.max() > 0.9 and abs(places.mean() - 0.5) < 0.15
    flips = np.mean([view.flip for view in views])
    assert 0.4 < flips < 0.6


def test_no_class_takes_more_than_its_share_where_that_can_be():
    label_map = random_map(90, 120)
    label_map[:, 60:] = 3
    recipe = crop(scale=(120, 90), crop=(32, 32), ratio=(1.0, 1.0))
    shares = [
        recipes.largest_share(recipes.crop_map(label_map, v)) for v in draws(recipe, label_map)
    ]
    anywhere = recipe._replace(max_class_share=1.0)
    before = [
        recipes.largest_share(recipes.crop_map(label_map, v)) for v in draws(anywhere, label_map)
    ]
    assert np.mean(np.array(before) > 0.75) > 0.3
    assert max(shares) <= 0.75


def test_a_picture_of_one_class_is_cropped_all_the_same():
    label_map = np.full((90, 120), 2, np.uint8)
    assert all(view.shown == (32, 32) for view in draws(crop(crop=(32, 32)), label_map, 3))


def test_ignored_pixels_do_not_count_in_a_share():
    label_map = np.zeros((4, 4), np.uint8)
    assert recipes.largest_share(label_map) == 1
    label_map[0] = [1, 1, 1, 2]
    assert recipes.largest_share(label_map) == 0.75
    assert recipes.largest_share(label_map.astype(np.uint16)) == 0.75


def test_a_window_of_a_map_equals_resizing_cropping_and_flipping():
    label_map = random_map(30, 41)
    for (size, (top, left)), flip in itertools.product(
        (((61, 93), (7, 20)), ((30, 41), (0, 0))), (False, True)
    ):
        shown = (min(40, size[0]), min(64, size[1]))
        view = View(size, (top, left), shown, flip)
        rows = np.floor((np.arange(size[0]) + 0.5) * 30 / size[0]).astype(int)
        columns = np.floor((np.arange(size[1]) + 0.5) * 41 / size[1]).astype(int)
        expected = label_map[rows][:, columns][top : top + shown[0], left : left + shown[1]]
        expected = expected[:, ::-1] if flip else expected
        np.testing.assert_array_equal(recipes.crop_map(label_map, view), expected)


# Which pictures share a batch, and its canvas.


def test_groups_and_canvases():
    split = SimpleNamespace(
        sizes=np.array([[60, 80], [80, 60], [70, 70]]), num_things=np.array([1, 3, 0])
    )
    for least, expected in ((0, [[0, 2], [1]]), (1, [[0], [1]]), (2, [[], [1]])):
        groups = whole_picture(min_things=least).groups(split)
        assert [group.tolist() for group in groups] == expected
    assert whole_picture().train_canvases == ((96, 128), (128, 96))
    with pytest.raises(ValueError, match=r"config\.data\.min_things 4: .* the most are 3"):
        whole_picture(min_things=4).groups(split)
    [everything] = crop().groups(split)
    assert everything.tolist() == [0, 1, 2] and crop().train_canvases == ((512, 512),)
