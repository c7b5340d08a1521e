"""What the files of results of all tasks have in common."""

from __future__ import annotations

import json
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
    path = PurePath(file_name).with_suffix(".png")
    inside = (part for part in path.parts if part not in (path.anchor, ".."))
    name = PurePath(*inside).as_posix()
    place = folder / name
    place.parent.mkdir(parents=True, exist_ok=True)
    return name, place


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON, whole or not at all."""
    unfinished = path.with_suffix(".json.part")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


class JsonList:
    """Writes a JSON list record by record, so that none of them stays in memory.

    path: of the file; it appears when it is whole.
    """

    def __init__(self, path: Path):
        self._path = path
        self._unfinished = path.with_suffix(".json.part")
        self._separator = "["
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._unfinished.open("w")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def add(self, record: Any) -> None:
        """Writes what JSON can hold."""
        self._file.write(f"{self._separator}{json.dumps(record)}")
        self._separator = ",\n"

    def close(self) -> None:
        """Ends the list."""
        self._file.write("[]" if self._separator == "[" else "]")
        self._file.close()
        self._unfinished.replace(self._path)
