"""Run lengths of masks."""

import numpy as np
import pytest
import tiny_coco
from pycocotools import mask as coco_mask

from knet_jax.segmentation import rle


def test_masks_come_back():
    for shape in ((1, 1), (7, 5), (5, 300), (300, 5)):
        for share in (0, 0.5, 1):
            mask = np.random.default_rng(0).random(shape) < share
            encoded = rle.encode(mask)
            assert encoded["size"] == list(shape) and isinstance(encoded["counts"], bytes)
            assert encoded == coco_mask.encode(np.asfortranarray(mask, np.uint8))
            assert encoded == rle.encode(mask.astype(np.uint8))
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
        assert rle.from_annotation(segmentation, (6, 8)) == (compressed, [])


def test_a_bad_polygon_takes_no_good_one_with_it():
    good = [2, 1, 6, 1, 6, 4, 2, 4]
    mask, _ = rle.from_annotation([good], (6, 8))
    for bad, message in (([1, 2, 3, 4], "2 points"), ("xy", "list of numbers"), ([], "0 points")):
        found, [problem] = rle.from_annotation([bad, good], (6, 8))
        assert found == mask and message in problem


def test_errors_name_the_value():
    for segmentation, message in (
        ([], "it has no mask"),
        (None, "it has no mask"),
        ("x", "segmentation 'x' is neither polygons nor RLE"),
        ([[0, 0, 1, 1]], "a polygon has 2 points, it must have three or more"),
        ([[0, 0, 1, 1, 2, 2, 3]], "a polygon has 3.5 points"),
        ([[0, 0, 1, 1, 1e30, 0]], "a polygon goes beyond 100 times the sides"),
        ([[0, 0, 1, 1, 10**400, 0]], "a polygon must be a list of numbers"),
        ([0, 0, 1, 1, 1, 0], "a polygon must be a list of numbers"),
        ({"counts": [48]}, r"its RLE has size None, the picture \[6, 8\]"),
        ({"size": [8, 6], "counts": [48]}, r"its RLE has size \[8, 6\], the picture \[6, 8\]"),
        ({"size": [6, 8], "counts": 3}, "the runs of its RLE do not fill the 48 pixels"),
        ({"size": [6, 8], "counts": [40, 9]}, "do not fill"),
        ({"size": [6, 8], "counts": [50, -2]}, "do not fill"),
    ):
        with pytest.raises(ValueError, match=message):
            rle.from_annotation(segmentation, (6, 8))


def test_compressed_runs_are_read_as_the_reference_reads_them():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = np.kron(rng.integers(0, 2, (7, 9)), np.ones(rng.integers(1, 60, 2), int))
        compressed = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert rle._runs(compressed["counts"]) == tiny_coco.runs_of(mask)
        text = compressed | {"counts": compressed["counts"].decode()}
        assert rle.from_annotation(text, mask.shape) == (compressed, [])
        plain = {"size": list(mask.shape), "counts": tiny_coco.runs_of(mask)}
        assert rle.from_annotation(plain, mask.shape) == (compressed, [])
