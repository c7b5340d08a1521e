"""What COCO's annotation files of all kinds have in common.

Annotations come in no order, and may be more than memory holds: they are sorted by their pictures on
disk, in a temporary file of about twice the size, in the folder SQLITE_TMPDIR, or else TMPDIR.
"""

from __future__ import annotations

import functools
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import tqdm

from knet_jax.data import records
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation import coco_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

LISTS = ("images", "annotations", "categories")
TABLES = """
CREATE TABLE images (number INTEGER PRIMARY KEY, id UNIQUE, entry);
CREATE TABLE annotations (number INTEGER PRIMARY KEY, image_id, entry);
"""
INDEX = "CREATE INDEX by_image ON annotations (image_id, number, entry)"


class Content(NamedTuple):
    """What the classes of an annotation file follow from."""

    categories: Sequence[Mapping]
    used: set[int]
    """The ids of categories that annotations have."""
    lacks_masks: bool
    """Whether there are annotations, none of which has a segmentation."""


def examine(
    path: Path,
    kind: str,
    read_categories: Callable[[Content], Categories],
    read_picture: Callable[..., tuple[Record, Sequence[str]]],
) -> records.Examples:
    """Reads an annotation file in constant memory, showing progress.

    An image without an id is left out, since nothing can be its annotation.

    Args:
        path: of the JSON.
        kind: "panoptic", where a picture has one annotation, or "instance".
        read_categories: makes the classes of the file's content.
        read_picture: takes {category id: label}, and (image, the JSON of each of its annotations);
            returns the record, and what is wrong with it.

    Raises:
        UserError: the file is not what it should be, or there is no room to sort it.
    """
    rows = sqlite3.connect("")  # a file that goes with the connection
    try:
        content, problems = _sort(path, rows)
        categories = read_categories(content)
    except UserError as error:
        raise UserError(f"config.data.root: {path}: {error}") from error
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config.data.root: {path} is not readable JSON: {error}") from error
    except sqlite3.Error as error:
        raise UserError(
            f"config.data.root: {path} cannot be sorted in the folder of temporary files, TMPDIR: "
            f"{error}"
        ) from error
    except Exception as error:  # whatever another form of file leads to
        raise UserError(
            f"config.data.root: {path} is not COCO {kind} JSON: {error!r:.200}"
        ) from error
    twice = sorted({name for name in categories.names if categories.names.count(name) > 1})
    problems += [f"several categories are called {name!r:.40}, and stay apart" for name in twice]
    if kind == "panoptic":
        several = rows.execute(
            "SELECT image_id FROM annotations GROUP BY image_id HAVING COUNT(*) > 1 "
            "ORDER BY MIN(number)"
        )
        problems += [
            f"image {id}: annotated more than once, the first one counts" for (id,) in several
        ]
    labels = {id: label for label, id in enumerate(categories.dataset_ids)}
    read = functools.partial(read_picture, labels)
    [(count,)] = rows.execute("SELECT COUNT(*) FROM images")
    place = f"config.data.root: no picture of {path}"
    return records.Examples(categories, count, _entries(rows), read, problems, place)


def _sort(path: Path, rows: sqlite3.Connection) -> tuple[Content, list[str]]:
    """Fills the tables. Returns what the classes follow from, and a line for each image that has no
    id, or annotations but no entry."""
    rows.executescript(TABLES)
    categories, used, num_annotations, has_masks = [], set(), 0, False
    problems, absent = [], set(LISTS)
    for key, entries in coco_files.read_lists(path):
        if key not in LISTS:
            continue
        if entries is None:
            raise UserError(f"{key!r} is not accepted; accepted: a list")
        absent.discard(key)
        entries = tqdm.tqdm(entries, f"Reading {key} of {path.name}", unit=" entries", delay=5)
        for entry, text in entries:
            if key == "categories":
                categories.append(entry)
            elif key == "images":
                problems += _add_image(rows, entry, text)
            else:
                known = entry if isinstance(entry, Mapping) else {}
                id, category = known.get("image_id"), known.get("category_id")
                has_id = isinstance(id, int) and id.bit_length() <= 63
                row = (id if has_id else None, text)
                rows.execute("INSERT INTO annotations (image_id, entry) VALUES (?, ?)", row)
                num_annotations += bool(known)
                has_masks |= bool(known.get("segmentation"))
                used |= {category} if isinstance(category, int) else set()
    if absent:
        raise KeyError(*sorted(absent))
    rows.execute(INDEX)
    unknown = rows.execute(
        "SELECT image_id FROM annotations "
        "WHERE NOT EXISTS (SELECT 1 FROM images WHERE id IS image_id) "
        "GROUP BY image_id ORDER BY MIN(number)"
    )
    problems += [
        f"image {id}: annotated but not among the file's images, left out" for (id,) in unknown
    ]
    return Content(categories, used, num_annotations > 0 and not has_masks), problems


def _add_image(rows: sqlite3.Connection, image: Mapping, text: bytes) -> list[str]:
    """Keeps an image. Returns what is wrong with it. Raises UserError where its id is no good."""
    id = image.get("id")
    if id is None:
        return [f"{image.get('file_name')}: it has no id, left out"]
    add = "INSERT OR IGNORE INTO images (id, entry) VALUES (?, ?)"
    is_sound = isinstance(id, int) and id.bit_length() <= 63
    if not is_sound or not rows.execute(add, (id, text)).rowcount:
        raise UserError(f"image id {id!r:.40}; accepted: whole numbers of 64 bits, each once")
    return []


def _entries(rows: sqlite3.Connection) -> Iterator[tuple[str, tuple[Mapping, list[bytes]]]]:
    of_image = "SELECT entry FROM annotations WHERE image_id = ? ORDER BY number"
    for id, text in rows.execute("SELECT id, entry FROM images ORDER BY number"):
        image = coco_files.parse(text)
        yield (
            str(image.get("file_name")),
            (image, [one for (one,) in rows.execute(of_image, (id,))]),
        )


def find_file(folders: Sequence[Path], entry: Mapping) -> Path:
    """The file of an image or annotation, in the first of some folders that has it.

    Raises:
        UserError: the entry names none, or leads out of the folders.
    """
    name = entry.get("file_name")
    if not isinstance(name, str):
        raise UserError(f"file_name is {name!r:.40}; accepted: the name of a file")
    path = PurePosixPath(name.replace("\\", "/"))  # as Windows writes it
    if path.is_absolute() or ".." in path.parts:
        raise UserError("file_name leads out of the folder of pictures")
    places = [folder / path for folder in folders]
    return next((place for place in places if place.is_file()), places[0])
