"""Your own semantic dataset: a folder of pictures, a folder of masks, and a list of classes.

The mask of a picture is a PNG that has its name, perhaps with one of `SUFFIXES`, and lies in the same
subfolder. Line i of the text file, counted from 0, names the class whose pixels hold i, or have its
color if it has one; an index may be ignored.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation.class_lists import read_class_list
from knet_jax.system.errors import UserError

SUFFIXES = (
    "",
    *("_mask", "_masks", "_label", "_labels", "_labelIds", "_gt", "_seg", "_L", "-mask"),
)
"""What the name of a mask may have after that of its picture."""


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
    categories, colors = read_class_list(classes, ignore_index)
    remedy = (
        f"name them in config.data.classes, {classes}, which ends at "
        f"{max(categories.dataset_ids)}, or use config.data.ignore_index, {ignore_index}"
    )
    return index_maps.examine_pairs(pairs, categories, {ignore_index}, images, remedy, colors)


def find_pairs(pictures: Path, annotations: Path) -> list[index_maps.LabelledPicture]:
    """The pictures of a folder, each with its mask in another folder, or in the same.

    What is the mask of a picture is no picture.
    """
    found = [path.relative_to(annotations) for path in index_maps.find_pictures(annotations)]
    found.sort(key=lambda path: path.suffix.lower() == ".png")  # goes before others of its name
    masks = {path.with_suffix("").as_posix(): annotations / path for path in found}
    pairs = []
    for path in index_maps.find_pictures(pictures):
        name = path.relative_to(pictures)
        wanted = [masks.get(name.with_suffix("").as_posix() + suffix) for suffix in SUFFIXES]
        others = [mask for mask in wanted if mask and not mask.samefile(path)]
        absent = annotations / name.with_name(f"{name.stem}{SUFFIXES[pictures == annotations]}.png")
        pairs.append(
            index_maps.LabelledPicture(path, others[0] if others else absent, name.as_posix())
        )
    used = {pair.png for pair in pairs}
    return [pair for pair in pairs if pair.path not in used]
