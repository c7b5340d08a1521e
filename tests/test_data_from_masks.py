"""COCO's layout from maps of classes and of instances, and from polygons."""

import json

import cv2
import numpy as np
import pytest
import tiny_coco
from programs import status_of
from pycocotools.coco import COCO

from knet_jax.data import pipeline
from knet_jax.data.from_masks import write_panoptic_dataset
from knet_jax.data.from_polygons import write_instance_dataset
from knet_jax.system.errors import UserError

CLASSES = np.zeros((40, 60), np.uint8)  # background
CLASSES[5:15, 5:25] = 1  # two cells that touch
CLASSES[20:30, 40:50] = 2  # a fiber
CLASSES[30:40] = 3  # soil
CLASSES[0:2] = 255  # unknown
INSTANCES = np.zeros((40, 60), np.uint16)
INSTANCES[5:15, 5:15] = 300
INSTANCES[5:15, 15:25] = 7


@pytest.fixture
def masks(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "deep/b.png"):
        for folder, pixels in (
            ("photos", rng.integers(0, 256, (40, 60, 3), np.uint8)),
            ("classes", CLASSES),
            ("instances", INSTANCES),
        ):
            path = tmp_path / folder / name
            path = path if folder == "photos" else path.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)
    (tmp_path / "classes.txt").write_text("background\ncell\nfiber\nsoil\n")
    return tmp_path


def arguments(masks, **changes):
    values = {
        "images": masks / "photos",
        "class_maps": masks / "classes",
        "instance_maps": masks / "instances",
        "names": masks / "classes.txt",
        "things": ["fiber", "cell"],
        "root": masks / "DATA",
        "split": "train",
    }
    return values | changes


def test_the_loader_and_pycocotools_read_the_maps_back(masks):
    assert write_panoptic_dataset(**arguments(masks)) == []
    config = tiny_coco.data_config(masks / "prepared", masks / "DATA")
    split = pipeline.load_split(config, "train", "panoptic")
    assert split.categories.names == ("cell", "fiber", "background", "soil")
    assert (len(split.sizes), split.categories.num_things) == (2, 2)
    truth = split.truth(1)
    shown = np.full(CLASSES.shape, 255)
    for info in truth.segments:
        shown[truth.ids == info.id] = (1, 2, 0, 3)[info.label]
    np.testing.assert_array_equal(shown, CLASSES)
    cells = [info for info in truth.segments if info.label == 0]
    assert [(truth.ids == info.id).sum() for info in cells] == [100, 100]
    # The fiber has no number in the map of instances.
    assert [info.iscrowd for info in truth.segments if info.label == 1] == [True]

    instances = pipeline.load_split(config, "train", "instance").truth(0)
    cell, fiber = (0, 100.0, False), (1, 100.0, True)
    assert sorted((i.label, i.area, i.iscrowd) for i in instances) == [cell, cell, fiber]

    coco = COCO(masks / "DATA/annotations/instances_train.json")
    annotation = coco.loadAnns(coco.getAnnIds(imgIds=[1]))[0]
    x, y, width, height = map(int, annotation["bbox"])
    mask = coco.annToMask(annotation)
    assert mask[y : y + height, x : x + width].all() and mask.sum() == width * height


def test_regions_are_things_without_a_map_of_instances(masks):
    assert write_panoptic_dataset(**arguments(masks, instance_maps=None)) == []
    content = json.loads((masks / "DATA/annotations/instances_train.json").read_text())
    assert [a["area"] for a in content["annotations"]] == [200.0, 100.0] * 2
    assert not any(a["iscrowd"] for a in content["annotations"])


def test_mistakes_are_named(masks, tmp_path):
    for changes, message in (
        (
            {"things": ["cel"]},
            "--things: 'cel'; accepted, each once: background, cell, fiber, soil",
        ),
        ({"images": tmp_path / "nowhere"}, "--images: there is no folder .*nowhere"),
        ({"names": tmp_path / "nowhere"}, "--names: there is no file .*nowhere"),
        ({"split": "../../evil"}, "--split=../../evil; accepted: a name without folders"),
        ({"split": ".."}, "--split=..; accepted: a name without folders"),
    ):
        with pytest.raises(UserError, match=message):
            write_panoptic_dataset(**arguments(masks, **changes))
        assert not (masks / "DATA").exists()
    with pytest.raises(UserError, match=r"can be used; .* holds \[255\], which --names has no"):
        write_panoptic_dataset(**arguments(masks, void=7))


def test_the_command_says_what_is_left_out(masks, capsys):
    (masks / "classes/a.png").unlink()
    values = arguments(masks, things="fiber,cell")
    assert status_of("from-masks", *(f"--{name}={value}" for name, value in values.items())) == 3
    said = capsys.readouterr().out
    assert "a.jpg: " in said and "a.png is missing, left out" in said
    assert "wrote 1 pictures" in said


SQUARE, CORNERS = [[5, 5], [15, 5], [15, 15], [5, 15]], [[5, 5], [15, 15]]


