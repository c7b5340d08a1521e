"""Your own semantic dataset: a folder of pictures, a folder of index PNGs, and a list of classes.

The PNG of a picture has its name (and lies in the same subfolder), but ends in `.png`. Line i of the
text file, counted from 0, names the class whose pixels hold i; an index may be ignored.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation.class_lists import read_class_list
from knet_jax.system.errors import UserError


def find(config_data, split: str) -> records.Source:
    """Finds a split below `config.data.root`.

    Args:
        config_data: `config.data`; its `images`, `labels` and `classes` are paths below its
            `root`, in which `{split}` stands for the name of the split.
        split: name of the split.

    Raises:
        UserError: a path does not exist.
    """
    root = Path(os.path.expanduser(config_data.root))
    paths = {}
    for key in ("images", "labels", "classes"):
        path = root / str(config_data[key]).replace("{split}", split)
        if not (path.is_file() if key == "classes" else path.is_dir()):
            kind = "file" if key == "classes" else "folder"
            raise UserError(f"config.data.{key}: split '{split}' needs the {kind} {path}")
        paths[key] = path
    index = config_data.ignore_index
    if not 0 <= index <= index_maps.MAX_INDEX:
        raise UserError(f"config.data.ignore_index {index} must be in [0, {index_maps.MAX_INDEX}]")
    folders = [paths["images"], paths["labels"]]
    inside = (path for top in folders for path in top.rglob("*") if path.is_dir())
    facts = [examine.state(path) for path in (*paths.values(), *sorted(inside))]
    name = records.config_name("semantic", split, index, *facts)
    examine_split = partial(_examine, split, index, **paths)
    return records.Source("folder", name, split, "semantic", examine_split)


def _examine(
    split: str, ignore_index: int, images: Path, labels: Path, classes: Path
) -> records.Examples:
    pairs = find_pairs(images, labels)
    if not pairs:
        raise UserError(f"config.data.images: split '{split}': no picture in {images}")
    categories = read_class_list(classes, ignore_index)
    remedy = (
        f"name them in config.data.classes, {classes}, which ends at "
        f"{max(categories.dataset_ids)}, or use config.data.ignore_index, {ignore_index}"
    )
    return index_maps.examine_pairs(pairs, categories, {ignore_index}, images, remedy)


def find_pairs(pictures: Path, annotations: Path) -> list[index_maps.Pair]:
    """The pictures of a folder, each with the PNG of its name in another folder."""
    names = (path.relative_to(pictures) for path in index_maps.find_pictures(pictures))
    return [
        index_maps.Pair(pictures / name, annotations / name.with_suffix(".png"), name.as_posix())
        for name in names
    ]
