"""COCO's panoptic and instance files: what is stored of sound ones, and what is said of broken ones."""

import json
import re
import shutil
import tracemalloc

import cv2
import numpy as np
import pytest
import tiny_coco
from coco_readers import InstanceFile
from PIL import Image
from pycocotools import mask as run_lengths

from knet_jax.data.sources import by_name
from knet_jax.segmentation import coco_files, image_files
from knet_jax.system.errors import UserError

PREFIXES = {"panoptic": "panoptic_", "instance": "instances_"}
ALL = (0, 1, 2, 3, 4)
WITHOUT_1 = (0, 2, 3, 4)


def find(root, split="train", task="panoptic"):
    return by_name.find(tiny_coco.data_config("", root, dataset="coco"), split, task)


def scan(root, task="panoptic", split="train"):
    return tiny_coco.examined(find(root, split, task))


def write(root, task="panoptic"):
    writers = {"panoptic": tiny_coco.write, "instance": tiny_coco.write_instances}
    return writers[task](root, splits=("train",))


def picture(root, index=1):
    return root / "train2017" / f"train_{index}.jpg"


def png(root, index=1):
    return root / "annotations" / "panoptic_train2017" / f"train_{index}.png"


def test_sound_panoptic_dataset(tmp_path):
    root = write(tmp_path / "coco")
    examples = scan(root)
    assert examples.problems == [] and examples.count == 5
    assert examples.categories == (("dog", "cat", "grass", "sky"), (3, 12, 7, 90), 2)
    for index, record in enumerate(examples.records):
        _, ids, segments = tiny_coco.draw(index, *record.size)
        assert record.image_id == 100 + index and record.file_name == f"train_{index}.jpg"
        assert record.image == picture(root, index).read_bytes()
        assert record.annotation.png == png(root, index).read_bytes()
        stored = record.annotation.segments
        assert [s.id for s in stored] == [s["id"] for s in segments]
        assert [s.label for s in stored] == [3, 2, 0, 1, 1]
        assert [s.iscrowd for s in stored] == [False] * 4 + [True]
        assert [s.area for s in stored] == [(ids == s["id"]).sum() for s in segments]
        # COCO's id is R + 256 G + 65536 B, whatever order a library decodes to.
        pixels = np.array(Image.open(png(root, index))).astype(int)
        np.testing.assert_array_equal(pixels @ [1, 256, 65536], ids)
        loaded = image_files.load_panoptic(record.annotation.png, record.size)
        np.testing.assert_array_equal(image_files.segment_ids(loaded), ids)


def decode(record, instance):
    return run_lengths.decode({"size": list(record.size), "counts": instance.counts})


def test_sound_instance_dataset(tmp_path):
    root = write(tmp_path / "coco", "instance")
    examples = scan(root, "instance")
    assert examples.problems == [] and examples.count == 5
    assert examples.categories == (("dog", "cat"), (3, 12), 2)
    for index, record in enumerate(examples.records):
        assert record.image_id == 100 + index and record.file_name == f"train_{index}.jpg"
        assert record.image == picture(root, index).read_bytes()
        assert [i.label for i in record.annotation] == [0, 1, 1]
        assert [i.iscrowd for i in record.annotation] == [False, False, True]
        drawn = tiny_coco.instance_masks(*record.size)
        for instance, (_, _, mask) in zip(record.annotation, drawn, strict=True):
            np.testing.assert_array_equal(decode(record, instance), mask)
            assert instance.area == mask.sum()


