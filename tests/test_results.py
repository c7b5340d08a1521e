"""What a result holds."""

import json

import numpy as np
import pytest
from coco_readers import InstanceFile
from PIL import Image
from pycocotools import mask as coco_mask

from knet_jax.segmentation import rle
from knet_jax.segmentation.coco_files import InstanceResults
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY
from knet_jax.system.errors import UserError

TASKS = ("panoptic", "instance", "semantic")
CATEGORIES = Categories(("cat", "dog", "sky"), (17, 18, 119), 2)
IMAGE = np.full((4, 6, 3), 100, np.uint8)
IDS = np.array([[1, 1, 3, 3, 3, 0], [1, 1, 3, 3, 3, 0], [2, 2, 2, 3, 0, 0], [2, 2, 2, 3, 0, 0]])
PANOPTIC = PanopticMap(
    IDS.astype(np.int32),
    (SegmentInfo(3, 2, score=0.9), SegmentInfo(1, 0, score=0.8), SegmentInfo(2, 1, score=0.4)),
)
SKY = IDS == 3


def test_a_panoptic_result():
    result = Result("panoptic", CATEGORIES, IMAGE, PANOPTIC)
    assert [(s.name, s.is_thing, s.score, s.area, s.box) for s in result.segments] == [
        ("sky", False, 0.9, 8, (2, 0, 3, 4)),
        ("cat", True, 0.8, 4, (0, 0, 2, 2)),
        ("dog", True, 0.4, 6, (0, 2, 3, 2)),
    ]
    sky, cat, dog = result.segments
    assert result.instances == (cat, dog)
    np.testing.assert_array_equal(sky.mask, SKY)
    np.testing.assert_array_equal(rle.decode(sky.rle), SKY)
    labels = np.select([IDS == 1, IDS == 2, IDS == 3], [0, 1, 2], EMPTY)
    np.testing.assert_array_equal(result.semantic, labels)
    assert result.semantic.dtype == np.int32 and result.panoptic is PANOPTIC

    above = result.above(0.5)
    assert [s.name for s in above.segments] == ["sky", "cat"]
    np.testing.assert_array_equal(above.panoptic.ids, np.where(IDS == 2, 0, IDS))
    assert [s.name for s in result.above(1.0).segments] == ["sky"]


def test_an_instance_result():
    one = Instance(rle.encode(SKY), 1, 0.75, area=8.0)
    result = Result("instance", CATEGORIES._replace(num_things=3), IMAGE, (one,))
    [segment] = result.segments
    assert result.instances == result.segments and result.panoptic is result.semantic is None
    assert (segment.id, segment.name, segment.score, segment.area) == (1, "dog", 0.75, 8)
    assert segment.box == (2, 0, 3, 4) and segment.is_thing and segment.rle is one.rle
    np.testing.assert_array_equal(segment.mask, SKY)


def test_a_semantic_result():
    labels = np.select([IDS == 1, IDS == 3], [1, 3], 0).astype(np.uint8)
    result = Result("semantic", CATEGORIES._replace(num_things=0), IMAGE, labels)
    assert [(s.id, s.name, s.area) for s in result.segments] == [(1, "cat", 4), (3, "sky", 8)]
    assert result.instances is result.panoptic is None
    np.testing.assert_array_equal(result.semantic, labels.astype(int) - 1)
    np.testing.assert_array_equal(result.segments[1].mask, SKY)


def test_results_of_nothing():
    void = PanopticMap(np.zeros((4, 6), np.int32), ())
    for task, nothing in zip(TASKS, (void, (), np.zeros((4, 6), np.uint8))):
        result = Result(task, CATEGORIES, IMAGE, nothing)
        assert result.segments == () and result.draw().shape == (4, 6, 3)
        assert json.dumps(result.to_coco())
    assert (Result("panoptic", CATEGORIES, IMAGE, void).semantic == EMPTY).all()


