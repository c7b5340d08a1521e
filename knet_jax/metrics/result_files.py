"""What the files of results of all tasks have in common."""

from __future__ import annotations

import json
from pathlib import Path, PurePath
from typing import Any


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