def test_instances_as_they_are_written(tmp_path):
    """The order of classes, classes that say they are stuff, several polygons, areas."""
    root = write(tmp_path / "coco", "instance")

    def change(content):
        content["categories"].reverse()
        content["categories"][0]["isthing"] = 0
        first, second, _, of_next, *_ = content["annotations"]
        first["segmentation"].append([40, 40, 50, 40, 50, 45, 40, 45])
        first["area"] = 17.5
        del second["area"]
        of_next["segmentation"] = [[5, 10, 25, 10, 25, 30, 5, 30], [40, 40, 50, 40]]

    tiny_coco.edit(root, change, prefix="instances_")
    examples = scan(root, "instance")
    assert examples.categories == (("cat", "dog"), (12, 3), 2)
    file = InstanceFile(root / "annotations/instances_train2017.json")
    assert file.categories == examples.categories
    one, other, *_ = examples.records
    expected = tiny_coco.instance_masks(*one.size)[0][2]
    expected[40:45, 40:50] = 1
    np.testing.assert_array_equal(decode(one, one.annotation[0]), expected)
    assert [instance.area for instance in one.annotation[:2]] == [17.5, 25 * 30]
    # A bad polygon leaves the others of its thing.
    [problem] = examples.problems
    assert re.search(r"annotation 3: a polygon has 2 points, .*, its other polygons stay", problem)
    dog = tiny_coco.instance_masks(*other.size)[0][2]
    np.testing.assert_array_equal(decode(other, other.annotation[0]), dog)


def test_where_the_file_of_a_split_is_looked_for(tmp_path):
    root = write(tmp_path / "coco")
    for wrong in ("", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=r"root: .* must hold one annotations/panoptic_train"):
            find(wrong)
    there = r"panoptic_test\*\.json for split 'test' .*, found annotations/panoptic_train2017\.json"
    with pytest.raises(UserError, match=there):
        find(root, "test")
    name = find(root).name
    assert find(root).name == name
    assert find(shutil.copytree(root, tmp_path / "copy")).name != name
    tiny_coco.edit(root, lambda content: content["images"].reverse())
    assert find(root).name != name
    folder = root / "annotations"
    shutil.copy(folder / "panoptic_train2017.json", folder / "panoptic_train_b.json")
    with pytest.raises(UserError, match=r"found annotations/panoptic_train2017.json, .*_b\.json"):
        find(root)
    assert find(root, "train2017").name
    shutil.copy(folder / "panoptic_train2017.json", folder / "panoptic_train.json")
    assert find(root).name


# What makes a dataset unusable: the content of its JSON, changed or replaced, and the message.


def replace(key, value, *path):
    """Changes a value deep in the content."""

    def change(content):
        for step in path:
            content = content[step]
        content[key] = value

    return change


def remove(key, *path):
    """Removes a key, or an item of a list, deep in the content."""

    def change(content):
        for step in path:
            content = content[step]
        content.pop(key)

    return change


def of_all(key, change, *arguments):
    """Changes all entries of a list of the content."""

    def change_all(content):
        for entry in content[key]:
            change(*arguments)(entry)

    return change_all


BROKEN = {
    "panoptic": [
        *(
            (text, r"config\.data\.root: .*train2017\.json is not .*JSON")
            for text in ("{", "[]", "{}", "null", "\xff", "[" * 100_000)
        ),
        ('{"categories": [], "annotations": [], "images": [{"id": Infinity}]}', "image id inf;"),
        (replace("annotations", None), "'annotations' is not accepted; accepted: a list"),
        (remove("isthing", "categories", 0), "category 'grass' does not say isthing"),
        (replace("id", 7, "categories", 1), r"category ids are \[.*\]; accepted: .* each once"),
        (replace("id", "grass", "categories", 0), r"category ids are \[.*\]; accepted: whole"),
        (replace("name", "x" * 5000, "categories", 0), "a class is called 'xxx.*; accepted: texts"),
        (replace("name", "\x00\n", "categories", 0), "a class is called .*; accepted: texts of 1"),
        (replace("id", 101, "images", 2), r"2017\.json: image id 101; accepted: .*, each once"),
        (replace("id", 2**70, "images", 2), f"image id {2**70}; accepted: whole numbers of 64"),
        (replace("isthing", 2, "categories", 0), "isthing is 2; accepted: 0 and 1"),
        (replace("categories", []), "it lists 0 names"),
        *(
            (change, rf"can be used, the first of . problems: .*{message}.*, left out")
            for change, message in (
                (of_all("annotations", remove, "segments_info"), "no segment"),
                (of_all("annotations", replace, "file_name", None), "file_name is None; .* file"),
                (of_all("annotations", replace, "image_id", 5), "no annotation"),
            )
        ),
        (of_all("categories", replace, "isthing", 0), "lists no thing .*--config coco_semantic"),
    ],
    "instance": [
        (of_all("annotations", replace, "segmentation", []), "boxes only; accepted: masks"),
        (replace("annotations", []), "no picture of .* can be used.*nothing is annotated"),
    ],
}


