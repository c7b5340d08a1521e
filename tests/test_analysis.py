"""What is said of a network is right where the answer is known, and the page shows it as text."""

import json
import re
from html import unescape

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from knet_jax.analysis import findings, page
from knet_jax.analysis.analysis import Analysis
from knet_jax.analysis.findings import CONFUSED, DUPLICATE, INVENTED, MISSED, OUTLINE, RIGHT
from knet_jax.inference.activity import SIDE, Activity, observe
from knet_jax.metrics.counts import Prediction
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.structs import Pass, Stage
from knet_jax.system.errors import UserError
from knet_jax.tasks import TASKS
from knet_jax.training.evaluation import analyse

DOG, CAT, GRASS, NOTHING = range(4)
CATEGORIES = Categories(("dog", "cat", "grass"), (1, 2, 3), 2)
HOSTILE = Categories(("<script>alert(1)</script>", 'cat"onload="x', "grass & more"), (1, 2, 3), 2)
CROWD = 0.0
"""The score that marks a crowd of the truth."""
GRASS_IOU = 1125 / 1310  # of the picture below


def paint(*segments):
    """A panoptic map of 40 x 40 from (label, rows, columns, score), the later above the earlier."""
    ids, infos = np.zeros((40, 40), np.int32), []
    for number, (label, rows, columns, score) in enumerate(segments, 1):
        ids[slice(*rows), slice(*columns)] = number
        infos.append(SegmentInfo(number, label, score == CROWD, score))
    return PanopticMap(ids, tuple(infos))


EVERYWHERE = (0, 40), (0, 40)
TRUTH = paint(
    (GRASS, *EVERYWHERE, 1),
    (DOG, (0, 10), (0, 10), 1),
    (CAT, (0, 10), (20, 30), 1),
    (DOG, (20, 30), (0, 10), 1),
    (CAT, (20, 30), (20, 30), 1),
    (DOG, (35, 40), (0, 10), CROWD),
)
FOUND = paint(
    (GRASS, *EVERYWHERE, 0.95),
    (DOG, (0, 10), (0, 10), 0.65),
    (DOG, (0, 10), (20, 30), 0.85),  # a cat
    (DOG, (20, 24), (0, 10), 0.45),  # four tenths of a dog
    (CAT, (35, 40), (30, 35), 0.45),  # grass
    (DOG, (35, 40), (0, 10), 0.75),  # a crowd
)
IDLE = Activity(np.zeros((3, SIDE, SIDE), np.uint8), np.zeros(3, int), np.zeros(3))


def test_every_kind_of_mistake_is_told_from_the_others():
    overlaps = findings.compare(TRUTH, FOUND)
    verdicts = findings.judge(overlaps)
    told = {
        (v.kind, v.true_label, v.label, v.truth, v.prediction, round(v.iou, 6)) for v in verdicts
    }
    assert len(verdicts) == 6 and told == {
        (RIGHT, GRASS, GRASS, 0, 0, round(GRASS_IOU, 6)),
        (RIGHT, DOG, DOG, 1, 1, 1.0),
        (CONFUSED, CAT, DOG, 2, 2, 1.0),
        (OUTLINE, DOG, DOG, 3, 3, 0.4),
        (INVENTED, None, CAT, None, 4, round(25 / 1150, 6)),
        (MISSED, CAT, None, 4, None, round(100 / 1285, 6)),
    }
    # Two right ones of five predicted and five true segments: the crowd is neither.
    assert findings.quality(overlaps, verdicts) == pytest.approx((1 + GRASS_IOU) / 5)
    perfect = findings.compare(TRUTH, TRUTH)
    assert findings.quality(perfect, findings.judge(perfect)) == 1
    empty = findings.compare((), ())
    assert findings.judge(empty) == [] and findings.quality(empty, []) == 1


