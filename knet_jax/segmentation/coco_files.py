"""COCO's formats, and results written in them (https://cocodataset.org/#format-data).

Panoptic: a JSON, and beside it a folder of the same name with a PNG for each picture, whose pixels
hold the id R + 256 G + 65536 B of their segment, 0 for void. The JSON says which category each id is.

Instance: one JSON, a list of annotations with scores.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from knet_jax.segmentation import rle
from knet_jax.segmentation.image_files import NUM_IDS, segment_colors
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, segment_index
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import JsonList, PngFolder, write_json

IDS = ("id", "image_id", "category_id")


def load(path: Path) -> Any:
    """Reads a JSON in COCO's form, in any of Unicode's encodings.

    What is null counts as absent, and an id may be written as a text.

    Raises:
        OSError, ValueError or RecursionError: there is no such file, or it is no JSON.
    """
    return json.loads(path.read_bytes(), object_hook=_tidy)


def _tidy(entry: dict[str, Any]) -> dict[str, Any]:
    tidy = {}
    for key, value in entry.items():
        if isinstance(value, list):
            tidy[key] = [one for one in value if one is not None]
        elif value is not None:
            tidy[key] = _as_number(value) if key in IDS else value
    return tidy


def _as_number(id: Any) -> Any:
    """An id that is a whole number written as a text or with a point; others as they are."""
    try:
        return int(id) if isinstance(id, str) or int(id) == id else id
    except (TypeError, ValueError, OverflowError):
        return id


def image_entry(image_id: int, file_name: str, size: tuple[int, int]) -> dict[str, Any]:
    """Makes an entry of the list `images` of a picture of (height, width)."""
    height, width = size
    return {"id": int(image_id), "file_name": file_name, "height": height, "width": width}


class PanopticResults:
    """Writes panoptic maps picture by picture; only the small records of the JSON stay in memory.

    Args:
        path: of the JSON, for example results/panoptic.json; PNG files go to results/panoptic/.
        categories: the classes.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._images: list[dict] = []
        self._annotations: list[dict] = []
        self._pngs = PngFolder(self.path.with_suffix(""))

    def add(self, image_id: int, file_name: str, panoptic: PanopticMap) -> None:
        """Writes the map of one picture, as a PNG named like the picture.

        Args:
            image_id: the id of the picture.
            file_name: of the picture, subfolders included.
            panoptic: its map.
        """
        areas = np.bincount(segment_index(panoptic).ravel(), minlength=1 + len(panoptic.segments))
        infos = []
        for segment, area in zip(panoptic.segments, areas[1:].tolist()):
            assert 0 < segment.id < NUM_IDS and area, f"{file_name}: {segment}, {area} pixels"
            infos.append(
                {
                    "id": int(segment.id),
                    "category_id": int(self._categories.dataset_ids[segment.label]),
                    "iscrowd": int(segment.iscrowd),
                    "area": area,
                    "score": float(segment.score),
                }
            )
        rgb = segment_colors(panoptic.ids)
        png = self._pngs.write(file_name, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        self._images.append(image_entry(image_id, file_name, panoptic.ids.shape))
        self._annotations.append(
            {"image_id": int(image_id), "file_name": png, "segments_info": infos}
        )

    def close(self) -> None:
        """Writes the JSON, whole or not at all."""
        c = self._categories
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": [
                {"id": id, "name": name, "isthing": int(label < c.num_things)}
                for label, (id, name) in enumerate(zip(c.dataset_ids, c.names, strict=True))
            ],
        }
        write_json(self.path, content)


class InstanceResults:
    """Writes predicted instances picture by picture, as COCO's test server takes them.

    Args:
        path: of the JSON, for example results/instance.json; it appears when it is whole.
        categories: the classes.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._names: dict[int, str] = {}
        self._list = JsonList(self.path)

    def add(self, image_id: int, file_name: str, instances: Sequence[Instance]) -> None:
        """Writes the instances of one picture.

        Args:
            image_id: the id of the picture.
            file_name: of the picture, for messages.
            instances: of the picture.

        Raises:
            UserError: there was a picture of the same id.
        """
        if image_id in self._names:
            raise UserError(
                f"{self.path}: {file_name} has id {image_id}, as has {self._names[image_id]}"
            )
        self._names[image_id] = file_name
        for one in instances:
            record = {
                "image_id": int(image_id),
                "category_id": int(self._categories.dataset_ids[one.label]),
                "segmentation": rle.to_json(one.rle),
                "score": float(one.score),
            }
            self._list.add(record)

    def close(self) -> None:
        """Ends the JSON."""
        self._list.close()
