"""Identities through videos: their metric, the tracker, and videos on disk."""

import json
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
from ml_collections import ConfigDict
from tiny_runs import picture, write_video

from knet_jax.app.tracking import Tracker
from knet_jax.data.sources.shapes import draw_video
from knet_jax.inference.forward import with_kernels
from knet_jax.inference.postprocess import Instances
from knet_jax.metrics.tracking import count, merge, summarize
from knet_jax.segmentation import rle
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.structs import Pass, Stage
from knet_jax.system.errors import UserError

CAT, DOG, SKY = range(3)
CATEGORIES = Categories(("cat", "dog", "sky"), (17, 18, 187), 2)


# The metric.


def frame(text: str) -> PanopticMap:
    """One row of identities: cats up to 5, then dogs; 8 is sky, 9 a crowd of cats, 0 void."""
    ids = np.array([[int(digit) for digit in text]], np.int32)
    infos = {8: SegmentInfo(8, SKY), 9: SegmentInfo(9, CAT, True)}
    infos |= {i: SegmentInfo(i, CAT if i < 6 else DOG, track=i) for i in range(1, 8)}
    return PanopticMap(ids, tuple(infos[i] for i in np.unique(ids[ids > 0]).tolist()))


def numbers(*pairs):
    found = summarize(count([(frame(a), frame(b)) for a, b in pairs], 3))
    return {key: round(value, 3) for key, value in found.items()}


def test_stq_of_known_videos():
    perfect = {"STQ": 100.0, "AQ": 100.0, "SQ": 100.0, "switches": 0}
    assert numbers(("1128", "1128"), ("8112", "8112")) == perfect
    assert numbers(("1128", "4438"), ("8112", "8443")) == perfect  # other numbers
    # A tube of 8 pixels in two parts of 4: 2 · 4 · (4 / 8) / 8.
    half = {"STQ": round(100 * 0.5**0.5, 3), "AQ": 50.0, "SQ": 100.0}
    assert numbers(("1111", "1111"), ("1111", "2222")) == half | {"switches": 1}
    # Two tubes in one: of each 4 · (4 / 8) / 4.
    assert numbers(("1111", "1111"), ("2222", "1111")) == half | {"switches": 0}
    # Another class is no matter of identities; IoU of dogs 0, of cats 0.
    wrong = numbers(("1111", "7777"), ("1111", "7777"))
    assert wrong == {"STQ": 0.0, "AQ": 100.0, "SQ": 0.0, "switches": 0}
    # Cats: 4 of 6; dogs: 2 of 4.
    assert numbers(("1111", "1117"), ("1666", "1166"))["SQ"] == round(100 * (4 / 6 + 2 / 4) / 2, 3)


def test_void_and_crowds():
    # On a crowd an identity costs nothing; a crowd is no tube.
    assert numbers(("1199", "1111")) == {"STQ": 100.0, "AQ": 100.0, "SQ": 100.0, "switches": 0}
    # Void costs no class, but a tube may not grow over it: 2 · (2 / 4) / 2.
    assert numbers(("1100", "1111"))["AQ"] == 50 and numbers(("1100", "1111"))["SQ"] == 100
    assert numbers(("8888", "8888")) == {"STQ": 0.0, "AQ": 0.0, "SQ": 100.0, "switches": 0}


def test_switches():
    ways = ["1111", "2222", "2222", "8888", "1111", "1888"]  # not seen, then too small to match
    assert numbers(*(("1111", way) for way in ways))["switches"] == 2
    one = count([(frame("1111"), frame("2222"))], 3)
    other = count([(frame("1111"), frame("3333"))], 3)
    both = merge(one, other)  # other videos are other things
    assert summarize(both)["AQ"] == 100 and (both.switches, both.tubes, both.tracks) == (0, 2, 2)


# The tracker.


