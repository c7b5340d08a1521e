"""COCO's annotation files: where they are, and what all kinds of them have in common."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from knet_jax.segments import Categories


def find_annotations(root: str, split: str, prefix: str) -> Path:
    """The JSON of a split under a root.

    Raises:
        ValueError: there is no such directory, or not exactly one annotation file for the split.
    """
    folder = Path(os.path.expanduser(root)) / "annotations"
    wanted = f"annotations/{prefix}{split}*.json"
    if not root or not folder.is_dir():
        raise ValueError(
            f"config.data.root: no dataset in COCO's layout at '{root}', expected {wanted} in it"
        )
    exact = folder / f"{prefix}{split}.json"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"{prefix}{split}*.json"))
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise ValueError(
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
        raise ValueError(f"config.data.root: {path} is not readable JSON: {error}") from error
    try:
        classes = categories(content["categories"])
        images = {}
        for image in content["images"]:
            id = int(image["id"])
            if id in images:
                raise ValueError(f"image id {id} is listed more than once")
            if id.bit_length() > 63:
                raise ValueError(f"image id {id} does not fit into 64 bits")
            check_file_name(image)
            images[id] = image
        return classes, images, understand(content)
    except (KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"config.data.root: {path} is not COCO {what} JSON: {error!r}") from error
    except ValueError as error:
        raise ValueError(f"config.data.root: {path}: {error}") from error


def check_file_name(entry: Mapping) -> None:
    """Raises TypeError where an image or annotation names its file by something else than a text."""
    if not isinstance(entry["file_name"], str):
        raise TypeError(f"file_name is {entry['file_name']!r}")


def flag(entry: Mapping, key: str, default: int = 0) -> bool:
    """What an entry of the file says to a question.

    Raises:
        ValueError: neither 0 nor 1; a text, such as "0", would count as yes.
    """
    value = entry.get(key, default)
    if value not in (0, 1):
        raise ValueError(f"{key} is {value!r}; accepted: 0 and 1")
    return bool(value)


def read_categories(listed: Sequence[Mapping]) -> Categories:
    """Orders a file's category list things first, else as it stands.

    A category that does not say whether it is a thing is one.

    Raises:
        ValueError: an id occurs twice, or there is none.
    """
    if not listed:
        raise ValueError("its list of categories is empty")
    ordered = sorted(listed, key=lambda category: not flag(category, "isthing", 1))
    ids = [int(category["id"]) for category in ordered]
    if len(set(ids)) != len(ids):
        raise ValueError(f"category ids must differ from each other, got {ids}")
    names = tuple(str(category["name"]) for category in ordered)
    num_things = sum(flag(category, "isthing", 1) for category in ordered)
    return Categories(names, tuple(ids), num_things)


def read_things(listed: Sequence[Mapping]) -> Categories:
    """The categories of a file of instances, as they stand: all are things, whatever they say.

    Raises:
        ValueError: an id occurs twice, or there is none.
    """
    return read_categories([{**category, "isthing": 1} for category in listed])
