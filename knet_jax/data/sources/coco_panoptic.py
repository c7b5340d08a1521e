"""COCO's panoptic files, for panoptic and for semantic segmentation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from knet_jax.data import records, transforms
from knet_jax.data.annotations import panoptic, semantic
from knet_jax.data.annotations.kind import Record
from knet_jax.data.sources import coco_json, examine
from knet_jax.segmentation import class_lists, coco_files, image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

PREFIX = "panoptic_"


def examine_file(annotations: Path, pictures: Sequence[Path]) -> records.Examples:
    """Reads a panoptic annotation file, showing progress.

    Of a picture, a segment that its PNG does not show is left out and named. Pixels of a PNG that
    belong to no listed segment are void, and named too.

    Raises:
        UserError: the file is not what it should be.
    """
    examples = _examine(annotations, pictures, _read_picture)
    if not examples.categories.num_things:
        raise UserError(
            f"config.data.root: {annotations} lists no thing (isthing: 1); stuff alone is semantic "
            "segmentation: --config coco_semantic"
        )
    return examples


def examine_file_as_labels(annotations: Path, pictures: Sequence[Path]) -> records.Examples:
    """The same pictures with a class for every pixel; crowds and void are ignored.

    All classes are stuff here: nothing is told apart within a class. Raises as `examine_file`.
    """
    examples = _examine(annotations, pictures, _read_labels)
    return examples._replace(categories=examples.categories._replace(num_things=0))


def _examine(
    annotations: Path, pictures: Sequence[Path], read_picture: Callable
) -> records.Examples:
    read = functools.partial(read_picture, annotations.with_suffix(""), pictures)
    return coco_json.examine(annotations, "panoptic", _read_classes, read)


def _read_classes(content: coco_json.Content) -> Categories:
    for category in content.categories:
        if "isthing" not in category:  # as in a file of instances
            raise UserError(
                f"category {category.get('name')!r:.40} does not say isthing, 1 or 0, as in panoptic "
                "files; instances alone are for --config coco_instance"
            )
    return class_lists.read_coco_categories(content.categories)


def _read_picture(
    pngs: Path,
    pictures: Sequence[Path],
    labels: Mapping[int, int],
    entry: tuple[Mapping, Sequence[bytes]],
) -> tuple[Record, list[str]]:
    """A picture, and what is wrong with it. Raises any error where it cannot be used."""
    image, annotations = entry
    if not annotations:
        raise UserError("no annotation")
    annotation = coco_files.parse(annotations[0])
    path = coco_json.find_file(pictures, image)
    png = coco_json.find_file([pngs], annotation)
    encoded = examine.read_file(png)
    size, counts = _count_pixels(encoded, png.name)
    data, _ = examine.read_picture(path, size)
    infos = annotation.get("segments_info")
    if infos is None:
        raise UserError("no segment (segments_info)")
    listed = [info["id"] for info in infos]
    if len(set(listed)) < len(listed):
        twice = sorted({id for id in listed if listed.count(id) > 1})
        raise UserError(f"segments overlap: ids {twice} are listed more than once")
    for info in infos:
        if info.get("category_id") not in labels:
            raise UserError(
                f"category id {info.get('category_id')!r:.40} of segment {info['id']} is not among "
                "the file's categories"
            )
    segments = tuple(
        panoptic.StoredSegment(
            id=info["id"],
            label=labels[info["category_id"]],
            iscrowd=class_lists.flag(info, "iscrowd"),
            area=counts[info["id"]],
        )
        for info in infos
        if info["id"] in counts
    )
    absent = sorted(set(listed) - set(counts))
    unlisted = sorted(set(counts) - set(listed))
    problems = []
    if absent:
        problems.append(f"segments {absent} are not in its PNG, dropped")
    if unlisted:
        problems.append(f"ids {unlisted} of its PNG are not listed, taken as void")
    stored = panoptic.PanopticAnnotation(encoded, segments)
    return Record(data, image["id"], image["file_name"], size, stored), problems


def _count_pixels(png: bytes, name: str) -> tuple[tuple[int, int], dict[int, int]]:
    """Size of a panoptic PNG, and how many pixels every id but 0 has.

    Raises:
        UserError: it is broken.
    """
    try:
        rgb = image_files.load_panoptic(png)
    except UserError as error:
        raise UserError(f"panoptic PNG {name} {error}") from error
    ids = image_files.segment_ids(rgb).ravel()
    # Sorting the ends of runs of equal ids is much cheaper than sorting pixels.
    ends = np.append(np.flatnonzero(np.diff(ids)), len(ids) - 1)
    found, index = np.unique(ids[ends], return_inverse=True)
    counts = np.bincount(index, np.diff(ends, prepend=-1))
    return rgb.shape[:2], {int(id): int(count) for id, count in zip(found, counts) if id}


def _read_labels(*arguments: Any) -> tuple[Record, list[str]]:
    """As `_read_picture`, with a map of labels in place of segments."""
    record, problems = _read_picture(*arguments)
    png, segments = record.annotation
    ids = image_files.segment_ids(image_files.load_panoptic(png, record.size))
    shown = [segment for segment in segments if not segment.iscrowd]
    values = np.array([1 + segment.label for segment in shown], np.uint16)
    label_map = transforms.lookup(ids, [segment.id for segment in shown], values)
    return record._replace(annotation=semantic.encode_map(label_map)), problems
