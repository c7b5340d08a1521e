"""COCO's instance files: a mask for every thing, as polygons or as run lengths."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.annotations import instance
from knet_jax.data.sources import coco_json, examine
from knet_jax.segmentation import class_lists, rle
from knet_jax.system.errors import UserError

PREFIX = "instances_"


def examine_file(annotations: Path) -> records.Examples:
    """Examines every picture of an instance annotation file, showing progress.

    A picture that cannot be used is left out and named in `problems`; so is an annotation whose
    mask or category is no good. A picture without annotation is a picture without things.

    Raises:
        UserError: the file is not what it should be, or nothing can be used.
    """
    categories, images, by_image = coco_json.read(
        annotations, "instance", class_lists.read_coco_things, _read_annotations
    )
    labels = {id: label for label, id in enumerate(categories.dataset_ids)}
    folder = coco_json.pictures_folder(annotations, PREFIX)
    stray = [
        f"image {id}: annotated but not among the file's images, left out"
        for id in by_image
        if id not in images
    ]
    check = functools.partial(_check_picture, folder, labels, by_image)
    return examine.check_pictures(check, list(images.values()), categories, annotations, stray)


def _read_annotations(content: Mapping) -> dict[int, list[Mapping]]:
    """The annotations of every image that has some, by the image's id."""
    by_image: dict[int, list[Mapping]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(int(annotation["image_id"]), []).append(annotation)
        int(annotation["category_id"])
        for key in ("id", "segmentation"):
            annotation[key]
    return by_image


def _check_picture(
    folder: Path,
    labels: Mapping[int, int],
    by_image: dict[int, list[Mapping]],
    image: Mapping,
) -> tuple[examine.Picture | None, list[str]]:
    """A picture, or None where it cannot be used, and what is wrong with it.

    Its annotations are taken out of `by_image`.
    """
    listed = by_image.pop(int(image["id"]), ())  # gigabytes of polygons go as they are encoded
    name = image["file_name"]
    path = folder / name
    try:
        size = examine.read_sizes(path)[0]
        if "height" in image and "width" in image:
            entry = (int(image["height"]), int(image["width"]))
            size = examine.matching_size(path, entry, "entry in the JSON")
    except (TypeError, ValueError) as error:
        return None, [f"{name}: {error}, left out"]
    instances, problems = [], []
    for annotation in listed:
        called = f"{name}: annotation {annotation['id']}"
        try:
            stored, remarks = _instance(annotation, labels, size)
        except ValueError as error:
            problems.append(f"{called}: {error}, dropped")
        else:
            instances.append(stored)
            problems += [f"{called}: {remark}, its other polygons stay" for remark in remarks]
    annotate = functools.partial(tuple, instances)
    return examine.Picture(int(image["id"]), path, name, size, annotate, len(instances)), problems


def _instance(
    annotation: Mapping, labels: Mapping[int, int], size: tuple[int, int]
) -> tuple[instance.StoredInstance, list[str]]:
    """An annotation as it is stored, and what is wrong with polygons that were dropped from it.

    Raises UserError where nothing of it can be used.
    """
    if annotation["category_id"] not in labels:
        raise UserError(
            f"category id {annotation['category_id']} is not among the file's categories"
        )
    mask, remarks = rle.from_annotation(annotation["segmentation"], size)
    pixels = rle.area(mask)
    if not pixels:
        raise UserError("its mask is empty")
    area = annotation.get("area", pixels)
    if not rle.is_number(area) or area < 0:
        raise UserError(f"area {area!r} is no number of pixels")
    stored = instance.StoredInstance(
        counts=mask["counts"],
        label=labels[annotation["category_id"]],
        iscrowd=class_lists.flag(annotation, "iscrowd"),
        area=float(area),
    )
    return stored, remarks
