"""COCO's panoptic files, for panoptic and for semantic segmentation."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from knet_jax.data import records, transforms
from knet_jax.data.annotations import panoptic, semantic
from knet_jax.data.annotations.kind import Record
from knet_jax.data.sources import coco_json, examine
from knet_jax.segmentation import class_lists, coco_files, image_files
from knet_jax.system.errors import UserError

PREFIX = "panoptic_"


def examine_file(annotations: Path) -> records.Examples:
    """Examines every picture of a panoptic annotation file, showing progress.

    A picture that cannot be used is left out and named in `problems`; so is a segment that its PNG
    does not show. Pixels of a PNG that belong to no listed segment are void, and named too.

    Raises:
        UserError: the file is not what it should be, or nothing can be used.
    """
    categories, images, listed = coco_json.read(
        annotations, "panoptic", class_lists.read_coco_categories, _read_annotations
    )
    names = {image_id: image["file_name"] for image_id, image in images.items()}
    labels = {id: label for label, id in enumerate(categories.dataset_ids)}
    check = functools.partial(_check_picture, annotations, names, labels)
    by_image, twice = {}, []
    for annotation in listed:
        image_id = int(annotation["image_id"])
        if image_id in by_image:
            twice.append(f"image {image_id}: annotated more than once, the first one counts")
        by_image.setdefault(image_id, annotation)
    absent = [f"{names[id]}: no annotation, left out" for id in names if id not in by_image]
    return examine.check_pictures(
        check, list(by_image.values()), categories, annotations, twice + absent
    )


def examine_file_as_labels(annotations: Path) -> records.Examples:
    """The same pictures with a class for every pixel; crowds and void are ignored.

    All classes are stuff here: nothing is told apart within a class. Raises as `examine_file`.
    """
    examples = examine_file(annotations)
    return examples._replace(
        categories=examples.categories._replace(num_things=0),
        records=map(_as_labels, examples.records),
    )


def _read_annotations(content: Mapping) -> list[Mapping]:
    ids = {int(category["id"]) for category in content["categories"]}
    for category in content["categories"]:
        category["isthing"]  # which a file of instances would not say
    for annotation in content["annotations"]:
        image_id = int(annotation["image_id"])
        coco_files.check_file_name(annotation)
        for segment in annotation["segments_info"]:
            int(segment["id"])
            class_lists.flag(segment, "iscrowd")
            if segment["category_id"] not in ids:
                raise UserError(
                    f"image {image_id}: category id {segment['category_id']} of segment "
                    f"{segment['id']} is not among the file's categories"
                )
    return content["annotations"]


def _check_picture(
    annotations: Path, names: Mapping[int, str], labels: Mapping[int, int], annotation: Mapping
) -> tuple[examine.Picture | None, list[str]]:
    """A picture, or None where it cannot be used, and what is wrong with it."""
    image_id = int(annotation["image_id"])
    if image_id not in names:
        return None, [f"image {image_id}: annotated but not among the file's images, left out"]
    name = names[image_id]
    path = coco_json.pictures_folder(annotations, PREFIX) / name
    png = annotations.with_suffix("") / annotation["file_name"]
    try:
        size, counts = _count_pixels(path, png)
        listed = [int(segment["id"]) for segment in annotation["segments_info"]]
        twice = sorted({id for id in listed if listed.count(id) > 1})
        if twice:
            raise UserError(f"segments overlap: ids {twice} are listed more than once")
    except UserError as error:
        return None, [f"{name}: {error}, left out"]
    segments = tuple(
        panoptic.StoredSegment(
            id=int(segment["id"]),
            label=labels[segment["category_id"]],
            iscrowd=class_lists.flag(segment, "iscrowd"),
            area=counts[int(segment["id"])],
        )
        for segment in annotation["segments_info"]
        if int(segment["id"]) in counts
    )
    absent = sorted(set(listed) - set(counts))
    unlisted = sorted(set(counts) - set(listed))
    problems = []
    if absent:
        problems.append(f"{name}: segments {absent} are not in its PNG, dropped")
    if unlisted:
        problems.append(f"{name}: ids {unlisted} of its PNG are not listed, taken as void")

    def annotate() -> panoptic.PanopticAnnotation:
        return panoptic.PanopticAnnotation(png.read_bytes(), segments)

    return examine.Picture(image_id, path, name, size, annotate, len(segments)), problems


def _count_pixels(path: Path, png: Path) -> tuple[tuple[int, int], dict[int, int]]:
    """Size of a picture and its PNG, and how many pixels every id but 0 has.

    Raises:
        UserError: one of them is missing or broken, or their sizes differ.
    """
    size = examine.matching_size(path, examine.read_sizes(png)[1], "panoptic PNG")
    try:
        rgb = image_files.load_panoptic(png.read_bytes(), size)
    except UserError as error:
        raise UserError(f"panoptic PNG {png} {error}") from error
    ids = image_files.segment_ids(rgb).ravel()
    # Sorting the ends of runs of equal ids is much cheaper than sorting pixels.
    ends = np.append(np.flatnonzero(np.diff(ids)), len(ids) - 1)
    found, index = np.unique(ids[ends], return_inverse=True)
    counts = np.bincount(index, np.diff(ends, prepend=-1))
    return size, {int(id): int(count) for id, count in zip(found, counts) if id}


def _as_labels(record: Record) -> Record:
    """A record with a map of labels in place of segments."""
    png, segments = record.annotation
    ids = image_files.segment_ids(image_files.load_panoptic(png, record.size))
    shown = [segment for segment in segments if not segment.iscrowd]
    values = np.array([1 + segment.label for segment in shown], np.uint16)
    label_map = transforms.lookup(ids, [segment.id for segment in shown], values)
    return record._replace(annotation=semantic.encode_map(label_map))
