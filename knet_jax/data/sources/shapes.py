"""An embedded dataset: overlapping things on textured stuff, drawn from a seed.

The seed is the split's name and the picture's position. Five thing classes differ in outline and
mostly in hue, four stuff classes in texture. Pictures have different sizes and orientations; some
have no things, some a crowd of tiny ones, some a void patch.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from knet_jax.data import records
from knet_jax.data.annotations import instance, panoptic, semantic
from knet_jax.data.annotations.kind import Record
from knet_jax.data.prepared_split import split_name
from knet_jax.segmentation import image_files, published_classes, rle
from knet_jax.segmentation.published_classes import PATTERNS as STUFF
from knet_jax.segmentation.published_classes import SHAPES as THINGS
from knet_jax.system.errors import UserError

MAX_THINGS = 6
RADII = (11, 24)
"""Pixels from the centre of a thing to its farthest point."""
LEAST_VISIBLE = 0.4
"""The share of a thing that later things leave uncovered."""
LEAST_SIDE = 48
"""Pixels below which things do not fit."""
NUM_SAMPLES, SAMPLE_SIDE = 12, (96, 128)
"""Pictures that are written for a user, and their sides in pixels."""
VIDEO_SIZE, VIDEO_THINGS = (128, 128), 5
"""Height and width of videos, in pixels, and how many things they show."""
WITHOUT_THINGS, WITH_CROWD, WITH_VOID = 0.1, 0.1, 0.2
"""Shares of the pictures: without things, with a crowd, with a void patch."""


def find(task: str, config_data, split: str) -> records.Source:
    """A split of the pictures that `config.data` asks for, named after all they depend on.

    Raises UserError where their sides are too small.
    """
    counts = {
        split_name(config_data.val_split): config_data.num_val,
        split_name(config_data.train_split): config_data.num_train,
    }
    count, sides = counts[split], config_data.image_side
    if sides[0] < LEAST_SIDE:
        raise UserError(
            f"config.data.image_side is {sides}; accepted: sides of at least {LEAST_SIDE}, "
            "below which things do not fit"
        )
    name = f"{task}-{split}-{count}-{sides[0]}-{sides[1]}"
    return records.Source("shapes", name, split, task, partial(_examine, task, split, count, sides))


def _examine(task: str, split: str, count: int, sides: tuple[int, int]) -> records.Examples:
    categories = published_classes.find("shapes", task)
    entries = ((f"drawing {index}", index) for index in range(count))
    read = partial(_draw_record, task, split, sides)
    return records.Examples(categories, count, entries, read, (), "")


def _draw_record(
    task: str, split: str, sides: tuple[int, int], index: int
) -> tuple[Record, Sequence[str]]:
    drawing = draw(split, index, sides)
    name, annotation = f"{split}_{index:06d}.png", ANNOTATIONS[task](drawing)
    return Record(_encode(drawing.image), index, name, drawing.slots.shape, annotation), ()


class Drawing(NamedTuple):
    """A picture that was drawn, and the segments in it."""

    image: np.ndarray
    """uint8 [H, W, 3], RGB."""
    slots: np.ndarray
    """int [H, W]: number of each pixel's segment; 0 is void."""
    labels: list[int]
    """The class of each segment, by its number; -1 for void."""
    crowds: set[int]
    """Numbers of the segments that are crowds."""
    ids: np.ndarray
    """int [number of segments, void included]: the id of each in a panoptic PNG."""


def draw(split: str, index: int, image_side: tuple[int, int]) -> Drawing:
    """Draws a picture; the same arguments give the same drawing.

    Args:
        split: name of the split.
        index: position of the picture in it.
        image_side: least and greatest length of either side, in pixels.
    """
    rng = np.random.default_rng((zlib.crc32(split.encode()), index))
    height, width = (int(side) for side in rng.integers(*image_side, size=2, endpoint=True))
    image, slots, labels = _draw_stuff(rng, height, width)
    crowds = set()
    if rng.random() >= WITHOUT_THINGS:
        if rng.random() < WITH_CROWD:
            crowds.add(len(labels))
            _draw_crowd(rng, image, slots, labels)
        areas = np.bincount(slots.ravel(), minlength=len(labels)).tolist()
        for _ in range(rng.integers(1, MAX_THINGS, endpoint=True)):
            _draw_thing(rng, image, slots, labels, areas)
    if rng.random() < WITH_VOID:
        _draw_void(rng, image, slots)
    return _finish(rng, image, slots, labels, crowds)


