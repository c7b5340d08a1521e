"""Run lengths of masks, and predictions made of them."""

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from knet_jax import rle
from knet_jax.structs import EMPTY, Instance


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (5, 300), (300, 5)])
@pytest.mark.parametrize("share", [0, 0.5, 1])
@pytest.mark.parametrize("dtype", [bool, np.uint8])
def test_masks_come_back(shape, share, dtype):
    mask = np.random.default_rng(0).random(shape) < share
    encoded = rle.encode(mask.astype(dtype))
    assert encoded["size"] == list(shape) and isinstance(encoded["counts"], bytes)
    assert encoded == coco_mask.encode(np.asfortranarray(mask, np.uint8))
    np.testing.assert_array_equal(rle.decode(encoded), mask)
    assert rle.area(encoded) == mask.sum()


def test_masks_may_be_views():
    mask = np.zeros((20, 30), np.uint8)
    mask[4:8, 5:10] = 1
    assert rle.encode(mask[::2, 1::3]) == rle.encode(np.ascontiguousarray(mask[::2, 1::3]))
    assert rle.encode(mask.T[:9]) == rle.encode(np.ascontiguousarray(mask.T[:9]))


def test_annotations_of_all_three_forms_are_the_same_mask():
    mask = np.zeros((6, 8), np.uint8)
    mask[1:4, 2:6] = 1
    mask[5, 7] = 1
    polygons = [[2, 1, 6, 1, 6, 4, 2, 4], [7, 5, 8, 5, 8, 6, 7, 6]]
    numbers = {"size": [6, 8], "counts": [13, 3, 3, 3, 3, 3, 3, 3, 13, 1]}
    compressed = rle.encode(mask)
    text = compressed | {"counts": compressed["counts"].decode()}
    for segmentation in (polygons, numbers, compressed, text):
        assert rle.from_annotation(segmentation, (6, 8)) == compressed


@pytest.mark.parametrize(
    "segmentation, message",
    [
        ([], r"segmentation \[\]; accepted: polygons"),
        ([[0, 0, 1, 1]], r"segmentation \[\[0, 0, 1, 1\]\]; accepted"),
        ([[0, 0, 1, 1, 2, 2, 3]], "at least three points"),
        ([0, 0, 1, 1, 1, 0], "accepted"),
        (None, "segmentation None; accepted"),
        ({"counts": [48]}, "run lengths with size and counts"),
        ({"size": [6, 8], "counts": 3}, "accepted"),
        ({"size": [8, 6], "counts": [48]}, "segmentation of 8 x 6 pixels, expected 6 x 8"),
        ({"size": [6, 8], "counts": [40, 9]}, "run lengths add up to 49, not 48"),
        ({"size": [6, 8], "counts": [50, -2]}, "run lengths"),
    ],
)
def test_errors_name_the_value(segmentation, message):
    with pytest.raises(ValueError, match=message):
        rle.from_annotation(segmentation, (6, 8))


def test_predictions_share_the_masks_of_their_kernels():
    masks = np.random.default_rng(0).random((4, 9, 7)) < 0.4
    masks[3] = False
    found = rle.instances(
        masks,
        kernels=np.array([2, 0, 2, 3, 1], np.int32),
        labels=np.array([5, 1, 6, 0, EMPTY], np.int32),
        scores=np.array([0.5, 0.25, 0.125, 0.0625, 0], np.float32),
    )
    assert [one.label for one in found] == [5, 1, 6, 0]
    assert [one.score for one in found] == [0.5, 0.25, 0.125, 0.0625]
    for one, kernel in zip(found, (2, 0, 2, 3), strict=True):
        np.testing.assert_array_equal(rle.decode(one.rle), masks[kernel])
        assert one.area == masks[kernel].sum() and type(one.area) is float
    assert found[0].rle is found[2].rle
    assert type(found[0]) is Instance and not any(one.iscrowd for one in found)


def test_only_masks_that_are_predicted_are_read():
    class Masks:
        read = ()

        def __getitem__(self, kernel):
            self.read += (int(kernel),)
            return np.ones((2, 2), bool)

    masks = Masks()
    assert len(rle.instances(masks, [5, 1, 5, 0], [0, 1, 2, EMPTY], [1, 1, 1, 1])) == 3
    assert masks.read == (5, 1)
    assert rle.instances(masks, [], [], []) == ()
