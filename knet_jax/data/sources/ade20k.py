"""ADE20K with 150 classes (Zhou et al., CVPR 2017).

    root/images/<split>/*.jpg           training or validation
    root/annotations/<split>/*.png      0 is ignored, 1 + k is class k
    root/objectInfo150.txt              names of the classes, may be missing

as in ADEChallengeData2016.zip; the root may also be the folder that holds `ADEChallengeData2016`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation import class_lists, published_classes
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

FOLDER = "ADEChallengeData2016"
NUM_CLASSES = len(published_classes.ADE20K)
CATEGORIES = published_classes.find("ade20k", "semantic")
"""Where no file says more."""


class Ade20k(records.RecordBuilder, skip_registration=True):
    """Writes a split of ADE20K."""

    name = "ade20k"

    def examples(self) -> records.Examples:
        """See the base class."""
        root, split = Path(self.builder_config.root), self.builder_config.split
        pictures, annotations = root / "images" / split, root / "annotations" / split
        pairs = [
            index_maps.Pair(path, annotations / f"{path.stem}.png", path.name)
            for path in index_maps.find_pictures(pictures)
        ]
        return index_maps.scan(pairs, read_object_info(root), ignored={0}, source=pictures)


@dataclasses.dataclass
class Ade20kConfig(records.SplitConfig):
    """A split of one directory, as it is now."""

    root: str = ""


def split_config(root: str, split: str) -> Ade20kConfig:
    """Finds a split; another root, or a folder that has changed, gives another name.

    Raises:
        ValueError: there is no such directory, or no such split in it.
    """
    given = Path(os.path.expanduser(root))
    found = next((f for f in (given, given / FOLDER) if (f / "annotations").is_dir()), None)
    if not root or not found:
        raise UserError(
            f"config.data.root: no ADE20K at '{root}', expected images/ and annotations/ in it"
        )
    parts = [found / part / split for part in ("images", "annotations")]
    for part in parts:
        if not part.is_dir():
            raise UserError(f"config.data.root: split '{split}' needs the folder {part}")
    name = records.config_name("semantic", split, *map(examine.state, parts))
    return Ade20kConfig(name=name, split=split, task="semantic", root=str(found))


def read_object_info(root: Path) -> Categories:
    """The classes, with the first of the names that `objectInfo150.txt` lists for each.

    Raises:
        ValueError: the file is there, but does not list the classes.
    """
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return CATEGORIES
    # A header, then lines of tab-separated index, ratio, counts and names.
    try:
        lines = path.read_text().splitlines()[1:]
        rows = [line.split("\t") for line in lines if line.strip()]
        listed = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    except ValueError as error:
        raise UserError(f"config.data.root: {path} is not a table of classes") from error
    if list(listed) != list(range(1, 1 + NUM_CLASSES)):
        raise UserError(
            f"config.data.root: {path} lists {len(listed)} classes, expected 1 to {NUM_CLASSES}"
        )
    return class_lists.stuff_categories(listed)
