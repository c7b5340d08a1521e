"""What the page shows of a picture: its segments, reduced to what fits a screen."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation.drawing import as_panoptic, at_side, readable_side, segment_palette
from knet_jax.segmentation.image_files import check_megapixels, decode_image, segment_colors
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Instance
from knet_jax.system.errors import UserError

MAX_SIDE = 1600
"""Longer side, in pixels, of what the page shows: larger pictures are reduced, which bounds the time
of each change. What is saved has the picture's own size."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Formats of pictures that are read, by Pillow's names."""

REMEMBERED = 8
"""How many results are kept, so that a slider need not start the network."""


class Seen(NamedTuple):
    """What a network sees in an uploaded picture."""

    result: Result
    size: tuple[int, int]
    """Height and width of the file, which may be larger than the picture of the result."""
    seconds: float
    """How long the segmenter took."""


class Pictures:
    """Uploaded pictures, and what a network sees in them."""

    def __init__(self, segmenter: Segmenter, max_megapixels: float):
        self._segmenter = segmenter
        self._max_megapixels = max_megapixels
        self._find_reduced = lru_cache(maxsize=REMEMBERED)(self._find)

    def _find(
        self, path: str, overlap: float, max_side: int | None, threshold: float = 0.0
    ) -> Seen:
        image = decode_image(Path(path).read_bytes())
        size = image.shape[:2]
        if max_side and max(size) > max_side:
            image, _ = at_side(max_side, image)
        start = time.perf_counter()
        result = self._segmenter(image, threshold, overlap)
        return Seen(result, size, time.perf_counter() - start)

    def see(
        self, path: str, name: str, task: str, threshold: float, overlap: float, whole: bool = False
    ) -> Seen:
        """Segments the picture in a file, which the user calls `name`, as the page's settings say.

        It is reduced to what the page shows, unless the whole is asked for.

        Raises:
            UserError: there is no such picture, or it is too large.
        """
        try:
            check_megapixels(path, self._max_megapixels, FORMATS)
            if whole:
                seen = self._find(path, overlap, None, threshold)
            else:
                # All things are found once; `above` then gives what any threshold would.
                seen = self._find_reduced(path, overlap, MAX_SIDE)
        except FileNotFoundError as error:
            raise UserError(f"{name}: no longer here; drop it again") from error
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        return seen._replace(result=as_task(seen.result.above(threshold), task))


def as_task(result: Result, task: str) -> Result:
    """Shows a panoptic result as instances or as classes; other results have one task only."""
    if task == result.task:
        return result
    if task == "semantic":
        return replace(result, task=task, prediction=result.semantic + 1)
    things = tuple(Instance(s.rle, s.label, s.score, area=s.area) for s in result.instances)
    return replace(result, task=task, prediction=things)


def display(seen: Seen) -> dict[str, Any]:
    """Makes what viewer.js shows, ready for JSON."""
    result, (height, width) = seen.result, seen.size
    side = readable_side(result.size)
    found = as_panoptic(result.prediction, result.size, min_score=0.0)
    _, [shown] = at_side(side, result.image, found)
    colors = {
        segment.id: color
        for segment, color in zip(shown.segments, segment_palette(shown, result.categories))
    }
    scored = result.task != "semantic"
    return {
        "picture": data_url(result.draw(side), ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92]),
        "ids": data_url(segment_colors(shown.ids), ".png"),
        "segments": [
            {
                "id": segment.id,
                "name": segment.name,
                "score": f"{segment.score:.2f}" if scored else "",
                "share": f"{100 * segment.area / found.ids.size:.1f} %",
                "color": css_color(colors[segment.id]),
            }
            for segment in result.segments
        ],
        "facts": [
            f"{width} × {height} pixels",
            f"{len(result.segments)} {'segments' if scored else 'classes'}",
            f"segmented in {seen.seconds:.2f} s",
        ],
    }


def data_url(picture: np.ndarray, suffix: str, options: list[int] | None = None) -> str:
    """Encodes a picture, uint8 [H, W, 3] in RGB, as a `data:` address."""
    data = cv2.imencode(suffix, picture[..., ::-1], options or [])[1].tobytes()
    kind = suffix[1:].replace("jpg", "jpeg")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def css_color(color: np.ndarray) -> str:
    """Formats RGB in 0 … 255 as rgb(…)."""
    return "rgb({:.0f} {:.0f} {:.0f})".format(*color)
