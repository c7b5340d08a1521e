import json
import subprocess
import sys

import cv2
import numpy as np
import pytest
import tiny_coco
from pycocotools.coco import COCO

from knet_jax.data import pipeline

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
    for split, name in (("train", "a.jpg"), ("train", "deep/b.png"), ("val", "c.jpg")):
        for folder, pixels in (
            ("photos", rng.integers(0, 256, (40, 60, 3), np.uint8)),
            ("classes", CLASSES),
            ("instances", INSTANCES),
        ):
            path = tmp_path / folder / split / name
            path = path if folder == "photos" else path.with_suffix(".png")
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), pixels)
    (tmp_path / "classes.txt").write_text("background\ncell\nfiber\nsoil\n")
    return tmp_path


def convert(masks, split="train", **flags):
    values = {
        "images": masks / "photos" / split,
        "class_maps": masks / "classes" / split,
        "instance_maps": masks / "instances" / split,
        "names": masks / "classes.txt",
        "things": "fiber,cell",
        "root": masks / "DATA",
        "split": split,
    } | flags
    arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
    command = [sys.executable, "-m", "knet_jax.data.from_masks", *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def load(masks, task):
    config = tiny_coco.data_config(masks / "prepared", masks / "DATA", dataset="coco")
    return pipeline.load_split(config, "train", task)


def test_the_loader_reads_the_maps_back(masks):
    for split in ("train", "val"):
        assert convert(masks, split).returncode == 0
    split = load(masks, "panoptic")
    assert split.categories.names == ("cell", "fiber", "background", "soil")
    assert (len(split), split.categories.num_things) == (2, 2)
    truth = split.truth(1)
    shown = np.full(CLASSES.shape, 255)
    for info in truth.segments:
        shown[truth.ids == info.id] = (1, 2, 0, 3)[info.label]
    np.testing.assert_array_equal(shown, CLASSES)
    cells = [info for info in truth.segments if info.label == 0]
    assert [(truth.ids == info.id).sum() for info in cells] == [100, 100]
    # The fiber has no number in the map of instances.
    assert [info.iscrowd for info in truth.segments if info.label == 1] == [True]

    instances = load(masks, "instance").truth(0)
    assert sorted((i.label, i.area, i.iscrowd) for i in instances) == [
        (0, 100.0, False),
        (0, 100.0, False),
        (1, 100.0, True),
    ]


def test_pycocotools_reads_the_instances(masks):
    convert(masks)
    coco = COCO(masks / "DATA/annotations/instances_train.json")
    annotation = coco.loadAnns(coco.getAnnIds(imgIds=[1]))[0]
    x, y, width, height = map(int, annotation["bbox"])
    mask = coco.annToMask(annotation)
    assert mask[y : y + height, x : x + width].all() and mask.sum() == width * height


def test_regions_are_things_without_a_map_of_instances(masks):
    assert convert(masks, instance_maps=None).returncode == 0
    content = json.loads((masks / "DATA/annotations/instances_train.json").read_text())
    assert [a["area"] for a in content["annotations"]] == [200.0, 100.0] * 2
    assert not any(a["iscrowd"] for a in content["annotations"])


def test_what_does_not_fit_is_left_out_and_named(masks):
    (masks / "classes/train/a.png").unlink()
    result = convert(masks)
    assert result.returncode == 3
    assert "a.jpg: " in result.stdout and "a.png is missing, left out" in result.stdout
    assert "wrote 1 pictures" in result.stdout


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"things": "cel"}, "--things: 'cel'; accepted, each once: background, cell, fiber, soil"),
        ({"things": None}, "--things missing"),
        ({"void": 7}, "255"),
        ({"images": "nowhere"}, "--images: there is no folder nowhere"),
        ({"split": "../../evil"}, "--split=../../evil; accepted: a name without folders"),
        ({"split": ".."}, "--split=..; accepted: a name without folders"),
    ],
)
def test_mistakes_end_in_one_line(masks, flags, message):
    result = convert(masks, **flags)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not (masks / "DATA").exists() or "void" in flags
    assert message in result.stdout + result.stderr
