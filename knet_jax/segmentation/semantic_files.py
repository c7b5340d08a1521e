"""Writing semantic results: a folder with a PNG for a picture, whose pixels are ids of categories.

This is how ADE20K, Cityscapes and Pascal VOC give their truth, and what their servers take.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from knet_jax.segmentation.coco_files import image_entry
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import PngFolder, write_json


class SemanticResults:
    """Writes label maps picture by picture, as PNG files with the dataset's own ids of classes.

    Args:
        path: of a JSON that lists pictures and categories, for example results/semantic.json. PNG
            files go to results/semantic/; a pixel has one byte, which is what ADE20K's server
            takes, or two where an id is above 255. Pixels without a class become 0, or the largest
            number where a class has the id 0. Where an id does not fit into two bytes, pixels are
            the positions of classes in the JSON's list, from 1, which are called `pixel` there.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._images: list[dict] = []
        ids, names = categories.dataset_ids, categories.names
        self._listed = [{"id": id, "name": name} for id, name in zip(ids, names)]
        if min(ids) < 0 or max(ids) > 65535:
            ids = range(1, 1 + len(ids))
            self._listed = [entry | {"pixel": i} for i, entry in zip(ids, self._listed)]
        dtype = np.uint8 if max(ids) <= 255 else np.uint16
        voids = (0, np.iinfo(dtype).max)
        self._void = next((value for value in voids if value not in ids), None)
        self._values = np.array([self._void or 0, *ids], dtype)
        self._pngs = PngFolder(self.path.with_suffix(""))

    def add(self, image_id: int, file_name: str, labels: np.ndarray) -> None:
        """Writes the map of one picture, as a PNG named like the picture, subfolders included.

        Args:
            labels: integers [H, W], 1 + class, 0 = none.

        Raises:
            UserError: a pixel has no class although classes have both of the ids that could say so.
        """
        if self._void is None and not labels.all():
            largest = np.iinfo(self._values.dtype).max
            raise UserError(
                f"{file_name}: a pixel without a class; classes have the ids 0 and {largest}"
            )
        png = self._pngs.write(file_name, self._values[labels])
        self._images.append(image_entry(image_id, file_name, labels.shape) | {"png": png})

    def close(self) -> None:
        """Writes the JSON, whole or not at all."""
        write_json(self.path, {"images": self._images, "categories": self._listed})
