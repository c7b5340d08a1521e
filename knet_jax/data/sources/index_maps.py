"""Semantic datasets of files: a picture, and a PNG whose pixels are the indices of classes."""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from knet_jax.data import records
from knet_jax.data.annotations import semantic
from knet_jax.data.sources import examine
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

PNG = b"\x89PNG\r\n\x1a\n"
"""How a PNG begins."""
MAX_INDEX = 65535
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow's names for pictures of one number a pixel."""
SPREAD = {2: 85, 4: 17}
"""By bits a pixel: the factor by which Pillow spreads grey values of few bits over 0 to 255."""


class Pair(NamedTuple):
    """A picture and the PNG file of its annotation."""

    path: Path
    png: Path
    name: str
    """What the dataset calls it, with subfolders where names are not unique without them."""


def examine_pairs(
    pairs: Sequence[Pair],
    categories: Categories,
    ignored: Collection[int],
    source: Path,
    remedy: str = "",
) -> records.Examples:
    """Examines pictures and their PNG files, showing progress.

    A picture that cannot be used is left out and named in `problems`. So are indices that are
    neither a class nor ignored; their pixels become ignored, unless there is a remedy.

    Args:
        pairs: the pictures, each with its PNG file.
        categories: the classes; their `dataset_ids` are indices of the PNG files.
        ignored: indices that stand for no class.
        source: the folder of the pictures.
        remedy: what a user can do about other indices, which then are an error.

    Raises:
        UserError: there is no picture, none can be used, or there are such indices.
    """
    if not pairs:
        raise UserError(f"config.data.root: no picture in {source}")
    known = {*categories.dataset_ids, *ignored}
    check = functools.partial(_check, categories, known, remedy)
    return examine.check_pictures(check, list(enumerate(pairs)), categories, source)


def _check(
    categories: Categories, known: Collection[int], remedy: str, item: tuple[int, Pair]
) -> tuple[examine.Picture | None, list[str]]:
    """A picture, or None where it cannot be used, and what is wrong with it."""
    number, pair = item
    try:
        size = examine.matching_size(pair.path, examine.read_sizes(pair.png)[1], "index PNG")
        found = np.unique(read_indices(pair.png.read_bytes(), str(pair.png)))
    except UserError as error:
        return None, [f"{pair.name}: {error}, left out"]
    shown = set(found.tolist())
    strange = sorted(shown - set(known))
    classes = shown & set(categories.dataset_ids)
    problems = []
    if strange and remedy:
        raise UserError(f"{pair.png} has indices {strange[:10]} that are no class: {remedy}")
    if strange:
        problems.append(f"{pair.name}: indices {strange[:10]} are no class, ignored")
    if not classes:
        problems.append(f"{pair.name}: every pixel is ignored")

    def annotate() -> bytes:
        return relabel(read_indices(pair.png.read_bytes(), str(pair.png)), categories)

    return examine.Picture(number, pair.path, pair.name, size, annotate, len(classes)), problems


def relabel(indices: np.ndarray, categories: Categories) -> bytes:
    """The annotation to store for a map [H, W] of `categories.dataset_ids` and ignored indices."""
    table = np.zeros(MAX_INDEX + 1, np.uint16)
    table[np.array(categories.dataset_ids)] = 1 + np.arange(len(categories.names))
    return semantic.encode_map(table[indices])


def read_indices(data: bytes, name: str) -> np.ndarray:
    """The indices that a PNG holds, of 1 to 16 bits, grey or with a palette: int [H, W].

    Raises:
        UserError: it is no PNG, is damaged, or its pixels are colors.
    """
    if not data.startswith(PNG):
        raise UserError(f"{name} is no PNG")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode not in INDEX_MODES:
                raise UserError(
                    f"{name} has pixels of mode {image.mode}, expected one index a pixel"
                )
            indices = np.array(image).astype(np.int32)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} cannot be decoded") from error
    # Bytes 24 and 25 of a PNG are its bits a sample and its color type, of which 0 is grey.
    bits, color_type = data[24], data[25]
    return indices // SPREAD[bits] if color_type == 0 and bits in SPREAD else indices


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and of the folders in it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in image_files.PICTURES)
