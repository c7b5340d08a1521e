"""Drawing segmentations over their pictures: every segment tinted, outlined and named."""

from __future__ import annotations

import functools
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import matplotlib
import numpy as np
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from knet_jax.segmentation import rle
from knet_jax.segmentation.segments import (
    MIN_SCORE,
    Categories,
    Instance,
    PanopticMap,
    SegmentInfo,
    printable,
    segment_index,
)
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import write_whole

CELL = 640
"""Longer side, in pixels, of a picture of a panel."""
THUMBNAIL = 320
"""Longer side, in pixels, of a picture of a contact sheet."""
MARGIN = 8
"""Pixels between the pictures of a panel or contact sheet."""
MIN_FONT_SIZE = 12
"""Height of letters in pixels below which text cannot be read."""
MAX_SIDES = {".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
"""Largest side, in pixels, of the pictures that a file format can hold, where there is a limit."""
FONT = str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")
"""Font file of all names whose letters it has."""
OPACITY = 0.55
"""How much of a segment's color covers the picture."""
STUFF_OPACITY = 0.4
"""How much of the color of stuff covers the picture in an overlay."""
TRACK_COLORS = 24
"""How many things of a video have a color that no other has."""

Segmentation = PanopticMap | Sequence[Instance] | np.ndarray
"""A panoptic map, instances, or integer labels [H, W]: 1 + class, 0 = none."""


class Compared(NamedTuple):
    """One row of a panel: a picture, its truth and what was predicted."""

    title: str
    image: np.ndarray
    """uint8 [H, W, 3]."""
    truth: Segmentation
    prediction: Segmentation


def draw(image: np.ndarray, segmentation: Segmentation, categories: Categories) -> np.ndarray:
    """Draws segments in color over the picture in gray, with names where there is room for them.

    A class has the same color in all pictures; things of one class differ in shade by their
    place. Crowds are hatched, pixels of no segment are dark. A score is written where it is below
    1. Where instances overlap, the smaller one is in front; those that score below `MIN_SCORE` are
    left out.

    Args:
        image: uint8 [H, W, 3], RGB, as the result.
        segmentation: of the same size.
    """
    panoptic = as_panoptic(segmentation, image.shape[:2])
    gray = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    return _paint(gray, panoptic, categories, [OPACITY] * (1 + len(panoptic.segments)))


def overlay(
    image: np.ndarray,
    segmentation: Segmentation,
    categories: Categories,
    side: int | None = None,
) -> np.ndarray:
    """Draws segments over the picture in its own colors, with names and scores where there is room.

    Colors and names are those of `draw`, but every instance is drawn, stuff is paler than things,
    and pixels of no segment are left as they are.

    Args:
        image: uint8 [H, W, 3], RGB, as the result.
        segmentation: of the same size.
        side: longer side of what is drawn, in pixels; default: that of the picture.

    Raises:
        UserError: the side is no positive number.
    """
    panoptic = as_panoptic(segmentation, image.shape[:2], min_score=0.0)
    if side is not None:
        image, (panoptic,) = at_side(side, image, panoptic)
    opacities = (
        OPACITY if segment.label < categories.num_things else STUFF_OPACITY
        for segment in panoptic.segments
    )
    return _paint(image, panoptic, categories, [0, *opacities])


def _paint(
    image: np.ndarray, panoptic: PanopticMap, categories: Categories, opacities: Sequence[float]
) -> np.ndarray:
    """Paints segments over a picture, with outlines and names.

    `opacities` are those of the pixels of no segment, and of every segment.
    """
    index, segments = segment_index(panoptic), panoptic.segments
    colors = np.array([(0, 0, 0), *segment_palette(panoptic, categories)])
    opacity = np.array(opacities)[:, None]
    # Both are looked up, and blended in bytes: pictures may have many millions of pixels.
    tint, rest = (opacity * colors).astype(np.uint8), 255 * (1 - opacity).repeat(3, 1)
    tints = tint[index]
    crowd = np.array([False, *(segment.iscrowd for segment in segments)])
    if crowd.any():
        rows, columns = np.indices(index.shape, sparse=True)
        period = max(6, _font_size(image))
        tints[crowd[index] & ((rows + columns) % period < period // 3)] = 0
    picture = cv2.multiply(image, rest.round().astype(np.uint8)[index], scale=1 / 255) + tints
    bright = (0.4 * colors + 0.6 * 255).astype(np.uint8)
    edge = _edges(index)
    picture[edge] = bright[index[edge]]
    return _write_names(picture, index, segments, categories)


def as_panoptic(
    segmentation: Segmentation, size: tuple[int, int], min_score: float = MIN_SCORE
) -> PanopticMap:
    """Flattens any segmentation of a picture into a panoptic map, where each pixel has one owner.

    Small instances hide large ones, and all hide crowds.
    Instances that score less than `min_score` are left out.
    """
    if isinstance(segmentation, np.ndarray):
        segmentation = PanopticMap.of_labels(segmentation)
    if isinstance(segmentation, PanopticMap):
        assert segmentation.ids.shape == size, f"{segmentation.ids.shape} of {size} pixels"
        return segmentation
    ids = np.zeros(size, np.int32)
    shown = [instance for instance in segmentation if instance.score >= min_score]
    for i in sorted(
        range(len(shown)), key=lambda i: (not shown[i].iscrowd, -rle.area(shown[i].rle))
    ):
        ids[rle.decode(shown[i].rle) > 0] = i + 1
    return PanopticMap(
        ids,
        tuple(SegmentInfo(i, s.label, s.iscrowd, s.score, s.track) for i, s in enumerate(shown, 1)),
    )


def panel(rows: Sequence[Compared], categories: Categories) -> np.ndarray:
    """Draws pictures one under another, each as image | truth | prediction.

    Small pictures are enlarged until names can be read, large ones are reduced.

    Returns:
        uint8 [H, W, 3], RGB.
    """
    strips = []
    for title, image, truth, prediction in rows:
        given = {"truth": truth, "prediction": prediction}
        strips.append(strip(draw_all(title, image, given, categories)))
    width = max(strip.shape[1] for strip in strips)
    return np.concatenate(
        [
            np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)
            for strip in strips
        ]
    )


def draw_all(
    title: str,
    image: np.ndarray,
    segmentations: Mapping[str, Segmentation],
    categories: Categories,
    side: int = CELL,
) -> list[tuple[str, np.ndarray]]:
    """Draws a picture and several segmentations of it at a longer side, with their captions."""
    given = (as_panoptic(each, image.shape[:2]) for each in segmentations.values())
    image, maps = at_side(side, image, *given)
    drawn = (draw(image, each, categories) for each in maps)
    return [(printable(title), image), *zip(segmentations, drawn, strict=True)]


def strip(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Lays pictures of one size out in a row, captions above: uint8 [H, W, 3], RGB."""
    height, width = pictures[0][1].shape[:2]
    size = 18
    top = 2 * size
    canvas_width = len(pictures) * (width + MARGIN) + MARGIN
    canvas = Image.new("RGB", (canvas_width, top + height + MARGIN), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (caption, picture) in enumerate(pictures):
        left = MARGIN + i * (width + MARGIN)
        pen.text((left, top // 2), caption, "black", _font(size, caption), anchor="lm")
        canvas.paste(Image.fromarray(picture), (left, top))
    return np.array(canvas)


def readable_side(size: tuple[int, int]) -> int:
    """Returns the longer side of an overlay of a picture of (height, width), at least `CELL`.

    On a smaller one names would cover the picture.
    """
    return max(CELL, *size)


def at_side(
    side: int, image: np.ndarray, *maps: PanopticMap
) -> tuple[np.ndarray, list[PanopticMap]]:
    """Resizes a picture and its panoptic maps to a longer side of `side` pixels.

    Thin segments may lose their last pixel.

    Raises:
        UserError: the side is no positive number.
    """
    if not (isinstance(side, int | np.integer) and side > 0):
        raise UserError(f"side is {side!r}; accepted: a number of pixels, at least 1")
    scale = side / max(image.shape[:2])
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    smooth = cv2.INTER_CUBIC if scale > 1 else cv2.INTER_AREA
    nearest = cv2.INTER_NEAREST_EXACT
    return cv2.resize(image, (width, height), interpolation=smooth), [
        each._replace(ids=cv2.resize(each.ids, (width, height), interpolation=nearest))
        for each in maps
    ]


@functools.cache
def class_colors(num_things: int, num_classes: int) -> np.ndarray:
    """Chooses a color for every class, each the one that differs most from those before it.

    Where there are things and stuff, stuff is less vivid.

    Returns:
        float [num_classes, 3], RGB in 0 … 255.
    """
    grid = np.meshgrid(
        np.arange(0, 360, 7.5), np.linspace(1, 0.25, 6), np.linspace(1, 0.55, 5), indexing="ij"
    )
    hsv = np.stack(grid, -1).reshape(1, -1, 3).astype(np.float32)
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    # Lightness counts for less: that of the picture shines through.
    lab = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)[0] * [0.8, 1, 1]
    is_vivid = hsv[0, :, 1] > 0.6
    distance = np.full(len(lab), np.inf)
    chosen = []
    for label in range(num_classes):
        fits = is_vivid == (label < num_things) if 0 < num_things < num_classes else True
        chosen.append(np.where(fits, distance, -1).argmax())
        distance = np.minimum(distance, np.linalg.norm(lab - lab[chosen[-1]], axis=1))
    return 255.0 * rgb[0, chosen]


def segment_palette(panoptic: PanopticMap, categories: Categories) -> list[np.ndarray]:
    """Returns the color of every segment, RGB in 0 … 255: shades of its class's by its place.

    What is tracked through a video has a color of its own instead.
    """
    index = segment_index(panoptic)
    places = ndimage.find_objects(index, len(panoptic.segments))
    palette = class_colors(categories.num_things, len(categories.names))
    counts = Counter(s.label for s in panoptic.segments if s.label < categories.num_things)
    colors = []
    for segment, place in zip(panoptic.segments, places):
        color = palette[segment.label]
        if segment.track:
            color = class_colors(TRACK_COLORS, TRACK_COLORS + 1)[segment.track % TRACK_COLORS]
        elif place and counts[segment.label] > 1:
            # Darker or paler, by the place and not by the rank, which in a video changes all the time.
            # Of things side by side, in a row or a column, neighbors are far apart on the circle.
            middle = sum(
                (side.start + side.stop) / (2 * length) for side, length in zip(place, index.shape)
            )
            angle = 2 * np.pi * 1.4 * middle
            color = color + (255 - color) * 0.15 * (1 + np.sin(angle))
            color = color * (0.85 + 0.15 * np.cos(angle))
        colors.append(color)
    return colors


def _edges(index: np.ndarray) -> np.ndarray:
    """Marks both sides of where segments meet, bool [H, W]; wider in large pictures."""
    edge = np.zeros(index.shape, np.uint8)
    beside, below = index[:, 1:] != index[:, :-1], index[1:] != index[:-1]
    edge[:, 1:] |= beside
    edge[:, :-1] |= beside
    edge[1:] |= below
    edge[:-1] |= below
    width = 1 + 2 * round(max(index.shape) / (3 * CELL))
    return cv2.dilate(edge, np.ones((width, width), np.uint8)) > 0


def _write_names(
    image: np.ndarray,
    index: np.ndarray,
    segments: Sequence[SegmentInfo],
    categories: Categories,
) -> np.ndarray:
    """Writes names in the middle of segments that have room for them, large segments first.

    A name that is wider than the picture is written without its score, or not at all.
    """
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas, "RGBA")
    size = _font_size(image)
    gap = size // 5
    height, width = index.shape
    places = ndimage.find_objects(index, len(segments))
    areas = np.bincount(index.ravel(), minlength=len(segments) + 1)[1:]
    taken: list[tuple[float, ...]] = []
    for i in np.argsort(-areas, kind="stable"):
        if places[i] is None:
            continue
        x, y, radius = _middle(index[places[i]] == i + 1)
        x, y = x + places[i][1].start, y + places[i][0].start
        if radius < 0.6 * size:
            continue
        name, addition = _name(segments[i], categories)
        font = _font(size, name)
        for text in dict.fromkeys((name + addition, name)):
            left, top, right, bottom = pen.textbbox((x, y), text, font, anchor="mm")
            left, top, right, bottom = left - gap, top - gap, right + gap, bottom + gap
            if right - left <= width:
                break
        else:
            continue
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


def _name(segment: SegmentInfo, categories: Categories) -> tuple[str, str]:
    """Returns the name of a segment, and what may be left out: its score, or that it is a crowd.

    What is tracked through a video has the number of its track, and no score. Where no font has the
    letters of the name, the id of the class stands for it.
    """
    name = categories.names[segment.label]
    if _typeface(name) is None:
        name = f"#{categories.dataset_ids[segment.label]}"
    if segment.iscrowd:
        return name, " (crowd)"
    if segment.track:
        return f"{name} {segment.track}", ""
    return name, "" if segment.score == 1 else f" {segment.score:.2f}"


def _middle(mask: np.ndarray) -> tuple[int, int, float]:
    """Returns column, row and radius of the largest disc inside a mask [H, W]."""
    distance = cv2.distanceTransform(np.pad(mask, 1).astype(np.uint8), cv2.DIST_L2, 5)
    _, radius, _, (x, y) = cv2.minMaxLoc(distance)
    return x - 1, y - 1, radius


def _font_size(image: np.ndarray) -> int:
    return max(MIN_FONT_SIZE, round(0.022 * max(image.shape[:2])))


@functools.cache
def _font(size: int, text: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_typeface(text) or FONT, size)


@functools.cache
def _typeface(text: str) -> str | None:
    """Finds the file of a font that has all letters of a text: our own, or one of the system."""
    letters = {ord(letter) for letter in text if not letter.isspace()}
    if letters <= _letters(FONT):
        return FONT
    return next((path for path in _system_fonts() if letters <= _letters(path)), None)


@functools.cache
def _system_fonts() -> list[str]:
    """Lists the files of the system's fonts, regular ones first."""
    from matplotlib.font_manager import findSystemFonts  # slow: it reads all it finds

    return sorted(findSystemFonts(), key=lambda path: ("Regular" not in path, path))


@functools.cache
def _letters(path: str) -> frozenset[int]:
    """Returns the code points that a font has; none where it cannot be drawn at any size."""
    try:
        ImageFont.truetype(path, MIN_FONT_SIZE)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def thumbnail(picture: np.ndarray, caption: str) -> np.ndarray:
    """Draws a small picture over its name, in a cell of the same size for all: uint8 [H, W, 3], RGB."""
    caption = printable(caption)
    small, _ = at_side(THUMBNAIL, picture)
    height, width = small.shape[:2]
    font = _font(MIN_FONT_SIZE, caption)
    line = 2 * font.size
    cell = Image.new("RGB", (THUMBNAIL, THUMBNAIL + line), "white")
    cell.paste(Image.fromarray(small), ((THUMBNAIL - width) // 2, (THUMBNAIL - height) // 2))
    while len(caption) > 1 and font.getlength(caption) > THUMBNAIL:
        caption = "…" + caption.removeprefix("…")[1:]
    middle = (THUMBNAIL // 2, THUMBNAIL + line // 2)
    ImageDraw.Draw(cell).text(middle, caption, "black", font, anchor="mm")
    return np.array(cell)


def contact_sheet(thumbnails: Sequence[np.ndarray]) -> np.ndarray:
    """Lays thumbnails out in rows: uint8 [H, W, 3], RGB."""
    columns = min(len(thumbnails), max(3, math.ceil(len(thumbnails) ** 0.5)))
    height, width = (side + 2 * MARGIN for side in thumbnails[0].shape[:2])
    rows = math.ceil(len(thumbnails) / columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, cell in enumerate(thumbnails):
        top, left = i // columns * height + MARGIN, i % columns * width + MARGIN
        sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    return sheet


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """Writes uint8 [H, W, 3], RGB, in the format of the name's suffix: whole or not at all.

    Raises:
        UserError: the format holds no picture of this size.
        OSError: the file cannot be written.
    """
    path, encoded = Path(path), io.BytesIO()
    suffix = path.suffix.lower()
    height, width = picture.shape[:2]
    if max(height, width) > (accepted := MAX_SIDES.get(suffix, math.inf)):
        raise UserError(
            f"{path}: the picture has {height} x {width} pixels; a {suffix} file holds up to "
            f"{accepted} a side"
        )
    form = Image.registered_extensions()[suffix]
    Image.fromarray(picture).save(encoded, form, quality=92)
    write_whole(path, encoded.getvalue())
