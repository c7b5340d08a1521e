"""Cityscapes, fine annotations (Cordts et al., CVPR 2016): the 19 classes of the benchmark.

root/leftImg8bit/<split>/<city>/<name>_leftImg8bit.png
root/gtFine/<split>/<city>/<name>_gtFine_labelIds.png
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import examine, index_maps
from knet_jax.segmentation import published_classes
from knet_jax.system.errors import UserError

CATEGORIES = published_classes.find("cityscapes", "semantic")
IGNORED = {*range(34), 255} - {*CATEGORIES.dataset_ids}
"""255 is the licence plate, whose id is -1."""
PICTURE, ANNOTATION = "_leftImg8bit.png", "_gtFine_labelIds.png"


def find(config_data, split: str) -> records.Source:
    """Finds a split below `config.data.root`. Raises UserError where there is none."""
    root = Path(os.path.expanduser(config_data.root))
    folders = (root / "leftImg8bit" / split, root / "gtFine" / split)
    for folder in folders:
        if not config_data.root or not folder.is_dir():
            raise UserError(
                f"config.data.root: no Cityscapes at '{config_data.root}', expected {folder}"
            )
    cities = sorted(city for folder in folders for city in folder.iterdir())
    name = records.config_name("semantic", split, *map(examine.state, cities))
    return records.Source("cityscapes", name, split, "semantic", partial(_examine, *folders))


def _examine(pictures: Path, annotations: Path) -> records.Examples:
    pairs = []
    for path in sorted(pictures.glob(f"*/*{PICTURE}")):
        png = path.name.removesuffix(PICTURE) + ANNOTATION
        pairs.append(
            index_maps.LabelledPicture(path, annotations / path.parent.name / png, path.name)
        )
    return index_maps.examine_pairs(pairs, CATEGORIES, IGNORED, source=pictures)