def draw_video(seed: int, num_frames: int, speed: float = 4.0) -> Iterator[Drawing]:
    """Draws a video: things of two classes that cross, hide each other, go and return.

    Each swings to and fro, some beyond the borders, and turns; which one is in front stays.

    Args:
        seed: of everything random.
        num_frames: how many.
        speed: the most that the middle of a thing moves from frame to frame, in pixels.

    Returns:
        The frames, in which a segment has the same number throughout, also where nothing is seen
        of it.
    """
    rng = np.random.default_rng((zlib.crc32(b"video"), seed))
    background, slots, labels = _draw_stuff(rng, *VIDEO_SIZE)
    classes = rng.choice(len(THINGS), 2, replace=False)
    things = [int(classes[i % 2]) for i in range(VIDEO_THINGS)]
    outlines = [_outline(rng, THINGS[label], rng.uniform(*RADII)) for label in things]
    colors = [_color(rng, label) * rng.uniform(0.85, 1.0) for label in things]
    # Along x and y: the middle of the swing, how far it reaches, and where in it the video begins.
    of_each = VIDEO_THINGS, 2
    middle = rng.uniform(0.3, 0.7, of_each) * VIDEO_SIZE[::-1]
    reach = rng.uniform((0.3, 0.1), (0.9, 0.4), of_each) * VIDEO_SIZE[::-1]
    start, turn = rng.uniform(0, 2 * np.pi, of_each), rng.uniform(-0.05, 0.05, VIDEO_THINGS)
    for time in range(num_frames):
        image, seen = background.copy(), slots.copy()
        middles = middle + reach * np.sin(start + speed / np.sqrt(2) / reach * time)
        for i, (outline, center, angle) in enumerate(zip(outlines, middles, turn * time)):
            cos, sin = np.cos(angle), np.sin(angle)
            mask = _fill(outline @ np.array([[cos, sin], [-sin, cos]]) + center, VIDEO_SIZE)
            image[mask], seen[mask] = colors[i], len(labels) + i
        yield _finish(rng, image, seen, [*labels, *things], set())


def draw_large(seed: int, size: tuple[int, int], num_things: int) -> Drawing:
    """Draws a picture of a height and width with so many things of the same sizes on stuff as dense as
    in small ones, without crowds and void. The things must leave each other room."""
    rng = np.random.default_rng(seed)
    image, slots = np.zeros((*size, 3), np.float32), np.zeros(size, np.int32)
    labels = [-1, *range(len(THINGS), len(THINGS) + len(STUFF))]
    tile = sum(SAMPLE_SIDE) // 2
    for top, left in product(*(range(0, side, tile) for side in size)):
        part = np.s_[top : top + tile, left : left + tile]
        image[part], drawn, shown = _draw_stuff(rng, *slots[part].shape)
        slots[part] = (np.array(shown) - len(THINGS) + 1)[drawn]
    areas = np.bincount(slots.ravel(), minlength=len(labels)).tolist()
    wanted = len(labels) + num_things
    while len(labels) < wanted:
        _draw_thing(rng, image, slots, labels, areas)
    return _finish(rng, image, slots, labels, set())


def _finish(
    rng: np.random.Generator,
    image: np.ndarray,
    slots: np.ndarray,
    labels: list[int],
    crowds: set[int],
) -> Drawing:
    """Adds noise to what was drawn, and gives the segments ids."""
    noisy = image + rng.normal(0, 6, image.shape)
    image = np.clip(cv2.GaussianBlur(noisy, (3, 3), 0.6), 0, 255).astype(np.uint8)
    # Any distinct ids would do; random ones use all three channels of the PNG.
    ids = rng.choice(np.arange(1, 1 << 24, 997), len(labels), replace=False)
    ids[0] = 0
    return Drawing(image, slots, labels, crowds, ids)


