"""IoU of classes: rules one by one, and the files."""

import json

import cv2
import numpy as np
import pytest

from knet_jax.metrics.semantic import count, no_counts, per_class, summarize, table
from knet_jax.segmentation.segments import Categories
from knet_jax.segmentation.semantic_files import SemanticResults

CATEGORIES = Categories(("cat", "dog", "sky"), dataset_ids=(17, 18, 187), num_things=2)


def labels(text: str, dtype=np.uint8) -> np.ndarray:
    """A map of one row of digits, 0 = none."""
    return np.array([[int(digit) for digit in text]], dtype)


def counted(truth: str, prediction: str):
    return count(labels(truth), labels(prediction), len(CATEGORIES.names))


def test_equals_sets_of_pixels():
    """Against the definition, on random maps with unlabelled pixels."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 4, (2, 31, 17))
    counts = count(truth, prediction, 3)
    for k in range(3):
        a = set(np.flatnonzero(truth == 1 + k))
        b = set(np.flatnonzero((prediction == 1 + k) & (truth > 0)))
        assert [column[k] for column in counts] == [len(a & b), len(a), len(b)]
        assert per_class(counts, CATEGORIES)[k]["IoU"] == pytest.approx(
            100 * len(a & b) / len(a | b)
        )


def test_known_values_and_undefined_classes():
    """A class of neither map is in no mean, a class that is only predicted not in mAcc."""
    counts = counted("1111", "1113")
    summary = summarize(counts, CATEGORIES)
    assert summary == {"mIoU": 37.5, "mAcc": 75.0, "aAcc": 75.0}
    cat, dog, sky = per_class(counts, CATEGORIES)
    assert (cat["IoU"], cat["Acc"]) == (75, 75)
    assert (dog["IoU"], dog["Acc"]) == (None, None)
    assert (sky["IoU"], sky["Acc"]) == (0, None)
    assert sky["prediction"] == 1 and sky["id"] == 187
    assert set(summarize(no_counts(3), CATEGORIES).values()) == {0.0}
    assert summarize(counted("1233", "1233"), CATEGORIES) == dict.fromkeys(summary, 100.0)


def test_table_lists_what_occurs():
    text = table(counted("1111", "1113"), CATEGORIES)
    assert [line.split() for line in text.splitlines() if line.strip()] == [
        ["IoU", "Acc", "truth", "k", "predicted", "k"],
        ["cat", "75.0", "75.0", "0.0", "0.0"],
        ["sky", "0.0", "-", "0.0", "0.0"],
        ["mIoU", "mAcc", "aAcc", "classes"],
        ["All", "37.5", "75.0", "75.0", "2"],
    ]


def test_files_hold_the_datasets_ids(tmp_path):
    results = SemanticResults(tmp_path / "out" / "semantic.json", CATEGORIES)
    results.add(7, "val/7.jpg", labels("01233", np.uint16))
    results.close()
    png = cv2.imread(str(tmp_path / "out" / "semantic" / "val" / "7.png"), cv2.IMREAD_UNCHANGED)
    assert png.dtype == np.uint8 and png.tolist() == [[0, 17, 18, 187, 187]]
    assert json.loads((tmp_path / "out" / "semantic.json").read_text()) == {
        "images": [
            {"id": 7, "file_name": "val/7.jpg", "png": "val/7.png", "height": 1, "width": 5}
        ],
        "categories": [
            {"id": 17, "name": "cat"},
            {"id": 18, "name": "dog"},
            {"id": 187, "name": "sky"},
        ],
    }
    written = [path for path in (tmp_path / "out" / "semantic").rglob("*") if path.is_file()]
    assert [path.name for path in written] == ["7.png"]


def test_pixels_without_a_class_get_an_id_that_no_class_has(tmp_path):
    def written(ids):
        results = SemanticResults(tmp_path / f"{ids[0]}.json", Categories(("a", "b"), ids, 0))
        results.add(1, "1.jpg", labels("012"))
        return cv2.imread(str(tmp_path / f"{ids[0]}" / "1.png"), cv2.IMREAD_UNCHANGED).tolist()

    assert written((1, 255)) == [[0, 1, 255]]
    assert written((0, 1)) == [[255, 0, 1]]
    assert written((255, 40000)) == [[0, 255, 40000]]
    assert written((0, 256)) == [[65535, 0, 256]]
    results = SemanticResults(tmp_path / "both.json", Categories(("a", "b"), (0, 255), 0))
    results.add(1, "1.jpg", labels("12"))
    with pytest.raises(ValueError, match="2.jpg: a pixel without a class"):
        results.add(2, "2.jpg", labels("012"))


def test_ids_beyond_two_bytes_are_written_as_positions(tmp_path):
    categories = CATEGORIES._replace(dataset_ids=(1, 2, 4512345))
    results = SemanticResults(tmp_path / "a.json", categories)
    results.add(1, "1.jpg", labels("0123"))
    results.close()
    listed = json.loads((tmp_path / "a.json").read_text())["categories"]
    assert [(entry["id"], entry["pixel"]) for entry in listed] == [(1, 1), (2, 2), (4512345, 3)]
    assert cv2.imread(str(tmp_path / "a/1.png"), -1).tolist() == [[0, 1, 2, 3]]