@pytest.mark.parametrize("task", BROKEN)
def test_broken_files_are_named(tmp_path, task):
    root = write(tmp_path / "coco", task)
    path = root / "annotations" / f"{PREFIXES[task]}train2017.json"
    sound = path.read_bytes()
    for change, message in BROKEN[task]:
        if callable(change):
            path.write_bytes(sound)
            tiny_coco.edit(root, change, prefix=PREFIXES[task])
        else:
            path.write_bytes(change.encode("latin-1"))
        with pytest.raises(UserError, match=message):
            scan(root, task)
    path.write_bytes(sound)
    if task == "panoptic":
        tiny_coco.edit(root, replace("isthing", True, "categories", 1))
        assert scan(root).problems == []
        for index in ALL:  # swapped channels are not taken for data
            cv2.imwrite(str(png(root, index)), cv2.imread(str(png(root, index)))[..., ::-1])
        with pytest.raises(UserError, match="no picture of .* can be used"):
            scan(root)
    shutil.rmtree(root / "train2017")
    with pytest.raises(UserError, match="no picture of .* can be used, the first of 5 problems"):
        scan(root, task)


# What costs a picture, or a part of one: what is changed, what is said, which pictures are left.


def truncate(keep):
    return lambda root: png(root).write_bytes(png(root).read_bytes()[:keep])


def edit(change):
    return lambda root: tiny_coco.edit(root, change)


def list_twice(content):
    segments = content["annotations"][1]["segments_info"]
    segments[1]["id"] = segments[0]["id"]


PANOPTIC_PROBLEMS = [
    (lambda root: png(root).unlink(), r"train_1\.jpg: .*1\.png is missing, left out", WITHOUT_1),
    (
        lambda root: shutil.copy(png(root, 0), png(root)),
        "train_1.jpg: is 60x80 where 80x60 is expected, left out",
        WITHOUT_1,
    ),
    (truncate(150), r"train_1\.jpg: .*train_1\.png", WITHOUT_1),
    (
        lambda root: Image.open(png(root)).save(png(root), "JPEG"),
        r"train_1\.png is a JPEG; accepted: PNG, .*, left out",
        WITHOUT_1,
    ),
    (
        lambda root: picture(root).write_text("<html>404</html>"),
        r"train_1\.jpg: cannot be decoded, left out",
        WITHOUT_1,
    ),
    (
        edit(lambda c: c["annotations"][1]["segments_info"].append({"id": 5, "category_id": 3})),
        r"train_1\.jpg: segments \[5\] are not in its PNG, dropped",
        ALL,
    ),
    (
        edit(remove(0, "annotations", 1, "segments_info")),
        r"train_1\.jpg: ids \[140256\] of its PNG are not listed",
        ALL,
    ),
    (edit(list_twice), r"train_1\.jpg: segments overlap: ids \[140256\] .* left out", WITHOUT_1),
    (
        edit(lambda c: c["annotations"].append(c["annotations"][1])),
        "image 101: annotated more than once",
        ALL,
    ),
    (
        edit(lambda c: c["categories"][1].update(name=c["categories"][0]["name"])),
        "several categories are called '.*', and stay apart",
        ALL,
    ),
    (edit(remove(1, "annotations")), r"train_1\.jpg: no annotation, left out", WITHOUT_1),
    (
        edit(remove(1, "images")),
        "image 101: annotated but not among the file's images",
        WITHOUT_1,
    ),
]