def seen(*things, task="instance", width=40):
    """A frame with squares of 8 pixels: (column, kernel, label) each; and their kernels."""
    ids = np.zeros((8, width), np.int32)
    infos, masks = [], []
    for i, (column, _, *label) in enumerate(things, 1):
        ids[:, column : column + 8] = i
        infos.append(SegmentInfo(i, *label or [CAT]))
        masks.append(Instance(rle.encode(ids == i), *label or [CAT], area=64.0))
    prediction = PanopticMap(ids, tuple(infos)) if task == "panoptic" else tuple(masks)
    image = np.zeros((*ids.shape, 3), np.uint8)
    kernels = np.array([kernel for _, kernel, *_ in things], float).reshape(-1, 2)
    return Result(task, CATEGORIES, image, prediction), kernels


def tracks(tracker, *frames):
    results = [tracker.update(*frame) for frame in frames]
    return [[segment.track for segment in result.segments] for result in results]


A, B, C = (3, 0), (0, 2), (6, 0)
"""Kernels of things; the last one is another that is like the first."""


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_kernels_tell_what_overlap_does_not(task):
    crossing = (
        seen((0, A), (16, B), task=task),
        seen((5, A), (11, B), task=task),
        seen((11, A), (5, B), task=task),
        seen((16, A), (0, B), task=task),
    )
    assert tracks(Tracker(), *crossing) == [[1, 2]] * 4
    assert tracks(Tracker(by_kernels=0, least=0.1), *crossing) == [[1, 2], [1, 2], [2, 1], [2, 1]]


def test_overlap_tells_what_kernels_do_not():
    alike = seen((0, A), (16, C)), seen((16, A), (1, C)), seen((0, C), (14, A))
    assert tracks(Tracker(), *alike) == [[1, 2], [2, 1], [1, 2]]


def test_things_come_go_and_return():
    here, gone = seen((0, A), (16, B)), seen((16, B))
    for memory, id in ((3, 1), (2, 3)):
        found = tracks(Tracker(memory), here, gone, gone, gone, seen((16, B), (30, A)))
        assert found == [[1, 2], [2], [2], [2], [2, id]]
    nothing, cat, dog = seen(), seen((0, A)), seen((0, A, DOG))
    change = nothing, cat, dog, seen((0, A, DOG), (20, C)), nothing, cat
    assert tracks(Tracker(), *change) == [[], [1], [1], [1, 2], [], [1]]
    assert tracks(Tracker(same_class=True), *change) == [[], [1], [2], [2, 1], [], [1]]
    twice = seen((0, A), (4, B), (0, A, DOG), (1, B), (20, C))  # by a kernel, and by another
    assert tracks(Tracker(), twice, twice) == [[1, 2, 1, 1, 3]] * 2
    assert tracks(Tracker(same_class=True), twice) == [[1, 2, 3, 1, 4]]
    assert tracks(Tracker(), cat, seen((8, B)), cat) == [[1], [2], [1]]


def test_stuff_is_not_tracked_and_sizes_may_differ():
    tracker = Tracker()
    assert tracks(tracker, seen((0, A), (16, B, SKY), task="panoptic")) == [[1, 0]]
    assert tracks(tracker, seen((24, B, SKY), (9, A), task="panoptic", width=60)) == [[0, 1]]


def test_settings_that_make_no_sense():
    for name, value in (("memory", -1), ("memory", 2.5), ("by_kernels", 1.1), ("least", "0.5")):
        with pytest.raises(UserError, match=f"^{name} is {value!r}; accepted: "):
            Tracker(**{name: value})


# The kernels of things, from the network to the files.


def test_every_thing_gets_its_kernel():
    kernels = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
    chosen = np.array([[3, 0, 3], [1, 4, 2]])
    found = Instances(None, None, chosen, None)
    one = Pass(Stage(kernels, None, None), None, None, None)
    results, gathered = with_kernels(lambda passes, size, **_: found)([one], None, canvas=None)
    assert results is found
    for i, row in enumerate(chosen):
        np.testing.assert_array_equal(gathered[i], kernels[i][row])


