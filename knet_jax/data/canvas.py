"""Batches of empty canvases, and pictures that are laid out on them."""

from __future__ import annotations

import numpy as np

from knet_jax.data import transforms
from knet_jax.structs import EMPTY, Batch


def empty_batch(count: int, canvas: tuple[int, int]) -> Batch:
    """A batch for `count` pictures on a canvas (height, width), without targets, empty."""
    return Batch(
        image=np.zeros((count, *canvas, 3), np.uint8),
        targets=None,
        size=np.zeros((count, 2), np.int32),
        original_size=np.zeros((count, 2), np.int32),
        id=np.full(count, EMPTY, np.int32),
    )


def fill(batch: Batch, place: int, position: int, image: np.ndarray, view: transforms.View) -> None:
    """Writes a view of a picture, uint8 [h, w, 3], into a row of a batch.

    Its id becomes its position in the split.
    """
    transforms.place_image(image, view, batch.image[place])
    batch.size[place] = view.shown
    batch.original_size[place] = image.shape[:2]
    batch.id[place] = position
