import json
import re
import shutil

import cv2
import numpy as np
import pytest
import tiny_coco
from PIL import Image

from knet_jax.data.sources import coco, examine
from knet_jax.segmentation import image_files


@pytest.fixture
def root(tmp_path):
    return tiny_coco.write(tmp_path / "coco")


def scan(root, split="train", task="panoptic"):
    source = coco.SOURCES[task]
    return source.scan(coco.find_annotations(str(root), split, source.prefix))


def png(root, index):
    return root / "annotations" / "panoptic_train2017" / f"train_{index}.png"


ALL = [f"train_{i}.jpg" for i in range(5)]
WITHOUT_1 = ["train_0.jpg", "train_2.jpg", "train_3.jpg", "train_4.jpg"]


def test_sound_dataset(root):
    examples = scan(root)
    assert examples.problems == [] and examples.count == 5
    assert examples.categories.names == ("dog", "cat", "grass", "sky")
    assert examples.categories.dataset_ids == (3, 12, 7, 90)
    assert examples.categories.num_things == 2
    for index, record in enumerate(examples.records):
        height, width = record.size
        _, ids, segments = tiny_coco.draw(index, height, width)
        assert record.image_id == 100 + index and record.file_name == f"train_{index}.jpg"
        assert record.image == (root / "train2017" / record.file_name).read_bytes()
        assert record.annotation.png == png(root, index).read_bytes()
        assert [s.id for s in record.annotation.segments] == [s["id"] for s in segments]
        assert [s.label for s in record.annotation.segments] == [3, 2, 0, 1, 1]
        assert [s.iscrowd for s in record.annotation.segments] == [False] * 4 + [True]
        assert [s.area for s in record.annotation.segments] == [
            (ids == s["id"]).sum() for s in segments
        ]


def test_coco_itself(coco_mini):
    """The file's own list, things first, is COCO's standard order of 80 and 53 classes."""
    examples = scan(coco_mini, "val")
    assert examples.count == 60 and examples.problems == []
    assert len(examples.categories.names) == 133 and examples.categories.num_things == 80
    ids = examples.categories.dataset_ids
    assert (ids[0], ids[79], ids[80], ids[132]) == (1, 90, 92, 200)
    assert list(ids) == sorted(ids)
    assert examples.categories.names[0] == "person" and examples.categories.names[80] == "banner"


def test_areas_equal_the_ones_of_coco(coco_mini):
    listed = json.loads((coco_mini / "annotations" / "panoptic_val2017.json").read_text())
    areas = {
        (annotation["image_id"], segment["id"]): segment["area"]
        for annotation in listed["annotations"]
        for segment in annotation["segments_info"]
    }
    counted = {
        (record.image_id, segment.id): segment.area
        for record in scan(coco_mini, "val").records
        for segment in record.annotation.segments
    }
    assert counted == areas


# What makes a dataset unusable.


@pytest.mark.parametrize("where", ["", "nowhere"])
def test_no_dataset_at_root(tmp_path, where):
    with pytest.raises(
        ValueError, match=r"config\.data\.root: no dataset .* annotations/panoptic_"
    ):
        coco.split_config(where and str(tmp_path / where), "train", "panoptic")


def test_no_such_split(root):
    with pytest.raises(ValueError, match=r"panoptic_test\*\.json for split 'test', found none"):
        coco.split_config(str(root), "test", "panoptic")


