"""Reads truth and results in COCO's formats, to compare what was written, and scores of files."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from knet_jax.metrics import instance, panoptic
from knet_jax.segmentation import rle
from knet_jax.segmentation.class_lists import read_coco_categories, read_coco_things
from knet_jax.segmentation.image_files import load_panoptic, segment_ids
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo


class PanopticFile:
    """A panoptic JSON and the PNG files beside it: a mapping from ids of pictures to maps.

    Args:
        path: of the JSON.
        truth: where categories and the sizes of pictures come from when the file holds results.
    """

    def __init__(self, path: str | Path, truth: PanopticFile | None = None):
        self.path = Path(path)
        content = json.loads(self.path.read_bytes())
        self._annotations = {a["image_id"]: a for a in content["annotations"]}
        if truth is None:
            self.categories = read_coco_categories(content["categories"])
            self._sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
        else:
            self.categories, self._sizes = truth.categories, truth._sizes
        self._labels = {id: label for label, id in enumerate(self.categories.dataset_ids)}

    def __iter__(self) -> Iterator[int]:
        return iter(self._annotations)

    def __getitem__(self, image_id: int) -> PanopticMap:
        annotation = self._annotations[image_id]
        png = self.path.with_suffix("") / annotation["file_name"]
        segments = tuple(
            SegmentInfo(
                info["id"], self._labels[info["category_id"]], bool(info.get("iscrowd", False))
            )
            for info in annotation["segments_info"]
        )
        ids = segment_ids(load_panoptic(png.read_bytes(), self._sizes[image_id]))
        return PanopticMap(ids, segments)


def score_files(
    truth_path: str | Path, result_path: str | Path
) -> tuple[panoptic.PQCounts, Categories]:
    """Panoptic counts of a file of results against the truth, every picture of which it must have."""
    truth = PanopticFile(truth_path)
    results, k = PanopticFile(result_path, truth), len(truth.categories.names)
    return panoptic.merge(
        *(panoptic.count(truth[id], results[id], k, id) for id in truth)
    ), truth.categories


class InstanceFile:
    """An instance JSON, all of whose categories are things: a mapping from ids of pictures.

    Args:
        path: of the JSON.
        truth: where categories and the sizes of pictures come from when the file holds results.
    """

    def __init__(self, path: str | Path, truth: InstanceFile | None = None):
        content = json.loads(Path(path).read_bytes())
        if truth is None:
            self.categories = read_coco_things(content["categories"])
            self._sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
            content = content["annotations"]
        else:
            self.categories, self._sizes = truth.categories, truth._sizes
        self._annotations = defaultdict(list)
        for annotation in content:
            self._annotations[annotation["image_id"]].append(annotation)
        self._labels = {id: label for label, id in enumerate(self.categories.dataset_ids)}

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._sizes))

    def __getitem__(self, image_id: int) -> tuple[Instance, ...]:
        return tuple(
            Instance(
                rle.from_annotation(one["segmentation"], self._sizes[image_id])[0],
                self._labels[one["category_id"]],
                float(one.get("score", 1)),
                bool(one.get("iscrowd", False)),
                float(one.get("area", 0)),
            )
            for one in self._annotations.get(image_id, [])
        )


def score_instance_files(
    truth_path: str | Path, result_path: str | Path, overlap: instance.Overlap = rle.iou
) -> tuple[instance.InstanceCounts, Categories]:
    """Instance counts of a file of results against the truth; a picture without results has none."""
    truth = InstanceFile(truth_path)
    results, k = InstanceFile(result_path, truth), len(truth.categories.names)
    return instance.merge(
        *(instance.count(truth[id], results[id], k, id, overlap) for id in truth)
    ), truth.categories
