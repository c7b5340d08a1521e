"""COCO's annotation files: where they are, and what all kinds of them have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knet_jax.segmentation.coco_files import check_file_name
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError


def find_annotations(root: str, split: str, prefix: str) -> Path:
    """The JSON of a split under a root.

    Raises:
        ValueError: there is no such directory, or not exactly one annotation file for the split.
    """
    folder = Path(os.path.expanduser(root)) / "annotations"
    wanted = f"annotations/{prefix}{split}*.json"
    if not root or not folder.is_dir():
        raise UserError(
            f"config.data.root: no dataset in COCO's layout at '{root}', expected {wanted} in it"
        )
    exact = folder / f"{prefix}{split}.json"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"{prefix}{split}*.json"))
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"config.data.root: '{root}' must hold one {wanted} for split '{split}', found {what}"
        )
    return found[0]


def pictures_folder(annotations: Path, prefix: str) -> Path:
    """Where the pictures of an annotation file are."""
    return annotations.parent.parent / annotations.stem.removeprefix(prefix)


def read(
    path: Path,
    understand: Callable[[Mapping], Any],
    what: str,
    categories: Callable[[Sequence[Mapping]], Categories],
) -> tuple[Categories, dict[int, Mapping], Any]:
    """Reads an annotation file.

    Args:
        path: of the JSON.
        understand: takes what it needs from the whole content; may raise whatever a content of
            another form leads it to.
        what: such a file is called.
        categories: understands its list of categories.

    Returns:
        the classes, the images by id, and what `understand` returned.

    Raises:
        ValueError: the file is not what it should be.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"config.data.root: {path} is not readable JSON: {error}") from error
    try:
        classes = categories(content["categories"])
        images = {}
        for image in content["images"]:
            id = int(image["id"])
            if id in images:
                raise UserError(f"image id {id} is listed more than once")
            if id.bit_length() > 63:
                raise UserError(f"image id {id} does not fit into 64 bits")
            check_file_name(image)
            images[id] = image
        return classes, images, understand(content)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"config.data.root: {path} is not COCO {what} JSON: {error!r}") from error
    except ValueError as error:
        raise UserError(f"config.data.root: {path}: {error}") from error