def test_ambiguous_split(root):
    annotations = root / "annotations"
    shutil.copy(annotations / "panoptic_train2017.json", annotations / "panoptic_train_b.json")
    with pytest.raises(ValueError, match="found panoptic_train2017.json, panoptic_train_b.json"):
        coco.split_config(str(root), "train", "panoptic")
    assert coco.split_config(str(root), "train2017", "panoptic").annotations.endswith(
        "train2017.json"
    )
    shutil.copy(annotations / "panoptic_train2017.json", annotations / "panoptic_train.json")
    assert coco.split_config(str(root), "train", "panoptic").annotations.endswith(
        "panoptic_train.json"
    )


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "{}",
        "null",
        '{"images": 3}',
        "\xff",
        '{"images": [{"id": Infinity}]}',
        "[" * 100_000,
    ],
)
def test_broken_json(root, text):
    path = root / "annotations" / "panoptic_train2017.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"config\.data\.root: .*train2017\.json is not .*JSON"):
        scan(root)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["annotations"][2].pop("segments_info"),
        lambda c: c["annotations"][2].pop("image_id"),
        lambda c: c["annotations"][2]["segments_info"][0].pop("id"),
        lambda c: c["annotations"].__setitem__(1, None),
        lambda c: c["images"][0].pop("file_name"),
        lambda c: c["images"][0].update(id=None),
        lambda c: c["images"][0].update(file_name=7),
        lambda c: c["annotations"][0].update(file_name=None),
        lambda c: c["categories"][0].pop("isthing"),
    ],
)
def test_incomplete_json(root, change):
    tiny_coco.edit(root, change)
    with pytest.raises(ValueError, match=r"config\.data\.root: .*is not COCO panoptic JSON"):
        scan(root)


def test_unknown_category(root):
    def change(content):
        content["annotations"][1]["segments_info"][0]["category_id"] = 55

    tiny_coco.edit(root, change)
    with pytest.raises(ValueError, match="image 101: category id 55 of segment"):
        scan(root)


def test_category_ids_twice(root):
    tiny_coco.edit(root, lambda content: content["categories"].append(content["categories"][0]))
    with pytest.raises(ValueError, match="category ids must differ"):
        scan(root)


def test_image_ids_twice(root):
    tiny_coco.edit(root, lambda content: content["images"][2].update(id=101))
    with pytest.raises(ValueError, match=r"train2017\.json: image id 101 is listed more than once"):
        scan(root)


def test_image_id_of_many_digits(root):
    tiny_coco.edit(root, lambda content: content["images"][2].update(id=2**70))
    with pytest.raises(ValueError, match=f"image id {2**70} does not fit into 64 bits"):
        scan(root)


@pytest.mark.parametrize("value", ["0", 2, None])
def test_answers_are_yes_or_no(root, value):
    tiny_coco.edit(root, lambda content: content["categories"][0].update(isthing=value))
    with pytest.raises(ValueError, match=rf"isthing is {value!r}; accepted: 0 and 1"):
        scan(root)
    tiny_coco.edit(root, lambda content: content["categories"][0].update(isthing=True))
    scan(root)
    tiny_coco.edit(root, lambda c: c["annotations"][0]["segments_info"][0].update(iscrowd=value))
    with pytest.raises(ValueError, match=rf"iscrowd is {value!r}; accepted: 0 and 1"):
        scan(root)


def test_no_category(root):
    tiny_coco.edit(root, lambda content: content.update(categories=[]))
    with pytest.raises(ValueError, match="its list of categories is empty"):
        scan(root)


def test_nothing_can_be_used(root):
    shutil.rmtree(root / "train2017")
    with pytest.raises(ValueError, match="no picture of .* can be used, the first of 5 problems"):
        scan(root)


def test_swapped_channels_are_not_taken_for_data(root):
    for index in range(5):
        cv2.imwrite(str(png(root, index)), cv2.imread(str(png(root, index)))[..., ::-1])
    with pytest.raises(ValueError, match="no picture of .* can be used"):
        scan(root)


# What costs a picture, or a part of it.


def check_problem(root, pattern, left):
    examples = scan(root)
    assert len(examples.problems) == 1
    assert re.search(pattern, examples.problems[0])
    records = list(examples.records)
    assert [record.file_name for record in records] == left
    assert examples.count == len(left)
    return records


def test_missing_picture(root):
    (root / "train2017" / "train_1.jpg").unlink()
    check_problem(root, r"train_1\.jpg: .*train_1\.jpg is missing, left out", WITHOUT_1)


