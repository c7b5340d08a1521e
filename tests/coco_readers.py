"""TODOC."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from knet_jax.metrics import instance
from knet_jax.metrics.panoptic import PQCounts, count, merge, no_counts
from knet_jax.segmentation import rle
from knet_jax.segmentation.class_lists import read_coco_categories, read_coco_things
from knet_jax.segmentation.image_files import (
    load_panoptic,
    segment_ids,
)
from knet_jax.segmentation.segments import (
    Categories,
    Instance,
    PanopticMap,
    SegmentInfo,
)


@contextlib.contextmanager
def _reading(path: str | Path, kind: str) -> Iterator[None]:
    """Whatever a file of this kind, missing or of another form, raises is a ValueError that names it."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO {kind} file: {error!r}") from error


class PanopticFile:
    """Reads a panoptic JSON at once, and its PNG files one by one.

    path: the JSON.
    truth: where categories and the sizes of pictures come from when the file holds results.

    Raises ValueError where the file is missing or not of this form.
    """

    def __init__(self, path: str | Path, truth: PanopticFile | None = None):
        self.path = Path(path)
        with _reading(path, "panoptic"):
            content = json.loads(self.path.read_bytes())
            self._annotations = {a["image_id"]: a for a in content["annotations"]}
            if truth is None:
                self.categories = read_coco_categories(content["categories"])
                self._sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
            else:
                self.categories, self._sizes = truth.categories, truth._sizes
        self._labels = {id: label for label, id in enumerate(self.categories.dataset_ids)}

    def __len__(self) -> int:
        return len(self._annotations)

    def __iter__(self) -> Iterator[int]:
        """The ids of the pictures, in the order of the file."""
        return iter(self._annotations)

    def __getitem__(self, image_id: int) -> PanopticMap:
        """The map of a picture; ValueError names what is missing or does not fit."""
        if image_id not in self._annotations or image_id not in self._sizes:
            raise ValueError(f"{self.path} has no picture {image_id}")
        annotation = self._annotations[image_id]
        png = self.path.with_suffix("") / annotation["file_name"]
        segments = []
        for info in annotation["segments_info"]:
            if info["category_id"] not in self._labels:
                raise ValueError(f"{self.path}: {png.name}: no category {info['category_id']}")
            label = self._labels[info["category_id"]]
            segments.append(SegmentInfo(info["id"], label, bool(info.get("iscrowd", False))))
        try:
            ids = segment_ids(load_panoptic(png.read_bytes(), self._sizes[image_id]))
        except OSError as error:
            raise ValueError(f"{png}: {error.strerror}") from error
        except ValueError as error:
            raise ValueError(f"{png}: {error}") from error
        return PanopticMap(ids, tuple(segments))


def score_files(truth_path: str | Path, result_path: str | Path) -> tuple[PQCounts, Categories]:
    """Panoptic counts of a file of results against the truth, every picture of which it must have."""
    truth = PanopticFile(truth_path)
    results = PanopticFile(result_path, truth)
    num_classes = len(truth.categories.names)
    counts = no_counts(num_classes)
    for image_id in truth:
        true, predicted = truth[image_id], results[image_id]
        try:
            counts = merge(counts, count(true, predicted, num_classes))
        except ValueError as error:
            raise ValueError(f"{result_path}: picture {image_id}: {error}") from error
    return counts, truth.categories


class InstanceFile:
    """Reads an instance JSON at once; all its categories are things.

    path: the JSON.
    truth: where categories and the sizes of pictures come from when the file holds results.

    Raises ValueError where the file is missing or not of this form.
    """

    def __init__(self, path: str | Path, truth: InstanceFile | None = None):
        self.path = Path(path)
        with _reading(path, "instance"):
            content = json.loads(self.path.read_bytes())
            if truth is None:
                self.categories = read_coco_things(content["categories"])
                self._sizes = {i["id"]: (i["height"], i["width"]) for i in content["images"]}
                annotations = content["annotations"]
            else:
                self.categories, self._sizes, annotations = truth.categories, truth._sizes, content
            self._annotations = defaultdict(list)
            for annotation in annotations:
                self._annotations[annotation["image_id"]].append(annotation)
        for image_id in self._annotations.keys() - self._sizes.keys():
            raise ValueError(f"{path}: picture {image_id} is annotated but not listed")
        self._labels = {id: label for label, id in enumerate(self.categories.dataset_ids)}

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[int]:
        """The ids of the pictures, in ascending order."""
        return iter(sorted(self._sizes))

    def __getitem__(self, image_id: int) -> tuple[Instance, ...]:
        """The instances of a picture; ValueError names what is missing or does not fit."""
        if image_id not in self._sizes:
            raise ValueError(f"{self.path} has no picture {image_id}")
        found = []
        for annotation in self._annotations.get(image_id, []):
            try:
                found.append(
                    Instance(
                        rle.from_annotation(annotation["segmentation"], self._sizes[image_id])[0],
                        self._labels[annotation["category_id"]],
                        float(annotation.get("score", 1)),
                        bool(annotation.get("iscrowd", False)),
                        float(annotation.get("area", 0)),
                    )
                )
            except KeyError as error:
                what = error.args[0]
                problem = f"has no {what}" if isinstance(what, str) else f"no category {what}"
                raise ValueError(f"{self.path}: picture {image_id}: {problem}") from error
            except ValueError as error:
                raise ValueError(f"{self.path}: picture {image_id}: {error}") from error
        return tuple(found)


def score_instance_files(
    truth_path: str | Path, result_path: str | Path, overlap: instance.Overlap = instance.mask_iou
) -> tuple[instance.InstanceCounts, Categories]:
    """Instance counts of a file of results against the truth.

    A picture without results has none. `overlap` is as for `instance.count`.
    """
    truth = InstanceFile(truth_path)
    results = InstanceFile(result_path, truth)
    num_classes = len(truth.categories.names)
    counts = [instance.no_counts(num_classes)]
    for image_id in truth:
        true, predicted = truth[image_id], results[image_id]
        counts.append(instance.count(true, predicted, num_classes, image_id, overlap))
    return instance.merge(*counts), truth.categories
