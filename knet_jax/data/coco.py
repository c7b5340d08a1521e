"""COCO's own panoptic layout, and any dataset exported to it.

    root/annotations/panoptic_<split>*.json    images, annotations, categories
    root/annotations/panoptic_<split>*/        a PNG an image, whose colors are segment ids
    root/<split>*/                             the pictures

`*` is whatever the files agree on: `panoptic_train2017.json` goes with `train2017/`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import pool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm
from PIL import Image

from knet_jax.data import records, transforms
from knet_jax.structs import Categories

PREFIX = "panoptic_"
EXIF_ORIENTATION = 0x0112
TURNED = range(5, 9)
"""The EXIF orientations that swap height and width."""


class Picture(NamedTuple):
    """A picture that can be used."""

    image_id: int
    path: Path
    panoptic_path: Path
    size: tuple[int, int]
    segments: tuple[records.RecordSegment, ...]


class Coco(records.RecordBuilder, skip_registration=True):
    """Writes a split of a directory in COCO's layout."""

    name = "coco"

    def examples(self) -> records.Examples:
        """See the base class."""
        return scan(Path(self.builder_config.annotations))


@dataclasses.dataclass
class CocoConfig(records.SplitConfig):
    """A split of one directory, as it is now."""

    annotations: str = ""
    """Path of the JSON file."""


def split_config(root: str, split: str) -> CocoConfig:
    """Finds a split; changed annotations or another root give another name.

    Raises:
        ValueError: there is no such directory, or not exactly one annotation file for the split.
    """
    annotations = find_annotations(root, split)
    state = annotations.stat()
    facts = f"{annotations.resolve()} {state.st_size} {state.st_mtime_ns}"
    digest = hashlib.sha256(facts.encode()).hexdigest()[:10]
    return CocoConfig(name=f"{split}-{digest}", split=split, annotations=str(annotations))


def find_annotations(root: str, split: str) -> Path:
    """The panoptic JSON of a split under a root. Raises ValueError as `split_config` does."""
    folder = Path(root).expanduser() / "annotations"
    wanted = f"annotations/{PREFIX}{split}*.json"
    if not root or not folder.is_dir():
        raise ValueError(
            f"config.data.root: no dataset in COCO's layout at '{root}', expected {wanted} in it"
        )
    exact = folder / f"{PREFIX}{split}.json"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"{PREFIX}{split}*.json"))
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise ValueError(
            f"config.data.root: '{root}' must hold one {wanted} for split '{split}', found {what}"
        )
    return found[0]


def scan(annotations: Path) -> records.Examples:
    """Examines every picture of an annotation file, showing progress.

    A picture that cannot be used is left out and named in `problems`; so is a segment that its PNG
    does not show. Pixels of a PNG that belong to no listed segment are void, and named too.

    Raises:
        ValueError: the file is not what it should be, or nothing can be used.
    """
    content = _read_json(annotations)
    try:
        categories = read_categories(content["categories"])
        labels = {id: label for label, id in enumerate(categories.dataset_ids)}
        images = {int(image["id"]): str(image["file_name"]) for image in content["images"]}
        for annotation in content["annotations"]:
            _check_labels(annotation, labels)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"config.data.root: {annotations} is not COCO panoptic JSON: {error!r}"
        ) from error
    except ValueError as error:
        raise ValueError(f"config.data.root: {annotations}: {error}") from error

    pictures, problems, seen = [], [], set()
    check = functools.partial(_check_picture, annotations, images, labels)
    with pool.ThreadPool(os.cpu_count()) as threads:
        checked = threads.imap(check, content["annotations"])
        checked = tqdm.tqdm(
            checked, f"Checking {annotations.name}", len(content["annotations"]), unit="img"
        )
        for (picture, remarks), annotation in zip(checked, content["annotations"]):
            image_id = int(annotation["image_id"])
            if image_id in seen:
                problems.append(f"image {image_id}: annotated more than once, the first one counts")
                continue
            seen.add(image_id)
            problems += remarks
            if picture:
                pictures.append(picture)
    problems += [f"{images[id]}: no annotation, left out" for id in images if id not in seen]
    if not any(picture.segments for picture in pictures):
        raise ValueError(
            f"config.data.root: no picture of {annotations} can be used, "
            f"the first of {len(problems)} problems: {problems[0] if problems else 'no images'}"
        )
    return records.Examples(categories, len(pictures), _read(pictures), problems)