def test_results_in_the_form_of_coco(tmp_path):
    panoptic = Result("panoptic", CATEGORIES, IMAGE, PANOPTIC).to_coco(7)
    assert panoptic["image_id"] == 7
    first = panoptic["segments_info"][0]
    counts = first.pop("segmentation")
    assert first == {
        "id": 3,
        "category_id": 119,
        "isthing": 0,
        "iscrowd": 0,
        "bbox": [2, 0, 3, 4],
        "area": 8,
        "score": 0.9,
    }
    np.testing.assert_array_equal(coco_mask.decode(json.loads(json.dumps(counts))), SKY)

    one = Instance(rle.encode(SKY), 1, 0.75, area=8.0)
    things = CATEGORIES._replace(num_things=3)
    [record] = Result("instance", things, IMAGE, (one,)).to_coco(7)
    results = InstanceResults(tmp_path / "instance.json", things)
    results.add(7, "7.jpg", (one,))
    results.close()
    [written] = json.loads((tmp_path / "instance.json").read_text())
    assert written.items() <= record.items()
    truth = {
        "images": [{"id": 7, "height": 4, "width": 6}],
        "annotations": [record],
        "categories": [
            {"id": id, "name": name} for id, name in zip(things.dataset_ids, things.names)
        ],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    [read] = InstanceFile(tmp_path / "truth.json")[7]
    np.testing.assert_array_equal(rle.decode(read.rle), SKY)


def test_results_are_saved_by_their_suffix(tmp_path):
    result = Result("panoptic", CATEGORIES, IMAGE, PANOPTIC)
    result.save(tmp_path / "a.PNG")  # enlarged: names would cover it
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.PNG")), result.draw(640))
    result.save(tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == result.to_coco()
    with pytest.raises(ValueError, match=r"ends in '.gif'; accepted: .json, .bmp, "):
        result.save(tmp_path / "a.gif")


def test_arguments_that_make_no_sense():
    result = Result("panoptic", CATEGORIES, IMAGE, PANOPTIC)
    for threshold in (-0.1, 5, float("nan"), "0.5", None):
        with pytest.raises(UserError, match="^threshold is .*; accepted: a number from 0 to 1$"):
            result.above(threshold)
    for side in (0, -5, 2.5, float("nan"), "640"):
        with pytest.raises(UserError, match="^side is .*; accepted: a number of pixels, at least"):
            result.draw(side)


def test_results_for_supervision():
    supervision = pytest.importorskip("supervision")
    one = Instance(rle.encode(SKY), 1, 0.75, area=8.0)
    labels = np.where(SKY, 3, 0).astype(np.uint8)
    for task, prediction, name, score in (
        ("panoptic", PANOPTIC._replace(ids=PANOPTIC.ids * SKY), "sky", 0.9),
        ("instance", (one,), "dog", 0.75),
        ("semantic", labels, "sky", 1.0),
    ):
        if task == "panoptic":
            prediction = prediction._replace(segments=prediction.segments[:1])
        found = Result(task, CATEGORIES, IMAGE, prediction).to_supervision()
        assert isinstance(found, supervision.Detections) and len(found) == 1
        assert found.xyxy.tolist() == [[2, 0, 5, 4]] and found.confidence.tolist() == [score]
        assert found.data["class_name"].tolist() == [name] == [CATEGORIES.names[found.class_id[0]]]
        np.testing.assert_array_equal(found.mask[0], SKY)
        drawn = supervision.MaskAnnotator().annotate(IMAGE.copy(), found)
        assert (drawn != IMAGE).any(-1)[SKY].all()
    tracked = Result("instance", CATEGORIES, IMAGE, (one._replace(track=7),)).to_supervision()
    assert tracked.tracker_id.tolist() == [7] and found.tracker_id is None
    nothing = Result("semantic", CATEGORIES, IMAGE, np.zeros((4, 6), np.uint8)).to_supervision()
    assert len(nothing) == 0