def annotate_panoptic(drawing: Drawing) -> panoptic.PanopticAnnotation:
    """The segments of a drawing, things and stuff."""
    slots, labels, ids = drawing.slots, drawing.labels, drawing.ids
    areas = np.bincount(slots.ravel(), minlength=len(labels))
    return panoptic.PanopticAnnotation(
        png=_encode(image_files.segment_colors(ids[slots])),
        segments=tuple(
            panoptic.StoredSegment(
                int(ids[slot]), labels[slot], slot in drawing.crowds, int(areas[slot])
            )
            for slot in range(1, len(labels))
            if areas[slot]
        ),
    )


def annotate_instances(drawing: Drawing) -> tuple[instance.StoredInstance, ...]:
    """The visible parts of a drawing's things and crowds."""
    found = []
    for slot, label in enumerate(drawing.labels):
        mask, is_crowd = drawing.slots == slot, slot in drawing.crowds
        if 0 <= label < len(THINGS) and mask.any():
            counts = rle.encode(mask)["counts"]
            found.append(instance.StoredInstance(counts, label, is_crowd, float(mask.sum())))
    return tuple(found)


def annotate_semantic(drawing: Drawing) -> bytes:
    """The class of every pixel of a drawing; crowds and void are ignored."""
    table = 1 + np.array(drawing.labels)
    table[[0, *drawing.crowds]] = 0
    return semantic.encode_map(table[drawing.slots])


ANNOTATIONS = {
    "panoptic": annotate_panoptic,
    "instance": annotate_instances,
    "semantic": annotate_semantic,
}
"""How a drawing is annotated for a task."""


def _encode(rgb: np.ndarray) -> bytes:
    return cv2.imencode(".png", rgb[..., ::-1])[1].tobytes()


