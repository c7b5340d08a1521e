"""COCO's instance files: a mask for every thing, as polygons or as run lengths."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.annotations import instance
from knet_jax.data.annotations.kind import Record
from knet_jax.data.sources import coco_json, examine
from knet_jax.segmentation import class_lists, coco_files, rle
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

PREFIX = "instances_"
MOST_AREA = 2.0**53
"""Pixels of a thing; more are no number that was counted."""


def examine_file(
    supercategories: bool, annotations: Path, pictures: Sequence[Path]
) -> records.Examples:
    """Reads an instance annotation file, showing progress.

    Of a picture, an annotation whose mask or category is no good is left out and named. A picture
    without annotation is a picture without things. Categories that only group others are classes if
    `supercategories` is set.

    Raises:
        UserError: the file is not what it should be.
    """
    read_classes = functools.partial(_read_classes, supercategories)
    read_picture = functools.partial(_read_picture, pictures)
    return coco_json.examine(annotations, "instance", read_classes, read_picture)


def _read_classes(supercategories: bool, content: coco_json.Content) -> Categories:
    listed = content.categories
    if content.lacks_masks:
        raise UserError("its annotations have boxes only; accepted: masks, in 'segmentation'")
    if not supercategories:
        groups = [(one.get("supercategory"), one.get("name")) for one in listed]
        groups = [group for group, name in groups if group != name]
        listed = [
            one for one in listed if one.get("name") not in groups or one.get("id") in content.used
        ]
    return class_lists.read_coco_things(listed)


def _read_picture(
    folders: Sequence[Path],
    labels: Mapping[int, int],
    entry: tuple[Mapping, Sequence[bytes]],
) -> tuple[Record, list[str]]:
    """A picture, and what is wrong with it. Raises any error where it cannot be used."""
    image, listed = entry
    path = coco_json.find_file(folders, image)
    has_size = "height" in image and "width" in image
    size = (int(image["height"]), int(image["width"])) if has_size else None
    data, size = examine.read_picture(path, size)
    instances, problems = [], []
    for annotation in map(coco_files.parse, listed):
        called = f"annotation {annotation.get('id', 'without id')}"
        try:
            stored, remarks = _instance(annotation, labels, size)
        except Exception as error:  # noqa: BLE001 - whatever annotations of others lead to
            problems.append(f"{called}: {error}, dropped")
        else:
            instances.append(stored)
            problems += [f"{called}: {remark}, its other polygons stay" for remark in remarks]
    return Record(data, image["id"], image["file_name"], size, tuple(instances)), problems


def _instance(
    annotation: Mapping, labels: Mapping[int, int], size: tuple[int, int]
) -> tuple[instance.StoredInstance, list[str]]:
    """An annotation as it is stored, and what is wrong with polygons that were dropped from it.

    Raises any error where nothing of it can be used.
    """
    category = annotation.get("category_id")
    if category not in labels:
        raise UserError(f"category id {category!r:.40} is not among the file's categories")
    mask, remarks = rle.from_annotation(annotation.get("segmentation"), size)
    pixels = rle.area(mask)
    if not pixels:
        raise UserError("its mask is empty")
    area = annotation.get("area", pixels)
    if not rle.is_number(area) or not 0 <= area <= MOST_AREA:
        raise UserError(f"area {area!r:.40} is no number of pixels")
    stored = instance.StoredInstance(
        counts=mask["counts"],
        label=labels[category],
        iscrowd=class_lists.flag(annotation, "iscrowd"),
        area=float(area),
    )
    return stored, remarks