def test_missing_png(root):
    png(root, 1).unlink()
    check_problem(root, r"train_1\.jpg: panoptic PNG .*train_1\.png is missing", WITHOUT_1)


def test_png_of_another_size(root):
    shutil.copy(png(root, 0), png(root, 1))
    check_problem(root, "train_1.jpg: picture is 60x80 but its panoptic PNG 80x60", WITHOUT_1)


@pytest.mark.parametrize("keep", [0, 20, 150])
def test_damaged_png(root, keep):
    png(root, 1).write_bytes(png(root, 1).read_bytes()[:keep])
    check_problem(root, r"train_1\.jpg: .*train_1\.png", WITHOUT_1)


def test_not_a_picture(root):
    (root / "train2017" / "train_1.jpg").write_text("<html>404</html>")
    check_problem(root, r"train_1\.jpg is not a picture, left out", WITHOUT_1)


def test_segment_that_the_png_does_not_show(root):
    def change(content):
        content["annotations"][1]["segments_info"].append({"id": 5, "category_id": tiny_coco.DOG})

    tiny_coco.edit(root, change)
    records = check_problem(root, r"train_1\.jpg: segments \[5\] are not in its PNG, dropped", ALL)
    assert len(records[1].annotation.segments) == 5


def test_id_that_the_json_does_not_list(root):
    tiny_coco.edit(root, lambda c: c["annotations"][1]["segments_info"].pop(0))
    records = check_problem(root, r"train_1\.jpg: ids \[140256\] of its PNG are not listed", ALL)
    assert len(records[1].annotation.segments) == 4


def test_overlap(root):
    def change(content):
        segments = content["annotations"][1]["segments_info"]
        segments[1]["id"] = segments[0]["id"]

    tiny_coco.edit(root, change)
    check_problem(root, r"train_1\.jpg: segments overlap: ids \[140256\] .* left out", WITHOUT_1)


def test_image_annotated_twice(root):
    tiny_coco.edit(root, lambda c: c["annotations"].append(c["annotations"][1]))
    check_problem(root, "image 101: annotated more than once", ALL)


def test_image_without_annotation(root):
    tiny_coco.edit(root, lambda c: c["annotations"].pop(1))
    check_problem(root, r"train_1\.jpg: no annotation, left out", WITHOUT_1)


def test_annotation_without_image(root):
    tiny_coco.edit(root, lambda c: c["images"].pop(1))
    check_problem(root, "image 101: annotated but not among the file's images", WITHOUT_1)


def test_picture_turned_by_exif(root):
    path = root / "train2017" / "train_1.jpg"
    picture, exif = Image.open(path), Image.Exif()
    exif[examine.EXIF_ORIENTATION] = 6
    # The annotation is drawn on the upright picture, or on the stored one: both are right.
    picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    assert scan(root).problems == []
    picture.save(path, exif=exif)
    assert scan(root).problems == []


# Names of what is prepared.


def test_config_name_follows_root_and_content(root, tmp_path):
    name = coco.split_config(str(root), "train", "panoptic").name
    assert coco.split_config(str(root), "train", "panoptic").name == name
    copy = shutil.copytree(root, tmp_path / "copy")
    assert coco.split_config(str(copy), "train", "panoptic").name != name
    tiny_coco.edit(root, lambda c: c["images"].reverse())
    assert coco.split_config(str(root), "train", "panoptic").name != name


def test_png_is_rgb(root):
    """COCO's id is R + 256 G + 65536 B, whatever order a library decodes to."""
    record = next(iter(scan(root).records))
    _, ids, _ = tiny_coco.draw(0, *record.size)
    pixels = np.array(Image.open(png(root, 0))).astype(int)
    np.testing.assert_array_equal(pixels @ [1, 256, 65536], ids)
    loaded = image_files.load_panoptic(record.annotation.png, record.size)
    np.testing.assert_array_equal(image_files.segment_ids(loaded), ids)