def test_what_is_found_twice_and_what_is_too_faint_to_be_shown():
    square, other = np.zeros((2, 20, 20), np.uint8)
    square[:10, :10] = other[10:, 10:] = 1
    square, other = map(rle.encode, (square, other))
    truth = (Instance(square, DOG), Instance(other, CAT, iscrowd=True))
    found = (
        *(Instance(square, DOG, 0.9), Instance(square, DOG, 0.8), Instance(square, CAT, 0.7)),
        *(Instance(other, CAT, 0.6), Instance(other, DOG, 0.2)),
    )
    overlaps = findings.compare(truth, found)
    verdicts = findings.judge(overlaps)
    assert [(v.kind, v.truth) for v in verdicts] == [(RIGHT, 0), (DUPLICATE, 0), (CONFUSED, 0)]
    found = findings.find(overlaps, verdicts, CATEGORIES, IDLE)
    # By score all count, but for what lies on the crowd of its class.
    assert found.calibration[:, 0].tolist() == [0, 0, 1, 0, 0, 0, 0, 1, 1, 1]
    assert found.calibration[2:, 2].tolist() == [0, 0, 0, 0, 0, 0, 1, 1]


def test_however_many_things_a_picture_has_all_are_looked_at():
    masks = np.eye(150, dtype=np.uint8).reshape(150, 10, 15)
    things = tuple(Instance(rle.encode(mask), CAT, 0.9) for mask in masks)
    verdicts = findings.judge(findings.compare(things, things))
    assert [verdict.kind for verdict in verdicts] == [RIGHT] * 150


def test_sums_over_a_picture():
    overlaps = findings.compare(TRUTH, FOUND)
    found = findings.find(overlaps, findings.judge(overlaps), CATEGORIES, IDLE)
    kinds = np.zeros((3, 6), int)
    for label, kind in (
        *((DOG, RIGHT), (DOG, OUTLINE), (GRASS, RIGHT)),
        *((CAT, CONFUSED), (CAT, MISSED), (CAT, INVENTED)),
    ):
        kinds[label, kind] = 1
    np.testing.assert_array_equal(found.kinds, kinds)
    confusion = np.zeros((4, 4), int)
    for pair in (
        *((DOG, DOG), (GRASS, GRASS), (CAT, DOG), (DOG, NOTHING), (CAT, NOTHING)),
        *((NOTHING, DOG), (NOTHING, CAT)),
    ):
        confusion[pair] = 1
    np.testing.assert_array_equal(found.confusion, confusion)
    # Four things of ten pixels a side: one found, IoU 1, 0, 0.4 and 0.
    np.testing.assert_allclose(found.sizes[1], [4, 1, 1.4])
    assert not found.sizes[[0, *range(2, 8)]].any()
    np.testing.assert_allclose(found.calibration[9], [1, 0.95, GRASS_IOU])
    np.testing.assert_allclose(found.calibration[6], [1, 0.65, 1])
    np.testing.assert_allclose(found.calibration[8], [1, 0.85, 0])
    np.testing.assert_allclose(found.calibration[4], [2, 0.9, 0.4])
    assert found.calibration[:, 0].sum() == 5


def test_pixels_of_a_map_of_labels():
    truth = np.zeros((2, 6), np.uint8)
    truth[:, :3], truth[0, 3:5] = 1 + DOG, 1 + CAT
    found = np.full((2, 6), 1 + DOG, np.uint8)
    found[1, 0] = 1 + GRASS
    overlaps = findings.compare(truth, found)
    verdicts = findings.judge(overlaps)
    sums = findings.find(overlaps, verdicts, CATEGORIES, IDLE, (truth, found))
    confusion = np.zeros((4, 4), int)
    confusion[DOG, DOG], confusion[DOG, GRASS], confusion[CAT, DOG] = 5, 1, 2
    np.testing.assert_array_equal(sums.confusion, confusion)
    assert [(v.kind, v.true_label, v.label) for v in verdicts] == [
        (RIGHT, DOG, DOG),  # 5 pixels of 8, void being none
        (INVENTED, None, GRASS),
        (MISSED, CAT, None),
    ]
    assert not sums.calibration.any()


