"""The result of segmenting one picture: segments with names, scores and masks."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from knet_jax.segmentation import image_files, rle
from knet_jax.segmentation.segments import Categories, Instance, PanopticMap, SegmentInfo
from knet_jax.structs import EMPTY
from knet_jax.system.errors import UserError
from knet_jax.system.output_files import write_whole

Box = tuple[int, int, int, int]
"""Left, top, width and height, in pixels."""


@dataclass(frozen=True, eq=False)
class Segment:
    """One thing, or all of one kind of stuff, in a picture."""

    id: int
    """Its id in the panoptic map; of an instance its number. From 1 on."""
    label: int
    """Its class, as a position among the names of the categories."""
    name: str
    is_thing: bool
    score: float
    """From 0 to 1; always 1 for a class of semantic segmentation, which has no score."""
    area: int
    """Number of pixels."""
    box: Box
    track: int
    """In a video that is tracked, the identity of a thing, from 1 on; else 0."""
    _source: Any = field(repr=False)
    """A map of ids [H, W], or the run lengths of the mask."""

    @property
    def mask(self) -> np.ndarray:
        """bool [H, W]."""
        if isinstance(self._source, dict):
            return rle.decode(self._source).astype(bool)
        return self._source == self.id

    @property
    def rle(self) -> dict[str, Any]:
        """COCO's compressed run lengths of the mask: {"size": [height, width], "counts": bytes}."""
        return self._source if isinstance(self._source, dict) else rle.encode(self.mask)


