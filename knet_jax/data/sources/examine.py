"""Examining a dataset of files: pictures checked in threads, problems gathered, records read late."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import pool
from pathlib import Path
from typing import Any, NamedTuple

import tqdm
from PIL import Image

from knet_jax.data import records
from knet_jax.system.errors import UserError

EXIF_ORIENTATION = 0x0112
TURNED = range(5, 9)
"""The EXIF orientations that swap height and width."""


class Picture(NamedTuple):
    """A picture that can be used."""

    image_id: int
    path: Path
    name: str
    """What the dataset calls it: where that is not unique without them, with subfolders."""
    size: tuple[int, int]
    annotate: Callable[[], Any]
    """Reads or builds the annotation."""
    count: int
    """How many segments, instances or classes it shows."""


def examine(
    check: Callable[[Any], tuple[Picture | None, Sequence[str]]], items: Sequence[Any], title: str
) -> tuple[list[Picture], list[str]]:
    """Checks items in threads and shows progress.

    Args:
        check: gives a picture, or None where it cannot be used, and what is wrong with it.
        items: its arguments.
        title: of the progress bar.

    Returns:
        the pictures and the problems, in order.
    """
    pictures, problems = [], []
    with pool.ThreadPool(os.cpu_count()) as threads:
        checked = threads.imap(check, items)
        for picture, remarks in tqdm.tqdm(checked, title, len(items), unit="img"):
            problems += remarks
            if picture:
                pictures.append(picture)
    return pictures, problems


def require_any(pictures: Iterable[Picture], problems: Sequence[str], source: object) -> None:
    """Raises ValueError where no picture shows anything."""
    if not any(picture.count for picture in pictures):
        first = problems[0] if problems else "nothing is annotated"
        raise UserError(
            f"config.data.root: no picture of {source} can be used, "
            f"the first of {len(problems)} problems: {first}"
        )


def read(pictures: Iterable[Picture]) -> Iterator[records.Record]:
    """The records of some pictures, each read when it is asked for."""
    for picture in pictures:
        yield records.Record(
            image=picture.path.read_bytes(),
            image_id=picture.image_id,
            file_name=picture.name,
            size=picture.size,
            annotation=picture.annotate(),
        )


def read_sizes(path: Path) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) of a picture, turned as its EXIF says and not; reads the header only.

    Raises:
        ValueError: the picture is missing or broken.
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
    """The size of an annotation, if the picture has it too, turned or not.

    Raises:
        ValueError: it has another one, or is missing or broken.
    """
    turned, unturned = read_sizes(path)
    if size not in (turned, unturned):
        raise UserError(f"picture is {turned[1]}x{turned[0]} but its {what} {size[1]}x{size[0]}")
    return size


def state(path: Path) -> tuple[str, int, int]:
    """What tells a file, or a folder, from a changed one: path, size and time."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns
