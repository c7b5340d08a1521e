"""Examining a dataset of files before it is converted: every picture is checked, in threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from multiprocessing import pool
from pathlib import Path
from typing import Any, NamedTuple

import tqdm
from PIL import Image

from knet_jax.data import records
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

EXIF_ORIENTATION = 0x0112
TURNED = range(5, 9)
"""The EXIF orientations that swap height and width."""


class Picture(NamedTuple):
    """A picture that can be used; its files are read when it is written."""

    image_id: int
    path: Path
    name: str
    """What the dataset calls it, with subfolders where names are not unique without them."""
    size: tuple[int, int]
    annotate: Callable[[], Any]
    """Reads or builds the annotation."""
    count: int
    """How many segments, instances or classes it shows."""


def check_pictures(
    check: Callable[[Any], tuple[Picture | None, Sequence[str]]],
    items: Sequence[Any],
    categories: Categories,
    source: Path,
    problems: Sequence[str] = (),
) -> records.Examples:
    """Checks items in threads, showing progress.

    Args:
        check: returns a picture, or None where it cannot be used, and what is wrong with it.
        items: arguments of `check`.
        categories: the classes.
        source: the file or folder that is examined.
        problems: what else is wrong with it.

    Raises:
        UserError: no picture shows anything.
    """
    pictures, found = [], []
    with pool.ThreadPool(os.cpu_count()) as threads:
        checked = threads.imap(check, items)
        for picture, remarks in tqdm.tqdm(
            checked, f"Checking {source.name}", len(items), unit="img"
        ):
            found += remarks
            if picture:
                pictures.append(picture)
    found += problems
    if not any(picture.count for picture in pictures):
        first = found[0] if found else "nothing is annotated"
        raise UserError(
            f"config.data.root: no picture of {source} can be used, "
            f"the first of {len(found)} problems: {first}"
        )
    return records.Examples(categories, len(pictures), map(_read, pictures), found)


def _read(picture: Picture) -> Record:
    return Record(
        image=picture.path.read_bytes(),
        image_id=picture.image_id,
        file_name=picture.name,
        size=picture.size,
        annotation=picture.annotate(),
    )


def read_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a picture, once turned as its EXIF orientation says and once unturned.

    Reads the header of the file only.

    Raises:
        UserError: the picture is missing or broken.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    try:
        with Image.open(path) as image:
            width, height = image.size
            turn = image.getexif().get(EXIF_ORIENTATION) in TURNED
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} is too large: {error}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} is not a picture") from error
    return ((width, height) if turn else (height, width)), (height, width)


def matching_size(path: Path, size: tuple[int, int], what: str) -> tuple[int, int]:
    """Checks that a picture, turned or unturned, has the size of its annotation.

    Args:
        path: of the picture.
        size: height and width of the annotation.
        what: the annotation is called in messages.

    Returns:
        `size`.

    Raises:
        UserError: the picture has another size, or is missing or broken.
    """
    turned, unturned = read_sizes(path)
    if size not in (turned, unturned):
        raise UserError(f"picture is {turned[1]}x{turned[0]} but its {what} {size[1]}x{size[0]}")
    return size


def state(path: Path) -> tuple[str, int, int]:
    """What changes when a file or a folder does: its path, size and time of modification."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns
