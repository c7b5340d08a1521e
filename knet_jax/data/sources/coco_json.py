"""What COCO's annotation files of all kinds have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

IDS = ("id", "image_id", "category_id")


def read(
    path: Path,
    kind: str,
    read_categories: Callable[[Mapping], Categories],
) -> tuple[Categories, dict[int, Mapping], dict[int | None, list[Any]]]:
    """Reads an annotation file.

    What is null counts as absent, and an id may be written as a text.

    Args:
        path: of the JSON.
        kind: "panoptic" or "instance", for messages.
        read_categories: makes the classes of the file's content.

    Returns:
        the classes, the images by id, and the annotations by the id of their image, None where
        they name none.

    Raises:
        UserError: the file is not what it should be.
    """
    try:
        content = json.loads(path.read_bytes(), object_hook=_tidy)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config.data.root: {path} is not readable JSON: {error}") from error
    try:
        images, annotations = {}, {}
        for image in content["images"]:
            id = image["id"]
            if not isinstance(id, int) or id.bit_length() > 63 or id in images:
                raise UserError(
                    f"image id {id!r:.40}; accepted: whole numbers of 64 bits, each once"
                )
            images[id] = image
        for annotation in content["annotations"]:
            id = annotation.get("image_id") if isinstance(annotation, Mapping) else None
            annotations.setdefault(id if isinstance(id, int) else None, []).append(annotation)
        return read_categories(content), images, annotations
    except UserError as error:
        raise UserError(f"config.data.root: {path}: {error}") from error
    except Exception as error:  # whatever another form of file leads to
        raise UserError(
            f"config.data.root: {path} is not COCO {kind} JSON: {error!r:.200}"
        ) from error


def _tidy(entry: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _as_number(value) if key in IDS else value
        for key, value in entry.items()
        if value is not None
    }


def _as_number(id: Any) -> Any:
    """An id that is a whole number written as a text or with a point; others as they are."""
    try:
        return int(id) if isinstance(id, str) or int(id) == id else id
    except (TypeError, ValueError, OverflowError):
        return id


def strays(images: Mapping, annotations: Mapping) -> list[str]:
    """A line for every image that is annotated but not listed."""
    return [
        f"image {id}: annotated but not among the file's images, left out"
        for id in annotations
        if id not in images
    ]


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