def read_categories(listed: Sequence[Mapping]) -> Categories:
    """Orders a file's category list things first, else as it stands.

    Raises:
        ValueError: an id occurs twice, or there is none.
    """
    ordered = sorted(listed, key=lambda category: not category["isthing"])
    ids = [int(category["id"]) for category in ordered]
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"category ids must differ from each other, got {ids}")
    names = tuple(str(category["name"]) for category in ordered)
    return Categories(names, tuple(ids), sum(bool(category["isthing"]) for category in ordered))


def _read_json(path: Path) -> Mapping:
    try:
        return json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"config.data.root: {path} is not readable JSON: {error}") from error


def _check_labels(annotation: Mapping, labels: Mapping[int, int]) -> None:
    """Raises ValueError or KeyError where an annotation is not understood."""
    image_id = int(annotation["image_id"])
    str(annotation["file_name"])
    for segment in annotation["segments_info"]:
        int(segment["id"])
        if segment["category_id"] not in labels:
            raise ValueError(
                f"image {image_id}: category id {segment['category_id']} of segment "
                f"{segment['id']} is not among the file's categories"
            )


def _check_picture(
    annotations: Path, images: Mapping[int, str], labels: Mapping[int, int], annotation: Mapping
) -> tuple[Picture | None, list[str]]:
    """A picture, or None where it cannot be used, and what is wrong with it."""
    image_id = int(annotation["image_id"])
    if image_id not in images:
        return None, [f"image {image_id}: annotated but not among the file's images, left out"]
    name = images[image_id]
    path = annotations.parent.parent / annotations.stem.removeprefix(PREFIX) / name
    panoptic_path = annotations.with_suffix("") / annotation["file_name"]
    try:
        size, counts = _count_pixels(path, panoptic_path)
        listed = [int(segment["id"]) for segment in annotation["segments_info"]]
        twice = sorted({id for id in listed if listed.count(id) > 1})
        if twice:
            raise ValueError(f"segments overlap: ids {twice} are listed more than once")
    except ValueError as error:
        return None, [f"{name}: {error}, left out"]
    segments = tuple(
        records.RecordSegment(
            id=int(segment["id"]),
            label=labels[segment["category_id"]],
            iscrowd=bool(segment.get("iscrowd", 0)),
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
    return Picture(image_id, path, panoptic_path, size, segments), problems


def _count_pixels(path: Path, panoptic_path: Path) -> tuple[tuple[int, int], dict[int, int]]:
    """Size of a picture and its PNG, and how many pixels every id but 0 has.

    Raises:
        ValueError: one of them is missing or broken, or their sizes differ.
    """
    turned, unturned = _read_sizes(path)
    if not panoptic_path.is_file():
        raise ValueError(f"panoptic PNG {panoptic_path} is missing")
    size = _read_sizes(panoptic_path)[1]
    if size not in (turned, unturned):
        raise ValueError(
            f"picture is {turned[1]}x{turned[0]} but its panoptic PNG {size[1]}x{size[0]}"
        )
    try:
        rgb = transforms.load_panoptic(panoptic_path.read_bytes(), size)
    except ValueError as error:
        raise ValueError(f"panoptic PNG {panoptic_path} {error}") from error
    ids = transforms.segment_ids(rgb).ravel()
    # Sorting the ends of runs of equal ids is much cheaper than sorting pixels.
    ends = np.append(np.flatnonzero(np.diff(ids)), len(ids) - 1)
    found, index = np.unique(ids[ends], return_inverse=True)
    counts = np.bincount(index, np.diff(ends, prepend=-1))
    return size, {int(id): int(count) for id, count in zip(found, counts) if id}


def _read_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a picture, turned as its EXIF says and not; reads the header only."""
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        with Image.open(path) as image:
            width, height = image.size
            turn = image.getexif().get(EXIF_ORIENTATION) in TURNED
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a picture") from error
    return ((width, height) if turn else (height, width)), (height, width)


def _read(pictures: Sequence[Picture]) -> Iterator[records.Record]:
    for picture in pictures:
        yield records.Record(
            image=picture.path.read_bytes(),
            image_id=picture.image_id,
            file_name=picture.path.name,
            panoptic=picture.panoptic_path.read_bytes(),
            size=picture.size,
            segments=picture.segments,
        )
