"""What the files of results of all tasks have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any, Self


def place_png(folder: Path, file_name: str) -> tuple[str, Path]:
    """Where the PNG of a picture goes: named like it, subfolders included, never out of the folder.

    `7.jpg` becomes `7.png`, `city/7.jpg` becomes `city/7.png`. The subfolder is created.

    Args:
        folder: of all PNG files.
        file_name: of the picture.

    Returns:
        the name below the folder, and the whole path.
    """
    name = _inside(file_name).with_suffix(".png").as_posix()
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return name, place


def _inside(file_name: str) -> PurePath:
    """A name without what would lead out of a folder."""
    path = PurePath(file_name)
    return PurePath(*(part for part in path.parts if part not in (path.anchor, "..")))


class Stems:
    """Names results after pictures, no two alike: 1.jpg and 1.png must not overwrite each other, nor
    1.jpg and 1.JPG on other systems."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def of(self, name: str) -> str:
        """What the results of the next picture are called, before a suffix; `name` has one."""
        inside, number = _inside(name), 1
        stem = inside.with_suffix("").as_posix()
        while stem.lower() in self._taken:
            stem = f"{inside.as_posix()}-{number}" if number > 1 else inside.as_posix()
            number += 1
        self._taken.add(stem.lower())
        return stem


def draft_of(path: Path) -> Path:
    """Where a file is written before it is whole and gets its name."""
    return path.with_name(f"{path.name}.part")


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file, whole or not at all. Raises OSError, which names the file."""
    draft = draft_of(path)
    with _naming(path):
        try:
            draft.write_bytes(data)
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON, whole or not at all. Raises OSError, which names the file."""
    write_whole(path, json.dumps(content).encode())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Gives an OSError inside the name of a file: a full disk has none, a draft not the one that
    the user knows."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


class JsonList:
    """Writes a JSON list record by record, so that none of them stays in memory.

    path: of the file; it appears when it is whole. OSErrors name it.
    """

    def __init__(self, path: Path):
        self._path = path
        self._draft = draft_of(path)
        self._separator = "["
        path.parent.mkdir(parents=True, exist_ok=True)
        with _naming(path):
            self._file = self._draft.open("w")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, record: Any) -> None:
        """Writes what JSON can hold."""
        with _naming(self._path):
            self._file.write(f"{self._separator}{json.dumps(record)}")
        self._separator = ",\n"

    def close(self) -> None:
        """Ends the list."""
        with _naming(self._path):
            self._file.write("[]" if self._separator == "[" else "]")
            self._file.close()
            self._draft.replace(self._path)
