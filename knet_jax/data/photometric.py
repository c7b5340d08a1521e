"""Photometric distortion: brightness, contrast, saturation and hue of a picture at random.

The standard augmentation of semantic segmentation, from SSD (Liu et al., ECCV 2016). Each of the
four changes is made with probability one half; contrast comes first or last.
"""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

BRIGHTNESS = 32
"""The most that is added to, or taken from, a value of 0 to 255."""
CONTRAST = SATURATION = (0.5, 1.5)
"""Least and greatest factor."""
HUE = 18
"""The most that the hue turns, in the units of OpenCV, of which 180 are the full circle."""


class Distortion(NamedTuple):
    """What is done to a picture; the defaults change nothing."""

    brightness: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: int = 0
    contrast_last: bool = False


def draw(rng: np.random.Generator) -> Distortion:
    """Draws a distortion."""
    chosen = rng.random(4) < 0.5
    drawn = (
        rng.uniform(-BRIGHTNESS, BRIGHTNESS),
        rng.uniform(*CONTRAST),
        rng.uniform(*SATURATION),
        int(rng.integers(-HUE, HUE, endpoint=True)),
    )
    values = (value if use else still for value, use, still in zip(drawn, chosen, Distortion()))
    return Distortion(*values, contrast_last=bool(rng.random() < 0.5))


def apply(image: np.ndarray, distortion: Distortion) -> np.ndarray:
    """The distorted picture, uint8 [h, w, 3], RGB; values are cut off at 0 and 255."""
    image = _map(image, distortion.brightness + np.arange(256.0))
    contrast = distortion.contrast * np.arange(256.0)
    if not distortion.contrast_last:
        image = _map(image, contrast)
    if (distortion.saturation, distortion.hue) != (1.0, 0):
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        values = np.arange(256.0)
        tables = ((values + distortion.hue) % 180, distortion.saturation * values, values)
        image = cv2.cvtColor(_map(hsv, np.stack(tables, -1)), cv2.COLOR_HSV2RGB)
    return _map(image, contrast) if distortion.contrast_last else image


def _map(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Looks every value up in a table [256], or a table for each channel, [256, 3]."""
    return cv2.LUT(image, np.clip(table, 0, 255).astype(np.uint8)[None])
