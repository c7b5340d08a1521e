import re
import shutil

import numpy as np
import pytest
import tiny_coco
from coco_readers import InstanceFile
from pycocotools import mask as run_lengths
from test_data_coco import scan

PREFIX = "instances_"
ALL = [f"train_{i}.jpg" for i in range(5)]


@pytest.fixture
def root(tmp_path):
    return tiny_coco.write_instances(tmp_path / "coco")


def decode(record, instance):
    return run_lengths.decode({"size": list(record.size), "counts": instance.counts})


def check_problem(root, pattern, counts):
    """One problem is named, and the pictures keep so many instances."""
    examples = scan(root, task="instance")
    assert len(examples.problems) == 1, examples.problems
    assert re.search(pattern, examples.problems[0])
    records = list(examples.records)
    assert [len(record.annotation) for record in records] == counts
    assert examples.count == len(counts)


def test_sound_dataset(root):
    examples = scan(root, task="instance")
    assert examples.problems == [] and examples.count == 5
    assert examples.categories == (("dog", "cat"), (3, 12), 2)
    for index, record in enumerate(examples.records):
        assert record.image_id == 100 + index and record.file_name == f"train_{index}.jpg"
        assert record.image == (root / "train2017" / record.file_name).read_bytes()
        drawn = tiny_coco.instance_masks(*record.size)
        assert [i.label for i in record.annotation] == [0, 1, 1]
        assert [i.iscrowd for i in record.annotation] == [False, False, True]
        for instance, (_, _, mask) in zip(record.annotation, drawn, strict=True):
            np.testing.assert_array_equal(decode(record, instance), mask)
            assert instance.area == mask.sum()


def test_categories_keep_the_order_of_the_file(root):
    tiny_coco.edit(root, lambda content: content["categories"].reverse(), prefix=PREFIX)
    examples = scan(root, task="instance")
    assert examples.categories == (("cat", "dog"), (12, 3), 2)


def test_all_categories_are_things_whatever_they_say(root):
    """And the reader of results agrees."""

    def change(content):
        content["categories"][0]["isthing"] = 0

    tiny_coco.edit(root, change, prefix=PREFIX)
    expected = (("dog", "cat"), (3, 12), 2)
    assert scan(root, task="instance").categories == expected
    assert InstanceFile(root / "annotations/instances_train2017.json").categories == expected


def test_several_polygons_are_one_thing(root):
    def change(content):
        content["annotations"][0]["segmentation"].append([40, 40, 50, 40, 50, 45, 40, 45])

    tiny_coco.edit(root, change, prefix=PREFIX)
    record = next(iter(scan(root, task="instance").records))
    expected = tiny_coco.instance_masks(*record.size)[0][2]
    expected[40:45, 40:50] = 1
    np.testing.assert_array_equal(decode(record, record.annotation[0]), expected)


def test_area_is_as_annotated_or_else_that_of_the_mask(root):
    def change(content):
        content["annotations"][0]["area"] = 17.5
        del content["annotations"][1]["area"]

    tiny_coco.edit(root, change, prefix=PREFIX)
    first, second, _ = next(iter(scan(root, task="instance").records)).annotation
    assert first.area == 17.5 and second.area == 25 * 30