@pytest.mark.parametrize("mirrored", [False, True])
def test_where_kernels_are_active(mirrored):
    """The left half of a picture that fills the upper half of its canvas."""
    masks = np.full((1, 3, 8, 8), -40.0, np.float32)
    masks[0, 0, :4, :4] = masks[0, 1, 5:] = masks[0, 2] = 40
    logits = np.full((1, 3, 3), -4.0, np.float32)
    logits[0, 0, CAT] = logits[0, 2, GRASS] = 1
    size = np.int32([[32, 64]])
    seen = Pass(Stage(None, masks, logits), size, np.int32([[64, 64]]), np.array([mirrored]))
    watch = jax.jit(observe, static_argnames="num_things")
    seen = watch(jax.tree.map(jnp.asarray, seen), num_things=2)
    maps = np.asarray(seen.maps)[0]
    left, right = maps[0, :, :20], maps[0, :, 28:]
    assert ((right if mirrored else left)[:40] == 255).all()
    assert not (left if mirrored else right).any()
    assert not maps[1, :40].any() and (maps[2] == 255).all()
    assert seen.labels.tolist() == [[CAT, DOG, GRASS]]
    sure, unsure = 1 / (1 + np.exp([-1.0, 4.0]))
    np.testing.assert_allclose(seen.scores, [[sure, unsure, sure]], rtol=1e-5)
    # Where kernel n is class n they share the pixels.
    alike = Pass(Stage(None, jnp.zeros((1, 4, 8, 8)), None), size, size, np.array([False]))
    assert (np.asarray(watch(alike, num_things=0).maps) == 64).all()


class Pictures:
    """A split of gray pictures."""

    def __init__(self, categories, size, names):
        self.categories, self._size, self._names = categories, size, names

    def __len__(self):
        return len(self._names)

    def image(self, index):
        return np.full((*self._size, 3), 99, np.uint8)

    def image_id(self, index):
        return index

    def file_name(self, index):
        return self._names[index]


def test_the_page_of_a_known_network(tmp_path):
    """The second of three pictures is perfect but found only by the update; the third is not looked at."""
    nothing, simple = (paint((label, *EVERYWHERE, 1)) for label in (GRASS, DOG))
    maps = np.zeros((3, SIDE, SIDE), np.uint8)
    maps[0], maps[2, :12] = 255, 255
    activity = Activity(maps, np.array([DOG, CAT, GRASS]), np.array([0.9, 0.2, 0.3]))
    split = Pictures(HOSTILE, (40, 40), ("a<b>.png", "b.png", "c.png"))
    sizes = {"num_proposals": 2, "num_stuff": 1, "num_stages": 1}
    analysis = Analysis(split, TASKS["panoptic"], sizes, 2)
    analysis.add([Prediction(1, simple, simple, [nothing], activity)])
    analysis.add([Prediction(0, TRUTH, FOUND, [TRUTH], IDLE), Prediction(2, TRUTH, FOUND)])
    report = analysis.write(tmp_path / "analysis", {"step": 7, "split": "val"})
    assert report == json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    assert (report["step"], report["num_images"]) == (7, 2)
    before, after = (row["PQ"] for row in report["rounds"])
    # Before the update: both dogs and one cat right, and the dog of the simple picture taken for grass.
    assert before == pytest.approx(100 * (2 / 2.5 + 1 + 1 / 1.5) / 3)
    assert after == pytest.approx(100 * (2 / 3.5 + 0 + GRASS_IOU) / 3)
    of_number = {row["from"]: row for row in report["num_objects"] if row["images"]}
    assert of_number.keys() == {1, 3} and of_number[1]["PQ"] == 100
    assert report["calibration"]["bins"][4] == {
        "from": 0.4,
        "below": 0.5,
        "predictions": 2,
        "score": 45.0,
        "IoU": 20.0,
    }
    # Of six predictions, in four ranges of score: too sure in three, too modest in one.
    error = abs(1.95 - (1 + GRASS_IOU)) + 0.85 + (1 - 0.65) + (0.9 - 0.4)
    assert report["calibration"]["error"] == pytest.approx(100 * error / 6, abs=0.01)
    kernels = [(one["stuff"], one["activity"], one["serves"]) for one in report["kernels"]]
    assert kernels == [
        (None, 50.0, [1, 0, 0]),
        (None, 0.0, [0, 0, 0]),
        (HOSTILE.names[GRASS], 12.5, [0, 0, 1]),
    ]
    assert [(one["image"], one["quality"]) for one in report["worst"]] == [("a<b>.png", 37.2)]
    assert [one["kind"] for one in report["worst"][0]["mistakes"]] == [
        *("confused", "badly outlined", "invented", "missed")
    ]
    assert report["confusion"]["pairs"] == [
        {"true": HOSTILE.names[CAT], "predicted": HOSTILE.names[DOG], "count": 1, "share": 50.0}
    ]

    text = (tmp_path / "analysis" / page.PAGE).read_text()
    assert "<script" not in text and '"onload' not in text and "a<b>" not in text
    assert all(name in unescape(text) for name in (*HOSTILE.names, "a<b>.png"))
    files = {name for name in re.findall(r'(?:src|href)="([^"#]+)"', text) if name[:5] != "data:"}
    assert files == {"analysis.json", "shown/0.jpg", "shown/1.jpg", "worst/0.jpg"}
    assert all((tmp_path / "analysis" / name).stat().st_size for name in files)
    assert text.count("data:image/png") == 3 and "http" not in text


