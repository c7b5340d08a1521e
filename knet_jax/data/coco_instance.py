"""COCO's instance files: a mask for every thing, as polygons or as run lengths."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from pycocotools import mask as run_lengths

from knet_jax.data import coco_json, files, instance, records

PREFIX = "instances_"


def scan(annotations: Path) -> records.Examples:
    """Examines every picture of an instance annotation file, showing progress.

    A picture that cannot be used is left out and named in `problems`; so is an annotation whose
    mask or category is no good. A picture without annotation is a picture of no thing.

    Raises:
        ValueError: the file is not what it should be, or nothing can be used.
    """
    categories, images, by_image = coco_json.read(annotations, _understand, "instance")
    labels = {id: label for label, id in enumerate(categories.dataset_ids)}
    folder = coco_json.pictures_folder(annotations, PREFIX)
    check = functools.partial(_check_picture, folder, labels, by_image)
    pictures, problems = files.examine(check, list(images.values()), f"Checking {annotations.name}")
    problems += [
        f"image {id}: annotated but not among the file's images, left out" for id in by_image
    ]
    files.require_any(pictures, problems, annotations)
    categories = categories._replace(num_things=len(categories.names))
    return records.Examples(categories, len(pictures), files.read(pictures), problems)


def _understand(content: Mapping) -> dict[int, list[Mapping]]:
    """The annotations of every image that has some, by its id."""
    by_image: dict[int, list[Mapping]] = {}
    for annotation in content["annotations"]:
        by_image.setdefault(int(annotation["image_id"]), []).append(annotation)
        for key in ("id", "category_id", "segmentation"):
            annotation[key]
    return by_image


def _check_picture(
    folder: Path,
    labels: Mapping[int, int],
    by_image: dict[int, list[Mapping]],
    image: Mapping,
) -> tuple[files.Picture | None, list[str]]:
    """A picture, or None where it cannot be used, and what is wrong with it.

    Its annotations are taken out of `by_image`.
    """
    listed = by_image.pop(int(image["id"]), ())  # gigabytes of polygons go as they are encoded
    path = folder / image["file_name"]
    try:
        size = files.read_sizes(path)[0]
        if "height" in image and "width" in image:
            entry = (int(image["height"]), int(image["width"]))
            size = files.matching_size(path, entry, "entry in the JSON")
    except (TypeError, ValueError) as error:
        return None, [f"{image['file_name']}: {error}, left out"]
    instances, problems = [], []
    for annotation in listed:
        try:
            instances.append(_instance(annotation, labels, size))
        except ValueError as error:
            problems.append(
                f"{image['file_name']}: annotation {annotation['id']}: {error}, dropped"
            )
    annotate = functools.partial(tuple, instances)
    return files.Picture(int(image["id"]), path, size, annotate, len(instances)), problems


def _instance(
    annotation: Mapping, labels: Mapping[int, int], size: tuple[int, int]
) -> instance.StoredInstance:
    """What is stored of an annotation. Raises ValueError where it is no good."""
    if annotation["category_id"] not in labels:
        raise ValueError(
            f"category id {annotation['category_id']} is not among the file's categories"
        )
    rle = encode_mask(annotation["segmentation"], size)
    pixels = int(run_lengths.area(rle))
    if not pixels:
        raise ValueError("its mask is empty")
    area = annotation.get("area", pixels)
    if not _is_number(area) or area < 0:
        raise ValueError(f"area {area!r} is no number of pixels")
    return instance.StoredInstance(
        counts=rle["counts"],
        label=labels[annotation["category_id"]],
        iscrowd=bool(annotation.get("iscrowd", 0)),
        area=float(area),
    )


def encode_mask(segmentation: Any, size: tuple[int, int]) -> dict:
    """COCO's compressed run lengths of polygons, of plain or of compressed run lengths.

    Args:
        segmentation: a list of polygons [x0, y0, x1, y1, …], or {"size": [h, w], "counts": …}.
        size: height and width of the picture.

    Returns:
        {"size": [h, w], "counts": bytes}.

    Raises:
        ValueError: it is no such thing, or one of another size.
    """
    if isinstance(segmentation, Mapping):
        return _encode_runs(segmentation, size)
    if not isinstance(segmentation, Sequence) or isinstance(segmentation, str) or not segmentation:
        raise ValueError(f"segmentation {str(segmentation)[:40]!r} is neither polygons nor RLE")
    for polygon in segmentation:
        # Four numbers would be taken for a box, an odd one left over for nothing.
        if not isinstance(polygon, Sequence) or not all(map(_is_number, polygon)):
            raise ValueError("a polygon must be a list of numbers x0, y0, x1, y1, …")
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(
                f"a polygon has {len(polygon) / 2:g} points, it must have three or more"
            )
    parts = run_lengths.frPyObjects([list(map(float, p)) for p in segmentation], *size)
    return run_lengths.merge(parts)


def _encode_runs(rle: Mapping, size: tuple[int, int]) -> dict:
    height, width = size
    listed, counts = rle.get("size"), rle.get("counts")
    if not isinstance(listed, Sequence) or tuple(listed) != size:
        raise ValueError(f"its RLE has size {listed}, the picture [{height}, {width}]")
    if isinstance(counts, str):
        counts = counts.encode()
    # The library takes any bytes; only a mask whose runs fill the picture is one.
    runs = _runs(counts) if isinstance(counts, bytes) else counts
    are_runs = isinstance(runs, Sequence) and all(isinstance(r, int) and r >= 0 for r in runs)
    if not are_runs or sum(runs) != height * width:
        raise ValueError(f"the runs of its RLE do not fill the {height * width} pixels")
    return run_lengths.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)


def _runs(data: bytes) -> list[int]:
    """The lengths in COCO's compressed form: five bits a character, from 48 on, the sixth says that
    more follow; from the fourth run on they are differences to the one before the last.

    Raises:
        ValueError: there is a character that cannot occur, or the last number is cut off.
    """
    runs, value, shift = [], 0, 0
    for byte in data:
        bits = byte - 48
        if not 0 <= bits < 64:
            raise ValueError(f"its RLE has a character {chr(byte)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("its RLE is cut off")
    return runs


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
