"""Semantic datasets of files: a picture, and a PNG whose pixels are the indices of classes."""

from __future__ import annotations

import functools
import io
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from knet_jax.data import records
from knet_jax.data.annotations import semantic
from knet_jax.data.annotations.kind import Record
from knet_jax.data.sources import examine
from knet_jax.segmentation import image_files
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

MAX_INDEX = 65535
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
"""Pillow's names for pictures of one number a pixel."""
SPREAD = {2: 85, 4: 17}
"""By bits a pixel: the factor by which Pillow spreads grey values of few bits over 0 to 255."""


class LabelledPicture(NamedTuple):
    """A picture and the PNG file of its annotation."""

    path: Path
    png: Path
    name: str
    """What the dataset calls it, with subfolders where names are not unique without them."""


def examine_pairs(
    pairs: Sequence[LabelledPicture],
    categories: Categories,
    ignored: Collection[int],
    source: Path,
    remedy: str = "",
    colors: Mapping[int, int] | None = None,
) -> records.Examples:
    """The pictures of a folder, each with the PNG file of its annotation.

    Indices that are neither a class nor ignored are named, and their pixels become ignored, unless
    there is a remedy.

    Args:
        pairs: the pictures.
        categories: the classes; their `dataset_ids` are indices of the PNG files.
        ignored: indices that stand for no class.
        source: the folder of the pictures, for messages.
        remedy: what a user can do about other indices, which then are an error.
        colors: as of `read_indices`.

    Raises:
        UserError: there is no picture.
    """
    if not pairs:
        raise UserError(f"config.data.root: no picture in {source}")
    known = {*categories.dataset_ids, *ignored}
    read = functools.partial(_read_picture, categories, known, remedy, colors)
    entries = ((pair.name, (number, pair)) for number, pair in enumerate(pairs))
    place = f"config.data.root: no picture of {source}"
    return records.Examples(categories, len(pairs), entries, read, (), place)


def _read_picture(
    categories: Categories,
    known: Collection[int],
    remedy: str,
    colors: Mapping[int, int] | None,
    entry: tuple[int, LabelledPicture],
) -> tuple[Record, list[str]]:
    """A picture, and what is wrong with it. Raises UserError where it cannot be used."""
    number, pair = entry
    found = read_indices(examine.read_file(pair.png), str(pair.png), colors)
    data, size = examine.read_picture(pair.path, found.shape)
    shown = set(np.unique(found).tolist())
    strange = sorted(shown - set(known))
    problems = []
    if strange and remedy:
        raise records.Unfit(f"{pair.png} has indices {strange[:10]} that are no class: {remedy}")
    if strange:
        problems.append(f"indices {strange[:10]} are no class, ignored")
    if shown.isdisjoint(categories.dataset_ids):
        problems.append("every pixel is ignored")
    return Record(data, number, pair.name, size, relabel(found, categories)), problems


def relabel(indices: np.ndarray, categories: Categories) -> bytes:
    """The annotation to store for a map [H, W] of `categories.dataset_ids` and ignored indices."""
    table = np.zeros(MAX_INDEX + 1, np.uint16)
    table[np.array(categories.dataset_ids)] = 1 + np.arange(len(categories.names))
    return semantic.encode_map(table[indices])


def read_indices(data: bytes, name: str, colors: Mapping[int, int] | None = None) -> np.ndarray:
    """The indices that a PNG holds, of 1 to 16 bits, grey or with a palette: int [H, W].

    Args:
        data: encoded PNG.
        name: of the file, for messages.
        colors: {R + 256 G + 65536 B: index}, where colors stand for indices.

    Raises:
        UserError: it is no PNG, is damaged, or its pixels are colors that are not listed.
    """
    try:
        image_files.check_png(data)
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.array(image.convert("RGB") if colors else image)
            mode = image.mode
    except UserError as error:
        raise UserError(f"{name} {error}") from error
    except Exception as error:  # whatever a damaged file leads Pillow to
        raise UserError(f"{name} cannot be decoded") from error
    if colors:
        ids, listed = image_files.segment_ids(pixels), np.array(sorted(colors))
        place = np.searchsorted(listed[:-1], ids)
        for strange in np.unique(pixels[listed[place] != ids], axis=0).tolist()[:1]:
            raise UserError(f"{name} has the color {strange}, which no class has")
        return np.array([colors[id] for id in listed.tolist()], np.int32)[place]
    if mode not in INDEX_MODES:
        raise UserError(
            f"{name} has pixels of mode {mode}, expected one index a pixel, or a color for every class "
            "in config.data.classes: NAME R G B"
        )
    # Bytes 24 and 25 of a PNG are its bits a sample and its color type, of which 0 is grey.
    bits, color_type = data[24], data[25]
    return pixels.astype(np.int32) // (SPREAD.get(bits, 1) if color_type == 0 else 1)


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder and of the folders in it, by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in image_files.PICTURES)