@pytest.mark.parametrize("task", ["panoptic", pytest.param("instance", marks=pytest.mark.slow)])
def test_a_video_on_disk(tmp_path, predict_files, task):
    write_video(tmp_path / "a.avi", (0, 0, 0, 1), code="MJPG")
    predict_files(task, [tmp_path / "a.avi"], tmp_path / "out", threshold=0.2, track=True)
    records = json.loads((tmp_path / "out" / "videos" / "a.json").read_text())
    if task == "panoptic":
        assert [record["image_id"] for record in records] == list(range(4))
        records = [s | {"image_id": r["image_id"]} for r in records for s in r["segments_info"]]
        assert all(("track_id" in record) == record["isthing"] for record in records)
    ids = [[r.get("track_id") for r in records if r["image_id"] == i] for i in range(4)]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    given = [id for id in ids[0] if id]
    assert 1 < len(set(given)) <= len(given)
    assert len(set(given)) == len(given) or task == "instance"


def test_what_cannot_be_tracked_is_named(tmp_path, segmenters, predict_files, monkeypatch):
    cv2.imwrite(str(tmp_path / "1.png"), picture())
    (tmp_path / "a.avi").touch()
    refused = partial(predict_files, output=tmp_path / "out", track=True)
    with pytest.raises(UserError, match="a semantic model has no things to track; accepted: panop"):
        refused("semantic", [tmp_path / "1.png", tmp_path / "a.avi"])
    with pytest.raises(UserError, match="track: no video among the 1 files .*; accepted: .avi"):
        refused("panoptic", [tmp_path / "1.png"])
    assert not (tmp_path / "out").exists()
    sees = segmenters["panoptic"]
    with pytest.raises(UserError, match="threshold is 2; accepted"):
        sees.track([], threshold=2)
    for see in (sees.track, sees.stream):
        with pytest.raises(
            UserError, match="a.avi is one path; accepted: a list of pictures, or fra"
        ):
            see(tmp_path / "a.avi")
    with monkeypatch.context() as patch:
        patch.setattr(sees, "config", ConfigDict({"eval": {"window": (64, 64)}}))
        with pytest.raises(UserError, match=r"config.eval.window is \(64, 64\): .*accepted: \(\)"):
            sees.track([])


def test_a_track_has_a_color_and_a_number():
    result, kernels = seen((0, A), (80, C), width=200)
    image = np.full((8, 200, 3), 100, np.uint8)
    first = replace(Tracker().update(result, kernels), image=image)
    swapped = replace(
        first, prediction=tuple(p._replace(track=3 - p.track) for p in first.prediction)
    )
    colors = [r.draw()[4, [4, 84]].tolist() for r in (first, swapped)]
    assert colors[0] == colors[1][::-1] and colors[0][0] != colors[0][1]
    large = seen((0, A), width=8)[0]
    large = replace(
        large,
        image=np.zeros((160, 160, 3), np.uint8),
        prediction=(Instance(rle.encode(np.ones((160, 160))), CAT, 0.5, track=7),),
    )
    other = replace(large, prediction=(large.prediction[0]._replace(track=7 + 24),))
    assert (large.draw() != other.draw()).any()  # the same color, another number


def test_drawn_videos_keep_the_numbers_of_things():
    frames = list(draw_video(1, 60))
    again = list(draw_video(1, 2))
    assert all((a.image == b.image).all() for a, b in zip(frames, again))
    assert {tuple(frame.labels) for frame in frames} == {tuple(frames[0].labels)}
    areas = np.array([np.bincount(f.slots.ravel(), minlength=len(f.labels)) for f in frames])
    things = areas[:, [label in range(5) for label in frames[0].labels]]
    assert things.shape[1] == 5 and (things.max(0) > 100).all()
    assert ((things == 0).any(0) & (things[-1] > 0)).any()  # some go and return
    assert len({label for label in frames[0].labels if 0 <= label < 5}) == 2
