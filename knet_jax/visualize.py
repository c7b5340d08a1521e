"""Pictures of segmentations of all kinds: every segment tinted, outlined and named."""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from knet_jax import rle
from knet_jax.metrics.panoptic import segment_index
from knet_jax.metrics.result_files import write_whole
from knet_jax.structs import Categories, Instance, PanopticMap, SegmentInfo

CELL = 640
"""Longer side, in pixels, of a picture of a panel."""
THUMBNAIL = 320
"""Longer side, in pixels, of a picture of a contact sheet."""
MARGIN = 8
"""Pixels between the pictures of a panel."""
MIN_FONT_SIZE = 12
"""Height in pixels below which text cannot be read."""
OPACITY = 0.55
"""How much of a segment's color covers the picture."""
MIN_SCORE = 0.3
"""Score below which an instance is not drawn: a network predicts many more than there are."""

Segmentation = PanopticMap | Sequence[Instance] | np.ndarray
"""A panoptic map, instances, or integer labels [H, W]: 1 + class, 0 = none."""


class Row(NamedTuple):
    """One picture of a panel."""

    title: str
    image: np.ndarray
    """uint8 [H, W, 3]."""
    truth: Segmentation
    prediction: Segmentation


def draw(image: np.ndarray, segmentation: Segmentation, categories: Categories) -> np.ndarray:
    """The picture in gray under its segments in color, with names where there is room for them.

    A class keeps its color in all pictures, things of one class differ in shade, crowds are
    hatched, what belongs to no segment is dark. A score is written where it is below 1. Of
    instances that overlap the smaller one is in front; those below `MIN_SCORE` are left out.

    Args:
        image: uint8 [H, W, 3], RGB.
        segmentation: of the same size.
        categories: names of its labels.

    Returns:
        uint8 [H, W, 3], RGB.
    """
    panoptic = as_panoptic(segmentation, image.shape[:2])
    index = segment_index(panoptic)
    crowd = np.array([False, *(segment.iscrowd for segment in panoptic.segments)])
    rows, columns = np.indices(index.shape, sparse=True)
    period = max(6, _font_size(image))
    stripe = crowd[index] & ((rows + columns) % period < period // 3)

    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.float32)
    colors = np.array([(0, 0, 0), *colors_of(panoptic.segments, categories)], np.float32)
    tinted = gray + OPACITY * (np.where(stripe[..., None], 0, colors[index]) - gray)
    picture = tinted.astype(np.uint8)
    edge = _edges(index)
    picture[edge] += ((255 - picture[edge]) * 0.75).astype(np.uint8)
    return _write_names(picture, index, panoptic.segments, categories)


def overlay(
    image: np.ndarray,
    segmentation: Segmentation,
    categories: Categories,
    side: int | None = None,
) -> np.ndarray:
    """The picture in its colors under its segments, with names and scores where there is room.

    Colors and names are as those of `draw`; here every instance is drawn, stuff is paler than
    things, what belongs to no segment is left as it is, and outlines are bright.

    Args:
        image: uint8 [H, W, 3], RGB.
        segmentation: of the same size.
        categories: names of its labels.
        side: the longer one of what is drawn, in pixels; default: that of the picture.

    Returns:
        uint8 [h, w, 3], RGB.
    """
    panoptic = as_panoptic(segmentation, image.shape[:2], min_score=0.0)
    if side:
        image, (panoptic,) = at_side(side, image, panoptic)
    index = segment_index(panoptic)
    colors = np.array([(0, 0, 0), *colors_of(panoptic.segments, categories)])
    opacity = np.array(
        [0, *(0.55 if s.label < categories.num_things else 0.4 for s in panoptic.segments)]
    )[:, None]
    # Both are looked up, and blended in bytes: pictures may have many millions of pixels.
    tint, rest = (opacity * colors).astype(np.uint8), 255 * (1 - opacity).repeat(3, 1)
    picture = cv2.multiply(image, rest.round().astype(np.uint8)[index], scale=1 / 255) + tint[index]
    bright = (0.4 * colors + 0.6 * 255).astype(np.uint8)
    edge = _edges(index)
    picture[edge] = bright[index[edge]]
    return _write_names(picture, index, panoptic.segments, categories)


