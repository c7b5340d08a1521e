"""Panoptic quality: rules one by one, and the files."""

import json

import cv2
import numpy as np
import pytest

from knet_jax.metrics.panoptic import count, no_counts, summarize, table
from knet_jax.segmentation.coco_files import PanopticResults
from knet_jax.segmentation.segments import Categories, PanopticMap, SegmentInfo

CATEGORIES = Categories(("cat", "dog", "sky"), dataset_ids=(17, 18, 187), num_things=2)
CAT, DOG, SKY = range(3)


def panoptic(text: str, *segments: tuple) -> PanopticMap:
    """A map of one row of digits, 0 = void, and its segments (id, label, iscrowd)."""
    ids = np.array([[int(digit) for digit in text]], np.int32)
    return PanopticMap(ids, tuple(SegmentInfo(*segment) for segment in segments))


def counted(truth: PanopticMap, prediction: PanopticMap) -> dict:
    """Counts of the classes that occur: label → (iou_sum, tp, fp, fn)."""
    counts = count(truth, prediction, len(CATEGORIES.names))
    rows = zip(*(column.tolist() for column in counts))
    return {label: row for label, row in enumerate(rows) if any(row)}


def test_match_needs_more_than_half_and_the_same_label():
    truth = panoptic("1111", (1, CAT))
    assert counted(truth, panoptic("1122", (1, CAT), (2, SKY))) == {
        CAT: (0, 0, 1, 1),
        SKY: (0, 0, 1, 0),
    }
    assert counted(truth, panoptic("1112", (1, CAT), (2, SKY))) == {
        CAT: (0.75, 1, 0, 0),
        SKY: (0, 0, 1, 0),
    }
    assert counted(truth, panoptic("1111", (1, DOG))) == {CAT: (0, 0, 0, 1), DOG: (0, 0, 1, 0)}


def test_void_is_taken_out_of_the_union():
    assert counted(panoptic("110000", (1, CAT)), panoptic("555555", (5, CAT))) == {
        CAT: (1, 1, 0, 0)
    }


def test_false_positives_on_void_and_crowds():
    prediction = panoptic("77770", (7, CAT))
    for truth, wrong in (
        (panoptic("00011", (1, SKY)), 0),  # three of four predicted pixels are void
        (panoptic("00111", (1, SKY)), 1),  # half is not enough
        (panoptic("22211", (1, SKY), (2, CAT, True)), 0),  # crowd of its class
        (panoptic("20311", (1, SKY), (2, CAT, True), (3, CAT, True)), 0),  # void and two crowds
        (panoptic("22211", (1, SKY), (2, DOG, True)), 1),  # crowd of another class
    ):
        assert count(truth, prediction, 3).fp.tolist() == [wrong, 0, 0]


def test_a_crowd_neither_matches_nor_is_missed():
    crowd = panoptic("1111", (1, CAT, True))
    assert counted(crowd, panoptic("1111", (1, CAT))) == {}
    assert counted(crowd, panoptic("0000")) == {}


def test_empty_maps_and_segments_without_pixels():
    assert counted(panoptic("0000"), panoptic("0000")) == {}
    assert counted(panoptic("0000"), panoptic("1111", (1, CAT))) == {}
    assert counted(panoptic("0000", (1, CAT)), panoptic("0011", (1, CAT))) == {CAT: (0, 0, 0, 1)}


def test_means_skip_classes_that_do_not_occur():
    counts = count(panoptic("1133", (1, CAT), (3, SKY)), panoptic("1110", (1, CAT)), 3)
    summary = summarize(counts, CATEGORIES)
    assert summary["PQ_things"] == pytest.approx(100 * 2 / 3)
    assert summary["PQ_stuff"] == 0
    assert summary["PQ"] == pytest.approx(50 * 2 / 3)
    assert summary["SQ"] == pytest.approx(50 * 2 / 3) and summary["RQ"] == 50
    assert set(summarize(no_counts(3), CATEGORIES).values()) == {0.0}

    text = table(counts, CATEGORIES)
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert first == ["PQ", "cat", "sky", "PQ", "All", "Things", "Stuff"]
    assert "33.3   33.3   50.0       2" in text


def write(path, maps: dict[int, PanopticMap]) -> None:
    results = PanopticResults(path, CATEGORIES)
    for image_id, result in maps.items():
        results.add(image_id, f"{image_id:012}.jpg", result)
    results.close()


def test_files_are_what_the_test_server_takes(tmp_path):
    id = 7 + 256 * 8 + 65536 * 9
    result = PanopticMap(np.array([[id, id, 0], [id, 5, 5]]), (SegmentInfo(id, CAT, score=0.9),))
    result = result._replace(segments=(*result.segments, SegmentInfo(5, SKY)))
    write(tmp_path / "panoptic.json", {139: result})
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["categories"] == [
        {"id": 17, "name": "cat", "isthing": 1},
        {"id": 18, "name": "dog", "isthing": 1},
        {"id": 187, "name": "sky", "isthing": 0},
    ]
    assert content["annotations"] == [
        {
            "image_id": 139,
            "file_name": "000000000139.png",
            "segments_info": [
                {"id": id, "category_id": 17, "iscrowd": 0, "area": 3, "score": 0.9},
                {"id": 5, "category_id": 187, "iscrowd": 0, "area": 2, "score": 1.0},
            ],
        }
    ]
    png = cv2.imread(str(tmp_path / "panoptic" / "000000000139.png"), cv2.IMREAD_COLOR_RGB)
    assert png[0, 0].tolist() == [7, 8, 9]
    assert png[1, 2].tolist() == [5, 0, 0]
    assert not png[0, 2].any()