def test_problems_of_panoptic_files(tmp_path):
    sound = write(tmp_path / "sound")
    for number, (change, message, left) in enumerate(PANOPTIC_PROBLEMS):
        root = shutil.copytree(sound, tmp_path / str(number))
        change(root)
        examples = scan(root)
        assert len(examples.problems) == 1 and re.search(message, examples.problems[0]), message
        records = list(examples.records)
        assert [record.file_name for record in records] == [f"train_{i}.jpg" for i in left]
        assert examples.count == len(left)
        if left == ALL:
            listed = 4 if "not listed" in message else 5
            assert len(records[1].annotation.segments) == listed


BAD_VALUES = [
    ({"segmentation": [[1, 2, 30, 40]]}, "a polygon has 2 points, it must have three or more"),
    ({"segmentation": [[1, 2, 3, 4, 5, float("nan")]]}, "a polygon must be a list of numbers"),
    ({"segmentation": 5}, "neither polygons nor RLE"),
    ({"segmentation": [[900, 900, 950, 900, 950, 950]]}, "its mask is empty"),
    ({"segmentation": {"size": [60, 80], "counts": "P"}}, "RLE is cut off"),
    ({"category_id": [1]}, "unhashable"),
    ({"category_id": 55}, "category id 55 is not"),
    ({"area": "big"}, "area 'big' is no number"),
    ({"iscrowd": "0"}, "iscrowd is '0'; accepted: 0 and 1"),
]


def test_bad_instances_are_named_and_dropped(tmp_path):
    root = write(tmp_path / "coco", "instance")

    def change(content):
        sound = content["annotations"][0]
        for number, (values, _) in enumerate(BAD_VALUES, 100):
            content["annotations"].append(sound | {"id": number} | values)

    tiny_coco.edit(root, change, prefix="instances_")
    examples = scan(root, "instance")
    assert len(examples.problems) == len(BAD_VALUES)
    for number, (problem, (_, message)) in enumerate(zip(examples.problems, BAD_VALUES), 100):
        assert re.search(rf"train_0\.jpg: annotation {number}: .*{message}.*, dropped", problem)
    assert [len(record.annotation) for record in examples.records] == [3] * 5


def test_a_picture_of_another_size_than_the_file_says_is_left_out(tmp_path):
    root = write(tmp_path / "coco", "instance")
    tiny_coco.edit(root, replace("height", 81, "images", 1), prefix="instances_")
    examples = scan(root, "instance")
    assert examples.problems == ["train_1.jpg: is 60x80 where 60x81 is expected, left out"]
    assert examples.count == 4


def test_what_is_null_or_a_text_or_absent(tmp_path):
    """As exports write it, and with a byte order mark."""
    root = write(tmp_path / "coco", "instance")
    path = root / "annotations" / "instances_train2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image |= {"id": str(image["id"]), "height": None, "width": None}
    for category in content["categories"]:
        category |= {"id": float(category["id"]), "name": f"{category['name']}\r\n\x07"}
    for annotation in content["annotations"]:
        for key in ("image_id", "category_id"):
            annotation[key] = str(annotation[key])
        annotation |= {"area": None, "id": None, "iscrowd": annotation["iscrowd"] or None}
    del content["annotations"][0]["segmentation"]
    for key in ("annotations", "images", "categories"):
        content[key].append(None)
    content["images"].append({"file_name": "lost.jpg"})
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text(json.dumps(content), encoding)
        examples = scan(root, "instance")
        assert examples.categories == (("dog", "cat"), (3, 12), 2)
        assert examples.problems == [
            "train_0.jpg: annotation without id: it has no mask ('segmentation'), dropped",
            "lost.jpg: it has no id, left out",
        ]
        records = list(examples.records)
        assert [len(record.annotation) for record in records] == [2, 3, 3, 3, 3]
        assert [one.iscrowd for one in records[0].annotation] == [False, True]
        assert records[0].annotation[0].area == 25 * 30


def lists_of(path):
    """All of a file, as `coco_files.read_lists` gives it."""
    return {
        key: entries and [(value, coco_files.parse(text)) for value, text in entries]
        for key, entries in coco_files.read_lists(path)
    }