def as_panoptic(
    segmentation: Segmentation, size: tuple[int, int], min_score: float = MIN_SCORE
) -> PanopticMap:
    """What can be seen of any segmentation of a picture, each pixel with one owner.

    Of instances small ones hide large ones, and all hide crowds.

    Args:
        segmentation: as `draw` takes it.
        size: height and width of the picture.
        min_score: of an instance that is seen.

    Raises:
        ValueError: the segmentation is of another size.
    """
    if isinstance(segmentation, PanopticMap):
        _check_size(segmentation.ids.shape, size)
        return segmentation
    if isinstance(segmentation, np.ndarray):
        _check_size(segmentation.shape, size)
        present = np.unique(segmentation[segmentation > 0]).tolist()
        segments = tuple(SegmentInfo(value, value - 1) for value in present)
        return PanopticMap(segmentation.astype(np.int32), segments)

    ids = np.zeros(size, np.int32)
    shown = [instance for instance in segmentation if instance.score >= min_score]
    for i in sorted(
        range(len(shown)), key=lambda i: (not shown[i].iscrowd, -rle.area(shown[i].rle))
    ):
        mask = rle.decode(shown[i].rle)
        _check_size(mask.shape, size)
        ids[mask > 0] = i + 1
    return PanopticMap(
        ids, tuple(SegmentInfo(i + 1, s.label, s.iscrowd, s.score) for i, s in enumerate(shown))
    )


def _check_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    if shape != size:
        sizes = (" x ".join(map(str, each)) for each in (shape, size))
        raise ValueError("the segmentation has {} pixels and the picture {}".format(*sizes))


def panel(rows: Sequence[Row], categories: Categories) -> np.ndarray:
    """Pictures one under another, each as image | truth | prediction: uint8 [H, W, 3], RGB.

    Small pictures are enlarged until names can be read, large ones are reduced.
    """
    strips = [_strip(row, categories) for row in rows]
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate(
        [
            np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)
            for strip in strips
        ]
    )


