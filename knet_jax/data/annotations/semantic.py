"""Semantic annotations: stored as a grey PNG of labels, learned as such a map at full size.

Whatever numbers a dataset uses, stored pixels are 0 where they are ignored and 1 + k for class k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds

from knet_jax.data import recipes
from knet_jax.data.transforms import View
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.structs import SemanticTargets
from knet_jax.system.errors import UserError

ENCODED = ("label_map",)
"""Which of the features are pictures."""


def features() -> dict[str, Any]:
    """What TFDS stores of an annotation."""
    # Bytes that are given are stored as they are, whatever their depth.
    return {"label_map": tfds.features.Image(shape=(None, None, 1), encoding_format="png")}


def encode(annotation: bytes) -> dict[str, Any]:
    """An annotation as TFDS takes it."""
    return {"label_map": annotation}


def decode(stored: Mapping[str, Any]) -> bytes:
    """An annotation as TFDS gives it back."""
    return stored["label_map"]


def encode_map(label_map: np.ndarray) -> bytes:
    """A map of labels below 65 536 as a PNG of as few bits as they need."""
    deep = label_map.max(initial=0) > 255
    return cv2.imencode(".png", label_map.astype(np.uint16 if deep else np.uint8))[1].tobytes()


def tally(
    annotation: bytes, size: tuple[int, int], categories: Categories
) -> tuple[int, dict[str, np.ndarray]]:
    """No things; the pictures (0 or 1) and the pixels that show each class."""
    label_map = load(annotation, size, categories)
    pixels = np.bincount(label_map.ravel(), minlength=1 + len(categories.names))[1:]
    return 0, {"pictures": (pixels > 0).astype(np.int64), "pixels": pixels}


def describe(columns: Mapping[str, Sequence[int]], num_pixels: int) -> tuple[str, Sequence[str]]:
    """A headline for the tallies of a split, and a text for each class."""
    pixels = columns["pixels"]
    texts = [
        f"{count:>8} pictures  {100 * part / num_pixels:6.2f} % of the pixels"
        for count, part in zip(columns["pictures"], pixels)
    ]
    return f"{100 * (1 - sum(pixels) / num_pixels):.2f} % of the pixels ignored", texts


def load(annotation: bytes, size: tuple[int, int], categories: Categories) -> np.ndarray:
    """Decodes an annotation: uint8 or uint16 [H, W], 0 ignored, 1 + k for class k.

    Raises:
        ValueError: the PNG is broken, or holds more classes than there are.
    """
    label_map = image_files.load_label_map(annotation, size)
    greatest = int(label_map.max(initial=0))
    if greatest > len(categories.names):
        raise UserError(f"has class {greatest - 1} of {len(categories.names)}")
    return label_map


def train_view(
    recipe: recipes.Crop, loaded: np.ndarray, size: tuple[int, int], rng: np.random.Generator
) -> View:
    """Draws what training sees of a picture."""
    return recipe.train_view(size, rng, loaded)


def empty(
    recipe: recipes.Crop, categories: Categories, count: int, canvas: tuple[int, int]
) -> SemanticTargets:
    """The targets of pictures of which every pixel is ignored."""
    del recipe
    dtype = np.uint8 if len(categories.names) <= 255 else np.uint16
    return SemanticTargets(np.zeros((count, *canvas), dtype))


def fill(
    targets: SemanticTargets,
    place: int,
    loaded: np.ndarray,
    view: View,
    canvas: tuple[int, int],
    categories: Categories,
) -> None:
    """Writes what a view shows of an annotation into a place of the targets."""
    del canvas, categories
    height, width = view.shown
    targets.label_map[place, :height, :width] = recipes.crop_map(loaded, view)


def truth(loaded: np.ndarray, categories: Categories) -> np.ndarray:
    """The annotation at original size, uint8 (uint16 above 255 classes) [H, W]."""
    return loaded.astype(np.uint8 if len(categories.names) <= 255 else np.uint16)