@pytest.mark.parametrize("form", ["labelme", "yolo"])
def test_polygons_of_labelme_and_yolo(masks, form):
    rows = (np.array(SQUARE) / (60, 40)).ravel().tolist()
    yolo = "\n".join(" ".join(map(str, row)) for row in ([1, *rows], [0, *rows], [1, 0, 0, 1, 1]))
    shapes = [
        {"label": "cell", "points": SQUARE, "group_id": 4},
        {"label": "cell", "points": [[20, 5], [30, 15]], "shape_type": "rectangle", "group_id": 4},
        {"label": "bud", "points": CORNERS, "shape_type": "rectangle", "group_id": None},
        {"label": "bud", "points": [[7, 7]], "shape_type": "point"},
    ]
    for name in ("a", "deep/b"):
        path = masks / "photos" / name
        path.with_suffix(".txt").write_text(yolo)
        if form == "labelme":
            path.with_suffix(".json").write_text(json.dumps({"shapes": shapes}), "utf-8-sig")
    names = masks / "data.yaml" if form == "yolo" else None
    (masks / "data.yaml").write_text("nc: 2\nnames: {0: bud, 1: cell}\n")
    problems = write_instance_dataset(
        masks / "photos", masks / "photos", masks / "DATA", "train", names
    )
    assert [problem.split(": ")[0] for problem in problems] == ["a.jpg", "deep/b.png"]
    config = tiny_coco.data_config(masks / "prepared", masks / "DATA")
    split = pipeline.load_split(config, "train", "instance")
    assert split.categories.names == ("bud", "cell")
    areas = [(1, 200.0), (0, 100.0)] if form == "labelme" else [(1, 100.0), (0, 100.0)]
    assert [(one.label, one.area) for one in split.truth(1)] == areas


def test_mistakes_in_polygons_are_named(masks):
    folders = masks / "photos", masks / "photos", masks / "DATA", "train"
    with pytest.raises(UserError, match=r"can be used; a\.jpg: .*a\.txt is missing, left out"):
        write_instance_dataset(*folders)
    (masks / "data.yaml").write_text("nc: 2")
    with pytest.raises(UserError, match=r"--names: .*data\.yaml is no list of classes: KeyError"):
        write_instance_dataset(*folders, masks / "data.yaml")
    (masks / "data.yaml").write_text("names: [cell, null]")
    with pytest.raises(UserError, match=r"--names: .*a name is empty, or there twice"):
        write_instance_dataset(*folders, masks / "data.yaml")
    (masks / "photos/a.txt").write_text("0 0 0 1 0 1 1\n0 0 0 90 0 90 90\n")
    (masks / "photos/deep/b.json").write_text('{"imagePath": "b.png"}')
    problems = write_instance_dataset(*folders, masks / "classes.txt")
    (masks / "photos/deep/b.json").unlink()
    assert [line.split(";")[0] for line in problems] == [
        "a.jpg: annotation 2: 6 coordinates up to 90",
        "deep/b.png: b.json has no list 'shapes', as LabelMe writes it, left out",
    ]
    (masks / "photos/a.txt").write_text("0 0 0 1 0 1 1\n")
    (masks / "photos/deep/b.txt").write_text("9 0 0 1 0 1 1")
    [problem] = write_instance_dataset(*folders, masks / "classes.txt")
    assert problem == "deep/b.png: class 9; accepted: numbers of --names, which has 4, left out"
    # Numbers are those of the file, whatever there are of them.
    (masks / "data.yaml").write_text("names: {3: cell, '9': bud}")
    (masks / "photos/a.txt").write_text("-1 0 0 1 0 1 1\n")
    [problem] = write_instance_dataset(*folders, masks / "data.yaml")
    assert problem == "a.jpg: class -1; accepted: numbers of --names, which has 2, left out"
    written = json.loads((masks / "DATA/annotations/instances_train.json").read_text())
    assert [one["category_id"] for one in written["annotations"]] == [2]


def test_bad_shapes_of_labelme_are_dropped(masks):
    shapes = [
        {"label": "cell\r", "points": SQUARE},
        {"label": 7, "points": SQUARE},
        {"label": None, "points": SQUARE},
        {"label": " ", "points": SQUARE},
        {"label": "cell", "points": None},
        {"label": "cell", "points": SQUARE, "shape_type": "rectangle"},
        {"label": "cell", "points": [[0, 0], [0, None], [1, 1]]},
        None,
    ]
    for name in ("a", "deep/b"):
        (masks / f"photos/{name}.json").write_text(json.dumps({"shapes": shapes}), "utf-16")
    problems = write_instance_dataset(masks / "photos", masks / "photos", masks / "DATA", "train")
    assert [line.split(":")[:2] for line in problems[:6]] == [
        ["a.jpg", f" annotation {number}"] for number in range(3, 9)
    ]
    written = json.loads((masks / "DATA/annotations/instances_train.json").read_text())
    assert [one["name"] for one in written["categories"]] == ["7", "cell"]
    assert [one["category_id"] for one in written["annotations"]] == [2, 1, 2, 1]