def test_files_are_read_alike_in_parts_of_any_size(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    content = {
        "info": {"year": 2017, "of": [1, None]},
        "empty": [],
        "images": [
            {"id": "7", "name": '\\ "]}, é \ud800', "size": 12345.75},
            None,
            -1e-9,
            123456,
            [],
        ],
        "none": None,
        "annotations": [{"segmentation": [[float("nan"), 2**70, None]]}, "x", True],
    }
    parsed = json.loads(json.dumps(content), object_hook=coco_files._tidy)
    lists = [parsed[key] if isinstance(parsed.get(key), list) else None for key in content]
    expected = {key: of and [(one, one) for one in of] for key, of in zip(content, lists)}
    for encoding, indent in (("utf-8", None), ("utf-8-sig", 1), ("utf-16", 4), ("utf-32", None)):
        text = json.dumps(content, indent=indent, ensure_ascii=encoding == "utf-16")
        path.write_text(text, encoding, errors="surrogatepass")
        for part in (1, 2, 3, 7, 64, 1 << 20):
            monkeypatch.setattr(coco_files, "PART", part)
            assert repr(lists_of(path)) == repr(expected)  # where nan equals itself
    text = json.dumps(content)
    for number in range(len(text)):  # wherever a file is cut off
        path.write_text(text[:number])
        with pytest.raises(ValueError):
            lists_of(path)
    path.write_text(f"{text} x")
    with pytest.raises(ValueError, match=f"nothing else is expected at letter {len(text) + 1}"):
        lists_of(path)


def test_files_are_read_in_constant_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(coco_files, "PART", 1 << 12)
    path = tmp_path / "file.json"
    path.write_text(json.dumps({"annotations": [{"segmentation": [[0.5] * 99]}] * 5000}))
    assert path.stat().st_size > 2_000_000
    tracemalloc.start()
    count = sum(1 for _, entries in coco_files.read_lists(path) for _ in entries)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 5000 and peak < 200_000


EXPORTS = [  # the JSON, and the folder of its pictures
    ("train/_annotations.coco.json", "train"),
    ("training/_annotations.coco.json", "training"),  # as `val` finds `valid`
    ("train/annotations/instances_default.json", "train/images"),
    ("train/annotations/instances_default.json", "train/images/default"),
    ("annotations/instances_train.json", "images/train"),
    ("train/result.json", "train"),
]


def test_exports_are_found_where_they_lie(tmp_path):
    sound = write(tmp_path / "sound", "instance")

    def group(content):
        for category in content["categories"]:
            category["supercategory"] = "animals"
        content["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

    tiny_coco.edit(sound, group, prefix="instances_")
    for number, (file, folder) in enumerate(EXPORTS):
        root = tmp_path / str(number)
        (root / file).parent.mkdir(parents=True)
        shutil.copy(sound / "annotations/instances_train2017.json", root / file)
        shutil.copytree(sound / "train2017", root / folder, dirs_exist_ok=True)
        examples = scan(root, "instance")
        assert examples.problems == [] and examples.categories.names == ("dog", "cat")
    config = tiny_coco.data_config("", root, dataset="coco", supercategories=True)
    wanted = by_name.find(config, "train", "instance")
    assert wanted.examine().categories.names == ("animals", "dog", "cat")
    assert wanted.name != find(root, task="instance").name


def test_names_of_files_lead_nowhere_else(tmp_path):
    root = write(tmp_path / "coco", "instance")
    shutil.copy(picture(root), tmp_path / "secret.jpg")
    for name in ("../../secret.jpg", str(tmp_path / "secret.jpg"), "x\\..\\..\\..\\secret.jpg"):
        tiny_coco.edit(root, replace("file_name", name, "images", 1), prefix="instances_")
        [problem] = scan(root, "instance").problems
        assert "leads out of the folder of pictures, left out" in problem
    tiny_coco.edit(root, replace("file_name", "\ud800", "images", 1), prefix="instances_")
    [problem] = scan(root, "instance").problems
    assert problem == r"'\ud800': its name is not in UTF-8, left out"