def test_a_perfect_network_has_no_worst_picture(tmp_path):
    truth = np.full((8, 8), 1, np.uint8)
    split = Pictures(Categories(("wall",), (1,), 0), (8, 8), ("a.png",))
    sizes = {"num_proposals": 0, "num_stuff": 1, "num_stages": 0}
    analysis = Analysis(split, TASKS["semantic"], sizes, 5)
    activity = Activity(np.full((1, SIDE, SIDE), 255, np.uint8), np.zeros(1, int), np.ones(1))
    analysis.add([Prediction(0, truth, truth, [], activity)])
    report = analysis.write(tmp_path, {"step": 1, "split": "val"})
    assert report["worst"] == [] and report["calibration"] is None
    assert report["confusion"]["counts"] == [[64, 0], [0, 0]]
    assert "no scores" in (tmp_path / page.PAGE).read_text()


def test_how_many_pictures_is_a_number_of_pictures():
    for limit in (0, -1, 2.5, "3", True):
        with pytest.raises(UserError, match=f"limit is {limit!r}; accepted: a whole number of at"):
            analyse("nowhere", limit=limit)


def test_a_chart_draws_what_it_is_given():
    drawn = page.bars(["a", "<b>"], {"x": [50.0, None], "y": [100.0, 0.0]})
    heights = [float(x) for x in re.findall(r'width="24" height="([\d.]+)"', drawn)]
    assert heights == [90, 180, 0] and "&lt;b&gt;" in drawn
    # What stands below the groups has room, and lies within the chart.
    labels = [f"{i} of many" for i in range(10, 14)]
    drawn = page.bars(labels, {"x": [1.0] * 4})
    at = [float(re.search(rf'x="([\d.]+)"[^>]*>{label}<', drawn)[1]) for label in labels]
    ends = (0, *at, float(re.search(r'width="([\d.]+)" font', drawn)[1]))
    assert min(np.diff(at)) > 6 * 10 and min(np.diff(ends)[[0, -1]]) > 3 * 10
    row = page.table(["", "a", "b", "c"], [("r", 1, 3, 0)], is_heat=True)
    assert re.findall(r",0\.\d+\)", row) == [",0.21)", ",0.64)", ",0.00)"]
    assert page.table(["n"], [["a", None], ["b", 1.25]]).count("<td") == 2