def _strip(row: Row, categories: Categories) -> np.ndarray:
    """One row of a panel, captions above."""
    given = (as_panoptic(each, row.image.shape[:2]) for each in (row.truth, row.prediction))
    image, maps = at_side(CELL, row.image, *given)
    truth, prediction = (draw(image, each, categories) for each in maps)
    height, width = image.shape[:2]

    font = _font(18)
    top = 2 * font.size
    canvas = Image.new("RGB", (3 * (width + MARGIN) + MARGIN, top + height + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    columns = ((row.title, image), ("truth", truth), ("prediction", prediction))
    for i, (caption, picture) in enumerate(columns):
        left = MARGIN + i * (width + MARGIN)
        pen.text((left, top // 2), caption, "black", font, anchor="lm")
        canvas.paste(Image.fromarray(picture), (left, top))
    return np.array(canvas)


def at_side(
    side: int, image: np.ndarray, *maps: PanopticMap
) -> tuple[np.ndarray, list[PanopticMap]]:
    """A picture whose longer side has so many pixels, and maps of it alike.

    Thin segments may lose their last pixel.
    """
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    nearest = cv2.INTER_NEAREST_EXACT
    return cv2.resize(image, (width, height), interpolation=smooth), [
        each._replace(ids=cv2.resize(each.ids, (width, height), interpolation=nearest))
        for each in maps
    ]


def colors_of(
    segments: Sequence[SegmentInfo], categories: Categories
) -> list[tuple[float, float, float]]:
    """RGB in 0 … 255 of every segment."""
    seen: dict[int, int] = {}
    colors = []
    for segment in segments:
        label = segment.label
        rank = seen[label] = seen.get(label, -1) + 1
        # Multiples of irrational numbers stay apart however many there are.
        hue, saturation, value = (
            0.618 * label,
            0.35 + (0.570 * label) % 0.3,
            0.95 - (0.755 * label) % 0.3,
        )
        if label < categories.num_things:
            shade = (0.5 + 0.618 * rank) % 1
            hue, saturation, value = hue + 0.1 * (shade - 0.5), 1 - 0.4 * shade, 0.7 + 0.3 * shade
        colors.append(tuple(255 * c for c in colorsys.hsv_to_rgb(hue % 1, saturation, value)))
    return colors


def _edges(index: np.ndarray) -> np.ndarray:
    """bool [H, W]: lines between segments, wider in large pictures."""
    edge = np.zeros(index.shape, np.uint8)
    edge[:, 1:] |= index[:, 1:] != index[:, :-1]
    edge[1:] |= index[1:] != index[:-1]
    width = 1 + 2 * round(max(index.shape) / (3 * CELL))
    return cv2.dilate(edge, np.ones((width, width), np.uint8)) > 0


def _write_names(
    image: np.ndarray, index: np.ndarray, segments: Sequence[SegmentInfo], categories: Categories
) -> np.ndarray:
    """Names in the middle of the segments that have room for them, large segments first."""
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas, "RGBA")
    font = _font(_font_size(image))
    gap = font.size // 5
    height, width = index.shape
    areas = np.bincount(index.ravel(), minlength=len(segments) + 1)[1:]
    found = ndimage.find_objects(index, len(segments))
    taken: list[tuple[float, ...]] = []
    for i in np.argsort(-areas, kind="stable"):
        if found[i] is None:
            continue
        x, y, radius = _middle(index[found[i]] == i + 1)
        x, y = x + found[i][1].start, y + found[i][0].start
        if radius < 0.6 * font.size:
            continue
        text = _name(segments[i], categories)
        left, top, right, bottom = pen.textbbox((x, y), text, font, anchor="mm")
        left, top, right, bottom = left - gap, top - gap, right + gap, bottom + gap
        # Names at the border are moved into the picture, those that would hide others up or down.
        dx = max(0, -left) - max(0, right - width)
        dy = max(0, -top) - max(0, bottom - height)
        line = bottom - top + 1
        boxes = (
            (left + dx, top + dy + shift, right + dx, bottom + dy + shift)
            for shift in (0, -line, line)
        )
        free = (box for box in boxes if 0 <= box[1] and box[3] <= height and _is_free(box, taken))
        box = next(free, None)
        if box is None:
            continue
        taken.append(box)
        pen.rounded_rectangle(box, gap, fill=(0, 0, 0, 150))
        pen.text((x + dx, y + box[1] - top), text, "white", font, anchor="mm")
    return np.array(canvas)


def _is_free(box: Sequence[float], taken: Sequence[Sequence[float]]) -> bool:
    """Whether (left, top, right, bottom) overlaps with no other such box."""
    return not any(
        box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
        for other in taken
    )


def _name(segment: SegmentInfo, categories: Categories) -> str:
    name = categories.names[segment.label]
    if segment.iscrowd:
        return f"{name} (crowd)"
    return name if segment.score == 1 else f"{name} {segment.score:.2f}"


def _middle(mask: np.ndarray) -> tuple[int, int, float]:
    """Column, row and radius of the largest disc inside a mask [H, W]; the border is outside."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    _, radius, _, (x, y) = cv2.minMaxLoc(distance)
    return x - 1, y - 1, radius


def _font_size(image: np.ndarray) -> int:
    return max(MIN_FONT_SIZE, round(0.022 * max(image.shape[:2])))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size
    )


def thumbnail(picture: np.ndarray, caption: str) -> np.ndarray:
    """A small picture over its name, of the size of all others: uint8 [H, W, 3], RGB."""
    small, _ = at_side(THUMBNAIL, picture)
    height, width = small.shape[:2]
    font = _font(MIN_FONT_SIZE)
    line = 2 * font.size
    cell = Image.new("RGB", (THUMBNAIL, THUMBNAIL + line), "white")
    cell.paste(Image.fromarray(small), ((THUMBNAIL - width) // 2, (THUMBNAIL - height) // 2))
    while len(caption) > 1 and font.getlength(caption) > THUMBNAIL:
        caption = "…" + caption.removeprefix("…")[1:]
    middle = (THUMBNAIL // 2, THUMBNAIL + line // 2)
    ImageDraw.Draw(cell).text(middle, caption, "black", font, anchor="mm")
    return np.array(cell)


def contact_sheet(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Thumbnails in rows: uint8 [H, W, 3], RGB."""
    columns = min(len(thumbnails), max(3, math.ceil(len(thumbnails) ** 0.5)))
    blank = np.full_like(thumbnails[0], 255)
    cells = [*thumbnails, *[blank] * (-len(thumbnails) % columns)]
    cells = [
        np.pad(cell, ((MARGIN,) * 2, (MARGIN,) * 2, (0, 0)), constant_values=255) for cell in cells
    ]
    rows = [np.concatenate(cells[i : i + columns], 1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3], RGB, in the form that the name ends in, such as PNG or JPEG: whole or
    not at all.

    Raises OSError where that is not possible.
    """
    path, encoded = Path(path), io.BytesIO()
    form = Image.registered_extensions()[path.suffix.lower()]
    Image.fromarray(picture).save(encoded, form, quality=92)
    write_whole(path, encoded.getvalue())