BAD = {
    "two points": ([[1, 2, 30, 40]], "a polygon has 2 points, it must have three or more"),
    "odd": ([[1, 2, 30, 40, 5, 6, 7]], "a polygon has 3.5 points"),
    "no polygon": ([], "neither polygons nor RLE"),
    "empty polygon": ([[]], "a polygon has 0 points"),
    "words": ([["a"] * 6], "a polygon must be a list of numbers"),
    "not a number": ([[1, 2, 30, 40, 5, float("nan")]], "a polygon must be a list of numbers"),
    "flat list": ([1, 2, 30, 40, 5, 6], "a polygon must be a list of numbers"),
    "null": (None, "neither polygons nor RLE"),
    "outside": ([[900, 900, 950, 900, 950, 950]], "its mask is empty"),
    "other size": ({"size": [80, 60], "counts": [4800]}, r"RLE has size \[80, 60\], .* \[60, 80\]"),
    "no size": ({"counts": [4800]}, "RLE has size None"),
    "too short": ({"size": [60, 80], "counts": [10, 5]}, "do not fill the 4800 pixels"),
    "negative": ({"size": [60, 80], "counts": [4810, -10]}, "do not fill the 4800 pixels"),
    "empty mask": ({"size": [60, 80], "counts": [4800]}, "its mask is empty"),
    "no counts": ({"size": [60, 80]}, "do not fill the 4800 pixels"),
    "garbage": ({"size": [60, 80], "counts": "zz\x01"}, "RLE has a character"),
    "cut off": ({"size": [60, 80], "counts": "P"}, "RLE is cut off"),
    "of a larger picture": ({"size": [60, 80], "counts": "o0o0o0o0"}, "do not fill"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_masks_are_named_and_dropped(root, name):
    segmentation, message = BAD[name]

    def change(content):
        content["annotations"][0]["segmentation"] = segmentation

    tiny_coco.edit(root, change, prefix=PREFIX)
    pattern = rf"train_0\.jpg: annotation 0: .*{message}.*, dropped"
    check_problem(root, pattern, [2, 3, 3, 3, 3])


def test_a_bad_polygon_leaves_the_others_of_its_thing(root):
    def change(content):
        content["annotations"][0]["segmentation"].append([40, 40, 50, 40])

    before = next(iter(scan(root, task="instance").records)).annotation[0]
    tiny_coco.edit(root, change, prefix=PREFIX)
    pattern = r"annotation 0: a polygon has 2 points, .*, its other polygons stay"
    check_problem(root, pattern, [3, 3, 3, 3, 3])
    after = next(iter(scan(root, task="instance").records)).annotation[0]
    assert after == before


def test_unknown_category_is_named_and_dropped(root):
    def change(content):
        content["annotations"][4]["category_id"] = 55

    tiny_coco.edit(root, change, prefix=PREFIX)
    check_problem(root, "train_1.jpg: annotation 4: category id 55 is not", [3, 2, 3, 3, 3])


def test_bad_area_is_named(root):
    tiny_coco.edit(root, lambda c: c["annotations"][0].update(area="big"), prefix=PREFIX)
    check_problem(root, "annotation 0: area 'big' is no number", [2, 3, 3, 3, 3])


def test_crowd_is_a_matter_of_yes_or_no(root):
    tiny_coco.edit(root, lambda c: c["annotations"][0].update(iscrowd="0"), prefix=PREFIX)
    check_problem(root, "annotation 0: iscrowd is '0'; accepted: 0 and 1", [2, 3, 3, 3, 3])


def test_picture_of_another_size_is_left_out(root):
    tiny_coco.edit(root, lambda c: c["images"][1].update(height=81), prefix=PREFIX)
    check_problem(root, "train_1.jpg: picture is 60x80 but its entry .* 60x81", [3, 3, 3, 3])


def test_missing_picture_is_left_out(root):
    (root / "train2017" / "train_1.jpg").unlink()
    check_problem(root, r"train_1\.jpg: .*train_1\.jpg is missing, left out", [3, 3, 3, 3])


def test_annotation_without_image_is_named(root):
    tiny_coco.edit(root, lambda c: c["images"].pop(1), prefix=PREFIX)
    check_problem(root, "image 101: annotated but not among the file's images", [3, 3, 3, 3])


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"images": [], "categories": []}'])
def test_broken_json(root, text):
    (root / "annotations" / "instances_train2017.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.data\.root: .*instances_train2017\.json"):
        scan(root, task="instance")


@pytest.mark.parametrize("key", ["id", "image_id", "category_id", "segmentation"])
def test_incomplete_json(root, key):
    tiny_coco.edit(root, lambda c: c["annotations"][2].pop(key), prefix=PREFIX)
    with pytest.raises(ValueError, match=r"config\.data\.root: .*is not COCO instance JSON"):
        scan(root, task="instance")


def test_a_category_that_is_no_number(root):
    tiny_coco.edit(root, lambda c: c["annotations"][2].update(category_id=[1]), prefix=PREFIX)
    with pytest.raises(ValueError, match=r"config\.data\.root: .*is not COCO instance JSON"):
        scan(root, task="instance")


def test_nothing_can_be_used(root):
    tiny_coco.edit(root, lambda c: c["annotations"].clear(), prefix=PREFIX)
    with pytest.raises(ValueError, match="no picture of .* can be used.*nothing is annotated"):
        scan(root, task="instance")
    shutil.rmtree(root / "train2017")
    with pytest.raises(ValueError, match="the first of 5 problems"):
        scan(root, task="instance")
