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
from knet_jax.data.annotations.kind import Kind, Record
from knet_jax.data.recipes import Crop
from knet_jax.data.transforms import View
from knet_jax.segmentation import image_files
from knet_jax.structs import SemanticTargets


class SemanticKind(Kind):
    """A class for every pixel; the decoded form is a map [H, W], uint8 or uint16."""

    @staticmethod
    def features() -> dict[str, Any]:
        # Bytes that are given are stored as they are, whatever their depth.
        return {"label_map": tfds.features.Image(shape=(None, None, 1), encoding_format="png")}

    def encode(self, annotation: bytes) -> dict[str, Any]:
        return {"label_map": annotation}

    def decode(self, stored: Mapping[str, Any]) -> bytes:
        return stored["label_map"]

    def tally(self, record: Record) -> tuple[int, dict[str, np.ndarray]]:
        num_values = 1 + len(self.categories.names)
        pixels = np.bincount(self.load(record).ravel(), minlength=num_values)[1:]
        return 0, {"pictures": (pixels > 0).astype(np.int64), "pixels": pixels}

    def describe(
        self, counts: Mapping[str, Sequence[int]], num_pixels: int
    ) -> tuple[str, Sequence[str]]:
        texts = [
            f"{count:>8} pictures  {100 * part / num_pixels:6.2f} % of the pixels"
            for count, part in zip(counts["pictures"], counts["pixels"])
        ]
        ignored = 1 - sum(counts["pixels"]) / num_pixels
        return f"{100 * ignored:.2f} % of the pixels ignored", texts

    def load(self, record: Record) -> np.ndarray:
        return image_files.load_label_map(record.annotation, record.size)

    def train_view(self, recipe: Crop, loaded: np.ndarray, rng: np.random.Generator) -> View:
        return recipe.train_view(loaded, rng)

    def empty(self, recipe: Crop, group: int, count: int) -> SemanticTargets:
        dtype = np.min_scalar_type(len(self.categories.names))
        return SemanticTargets(np.zeros((count, *recipe.train_canvases[group]), dtype))

    def fill(self, targets: SemanticTargets, place: int, loaded: np.ndarray, view: View) -> None:
        height, width = view.shown
        targets.label_map[place, :height, :width] = recipes.crop_map(loaded, view)

    def truth(self, loaded: np.ndarray) -> np.ndarray:
        return loaded.astype(np.min_scalar_type(len(self.categories.names)))


def encode_map(label_map: np.ndarray) -> bytes:
    """Encodes a map [H, W] of labels below 65 536 as a PNG of 8 bits, or of 16 where needed."""
    dtype = np.min_scalar_type(label_map.max(initial=0))
    return cv2.imencode(".png", label_map.astype(dtype))[1].tobytes()
