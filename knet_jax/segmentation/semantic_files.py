"""Files of semantic results: a folder with a PNG for a picture, whose pixels are ids of categories.

This is how ADE20K, Cityscapes and Pascal VOC give their truth, and what their servers take.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import place_png, write_json, write_whole


class SemanticResults:
    """Writes label maps picture by picture, as PNG files with the dataset's own ids.

    path: a JSON that lists pictures and categories, for example results/semantic.json; the PNG
    files go to results/semantic/, one byte a pixel, which is what ADE20K's server takes, or two
    where an id is above 255. Pixels without a class become 0, or the largest number where a class
    has the id 0.

    Raises ValueError where an id of a category does not fit into two bytes.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._images: dict[str, dict] = {}
        ids = categories.dataset_ids
        for id in ids:
            if not 0 <= id <= 65535:
                raise UserError(f"{path}: category id {id} is not one of 0 … 65535")
        dtype = np.uint8 if max(ids) <= 255 else np.uint16
        voids = (0, np.iinfo(dtype).max)
        self._void = next((value for value in voids if value not in ids), None)
        self._values = np.array([self._void or 0, *ids], dtype)
        self.path.with_suffix("").mkdir(parents=True, exist_ok=True)

    def add(self, image_id: int, file_name: str, labels: np.ndarray, png: str = "") -> None:
        """Write the map of one picture, the PNG named like the picture unless it is given a name.

        Args:
            image_id: of the picture.
            file_name: of the picture.
            labels: integers [H, W], 1 + class, 0 = none.
            png: name of the PNG.

        Raises:
            ValueError: that PNG was written before, a label is not of a class, or a pixel has none
                although classes have both of the ids that could say so.
        """
        png, place = place_png(self.path.with_suffix(""), png or file_name)
        if png in self._images:
            raise UserError(f"{self.path}: {png} was added before")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self._values):
            wrong = low if low < 0 else high
            raise UserError(f"{png}: label {wrong} is not one of 0 … {len(self._values) - 1}")
        if low == 0 and self._void is None:
            largest = np.iinfo(self._values.dtype).max
            raise UserError(f"{png}: a pixel without a class; classes have the ids 0 and {largest}")
        _, data = cv2.imencode(".png", self._values[labels])
        write_whole(place, data.tobytes())
        height, width = labels.shape
        self._images[png] = {
            "id": int(image_id),
            "file_name": file_name,
            "png": png,
            "height": height,
            "width": width,
        }

    def close(self) -> None:
        """Write the JSON, whole or not at all."""
        c = self._categories
        content = {
            "images": list(self._images.values()),
            "categories": [{"id": id, "name": n} for id, n in zip(c.dataset_ids, c.names)],
        }
        write_json(self.path, content)
