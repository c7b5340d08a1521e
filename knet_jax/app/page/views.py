"""What the page shows of a picture: its segments, reduced to what fits a screen."""

from __future__ import annotations

import base64
import time
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from scipy import ndimage

from knet_jax.app.segmenter import Segmenter
from knet_jax.segmentation.drawing import as_panoptic, at_side, readable_side
from knet_jax.segmentation.image_files import PICTURES, decode_image, segment_colors
from knet_jax.segmentation.result import Result
from knet_jax.segmentation.segments import Instance
from knet_jax.system.errors import UserError

MAX_SIDE = 1600
"""Pixels of the longer side of what the page shows: larger pictures are reduced, which bounds the time
of each change. What is saved has the picture's own size."""

FORMATS = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
"""Of pictures, as Pillow calls them."""

REMEMBERED = 8
"""Reduced pictures of which the segments are kept, so that a slider need not start the network."""


class Seen(NamedTuple):
    """What a network sees in a picture."""

    result: Result
    size: tuple[int, int]
    """Height and width of the file, which may be larger than the picture of the result."""
    speed: str
    """How long the network and its results took."""


class Pictures:
    """Uploaded pictures and what a network sees in them.

    Args:
      segmenter: the network.
      max_megapixels: of a picture.
    """

    def __init__(self, segmenter: Segmenter, max_megapixels: float):
        self._segmenter = segmenter
        self._max_megapixels = max_megapixels
        self._reduced = lru_cache(maxsize=REMEMBERED)(partial(self._find, max_side=MAX_SIDE))
        # For both buttons.
        self._whole = lru_cache(maxsize=1)(self._find)

    def _find(
        self, path: str, overlap: float, threshold: float = 0.0, max_side: int | None = None
    ) -> Seen:
        image = decode_image(Path(path).read_bytes())
        size = image.shape[:2]
        if max_side and max(size) > max_side:
            image, _ = at_side(max_side, image)
        start, programs = time.perf_counter(), self._segmenter.num_programs
        result = self._segmenter(image, threshold, overlap)
        speed = f"segmented in {time.perf_counter() - start:.2f} s"
        if self._segmenter.num_programs > programs:
            speed += ", the first of its size"
        return Seen(result, size, speed)

    def see(
        self, path: str, name: str, task: str, threshold: float, overlap: float, whole: bool = False
    ) -> Seen:
        """The picture in a file as the page's settings want it.

        Args:
          path: of the file.
          name: what the user calls it.
          task: what to see.
          threshold: least score of a thing.
          overlap: least share of a mask that others leave it.
          whole: not reduced to what the page shows.

        Raises:
          ValueError: there is no such picture, or it is too large.
        """
        try:
            check_picture(path, self._max_megapixels)
            # Which things are shown changes nothing else: `above` gives what a threshold would, but
            # to find all costs more.
            seen = self._whole(path, overlap, threshold) if whole else self._reduced(path, overlap)
        except FileNotFoundError as error:
            raise UserError(f"{name}: no longer here; drop it again") from error
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
        return seen._replace(result=as_task(seen.result.above(threshold), task))


def check_picture(path: str, max_megapixels: float) -> None:
    """Looks at the head of a file, before anything of the picture's size is in memory.

    Raises:
      ValueError: it is no picture, or one of more than `max_megapixels`.
      FileNotFoundError: there is no file.
    """
    try:
        with Image.open(path, formats=FORMATS) as head:
            megapixels = head.width * head.height / 1e6
    except Image.DecompressionBombError:
        megapixels = np.inf
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError) as error:
        accepted = ", ".join(PICTURES)
        raise UserError(f"no picture that can be read; accepted: {accepted}") from error
    if megapixels > max_megapixels:
        size = f"{megapixels:.1f}" if np.isfinite(megapixels) else "far too many"
        raise UserError(f"{size} megapixels; accepted: up to {max_megapixels:g}")


def as_task(result: Result, task: str) -> Result:
    """A panoptic result as instances or as classes, or the same where it is of that task."""
    if task == result.task:
        return result
    if task == "semantic":
        return replace(result, task=task, prediction=result.semantic + 1)
    things = tuple(Instance(s.rle, s.label, s.score, area=s.area) for s in result.instances)
    return replace(result, task=task, prediction=things)


def display(seen: Seen) -> dict[str, Any]:
    """What viewer.js shows: everything is ready for JSON."""
    result, (height, width) = seen.result, seen.size
    side = readable_side(result.size)
    found = as_panoptic(result.prediction, result.size, min_score=0.0)
    _, [shown] = at_side(side, result.image, found)
    drawn = result.draw(side)
    colors = _colors(drawn, shown.ids)
    scored = result.task != "semantic"
    return {
        "picture": data_url(drawn, ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92]),
        "ids": data_url(segment_colors(shown.ids), ".png"),
        "segments": [
            {
                "id": segment.id,
                "name": segment.name,
                "score": f"{segment.score:.2f}" if scored else "",
                "share": f"{100 * segment.area / found.ids.size:.1f} %",
                "color": css_color(colors[segment.id]) if segment.id in colors else "",
            }
            for segment in result.segments
        ],
        "facts": [
            f"{width} × {height} pixels",
            f"{len(result.segments)} {'segments' if scored else 'classes'}",
            seen.speed,
        ],
    }


def _colors(drawn: np.ndarray, ids: np.ndarray) -> dict[int, np.ndarray]:
    """RGB that most of each segment has in a picture, of those that can be seen."""
    colors = {}
    for id, place in enumerate(ndimage.find_objects(ids), 1):
        if place:
            pixels = drawn[place][ids[place] == id]
            colors[id] = np.median(pixels[:: 1 + len(pixels) // 10_000], axis=0)
    return colors


def data_url(picture: np.ndarray, suffix: str, options: list[int] | None = None) -> str:
    """A picture, uint8 [H, W, 3] in RGB, within an address."""
    data = cv2.imencode(suffix, picture[..., ::-1], options or [])[1].tobytes()
    return (
        f"data:image/{suffix[1:].replace('jpg', 'jpeg')};base64,{base64.b64encode(data).decode()}"
    )


def css_color(color: np.ndarray) -> str:
    """rgb(…) of RGB in 0 … 255."""
    return "rgb({:.0f} {:.0f} {:.0f})".format(*color)
