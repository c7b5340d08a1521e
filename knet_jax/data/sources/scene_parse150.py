"""`scene_parse150` of the TFDS catalog, where it has been prepared as ArrayRecord.

Its annotations are those of instances: red is one of 100 classes of things, green tells instances
apart. They are mapped to the 150 classes of ADE20K; the 50 classes of stuff are not annotated, so
their pixels are ignored. A grey annotation is taken for ADE20K's own. All 150 classes need
`ade20k`.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from knet_jax.data import records
from knet_jax.data.annotations.kind import Record
from knet_jax.data.sources import ade20k, examine, index_maps
from knet_jax.segmentation import image_files
from knet_jax.system.errors import UserError

CATALOG_NAME = "scene_parse150"
FOLDER = "scene_parse150_label_maps"
"""Of the prepared label maps, beside the catalog's own folder."""
# fmt: off
STUFF = (
    1, 2, 3, 4, 5, 6, 7, 10, 12, 14, 17, 18, 22, 26, 27, 29, 30, 35, 41, 47, 49, 52, 53, 55, 60,
    61, 62, 64, 69, 78, 80, 85, 92, 95, 97, 100, 101, 102, 106, 107, 110, 114, 115, 118, 123, 129,
    132, 141, 142, 146,
)
# fmt: on
"""The indices, from 1, of ADE20K's classes that have no instances."""
THINGS = tuple(i for i in range(1, 1 + len(ade20k.CATEGORIES.names)) if i not in STUFF)
"""Thing i of the annotations of instances, counted from 1, is class `THINGS[i - 1]`."""


def find(config_data, split: str) -> records.Source:
    """Finds a split (`train` or `test`) that TFDS has prepared in `config.data.data_dir`.

    Raises:
        UserError: the dataset has not been prepared, in this form, or has no such split.
    """
    data_dir = records.data_dir(config_data)
    versions = sorted((data_dir / CATALOG_NAME).glob("*/dataset_info.json"))
    if not versions:
        raise UserError(
            f"config.data.data_dir: TFDS has not prepared {CATALOG_NAME} in '{data_dir}'; "
            "config.data.dataset 'ade20k' reads the files themselves"
        )
    directory = versions[-1].parent
    _open(directory, split)
    name = records.config_name("semantic", split, examine.state(directory))
    examine_split = functools.partial(_examine, directory, split)
    return records.Source(FOLDER, name, split, "semantic", examine_split)


def _examine(directory: Path, split: str) -> records.Examples:
    count = len(_open(directory, split))
    entries = ((f"example {i}", i) for i in range(count))
    read = functools.partial(_read_picture, directory, split)
    place = f"config.data.data_dir: no picture of {directory}"
    return records.Examples(ade20k.CATEGORIES, count, entries, read, (), place)


def _read_picture(directory: Path, split: str, i: int) -> tuple[Record, Sequence[str]]:
    """A picture that TFDS has prepared. Raises UserError where it is damaged."""
    example = _open(directory, split)[i]
    indices = read_annotation(example["annotation"])
    image_files.load_image(example["image"], indices.shape)
    label_map = index_maps.relabel(indices, ade20k.CATEGORIES)
    return Record(example["image"], i, f"{split}_{i:06d}.jpg", indices.shape, label_map), ()


@functools.cache
def _open(directory: Path, split: str) -> Sequence[Mapping[str, Any]]:
    """The encoded examples. Raises UserError where they cannot be read."""
    skip = dict.fromkeys(("image", "annotation"), tfds.decode.SkipDecoding())
    try:
        builder = tfds.builder_from_directory(directory)
        known = ", ".join(builder.info.splits)
    except Exception as error:
        raise UserError(f"config.data.data_dir: {directory} cannot be read") from error
    try:
        return builder.as_data_source(split, decoders=skip)
    except Exception as error:
        # TFDS raises whatever its files lead it to.
        raise UserError(
            f"config.data.data_dir: split '{split}' of {directory} cannot be read; its splits are "
            f"{known}, and it must have been prepared with file_format='array_record'"
        ) from error


def read_annotation(data: bytes) -> np.ndarray:
    """ADE20K's indices, int [H, W], 0 where nothing is known, from an annotation of either form.

    Raises:
        UserError: it is damaged, or has a class that does not exist.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            is_color = image.mode not in index_maps.INDEX_MODES
            pixels = np.array(image.convert("RGB")) if is_color else np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError("its annotation cannot be decoded") from error
    indices = pixels[..., 0] if is_color else pixels
    table = np.array((0, *THINGS)) if is_color else np.arange(1 + len(ade20k.CATEGORIES.names))
    if indices.max(initial=0) >= len(table):
        raise UserError(f"its annotation has class {indices.max()} of {len(table) - 1}")
    return table[indices]
