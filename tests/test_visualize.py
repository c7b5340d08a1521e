"""Pictures of panoptic maps: what a viewer relies on."""

import numpy as np
import pytest

from knet_jax.structs import Categories, PanopticMap, SegmentInfo
from knet_jax.visualize import CELL, Row, draw, panel

CATEGORIES = Categories(("cat", "dog", "sky", "grass"), (1, 2, 3, 4), num_things=2)
CAT, DOG, SKY, GRASS = range(4)
GRAY = np.full((200, 300, 3), 120, np.uint8)


def halves(left: SegmentInfo | None, right: SegmentInfo, shape=(200, 300)) -> PanopticMap:
    """A map of two halves; the left one may be void."""
    ids = np.full(shape, right.id, np.int32)
    ids[:, : shape[1] // 2] = left.id if left else 0
    return PanopticMap(ids, tuple(segment for segment in (left, right) if segment))


def corner_colors(panoptic: PanopticMap, image: np.ndarray = GRAY) -> tuple:
    """The colors in the left and the right half, away from names and outlines."""
    picture = draw(image, panoptic, CATEGORIES)
    return tuple(picture[20, 20].tolist()), tuple(picture[20, -20].tolist())


def test_a_class_keeps_its_color():
    first = corner_colors(halves(SegmentInfo(1, CAT), SegmentInfo(2, SKY)))
    assert first == corner_colors(halves(SegmentInfo(900, CAT), SegmentInfo(7, SKY)))
    assert first[::-1] == corner_colors(halves(SegmentInfo(3, SKY), SegmentInfo(2, CAT)))
    colorful = GRAY.copy()
    colorful[..., 0] += 40  # with another blue the same brightness
    colorful[..., 2] -= 105
    np.testing.assert_allclose(
        corner_colors(halves(SegmentInfo(1, CAT), SegmentInfo(2, SKY)), colorful), first, atol=2
    )


def test_segments_can_be_told_apart():
    pairs = [(CAT, CAT), (CAT, DOG), (SKY, GRASS), (DOG, GRASS)]
    for left, right in pairs:
        a, b = corner_colors(halves(SegmentInfo(1, left), SegmentInfo(2, right)))
        assert np.abs(np.subtract(a, b)).max() > 15, (left, right)


def test_segments_have_outlines():
    panoptic = halves(SegmentInfo(1, SKY), SegmentInfo(2, SKY))
    line = draw(GRAY, panoptic, CATEGORIES)[10].astype(int).sum(-1)
    assert line.argmax() == 150
    assert line[150] > line[140] + 100 and line[140] == line[160]


def test_void_is_gray_and_dark():
    void, grass = corner_colors(halves(None, SegmentInfo(1, GRASS)))
    assert void[0] == void[1] == void[2] < 60
    assert max(grass) - min(grass) > 20


def test_a_crowd_is_hatched():
    picture = draw(GRAY, halves(SegmentInfo(1, CAT), SegmentInfo(2, CAT, True)), CATEGORIES)
    left, right = picture[5:40, 5:140], picture[5:40, 160:295]
    assert len(np.unique(left.reshape(-1, 3), axis=0)) == 1
    assert len(np.unique(right.reshape(-1, 3), axis=0)) == 2


def test_names_and_scores_are_written_where_there_is_room():
    def picture(name="sky", score=1.0, shape=(200, 300)):
        panoptic = halves(SegmentInfo(1, SKY), SegmentInfo(2, GRASS, score=score), shape)
        categories = CATEGORIES._replace(names=("cat", "dog", name, "grass"))
        return draw(GRAY[: shape[0], : shape[1]], panoptic, categories)

    changed = np.argwhere((picture() != picture("océan")).any(-1))
    assert len(changed) and (changed[:, 1] < 150).all()
    changed = np.argwhere((picture() != picture(score=0.5)).any(-1))
    assert len(changed) and (changed[:, 1] > 150).all()
    np.testing.assert_array_equal(picture(shape=(12, 24)), picture("sea", 0.5, shape=(12, 24)))


@pytest.mark.parametrize("shape", [(4, 300), (200, 6), (1, 1)])
def test_draw_leaves_its_input_and_keeps_the_size(shape):
    image = np.full((*shape, 3), 200, np.uint8)
    panoptic = PanopticMap(np.full(shape, 5, np.int32), (SegmentInfo(5, DOG),))
    picture = draw(image, panoptic, CATEGORIES)
    assert picture.shape == image.shape and picture.dtype == np.uint8
    assert (image == 200).all()


def test_panel_holds_pictures_of_any_size():
    def row(height, width):
        image = np.full((height, width, 3), 120, np.uint8)
        truth = halves(SegmentInfo(1, SKY), SegmentInfo(2, CAT), (height, width))
        return Row(f"{height}", image, truth, PanopticMap(np.zeros_like(truth.ids), ()))

    rows = [row(96, 128), row(128, 96), row(1500, 3000)]
    pictures = [panel([r], CATEGORIES) for r in rows]
    whole = panel(rows, CATEGORIES)
    assert whole.dtype == np.uint8
    assert whole.shape[1] == pictures[0].shape[1] == pictures[2].shape[1] > 3 * CELL
    assert whole.shape[0] == sum(p.shape[0] for p in pictures)
    for picture, (height, width) in zip(pictures, [(480, 640), (640, 480), (320, 640)]):
        assert 0 < picture.shape[0] - height < 100 and 0 < picture.shape[1] - 3 * width < 100
        # The picture itself, its truth in colors, a prediction of nothing.
        image, truth, prediction = (picture[-20, x * width // 2 + 40] for x in (1, 3, 5))
        assert image.tolist() == [120] * 3
        assert max(truth) - min(truth) > 20
        assert max(prediction) == min(prediction) < 60


def test_names_of_a_small_picture_can_be_read():
    image = np.full((96, 128, 3), 120, np.uint8)
    truth = halves(SegmentInfo(1, SKY), SegmentInfo(2, CAT), (96, 128))
    small, other = (
        panel([Row("", image, truth, truth)], CATEGORIES._replace(names=names))
        for names in (("cat", "dog", "sky", "grass"), ("cow", "dog", "sea", "grass"))
    )
    rows = np.flatnonzero((small != other).any((1, 2)))
    assert rows.max() - rows.min() >= 8  # x-height of 14 pixel type
