"""Average precision: COCOeval's numbers on random scenes, and rules one by one."""

import copy
import json

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCOCO
from faster_coco_eval import COCOeval_faster
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from knet_jax.metrics.instance import (
    NUMBERS,
    boundary_iou,
    count,
    merge,
    no_counts,
    per_class,
    summarize,
    table,
)
from knet_jax.segmentation import rle
from knet_jax.segmentation.coco_files import InstanceResults
from knet_jax.segmentation.segments import Categories, Instance

CATEGORIES = Categories(("cat", "dog", "cow"), dataset_ids=(17, 18, 21), num_things=3)
CAT, DOG, COW = range(3)
SIZE = (140, 150)


def box(top, left, height, width, size=SIZE) -> dict:
    mask = np.zeros(size, np.uint8)
    mask[top : top + height, left : left + width] = 1
    return rle.encode(mask)


def strip(start: int, stop: int) -> dict:
    """Pixels of a picture of one row of 20."""
    return box(0, start, 1, stop - start, (1, 20))


def random_boxes(rng, num: int) -> np.ndarray:
    """Top, left, height, width; of all three ranges of sizes."""
    sides = rng.choice([10, 25, 40, 70, 110], (num, 2)) + rng.integers(-4, 5, (num, 2))
    return np.concatenate([rng.integers(0, 60, (num, 2)), sides], axis=1)


