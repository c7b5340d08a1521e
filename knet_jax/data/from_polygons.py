"""Turns polygons of LabelMe and of YOLO into COCO's instance layout."""

from __future__ import annotations

import itertools
import json
import pickle
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tqdm
import yaml

from knet_jax.data.from_masks import check_places, describe_thing, link, write_instances
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation import class_lists, rle
from knet_jax.segmentation.coco_files import image_entry
from knet_jax.segmentation.segments import printable
from knet_jax.system.errors import UserError

CIRCLE = np.exp(2j * np.pi * np.arange(64) / 64)
"""Corners of the polygon that stands for a circle: 64 complex numbers of length 1."""
MOST_SHARE = 2.0
"""Corners may lie outside of the picture; beyond this share of a side they are taken for pixels."""


class Thing(NamedTuple):
    """One thing of a picture."""

    name: str | int
    """Of its class; with YOLO the number of the class."""
    polygons: list[list[float]]
    """Each [x0, y0, x1, y1, …], in pixels."""


def write_instance_dataset(
    images: Path, labels: Path, root: Path, split: str, names: Path | None = None
) -> list[str]:
    """Writes a split of a dataset in COCO's instance layout, showing progress.

    Args:
        images: folder of pictures; its subfolders are followed.
        labels: folder of a file for each picture, named like it: LabelMe's `.json`, or YOLO's
            `.txt`, lines of a class's number and x y pairs as shares of the sides.
        root: the dataset, `config.data.root` of the training.
        split: name of the split.
        names: YOLO's `data.yaml`, or a text file with a class on every line. None takes the names
            that LabelMe's files use, in the order of the alphabet.

    Returns:
        what is wrong with pictures and annotations that were left out, a line each.

    Raises:
        UserError: a folder or file is missing or of another form, or no picture can be used.
    """
    check_places(split, images=images, labels=labels)
    listed = read_names(names) if names else {}
    count, used, problems = 0, set(), []
    with tempfile.TemporaryFile() as read:  # there may be more than memory holds
        for path in tqdm.tqdm(index_maps.find_pictures(images), "Converting", unit="img"):
            name = path.relative_to(images)
            try:
                _, size = examine.read_picture(path)
                things, remarks = read_things(labels / name, size)
                things = [(_class_name(thing.name, listed), thing) for thing in things]
            except Exception as error:  # noqa: BLE001 - whatever files of others lead to
                problems.append(f"{name}: {error}, left out")
            else:
                pickle.dump((path, name.as_posix(), size, things), read)
                count += 1
                used |= {label for label, _ in things}
                problems += [f"{name}: {remark}, dropped" for remark in remarks]
        categories = [*listed.values()] or sorted(used)
        if not (count and categories):
            first = (problems or ["there is none"])[0]
            raise UserError(f"no picture of {images} can be used; {first}")

        def find_all() -> Iterator[tuple]:
            read.seek(0)
            return ((number, *pickle.load(read)) for number in range(1, count + 1))

        def pictures() -> Iterator[dict]:
            for number, path, name, size, _ in find_all():
                link(path, root / split / name)
                yield image_entry(number, name, size)

        def annotations() -> Iterator[dict]:
            ids = itertools.count(1)
            for number, _, name, size, things in find_all():
                for label, thing in things:
                    if label not in categories:
                        problems.append(f"{name}: {label!r} is not in --names, dropped")
                        continue
                    mask, _ = rle.from_annotation(thing.polygons, size)
                    place = (next(ids), number, 1 + categories.index(label))
                    yield describe_thing(*place, thing.polygons, mask)

        named = dict(enumerate(categories, 1))
        write_instances(root, split, pictures(), annotations(), named, problems)
    return problems


def _class_name(name: str | int, listed: Mapping[int, str]) -> str:
    if isinstance(name, str):
        return name
    if name not in listed:
        raise UserError(f"class {name}; accepted: numbers of --names, which has {len(listed)}")
    return listed[name]


def read_names(path: Path) -> dict[int, str]:
    """The classes of a text file, or of the `names` of a YAML, by number. Raises UserError for others."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix not in (".yaml", ".yml"):
            return class_lists.parse_class_list(text, f"--names: {path}")
        names = yaml.safe_load(text)["names"]
        rows = names.items() if isinstance(names, dict) else enumerate(names)
        found = {int(number): printable(str(name or "")) for number, name in rows}
        if "" in found.values() or len(set(found.values())) < len(found):
            raise ValueError("a name is empty, or there twice")
        return found
    except Exception as error:
        raise UserError(f"--names: {path} is no list of classes: {error!r:.100}") from error


def read_things(place: Path, size: tuple[int, int]) -> tuple[list[Thing], list[str]]:
    """The things of a picture, and what is wrong with others of it.

    Args:
        place: where the file of the picture's annotations is, but for its suffix.
        size: height and width of the picture.

    Raises:
        any error where the file is missing or of another form.
    """
    by_labelme, by_yolo = place.with_suffix(".json"), place.with_suffix(".txt")
    if by_labelme.is_file():
        content, read = json.loads(by_labelme.read_bytes()), _read_labelme
        if not (isinstance(content, Mapping) and isinstance(content.get("shapes"), list)):
            raise UserError(f"{by_labelme.name} has no list 'shapes', as LabelMe writes it")
        rows = content["shapes"]
    else:
        lines = examine.read_file(by_yolo).decode("utf-8-sig").split("\n")
        rows, read = [line.split() for line in lines if line.strip()], _read_yolo
    remarks: list[str] = []
    things: dict[object, Thing] = {}
    for number, row in enumerate(rows, 1):
        try:
            name, points, group = read(row, size)
            polygon = np.ravel(points).tolist()
            rle.from_annotation([polygon], size)
        except Exception as error:  # noqa: BLE001 - whatever annotations of others lead to
            said = error if isinstance(error, UserError) else repr(error)
            remarks.append(f"annotation {number}: {said}")
            continue
        # Polygons of one group are parts of one thing.
        key = number if group is None else (name, group)
        things.setdefault(key, Thing(name, [])).polygons.append(polygon)
    return list(things.values()), remarks


def _read_yolo(row: Sequence[str], size: tuple[int, int]) -> tuple[int, np.ndarray, None]:
    """The number of the class and the corners of a line of YOLO."""
    number, shares = int(row[0]), np.array(row[1:], float)
    if shares.size % 2 or shares.max(initial=0) > MOST_SHARE:
        raise UserError(
            f"{shares.size} coordinates up to {shares.max(initial=0):g}; accepted: x and y of each "
            "corner, as shares of the sides"
        )
    return number, shares.reshape(-1, 2) * size[::-1], None


def _read_labelme(shape: dict, size: tuple[int, int]) -> tuple[str, Sequence, object]:
    """The class, the corners (of a shape without an area its points), and the group of a shape."""
    name, kind, points = shape["label"], shape.get("shape_type", "polygon"), shape["points"]
    name = printable(str(name)) if isinstance(name, str | int) else ""
    if not name:
        raise UserError(f"label is {shape['label']!r:.40}; accepted: the name of a class")
    if kind == "rectangle":
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif kind == "circle":
        middle, edge = (complex(*point) for point in points)
        points = [(z.real, z.imag) for z in middle + abs(edge - middle) * CIRCLE]
    elif kind != "polygon":
        points = []
    return name, points, shape.get("group_id")
