"""Files of truth and results, in COCO's formats (https://cocodataset.org/#format-data).

Panoptic: a JSON, and beside it a folder of the same name with a PNG for a picture. A pixel of a PNG
holds the id R + 256 G + 65536 B of its segment, 0 for void; the JSON says which category each id is.
Truth and results have the same form; results need no more than their annotations, the rest is then
the truth's.

Instance: one JSON. The truth lists images, categories and annotations; results are a bare list of
annotations with scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from knet_jax.segmentation import rle
from knet_jax.segmentation.image_files import (
    NUM_IDS,
    segment_colors,
)
from knet_jax.segmentation.segments import (
    Categories,
    Instance,
    PanopticMap,
    segment_index,
)
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import JsonList, place_png, write_json, write_whole


class PanopticResults:
    """Writes panoptic maps picture by picture; only the small records of the JSON stay in memory.

    path: the JSON, for example results/panoptic.json; the PNG files go to results/panoptic/.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._images: list[dict] = []
        self._annotations: dict[str, dict] = {}
        self.path.with_suffix("").mkdir(parents=True, exist_ok=True)

    def add(self, image_id: int, file_name: str, panoptic: PanopticMap, png: str = "") -> None:
        """Write the map of one picture, the PNG named like the picture unless it is given a name.

        Raises ValueError where that PNG was written before, an id does not fit the format, a
        segment has no pixel, or as `segment_index`.
        """
        png, place = place_png(self.path.with_suffix(""), png or file_name)
        if png in self._annotations:
            raise UserError(f"{self.path}: {png} was added before")
        areas = np.bincount(segment_index(panoptic).ravel(), minlength=1 + len(panoptic.segments))
        infos = []
        for segment, area in zip(panoptic.segments, areas[1:].tolist()):
            if not 0 < segment.id < NUM_IDS:
                raise UserError(f"{png}: segment id {segment.id} is not one of 1 … {NUM_IDS - 1}")
            if area == 0:
                raise UserError(f"{png}: segment {segment.id} has no pixel")
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
        _, data = cv2.imencode(".png", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
        write_whole(place, data.tobytes())
        height, width = panoptic.ids.shape
        self._images.append(
            {"id": int(image_id), "file_name": file_name, "height": height, "width": width}
        )
        self._annotations[png] = {
            "image_id": int(image_id),
            "file_name": png,
            "segments_info": infos,
        }

    def close(self) -> None:
        """Write the JSON, whole or not at all."""
        c = self._categories
        content = {
            "images": self._images,
            "annotations": list(self._annotations.values()),
            "categories": [
                {"id": id, "name": name, "isthing": int(label < c.num_things)}
                for label, (id, name) in enumerate(zip(c.dataset_ids, c.names, strict=True))
            ],
        }
        write_json(self.path, content)


class InstanceResults:
    """Writes predicted instances picture by picture, as COCO's test server takes them.

    path: the JSON, for example results/instances.json; it appears when it is whole.
    """

    def __init__(self, path: str | Path, categories: Categories):
        self.path = Path(path)
        self._categories = categories
        self._names: dict[int, str] = {}
        self._list = JsonList(self.path)

    def add(
        self, image_id: int, file_name: str, instances: Sequence[Instance], png: str = ""
    ) -> None:
        """Write the instances of one picture; there is no PNG of them.

        Raises ValueError where its id was added before, or a label is not of a class.
        """
        del png
        if image_id in self._names:
            raise UserError(
                f"{self.path}: {file_name} has id {image_id}, as has {self._names[image_id]}"
            )
        num_classes = len(self._categories.names)
        for one in instances:
            if not 0 <= one.label < num_classes:
                raise UserError(
                    f"{file_name}: label {one.label} is not one of 0 … {num_classes - 1}"
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
        """Finish the JSON."""
        self._list.close()


def check_file_name(entry: Mapping) -> None:
    """Raises TypeError where an image or annotation names its file by something else than a text."""
    if not isinstance(entry["file_name"], str):
        raise TypeError(f"file_name is {entry['file_name']!r}")
