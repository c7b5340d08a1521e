"""What COCO's annotation files of all kinds have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knet_jax.segmentation.coco_files import check_file_name
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


def pictures_folder(annotations: Path, prefix: str) -> Path:
    """The folder of pictures that belongs to an annotation file `<prefix><name>.json`."""
    return annotations.parent.parent / annotations.stem.removeprefix(prefix)


def read(
    path: Path,
    kind: str,
    read_categories: Callable[[Sequence[Mapping]], Categories],
    read_annotations: Callable[[Mapping], Any],
) -> tuple[Categories, dict[int, Mapping], Any]:
    """Reads an annotation file.

    Args:
        path: of the JSON.
        kind: "panoptic" or "instance", for messages.
        read_categories: makes the classes of the file's list of categories.
        read_annotations: takes the annotations from the file's content, and raises ValueError,
            KeyError, TypeError or AttributeError where the content has another form.

    Returns:
        the classes, the images by id, and what `read_annotations` returned.

    Raises:
        UserError: the file is not what it should be.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config.data.root: {path} is not readable JSON: {error}") from error
    try:
        classes = read_categories(content["categories"])
        images = {}
        for image in content["images"]:
            id = int(image["id"])
            if id in images:
                raise UserError(f"image id {id} is listed more than once")
            if id.bit_length() > 63:
                raise UserError(f"image id {id} does not fit into 64 bits")
            check_file_name(image)
            images[id] = image
        return classes, images, read_annotations(content)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"config.data.root: {path} is not COCO {kind} JSON: {error!r}") from error
    except ValueError as error:
        raise UserError(f"config.data.root: {path}: {error}") from error
