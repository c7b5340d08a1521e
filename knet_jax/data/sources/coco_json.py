"""What COCO's annotation files of all kinds have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from knet_jax.segmentation import coco_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


def read(
    path: Path,
    kind: str,
    read_categories: Callable[[Mapping], Categories],
) -> tuple[Categories, dict[int, Mapping], dict[int | None, list[Any]], list[str]]:
    """Reads an annotation file.

    An image without an id is left out, since nothing can be its annotation.

    Args:
        path: of the JSON.
        kind: "panoptic" or "instance", for messages.
        read_categories: makes the classes of the file's content.

    Returns:
        the classes, the images by id, the annotations by the id of their image, None where they
        name none, and a line for each image that has no id, or annotations but no entry.

    Raises:
        UserError: the file is not what it should be.
    """
    try:
        content = coco_files.load(path)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config.data.root: {path} is not readable JSON: {error}") from error
    try:
        images, annotations, problems = {}, {}, []
        for image in content["images"]:
            id = image.get("id")
            if id is None:
                problems.append(f"{image.get('file_name')}: it has no id, left out")
                continue
            if not isinstance(id, int) or id.bit_length() > 63 or id in images:
                raise UserError(
                    f"image id {id!r:.40}; accepted: whole numbers of 64 bits, each once"
                )
            images[id] = image
        for annotation in content["annotations"]:
            id = annotation.get("image_id") if isinstance(annotation, Mapping) else None
            annotations.setdefault(id if isinstance(id, int) else None, []).append(annotation)
        problems += [
            f"image {id}: annotated but not among the file's images, left out"
            for id in annotations
            if id not in images
        ]
        return read_categories(content), images, annotations, problems
    except UserError as error:
        raise UserError(f"config.data.root: {path}: {error}") from error
    except Exception as error:  # whatever another form of file leads to
        raise UserError(
            f"config.data.root: {path} is not COCO {kind} JSON: {error!r:.200}"
        ) from error


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