@dataclass(frozen=True, eq=False)
class Result:
    """What a network sees in one picture."""

    task: str
    """`panoptic`, `instance` or `semantic`."""
    categories: Categories
    image: np.ndarray = field(repr=False)
    """uint8 [H, W, 3], RGB."""
    prediction: PanopticMap | tuple[Instance, ...] | np.ndarray = field(repr=False)
    """A panoptic map, instances, or labels [H, W] (0 = none, 1 + class): what metrics and files take."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.image.shape[:2]

    @property
    def panoptic(self) -> PanopticMap | None:
        """The panoptic map; None from instance and semantic networks."""
        return self.prediction if isinstance(self.prediction, PanopticMap) else None

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments, best score first; from a semantic network the classes that occur."""
        labels = isinstance(self.prediction, np.ndarray)
        panoptic = PanopticMap.of_labels(self.prediction) if labels else self.panoptic
        if panoptic is None:
            return tuple(
                self._segment(i, one, int(one.area), rle.box(one.rle), one.rle)
                for i, one in enumerate(self.prediction, 1)
                if one.area  # a kernel may be sure of its class and claim no pixel
            )
        ids, segments = panoptic
        areas, boxes = np.bincount(ids.ravel()), ndimage.find_objects(ids)
        return tuple(
            self._segment(s.id, s, int(areas[s.id]), _box(boxes[s.id - 1]), ids) for s in segments
        )

    def _segment(
        self, id: int, of: SegmentInfo | Instance, area: int, box: Box, source: Any
    ) -> Segment:
        name, is_thing = self.categories.names[of.label], of.label < self.categories.num_things
        return Segment(id, of.label, name, is_thing, of.score, area, box, of.track, source)

    @property
    def instances(self) -> tuple[Segment, ...] | None:
        """The things, best score first; None from a semantic network.

        Those of an instance network may overlap.
        """
        if isinstance(self.prediction, np.ndarray):
            return None
        return tuple(segment for segment in self.segments if segment.is_thing)

    @cached_property
    def semantic(self) -> np.ndarray | None:
        """The class of every pixel, int32 [H, W], -1 = none; None from an instance network."""
        if isinstance(self.prediction, np.ndarray):
            return self.prediction.astype(np.int32) - 1
        if not self.panoptic:
            return None
        labels = np.full(1 + max((s.id for s in self.panoptic.segments), default=0), EMPTY)
        for segment in self.panoptic.segments:
            labels[segment.id] = segment.label
        return labels.astype(np.int32)[self.panoptic.ids]

    def above(self, threshold: float) -> Result:
        """Returns the same result without the things that score less than a threshold.

        Raises:
            UserError: the threshold is no number from 0 to 1.
        """
        if not (isinstance(threshold, Real) and 0 <= threshold <= 1):
            raise UserError(f"threshold is {threshold!r}; accepted: a number from 0 to 1")
        if self.panoptic:
            kept = tuple(
                s
                for s in self.panoptic.segments
                if s.score >= threshold or s.label >= self.categories.num_things
            )
            values = np.zeros(1 + max((s.id for s in self.panoptic.segments), default=0), np.int32)
            for segment in kept:
                values[segment.id] = segment.id
            return replace(self, prediction=PanopticMap(values[self.panoptic.ids], kept))
        if isinstance(self.prediction, tuple):
            return replace(
                self, prediction=tuple(s for s in self.prediction if s.score >= threshold)
            )
        return self

    def draw(self, side: int | None = None) -> np.ndarray:
        """Draws the segments over the picture, with outlines, names and scores.

        Args:
            side: longer side of what is drawn, in pixels; default: that of the picture, where
                names may not fit: `draw(640)` has room for them.

        Returns:
            uint8 [h, w, 3], RGB.

        Raises:
            UserError: the side is no positive number.
        """
        from knet_jax.segmentation.drawing import overlay

        return overlay(self.image, self.prediction, self.categories, side)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a drawing, as of `draw`; or where the name ends in `.json`, the data of `to_coco`.

        Pictures of fewer than 640 pixels on the longer side are enlarged to that.

        Args:
            path: of the file, whose suffix chooses the format.

        Raises:
            UserError: the suffix is of no such format, or the format holds no picture so large.
            OSError: the file cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix == ".json":
            write_whole(path, f"{json.dumps(self.to_coco())}\n".encode())
        elif suffix in image_files.PICTURES:
            from knet_jax.segmentation.drawing import readable_side, save_picture

            save_picture(path, self.draw(readable_side(self.size)))
        else:
            raise UserError(
                f"{path} ends in {suffix!r}; accepted: .json, {', '.join(image_files.PICTURES)}"
            )

    def to_coco(self, image_id: int = 0) -> dict[str, Any] | list[dict[str, Any]]:
        """Converts the segments to the form of COCO's results, ready for JSON, masks as run lengths.

        Args:
            image_id: the id of the picture.

        Returns:
            A list of annotations of instances or semantic classes; of a panoptic map one annotation
            with `segments_info`, each of which has its mask too. What is tracked through a video has
            its `track_id`.
        """
        records = [
            {
                "category_id": int(self.categories.dataset_ids[segment.label]),
                "segmentation": rle.to_json(segment.rle),
                "bbox": list(segment.box),
                "area": segment.area,
                "score": segment.score,
                **({"track_id": segment.track} if segment.track else {}),
            }
            for segment in self.segments
        ]
        if not self.panoptic:
            return [{"image_id": image_id, **record} for record in records]
        infos = [
            {"id": segment.id, "isthing": int(segment.is_thing), "iscrowd": 0, **record}
            for segment, record in zip(self.segments, records)
        ]
        return {"image_id": image_id, "segments_info": infos}

    def to_supervision(self) -> Any:
        """Converts the segments to `supervision.Detections`, for its annotators and trackers.

        Needs the package supervision: `pip install 'knet-jax[supervision]'`.

        Returns:
            Detections with `xyxy`, `mask`, `confidence`, `class_id` and `data["class_name"]`, in
            the order of `segments`; in a video that is tracked also with `tracker_id`, as `track`.
        """
        import supervision

        tracks = [segment.track for segment in self.segments]
        boxes = np.array([segment.box for segment in self.segments], float).reshape(-1, 4)
        masks = [segment.mask for segment in self.segments]
        return supervision.Detections(
            xyxy=np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1),
            mask=np.array(masks, bool).reshape(-1, *self.size),
            confidence=np.array([segment.score for segment in self.segments], float),
            class_id=np.array([segment.label for segment in self.segments], int),
            tracker_id=np.array(tracks, int) if any(tracks) else None,
            data={"class_name": np.array([segment.name for segment in self.segments], str)},
        )


def _box(found: tuple[slice, slice]) -> Box:
    rows, columns = found
    return columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
