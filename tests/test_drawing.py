"""Pictures of segmentations: what a viewer relies on."""

import colorsys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from knet_jax.segmentation import drawing, rle
from knet_jax.segmentation.drawing import (
    CELL,
    FONT,
    THUMBNAIL,
    Compared,
    as_panoptic,
    class_colors,
    draw,
    overlay,
    panel,
    save_picture,
)
from knet_jax.segmentation.segments import (
    MIN_SCORE,
    Categories,
    Instance,
    PanopticMap,
    SegmentInfo,
)

CATEGORIES = Categories(("cat", "dog", "sky", "grass"), (1, 2, 3, 4), num_things=2)
CAT, DOG, SKY, GRASS = range(4)
GRAY = np.full((200, 300, 3), 120, np.uint8)


def halves(left: SegmentInfo | None, right: SegmentInfo, shape=(200, 300)) -> PanopticMap:
    """A map of two halves; the left one may be void."""
    ids = np.full(shape, right.id, np.int32)
    ids[:, : shape[1] // 2] = left.id if left else 0
    return PanopticMap(ids, tuple(segment for segment in (left, right) if segment))


def columns(start: int, stop: int, label: int, shape=(200, 300), **fields) -> Instance:
    """An instance of full height."""
    mask = np.zeros(shape, np.uint8)
    mask[:, start:stop] = 1
    return Instance(rle.encode(mask), label, **fields)


def corner_colors(segmentation, image: np.ndarray = GRAY) -> tuple:
    """The colors in the left and the right half, away from names and outlines."""
    picture = draw(image, segmentation, CATEGORIES)
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


def lab(colors: np.ndarray) -> np.ndarray:
    """CIELAB of RGB in 0 … 255 [k, 3]."""
    return cv2.cvtColor(np.float32(colors / 255)[None], cv2.COLOR_RGB2LAB)[0]


@pytest.mark.parametrize(
    "num_things, num_classes, bound",
    [(5, 9, 45), (80, 133, 14), (0, 150, 14)],
)
def test_classes_differ_in_color(num_things, num_classes, bound):
    colors = class_colors(num_things, num_classes)
    pairs = np.triu_indices(num_classes, 1)
    apart = np.linalg.norm(lab(colors)[:, None] - lab(colors), axis=-1)[pairs]
    assert apart.min() > bound
    assert np.abs(colors[:, None] - colors).max(-1)[pairs].min() > 15
    assert class_colors(1200, 1200).shape == (1200, 3)


def test_shades_of_a_class_stay_near_its_hue():
    categories = Categories(tuple("abcdefghi"), tuple(range(9)), num_things=5)
    palette = class_colors(5, 9)
    for label in range(5):
        segments = [SegmentInfo(i + 1, label) for i in range(40)]
        ids = np.zeros((100, 210), np.int32)
        for i in range(40):
            ids[:10, 5 * i : 5 * i + 10] = i + 1  # each covers half of the one before
        shades = np.array(drawing.segment_palette(PanopticMap(ids, tuple(segments)), categories))
        hues = np.array([colorsys.rgb_to_hsv(*shade)[0] for shade in [palette[label], *shades]])
        assert (np.abs((hues - hues[0] + 0.5) % 1 - 0.5) < 0.01).all()
        assert np.abs(shades[:-4] - shades[4:]).max(1).min() > 8  # neighbors in a row of ten
        others = np.delete(palette, label, 0)
        assert np.abs(shades[:, None] - others).max(-1).min() > 40


def test_a_shade_depends_on_the_place_alone():
    """In a video the order of things changes with their scores."""
    left, right = columns(0, 150, CAT, score=0.9), columns(150, 300, CAT, score=0.8)
    assert corner_colors((left, right)) == corner_colors((right, left))
    moved = corner_colors((columns(3, 150, CAT, score=0.9), columns(150, 297, CAT, score=0.8)))
    np.testing.assert_allclose(moved, corner_colors((left, right)), atol=3)


@pytest.mark.parametrize("side, width", [(THUMBNAIL, 2), (CELL, 2), (1600, 4), (4000, 6)])
def test_outlines_are_wider_in_large_pictures(side, width):
    image = np.full((60, side, 3), 120, np.uint8)
    line = overlay(image, halves(None, SegmentInfo(1, SKY), (60, side)), CATEGORIES)[3]
    middle = slice(side // 2 - 10, side // 2 + 10)
    assert (~np.isin(line[middle, 0], [line[0, 0], line[-1, 0]])).sum() == width


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


def test_panel_holds_pictures_of_any_size():
    def row(height, width):
        image = np.full((height, width, 3), 120, np.uint8)
        truth = halves(SegmentInfo(1, SKY), SegmentInfo(2, CAT), (height, width))
        return Compared(f"{height}", image, truth, PanopticMap(np.zeros_like(truth.ids), ()))

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


def test_the_same_scene_looks_the_same_in_all_forms():
    """A cat on the left, nothing on the right."""
    labels = np.zeros((200, 300), np.uint8)
    labels[:, :150] = CAT + 1
    panoptic = PanopticMap(7 * labels.astype(np.int32), (SegmentInfo(7 * (CAT + 1), CAT),))
    wanted = draw(GRAY, panoptic, CATEGORIES)
    for other in (labels, labels.astype(np.uint16), (columns(0, 150, CAT),)):
        np.testing.assert_array_equal(draw(GRAY, other, CATEGORIES), wanted)


def test_small_instances_are_in_front_and_crowds_behind():
    large, small = columns(0, 200, CAT, score=0.9), columns(50, 90, CAT, score=0.4)
    for instances in ((large, small), (small, large)):
        panoptic = as_panoptic(instances, (200, 300))
        assert [s.score for s in panoptic.segments] == [one.score for one in instances]
        owner = {s.id: s.score for s in panoptic.segments} | {0: None}
        row = [owner[id] for id in panoptic.ids[3].tolist()]
        assert row == [0.9] * 50 + [0.4] * 40 + [0.9] * 110 + [None] * 100
    # A crowd is behind all of them, however small it is.
    crowd = columns(30, 60, CAT, iscrowd=True)
    for instances in ((large, crowd), (crowd, large)):
        panoptic = as_panoptic(instances, (200, 300))
        assert [s.iscrowd for s in panoptic.segments] == [one.iscrowd for one in instances]
        assert panoptic.ids[3].tolist() == [1 + instances.index(large)] * 200 + [0] * 100
    assert not as_panoptic((), (4, 5)).ids.any()


# Overlays.

COLORFUL = np.tile(np.uint8([200, 120, 40]), (200, 300, 1))


def test_an_overlay_leaves_the_colors_of_the_picture():
    picture = overlay(COLORFUL, halves(None, SegmentInfo(1, GRASS)), CATEGORIES)
    np.testing.assert_array_equal(picture[:, :145], COLORFUL[:, :145])
    assert (COLORFUL == [200, 120, 40]).all()  # the input stays
    plain, colorful = (
        overlay(image, halves(None, SegmentInfo(1, GRASS)), CATEGORIES)[20, -20].astype(int)
        for image in (np.full_like(COLORFUL, 120), COLORFUL)
    )
    # As much redder and less blue as the picture, but for what the segment covers.
    assert 30 < colorful[0] - plain[0] < 70 and -70 < colorful[2] - plain[2] < -30


def test_things_are_stronger_than_stuff():
    black = np.zeros_like(GRAY)
    for thing, stuff in ((CAT, SKY), (DOG, GRASS)):
        panoptic = halves(SegmentInfo(1, thing), SegmentInfo(2, stuff))
        left, right = (
            overlay(black + 255, panoptic, CATEGORIES)[20, x].astype(int)
            - overlay(black, panoptic, CATEGORIES)[20, x]
            for x in (20, -20)
        )
        assert (left < 0.5 * 255).all() and (right > 0.5 * 255).all()  # what is seen of the picture
    left, right = (
        overlay(black, halves(SegmentInfo(1, CAT), SegmentInfo(2, CAT)), CATEGORIES)[20, x]
        for x in (20, -20)
    )
    assert np.abs(left.astype(int) - right).max() > 15


def test_every_instance_of_an_overlay_is_drawn():
    doubtful = columns(0, 150, CAT, score=MIN_SCORE / 2)
    picture = overlay(GRAY, (doubtful,), CATEGORIES)
    assert (picture[20, 20] != GRAY[20, 20]).any()
    np.testing.assert_array_equal(picture[:, 155:], GRAY[:, 155:])
    np.testing.assert_array_equal(draw(GRAY, (doubtful,), CATEGORIES), draw(GRAY, (), CATEGORIES))


def test_names_that_would_hide_others_move():
    """Of two small things side by side, whose names are wider than they are, both get theirs."""
    ids = np.zeros((200, 300), np.int32)
    ids[80:120, 110:150], ids[80:120, 150:190] = 1, 2
    pair = PanopticMap(ids, (SegmentInfo(1, CAT), SegmentInfo(2, DOG)))
    names = ("crocodile", "elephant", "sky", "grass")
    pictures = [
        overlay(GRAY, pair, CATEGORIES._replace(names=each))
        for each in (names, ("kangaroo", *names[1:]), (names[0], "porcupine", *names[2:]))
    ]
    assert (pictures[0] != pictures[1]).any() and (pictures[0] != pictures[2]).any()


def test_names_fit_the_picture_or_are_left_out():
    """A name that is too wide loses its score, then itself."""
    narrow = np.full((640, 60, 3), 120, np.uint8)

    def picture(name, score=0.3):
        panoptic = PanopticMap(np.ones((640, 60), np.int32), (SegmentInfo(1, SKY, score=score),))
        return overlay(narrow, panoptic, CATEGORIES._replace(names=("cat", "dog", name, "grass")))

    np.testing.assert_array_equal(picture("noise", 0.3), picture("noise", 1.0))
    assert (picture("noise") != picture("nooze")).any()
    nothing = picture("a name that is far too long")
    np.testing.assert_array_equal(nothing, picture("another that is far too long"))
    assert len(np.unique(nothing.reshape(-1, 3), axis=0)) == 1


def test_names_of_other_scripts(monkeypatch):
    """They are written with a font of the system; the id of the class where there is none."""
    panoptic = PanopticMap(np.ones((200, 300), np.int32), (SegmentInfo(1, SKY, score=0.5),))

    def picture(name, fonts):
        monkeypatch.setattr(drawing, "_system_fonts", lambda: fonts)
        drawing._typeface.cache_clear()
        drawing._font.cache_clear()
        return overlay(GRAY, panoptic, CATEGORIES._replace(names=("cat", "dog", name, "grass")))

    np.testing.assert_array_equal(picture("天空", []), picture("#3", []))
    np.testing.assert_array_equal(picture("天空", [__file__]), picture("#3", []))
    assert (picture("océan", []) != picture("#3", [])).any()
    has_all = str(next(Path(FONT).parent.glob("LastResort*")))
    with_font = picture("天空", [has_all])
    assert (with_font != picture("#3", [])).any() and (with_font != picture("sky", [])).any()
    np.testing.assert_array_equal(picture("sky", [has_all]), picture("sky", []))
    drawing._typeface.cache_clear()
    drawing._font.cache_clear()


def test_files_that_hold_no_panorama(tmp_path):
    wide = np.zeros((2, 70_000, 3), np.uint8)
    for name, most in (("a.jpg", 65500), ("a.JPEG", 65500), ("a.webp", 16383)):
        with pytest.raises(ValueError, match=f"2 x 70000 pixels; a .* file holds up to {most} a"):
            save_picture(tmp_path / name, wide)
        save_picture(tmp_path / name, wide[:, :most])
    save_picture(tmp_path / "a.png", wide)
    assert Image.open(tmp_path / "a.png").size == (70_000, 2)
