"""Examining a dataset of files before it is converted: every picture is decoded once, in threads."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from multiprocessing import pool
from pathlib import Path
from typing import Any, NamedTuple

import tqdm

from knet_jax.data import records
from knet_jax.data.annotations.kind import Record
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories, printable
from knet_jax.system.errors import UserError

MAX_LINE = 200
"""Letters of what is said of a picture; more cannot be read."""


class Unfit(UserError):
    """Something of one picture that makes the whole dataset unfit for use."""


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
    check: Callable[[Any], tuple[Picture, Sequence[str]]],
    items: Sequence[tuple[str, Any]],
    categories: Categories,
    source: Path,
    problems: Sequence[str] = (),
) -> records.Examples:
    """Checks items in threads, showing progress.

    Args:
        check: takes an item, decodes its picture, and returns it with what is wrong with it. Any
            error means that the picture is left out, but `Unfit` ends the examination.
        items: (name of a picture for messages, argument of `check`).
        categories: the classes.
        source: the file or folder that is examined.
        problems: what else is wrong with it.

    Raises:
        UserError: no picture shows anything.
    """
    checked = in_threads(functools.partial(_check, check), items, f"Checking {source.name}")
    pictures = [picture for picture, _ in checked if picture]
    found = [printable(line) for _, remarks in checked for line in remarks] + [*problems]
    found = [line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} …" for line in found]
    if not any(picture.count for picture in pictures):
        first = found[0] if found else "nothing is annotated"
        raise UserError(
            f"config.data.root: no picture of {source} can be used, "
            f"the first of {len(found)} problems: {first}"
        )
    return records.Examples(categories, len(pictures), map(_read, pictures), found)


def in_threads(function: Callable[[Any], Any], items: Sequence[Any], title: str) -> list[Any]:
    """What a function returns for each item, computed in threads, showing progress."""
    threads = pool.ThreadPool(os.cpu_count())
    try:
        return list(tqdm.tqdm(threads.imap(function, items), title, len(items), unit="img"))
    finally:
        # A thread that decodes while Python shuts down would abort the process.
        threads.terminate()
        threads.join()


def _check(check: Callable, item: tuple[str, Any]) -> tuple[Picture | None, list[str]]:
    name, argument = item
    try:
        name.encode()  # as it will be stored
        picture, remarks = check(argument)
    except Unfit:
        raise
    except UnicodeEncodeError:
        return None, [f"{name!a}: its name is not in UTF-8, left out"]
    except Exception as error:  # noqa: BLE001 - whatever files of others lead to
        said = error if isinstance(error, UserError) else repr(error)
        return None, [f"{name}: {said}, left out"]
    return picture, [f"{name}: {remark}" for remark in remarks]


def _read(picture: Picture) -> Record:
    try:
        image, annotation = picture.path.read_bytes(), picture.annotate()
    except OSError as error:  # the files are not as they were
        raise UserError(f"config.data.root: {picture.path} cannot be read: {error}") from error
    return Record(image, picture.image_id, picture.name, picture.size, annotation)


def read_file(path: Path) -> bytes:
    """The content of a file. Raises UserError where there is none."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    return path.read_bytes()


def decoded_size(path: Path, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Decodes a picture, to see that it can be.

    Args:
        path: of the picture.
        size: height and width of its annotation, where these are known.

    Returns:
        `size`, or else the picture's height and width, turned as its orientation says.

    Raises:
        UserError: the picture is missing or broken, or has another size.
    """
    return image_files.load_image(read_file(path), size).shape[:2]


def state(path: Path) -> tuple[str, int, int]:
    """What changes when a file or a folder does: its path, size and time of modification."""
    found = path.stat()
    return str(path.resolve()), found.st_size, found.st_mtime_ns