def scene(seed: int) -> tuple[tuple[Instance, ...], tuple[Instance, ...]]:
    """Truth and predictions of a picture: shifted, doubled, mislabelled, of equal scores."""
    rng = np.random.default_rng(seed)
    truth, prediction = [], []
    for place in random_boxes(rng, rng.integers(0, 9)):
        label, area = int(rng.integers(3)), float(place[2] * place[3] * rng.uniform(0.6, 1))
        truth.append(Instance(box(*place), label, iscrowd=bool(rng.random() < 0.15), area=area))
        for _ in range(rng.integers(0, 4)):
            shift = rng.integers(0, 1 + place[2:].min() // 6, 4)
            label = label if rng.random() < 0.8 else int(rng.integers(3))
            score = round(float(rng.random()), 1)
            prediction.append(Instance(box(*(place + shift)), label, score))
    for place in random_boxes(rng, rng.integers(0, 5)):
        prediction.append(Instance(box(*place), int(rng.integers(3)), round(rng.random(), 1)))
    return tuple(truth), tuple(prediction)


def counted(scenes, overlap=rle.iou):
    ids = range(1, len(scenes) + 1)
    return merge(*(count(*pair, 3, id, overlap) for id, pair in zip(ids, scenes)))


def oracle(scenes, coco_class, eval_class, **arguments):
    """COCOeval's own objects for the same pictures. -> the twelve numbers, and AP of each class."""
    truths, results = [], []
    for image_id, (truth, prediction) in enumerate(scenes, 1):
        for instance in truth:
            truths.append(
                {
                    "id": len(truths) + 1,
                    "image_id": image_id,
                    "category_id": CATEGORIES.dataset_ids[instance.label],
                    "segmentation": instance.rle,
                    "area": instance.area,
                    "bbox": [0, 0, 1, 1],
                    "iscrowd": int(instance.iscrowd),
                }
            )
        for instance in prediction:
            results.append(
                {
                    "image_id": image_id,
                    "category_id": CATEGORIES.dataset_ids[instance.label],
                    "segmentation": instance.rle,
                    "score": instance.score,
                }
            )
    truth = coco_class()
    truth.dataset = {
        "info": {},
        "images": [{"id": i + 1, "height": SIZE[0], "width": SIZE[1]} for i in range(len(scenes))],
        "categories": [
            {"id": id, "name": name} for id, name in zip(CATEGORIES.dataset_ids, CATEGORIES.names)
        ],
        "annotations": copy.deepcopy(truths),
    }
    truth.createIndex()
    evaluation = eval_class(truth, truth.loadRes(copy.deepcopy(results)), **arguments)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    return evaluation.stats[:12], precision.mean((0, 1))


def assert_equal(counts, stats, of_class):
    summary = summarize(counts, CATEGORIES)
    assert tuple(summary) == NUMBERS
    # Where there is no instance, -1 there is NaN here, and 0 without any at all.
    absent = np.where([name[-1] in "sml" for name in NUMBERS], np.nan, 0)
    wanted = np.where(stats == -1, absent, 100 * stats)
    np.testing.assert_allclose(list(summary.values()), wanted, rtol=0, atol=1e-10)
    for row, ap in zip(per_class(counts, CATEGORIES), of_class, strict=True):
        assert (row["AP"] is None) == (ap == -1)
        assert row["AP"] is None or row["AP"] == pytest.approx(100 * ap, rel=0, abs=1e-10)


def test_equals_cocoeval_on_random_scenes():
    """With crowds, three ranges of sizes, scores that tie, and more predictions than count."""
    scenes = [scene(i) for i in range(24)]
    many = tuple(Instance(box(i % 30, 5, 30, 30), CAT, 0.5) for i in range(120))
    scenes[3] = (scenes[3][0], many)
    stats, of_class = oracle(scenes, COCO, COCOeval, iouType="segm")
    assert (stats[:5] > -1).all() and 0.05 < stats[0] < 0.95
    assert_equal(counted(scenes), stats, of_class)


def test_boundary_ap_equals_faster_coco_eval():
    scenes = [scene(i) for i in range(24)]
    quiet = {"print_function": lambda *_: None}
    stats, of_class = oracle(scenes, FasterCOCO, COCOeval_faster, iouType="boundary", **quiet)
    assert_equal(counted(scenes, boundary_iou), stats, of_class)


def test_boundaries_of_large_masks_are_compared():
    """Frames of four pixels, 2 % of the diagonal; the border of the picture is an outline."""
    ious = boundary_iou([box(0, 0, 140, 100)], [box(0, 0, 140, 110)], np.array([False]))
    frame = 140 * 100 - 132 * 92, 140 * 110 - 132 * 102
    shared = 2 * 4 * 100 + 132 * 4
    np.testing.assert_allclose(ious, [[shared / (sum(frame) - shared)]])
    small = [box(5, 5, 7, 7)], [box(6, 5, 7, 7)], np.array([False])
    np.testing.assert_allclose(boundary_iou(*small), rle.iou(*small))
    hollow = [rle.encode(rle.decode(box(0, 0, 140, 100)) - rle.decode(box(4, 4, 132, 92)))]
    filled = [box(0, 0, 140, 100)], np.array([False])
    np.testing.assert_allclose(boundary_iou(hollow, *filled), rle.iou(hollow, *filled))
    crowd = [box(0, 0, 50, 50)], [box(0, 0, 100, 100)], np.array([True])
    np.testing.assert_allclose(boundary_iou(*crowd), [[1]])


def test_sizes_are_as_annotated_or_else_as_drawn():
    mask = box(0, 0, 40, 40)
    for area, found in {
        1600: [1, 0, 1, 0],
        0: [1, 0, 1, 0],  # not annotated
        1023: [1, 1, 0, 0],
        1024: [1, 1, 1, 0],  # the ranges include their ends
        9217: [1, 0, 0, 1],
    }.items():
        counts = count((Instance(mask, CAT, area=area),), (), 3)
        assert counts.objects[CAT].tolist() == found, area


def test_counts_of_a_dataset_do_not_depend_on_the_order():
    """Not even where scores tie: the ids of the pictures decide."""
    counts = [count(*scene(i), 3, i) for i in range(10)]
    there, back = merge(*counts), no_counts(3)
    for one in reversed(counts):
        back = merge(back, one)
    np.testing.assert_equal(summarize(there, CATEGORIES), summarize(back, CATEGORIES))
    assert len(there.score) == sum(len(one.score) for one in counts) > 50
    assert len(np.unique(there.score)) <= 11


def test_nothing_at_all():
    nothing = {name: np.nan if name[-1] in "sml" else 0.0 for name in NUMBERS}
    for counts in (no_counts(3), count((), (), 3)):
        np.testing.assert_equal(summarize(counts, CATEGORIES), nothing)
        assert "nan" not in table(counts, CATEGORIES)
        assert [row["AP"] for row in per_class(counts, CATEGORIES)] == [None] * 3
    counts = count((), (Instance(strip(0, 5), CAT, 0.9),), 3)
    np.testing.assert_equal(summarize(counts, CATEGORIES), nothing)
    assert per_class(counts, CATEGORIES)[CAT]["predictions"] == 1
    empty = Instance(strip(0, 0), CAT, 0.9)
    assert summarize(count((), (empty,), 3), CATEGORIES)["AP"] == 0
    assert summarize(count((Instance(strip(0, 5), CAT),), (empty,), 3), CATEGORIES)["AP"] == 0


def test_table_lists_what_occurs():
    truth = Instance(box(0, 0, 40, 40), CAT), Instance(box(0, 0, 10, 10), CAT)
    counts = count(truth, (Instance(box(0, 0, 40, 40), CAT, 0.5), truth[1]._replace(label=COW)), 3)
    text = table(counts, CATEGORIES)
    assert [line.split() for line in text.splitlines() if line.strip()] == [
        [*NUMBERS[:6], "objects", "predicted"],
        ["cat", "50.5", "50.5", "50.5", "0.0", "100.0", "-", "2", "1"],
        ["cow", "-", "-", "-", "-", "-", "-", "0", "1"],
        [*NUMBERS[:6], "classes"],
        ["All", "50.5", "50.5", "50.5", "0.0", "100.0", "-", "1"],
        [*NUMBERS[6:]],
        ["All", "50.0", "50.0", "50.0", "0.0", "100.0", "-"],
    ]


def test_files_are_what_the_test_server_takes(tmp_path):
    results = InstanceResults(tmp_path / "instances.json", CATEGORIES)
    results.add(139, "139.jpg", (Instance(strip(0, 5), DOG, np.float32(0.5)),))
    results.close()
    counts = strip(0, 5)["counts"].decode()
    assert json.loads((tmp_path / "instances.json").read_text()) == [
        {
            "image_id": 139,
            "category_id": 18,
            "segmentation": {"size": [1, 20], "counts": counts},
            "score": 0.5,
        }
    ]
    empty = InstanceResults(tmp_path / "empty.json", CATEGORIES)
    empty.add(1, "1.jpg", ())
    empty.close()
    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_writer_refuses_what_cannot_be_meant(tmp_path):
    results = InstanceResults(tmp_path / "instances.json", CATEGORIES)
    results.add(1, "a.jpg", ())
    with pytest.raises(ValueError, match="b.jpg has id 1, as has a.jpg"):
        results.add(1, "b.jpg", ())


def test_more_things_than_a_byte_counts():
    """pycocotools' own `area` takes no list of 256 masks."""
    things = [Instance(box(2 * (i // 20), 2 * (i % 20), 1, 1), CAT, area=1) for i in range(300)]
    counts = count(things, things, 3)
    assert counts.objects[CAT, 0] == 300 and len(counts.score) == 100
    assert summarize(counts, CATEGORIES)["AR100"] == pytest.approx(100 / 3)
