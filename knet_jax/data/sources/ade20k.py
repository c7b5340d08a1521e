"""ADE20K with 150 classes (Zhou et al., CVPR 2017).

    root/images/<split>/*.jpg           training or validation
    root/annotations/<split>/*.png      0 is ignored, 1 + k is class k
    root/objectInfo150.txt              names of the classes, may be missing

as in ADEChallengeData2016.zip; the root may also be the folder that holds `ADEChallengeData2016`.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation import class_lists, published_classes
from knet_jax.segmentation.segments import Categories
from knet_jax.system.errors import UserError

FOLDER = "ADEChallengeData2016"
CATEGORIES = published_classes.find("ade20k", "semantic")
"""The classes where no file names them."""


def find(config_data, split: str) -> records.Source:
    """Finds a split below `config.data.root`. Raises UserError where there is none."""
    given = Path(os.path.expanduser(config_data.root))
    root = next((f for f in (given, given / FOLDER) if (f / "annotations").is_dir()), None)
    if not config_data.root or not root:
        raise UserError(
            f"config.data.root: no ADE20K at '{config_data.root}', expected images/ and "
            "annotations/ in it"
        )
    parts = [root / part / split for part in ("images", "annotations")]
    for part in parts:
        if not part.is_dir():
            raise UserError(f"config.data.root: split '{split}' needs the folder {part}")
    name = records.config_name("semantic", split, *map(examine.state, parts))
    return records.Source("ade20k", name, split, "semantic", partial(_examine, root, *parts))


def _examine(root: Path, pictures: Path, annotations: Path) -> records.Examples:
    pairs = [
        index_maps.LabelledPicture(path, annotations / f"{path.stem}.png", path.name)
        for path in index_maps.find_pictures(pictures)
    ]
    return index_maps.examine_pairs(pairs, read_object_info(root), ignored={0}, source=pictures)


def read_object_info(root: Path) -> Categories:
    """The classes, each by the first of the names that `objectInfo150.txt` gives it.

    Raises:
        UserError: the file is there, but does not list the classes.
    """
    path = root / "objectInfo150.txt"
    if not path.is_file():
        return CATEGORIES
    # A header, then lines of tab-separated index, ratio, counts and names.
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()[1:]
        rows = [line.split("\t") for line in lines if line.strip()]
        listed = {int(row[0]): row[-1].split(",")[0].strip() for row in rows}
    except ValueError as error:
        raise UserError(f"config.data.root: {path} is not a table of classes") from error
    if tuple(listed) != CATEGORIES.dataset_ids:
        raise UserError(
            f"config.data.root: {path} lists {len(listed)} classes, "
            f"expected 1 to {len(CATEGORIES.names)}"
        )
    return class_lists.stuff_categories(listed)
