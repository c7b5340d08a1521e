"""Files of truth and results, in COCO's formats (https://cocodataset.org/#format-data).

Panoptic: a JSON, and beside it a folder of the same name with a PNG for a picture. A pixel of a PNG
holds the id R + 256 G + 65536 B of its segment, 0 for void; the JSON says which category each id is.
Truth and results have the same form; results need no more than their annotations, the rest is then
the truth's.

Instance: one JSON. The truth lists images, categories and annotations; results are a bare list of
annotations with scores.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

from knet_jax import rle
from knet_jax.data.coco_json import read_categories, read_things
from knet_jax.data.transforms import NUM_IDS, load_panoptic, segment_colors, segment_ids
from knet_jax.metrics import instance
from knet_jax.metrics.panoptic import PQCounts, count, merge, no_counts, segment_index
from knet_jax.metrics.result_files import JsonList, place_png, write_json, write_whole
from knet_jax.segments import Categories, Instance, PanopticMap, SegmentInfo


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
            raise ValueError(f"{self.path}: {png} was added before")
        areas = np.bincount(segment_index(panoptic).ravel(), minlength=1 + len(panoptic.segments))
        infos = []
        for segment, area in zip(panoptic.segments, areas[1:].tolist()):
            if not 0 < segment.id < NUM_IDS:
                raise ValueError(f"{png}: segment id {segment.id} is not one of 1 … {NUM_IDS - 1}")
            if area == 0:
                raise ValueError(f"{png}: segment {segment.id} has no pixel")
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
                self.categories = read_categories(content["categories"])
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
            raise ValueError(
                f"{self.path}: {file_name} has id {image_id}, as has {self._names[image_id]}"
            )
        num_classes = len(self._categories.names)
        for one in instances:
            if not 0 <= one.label < num_classes:
                raise ValueError(
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
                self.categories = read_things(content["categories"])
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
