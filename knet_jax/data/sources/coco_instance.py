"""COCO's instance files: a mask for every thing, as polygons or as run lengths."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from knet_jax.data import records
from knet_jax.data.annotations import instance
from knet_jax.data.sources import coco_json, examine
from knet_jax.segmentation import class_lists, rle
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

PREFIX = "instances_"


def examine_file(
    supercategories: bool, annotations: Path, pictures: Sequence[Path]
) -> records.Examples:
    """Examines every picture of an instance annotation file, showing progress.

    A picture that cannot be used is left out and named in `problems`; so is an annotation whose
    mask or category is no good. A picture without annotation is a picture without things.

    Args:
        supercategories: whether categories that only group others are classes too.
        annotations: the file.
        pictures: folders in which its pictures may lie.

    Raises:
        UserError: the file is not what it should be, or nothing can be used.
    """
    categories, images, by_image, problems = coco_json.read(
        annotations, "instance", functools.partial(_read_classes, supercategories)
    )
    labels = {id: label for label, id in enumerate(categories.dataset_ids)}
    items = [
        (str(image.get("file_name")), (image, by_image.get(id, ()))) for id, image in images.items()
    ]
    check = functools.partial(_check_picture, pictures, labels)
    return examine.check_pictures(check, items, categories, annotations, problems)


def _read_classes(supercategories: bool, content: Mapping) -> Categories:
    listed = content["categories"]
    annotations = [one for one in content["annotations"] if isinstance(one, Mapping)]
    if annotations and not any(one.get("segmentation") for one in annotations):
        raise UserError("its annotations have boxes only; accepted: masks, in 'segmentation'")
    if not supercategories:
        used = {id for one in annotations if isinstance(id := one.get("category_id"), int)}
        groups = [(one.get("supercategory"), one.get("name")) for one in listed]
        groups = [group for group, name in groups if group != name]
        listed = [one for one in listed if one.get("name") not in groups or one.get("id") in used]
    return class_lists.read_coco_things(listed)


def _check_picture(
    folders: Sequence[Path],
    labels: Mapping[int, int],
    item: tuple[Mapping, Sequence[Any]],
) -> tuple[examine.Picture, list[str]]:
    """A picture, and what is wrong with it. Raises any error where it cannot be used."""
    image, listed = item
    path = coco_json.find_file(folders, image)
    has_size = "height" in image and "width" in image
    size = (int(image["height"]), int(image["width"])) if has_size else None
    size = examine.decoded_size(path, size)
    instances, problems = [], []
    for annotation in listed:
        called = f"annotation {annotation.get('id', 'without id')}"
        try:
            stored, remarks = _instance(annotation, labels, size)
        except Exception as error:  # noqa: BLE001 - whatever annotations of others lead to
            problems.append(f"{called}: {error}, dropped")
        else:
            instances.append(stored)
            problems += [f"{called}: {remark}, its other polygons stay" for remark in remarks]
    annotate = functools.partial(tuple, instances)
    name = image["file_name"]
    return examine.Picture(image["id"], path, name, size, annotate, len(instances)), problems


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
    if not rle.is_number(area) or area < 0:
        raise UserError(f"area {area!r:.40} is no number of pixels")
    stored = instance.StoredInstance(
        counts=mask["counts"],
        label=labels[category],
        iscrowd=class_lists.flag(annotation, "iscrowd"),
        area=float(area),
    )
    return stored, remarks
