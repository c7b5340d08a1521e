"""Cityscapes, fine annotations (Cordts et al., CVPR 2016): the 19 classes of the benchmark.

root/leftImg8bit/<split>/<city>/<name>_leftImg8bit.png
root/gtFine/<split>/<city>/<name>_gtFine_labelIds.png
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation import published_classes
from knet_jax.system.errors import UserError

CATEGORIES = published_classes.find("cityscapes", "semantic")
IGNORED = {*range(34), 255} - {*CATEGORIES.dataset_ids}
"""255 is the licence plate, whose id is -1."""
PICTURE, ANNOTATION = "_leftImg8bit.png", "_gtFine_labelIds.png"


class Cityscapes(records.RecordBuilder, skip_registration=True):
    """Writes a split of Cityscapes."""

    name = "cityscapes"

    def examples(self) -> records.Examples:
        """See the base class."""
        pictures, annotations = _folders(self.builder_config.root, self.builder_config.split)
        pairs = []
        for path in sorted(pictures.glob(f"*/*{PICTURE}")):
            stem = path.name.removesuffix(PICTURE)
            png = annotations / path.parent.name / f"{stem}{ANNOTATION}"
            pairs.append(index_maps.Pair(path, png, path.name))
        return index_maps.scan(pairs, CATEGORIES, IGNORED, source=pictures)


@dataclasses.dataclass
class CityscapesConfig(records.SplitConfig):
    """A split of one directory, as it is now."""

    root: str = ""


def split_config(root: str, split: str) -> CityscapesConfig:
    """Finds a split; another root, or a folder that has changed, gives another name.

    Raises:
        ValueError: there is no such directory, or no such split in it.
    """
    folders = _folders(root, split)
    for folder in folders:
        if not root or not folder.is_dir():
            raise UserError(f"config.data.root: no Cityscapes at '{root}', expected {folder}")
    cities = sorted(city for folder in folders for city in folder.iterdir())
    name = records.config_name("semantic", split, *map(examine.state, cities))
    return CityscapesConfig(name=name, split=split, task="semantic", root=root)


def _folders(root: str, split: str) -> tuple[Path, Path]:
    """Where the pictures and the annotations of a split are."""
    base = Path(os.path.expanduser(root))
    return base / "leftImg8bit" / split, base / "gtFine" / split
