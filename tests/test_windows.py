"""Large pictures window by window: what the windows show becomes that of the picture."""

import numpy as np
import pytest
from tiny_runs import picture

from knet_jax.app.segmenter import Segmenter
from knet_jax.data import pipeline
from knet_jax.inference.windows import Windows
from knet_jax.saved.models import open_model
from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import Instance, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY
from knet_jax.tasks import TASKS

SIZE, NUM_THINGS = (150, 210), 3


def scene(seed):
    """A panoptic map of two kinds of stuff with discs of all sizes, some larger than any window."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    ids = 1 + (y + 20 * np.sin(x / 15) > 80)
    infos = [SegmentInfo(1, 3, score=0.8), SegmentInfo(2, 4, score=0.7)]
    for radius in (60, *rng.uniform(3, 25, 25)):
        center = rng.random(2) * SIZE
        disc = np.hypot(y - center[0], x - center[1]) < radius
        ids[disc] = 1 + len(infos)
        label = int(rng.integers(NUM_THINGS))
        infos.append(SegmentInfo(1 + len(infos), label, score=rng.uniform(0.4, 0.9)))
    shown = np.unique(ids)
    return PanopticMap(ids.astype(np.int32), tuple(i for i in infos if i.id in shown))


def show(truth, span):
    """What a perfect network sees in a window."""
    top, left, bottom, right = span
    ids = truth.ids[top:bottom, left:right]
    return PanopticMap(ids, tuple(s for s in truth.segments if (ids == s.id).any()))


def instances(panoptic, num_things=NUM_THINGS):
    return tuple(
        Instance(rle.encode(panoptic.ids == s.id), s.label, s.score)
        for s in panoptic.segments
        if s.label < num_things
    )


def join(task, windows, predictions):
    done = [windows.add(prediction) for prediction in predictions]
    assert done == [False] * (len(done) - 1) + [True]
    return windows.join(TASKS[task], NUM_THINGS, 0.5)


@pytest.mark.parametrize("window, step", [((64, 96), (32, 64)), ((96, 64), (32, 32))])
def test_perfect_windows_make_the_perfect_picture(window, step):
    """Nothing is lost and nothing counted twice, however a border cuts it."""
    for seed in range(3):
        truth = scene(seed)
        windows = Windows(SIZE, window, step)
        joined = join("panoptic", windows, [show(truth, span) for span in windows.spans])
        assert len(joined.segments) == len(truth.segments)
        for one in joined.segments:
            [wanted] = np.unique(truth.ids[joined.ids == one.id])
            np.testing.assert_array_equal(joined.ids == one.id, truth.ids == wanted)
            [like] = [s for s in truth.segments if s.id == wanted]
            assert one.label == like.label and one.score == pytest.approx(like.score)
        scores = [one.score for one in joined.segments]
        assert scores == sorted(scores, reverse=True)

        windows = Windows(SIZE, window, step)
        found = join("instance", windows, [instances(show(truth, s)) for s in windows.spans])
        wanted = {i.rle["counts"]: (i.label, pytest.approx(i.score)) for i in instances(truth)}
        assert {i.rle["counts"]: (i.label, i.score) for i in found} == wanted
        assert len(found) == len(wanted)
        assert all(one.area == rle.area(one.rle) for one in found)


def boxes(shape, *rows):
    """Instances that are boxes: (top, left, bottom, right, label, score)."""
    found = []
    for top, left, bottom, right, label, score in rows:
        mask = np.zeros(shape, bool)
        mask[top:bottom, left:right] = True
        found.append(Instance(rle.encode(mask), label, score))
    return tuple(found)


def found_in(pair, size=(32, 96)):
    """Boxes (label, score, box) of a picture of two windows, which share the columns 32 to 64."""
    found = join("instance", Windows(size, (32, 64), (32, 32)), pair)
    return [(one.label, one.score, rle.box(one.rle)) for one in found]


def test_who_is_believed_where_windows_differ():
    shape = (32, 64)
    # Cut by the left window, whole in the right one, which knows better what it is.
    cut, whole = boxes(shape, (4, 50, 20, 64, 1, 0.9)), boxes(shape, (4, 18, 20, 40, 0, 0.6))
    assert found_in([cut, whole]) == [(0, 0.6, (50, 4, 22, 16))]
    # Seen by both, or cut by both: once, with the mean score by area.
    pair = boxes(shape, (4, 40, 20, 55, 0, 0.5)), boxes(shape, (4, 8, 20, 23, 0, 0.7))
    assert found_in(pair) == [(0, pytest.approx(0.6), (40, 4, 15, 16))]
    pair = boxes(shape, (4, 10, 20, 64, 0, 0.5)), boxes(shape, (4, 0, 20, 36, 0, 0.8))
    assert found_in(pair) == [(0, pytest.approx(0.62), (10, 4, 58, 16))]
    # What ends in one window is not what goes on beyond the other, alike as they are in both.
    pair = boxes(shape, (4, 20, 20, 60, 0, 0.5)), boxes(shape, (4, 0, 20, 40, 0, 0.8))
    assert found_in(pair) == [(0, 0.8, (32, 4, 40, 16)), (0, 0.5, (20, 4, 40, 16))]
    # Neighbours that hardly overlap, or of two classes, are two; so are two of one window.
    pair = boxes(shape, (4, 40, 20, 50, 0, 0.5)), boxes(shape, (4, 16, 20, 30, 0, 0.7))
    assert len(found_in(pair)) == 2
    pair = boxes(shape, (4, 40, 20, 50, 0, 0.5)), boxes(shape, (4, 8, 20, 18, 1, 0.7))
    assert len(found_in(pair)) == 2
    pair = (
        boxes(shape, (4, 40, 20, 50, 0, 0.5), (4, 40, 20, 51, 0, 0.4)),
        boxes(shape, (4, 8, 20, 18, 0, 0.7)),
    )
    assert [one[:2] for one in found_in(pair)] == [(0, pytest.approx(0.6)), (0, 0.4)]


def test_windows_vote():
    """By their scores and by how far inside of them a pixel lies; votes of one mind add up."""

    def stuff(label, score, size=(32, 64)):
        return PanopticMap(np.ones(size, np.int32), (SegmentInfo(1, label, score=score),))

    def labels(predictions, size, window, step, overlap):
        windows = Windows(size, window, step)
        for prediction in predictions:
            windows.add(prediction)
        ids, segments = windows.join(TASKS["panoptic"], NUM_THINGS, overlap)
        return np.array([0, *(segment.label for segment in segments)])[ids]

    def of_two(*scores, overlap=0.0):
        pair = [stuff(3 + i, score) for i, score in enumerate(scores)]
        return labels(pair, (32, 96), (32, 64), (32, 32), overlap)

    even = of_two(0.5, 0.5)
    assert (even[:, :48] == 3).all() and (even[:, 48:] == 4).all()
    assert 32 < (of_two(0.3, 0.9)[0] == 3).sum() < 45
    # Of little that is left of a segment the others get the pixels where they have any vote.
    assert ((of_two(0.01, 0.9, overlap=0.6) == 4).sum(1) == 64).all()
    # Two that agree overrule the one in the middle of which a pixel lies.
    three = [stuff(4, 0.5), stuff(3, 0.45), stuff(4, 0.5)]
    assert (labels(three, (32, 96), (32, 64), (32, 16), 0.0) == 4).all()
    assert (labels(three[1:2] * 3, (32, 96), (32, 64), (32, 16), 0.0) == 3).all()


def test_run_lengths_move():
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape, margin = rng.integers(1, 9, 2), rng.integers(0, 4, (2, 2))
        mask = rng.random(shape) < rng.choice([0, 0.5, 1])
        moved = rle.move(rle.encode(mask), margin[:, 0], np.add(shape, margin.sum(1)).tolist())
        assert moved == rle.encode(np.pad(mask, margin))


def with_windows(path, window, step, *overrides):
    given = [f"--config.eval.window={window}", f"--config.eval.window_step={step}"]
    return open_model(path, overrides=[*given, *overrides])


@pytest.mark.parametrize("task", ["panoptic", "instance"])
def test_a_picture_within_a_window_is_seen_whole(segmenters, tiny_models, task):
    """To the last bit; a larger picture is a mosaic of such."""
    sees = Segmenter(with_windows(tiny_models[task], (64, 96), (32, 32)))
    image = picture()
    one, other = (each(image, threshold=0.1).prediction for each in (sees, segmenters[task]))
    if task == "instance":
        assert one == other and len(one) > 1
    else:
        assert one.segments == other.segments and len(one.segments) > 1
        np.testing.assert_array_equal(one.ids, other.ids)
    large = sees(np.concatenate([image, image]), threshold=0.1)
    assert large.size == (128, 96) and len(large.segments) > 1
    assert max(segment.area for segment in large.segments) > 32 * 32


@pytest.mark.parametrize("count", [1, 2])
def test_parts_of_large_pictures_come_together(tmp_path, tiny_models, count):
    """Each picture to one of several processes, which have as many batches."""
    window, step = (32, 64), (32, 32)
    overrides = f"--config.data.data_dir={tmp_path}", "--config.data.image_side=(64, 96)"
    data = with_windows(tiny_models["panoptic"], window, step, *overrides).config.data
    split, seen = pipeline.load_split(data, "val", "panoptic"), {}
    processes = [
        pipeline.eval_batches(split, data, 4, 5, i, count, window=window, step=step)
        for i in range(count)
    ]
    for each in zip(*processes, strict=True):
        for process, ((batch,), truths) in enumerate(each):
            for index, truth in truths:
                np.testing.assert_array_equal(truth.ids, split.truth(index).ids)
                windows = Windows(split.sizes[index], window, step)
                assert index not in seen and len(windows.spans) > 2
                seen[index] = process, iter(windows.spans), split.image(index)
            for place in np.flatnonzero(batch.id != EMPTY):
                of_process, spans, image = seen[int(batch.id[place])]
                top, left, bottom, right = next(spans)
                assert of_process == process
                assert tuple(batch.original_size[place]) == (bottom - top, right - left)
                height, width = batch.size[place]
                shown, part = batch.image[place, :height, :width], image[top:bottom, left:right]
                assert abs(shown.mean((0, 1)) - part.mean((0, 1))).max() < 3
    assert sorted(seen) == list(range(5))
    assert not any(list(spans) for _, spans, _ in seen.values())
