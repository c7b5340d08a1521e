"""Your own semantic dataset: a folder of pictures, a folder of index PNGs, and a list of classes.

The PNG of a picture has its name (and lies in the same subfolder), but ends in `.png`. Line i of the
text file, counted from 0, names the class whose pixels hold i; an index may be ignored.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation.class_lists import read_class_list
from knet_jax.system.errors import UserError


class Folder(records.RecordBuilder, skip_registration=True):
    """Writes a split of a custom dataset."""

    name = "folder"

    def examples(self) -> records.Examples:
        """See the base class."""
        config = self.builder_config
        pictures = Path(config.images)
        pairs = list(find_pairs(pictures, Path(config.labels)))
        if not pairs:
            raise UserError(f"config.data.images: split '{config.split}': no picture in {pictures}")
        categories = read_class_list(Path(config.classes), config.ignore_index)
        remedy = (
            f"name them in config.data.classes, {config.classes}, which ends at "
            f"{max(categories.dataset_ids)}, or use config.data.ignore_index, {config.ignore_index}"
        )
        return index_maps.scan(pairs, categories, {config.ignore_index}, pictures, remedy)


@dataclasses.dataclass
class FolderConfig(records.SplitConfig):
    """A split of one dataset, as it is now."""

    images: str = ""
    labels: str = ""
    classes: str = ""
    ignore_index: int = 0


def split_config(config_data, split: str) -> FolderConfig:
    """Finds a split; another path, or a folder that has changed, gives another name.

    Args:
        config_data: `config.data`, of which `root`, `images`, `labels`, `classes` and
            `ignore_index` are read; the three are paths below the root, in which `{split}` stands
            for the name of the split.
        split: its name.

    Raises:
        ValueError: something is not there.
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
    return FolderConfig(
        name=records.config_name("semantic", split, index, *facts),
        split=split,
        task="semantic",
        ignore_index=index,
        **{key: str(path) for key, path in paths.items()},
    )


def find_pairs(pictures: Path, annotations: Path) -> Iterator[index_maps.Pair]:
    for path in index_maps.find_pictures(pictures):
        name = path.relative_to(pictures)
        yield index_maps.Pair(path, annotations / name.with_suffix(".png"), name.as_posix())