def _draw_stuff(
    rng: np.random.Generator, height: int, width: int
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Fills a picture with two or three textured regions around random centres."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    count = int(rng.integers(2, 3, endpoint=True))
    kinds = rng.choice(len(STUFF), count, replace=False)
    centers = rng.random((count, 2)) * (height, width)
    bend = 6 * np.sin(x / rng.uniform(8, 20)) + 6 * np.sin(y / rng.uniform(8, 20))
    distances = [np.hypot(y - cy, x - cx) + bend * i for i, (cy, cx) in enumerate(centers)]
    slots = 1 + np.argmin(distances, axis=0)
    image = np.zeros((height, width, 3), np.float32)
    for slot, kind in enumerate(kinds, start=1):
        dark, bright = rng.uniform(50, 100), rng.uniform(150, 210)
        tint = rng.uniform(0.85, 1, 3)
        value = dark + (bright - dark) * _texture(rng, STUFF[kind], y, x)
        image[slots == slot] = (value[..., None] * tint)[slots == slot]
    return image, slots, [-1, *(len(THINGS) + int(kind) for kind in kinds)]


def _texture(rng: np.random.Generator, kind: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Brightness in [0, 1] of a pattern of random direction and period."""
    angle, period = rng.uniform(0, np.pi), rng.uniform(7, 11)
    u = 2 * np.pi / period * (np.cos(angle) * x + np.sin(angle) * y)
    v = 2 * np.pi / period * (np.cos(angle) * y - np.sin(angle) * x)
    if kind == "stripes":
        return (np.sin(u) > 0).astype(np.float32)
    if kind == "checks":
        return (np.sin(u / 1.3) * np.sin(v / 1.3) > 0).astype(np.float32)
    if kind == "dots":
        return (np.cos(u) + np.cos(v) > 0.9).astype(np.float32)
    return rng.random(x.shape, np.float32)


def _outline(rng: np.random.Generator, kind: str, radius: float) -> np.ndarray:
    """Corners of a thing around the origin, float [p, 2], at a random rotation."""
    if kind == "cross":
        t = radius * 0.3
        r = np.sqrt(radius**2 - t**2)
        corners = [(t, t), (t, r), (-t, r), (-t, t), (-r, t), (-r, -t)]
        corners += [(-x, -y) for x, y in corners]
        corners = np.array(corners)
        angles, radii = np.arctan2(corners[:, 1], corners[:, 0]), np.hypot(*corners.T)
    else:
        points = {"circle": 48, "square": 4, "triangle": 3, "star": 10}[kind]
        angles = 2 * np.pi * np.arange(points) / points
        radii = np.full(points, float(radius))
        if kind == "star":
            radii[1::2] *= 0.42
    angles = angles + rng.uniform(0, 2 * np.pi)
    return np.stack([np.cos(angles) * radii, np.sin(angles) * radii], -1)


def _color(rng: np.random.Generator, label: int) -> np.ndarray:
    """A saturated color whose hue hints at the class."""
    hue = (label * 180 / len(THINGS) + rng.uniform(-9, 9)) % 180
    hsv = np.array([[[hue, rng.uniform(150, 255), rng.uniform(140, 255)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _fill(corners: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    cv2.fillPoly(mask, [np.rint(corners).astype(np.int32)], 1)
    return mask.astype(bool)


def _draw_thing(rng, image: np.ndarray, slots: np.ndarray, labels: list, areas: list) -> None:
    """Draws a thing over what there is, unless that would hide another one too much."""
    label = int(rng.integers(len(THINGS)))
    outline = _outline(rng, THINGS[label], rng.uniform(*RADII))
    corners = outline + rng.random(2) * slots.shape[::-1]
    # Of a large picture only the part around it is looked at.
    left, top = np.maximum(np.rint(corners.min(0)).astype(int), 0)
    right, bottom = np.rint(corners.max(0)).astype(int) + 1
    image, slots = image[top:bottom, left:right], slots[top:bottom, left:right]
    mask = _fill(corners - (left, top), slots.shape)
    hidden, pixels = np.unique(slots[mask], return_counts=True)
    before = np.array(areas)[hidden]
    full_area = cv2.contourArea(outline.astype(np.float32))
    if mask.sum() < LEAST_VISIBLE * full_area or np.any(before - pixels < LEAST_VISIBLE * before):
        return
    image[mask] = _color(rng, label) * rng.uniform(0.85, 1.0)
    for slot, count in zip(hidden, pixels.tolist()):
        areas[slot] -= count
    slots[mask] = len(labels)
    labels.append(label)
    areas.append(int(mask.sum()))


def _draw_crowd(rng, image: np.ndarray, slots: np.ndarray, labels: list[int]) -> None:
    """Draws a cluster of tiny things of one class as a single segment."""
    label = int(rng.integers(len(THINGS)))
    center = rng.uniform(0.3, 0.7, 2) * slots.shape[::-1]
    for _ in range(12):
        outline = _outline(rng, THINGS[label], 4)
        mask = _fill(outline + center + rng.uniform(-14, 14, 2), slots.shape)
        image[mask] = _color(rng, label)
        slots[mask] = len(labels)
    labels.append(label)


def _draw_void(rng, image: np.ndarray, slots: np.ndarray) -> None:
    """Covers a small rectangle by a flat grey that belongs to nothing."""
    height, width = rng.integers(6, 14, 2)
    top, left = rng.integers(slots.shape[0] - height), rng.integers(slots.shape[1] - width)
    image[top : top + height, left : left + width] = 128
    slots[top : top + height, left : left + width] = 0


def write_samples(folder: Path) -> None:
    """Writes some pictures that no network was trained on, to try predictions with."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(NUM_SAMPLES):
        drawing = draw("samples", index, SAMPLE_SIDE)
        (folder / f"{index:02}.png").write_bytes(_encode(drawing.image))
    print(f"wrote {NUM_SAMPLES} pictures to {folder}/")
