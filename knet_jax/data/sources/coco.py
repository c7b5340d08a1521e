"""COCO's own layout, and any dataset exported in its format.

    root/annotations/panoptic_<split>*.json    images, annotations, categories
    root/annotations/panoptic_<split>*/        a PNG an image, whose colors are segment ids
    root/annotations/instances_<split>*.json   images, masks, categories
    root/<split>*/                             the pictures

`*` is whatever the files agree on: `panoptic_train2017.json` goes with `train2017/`. Panoptic and
semantic segmentation need the first two, instance segmentation the third. Exports of labelling
tools are taken as they are, see `LAYOUTS`.
"""

from __future__ import annotations

import glob
import os
from functools import partial
from pathlib import Path

from knet_jax.data import records
from knet_jax.data.sources import coco_instance, coco_panoptic, examine
from knet_jax.system.errors import UserError

FILES = {
    "instance": (coco_instance.PREFIX, coco_instance.examine_file),
    "panoptic": (coco_panoptic.PREFIX, coco_panoptic.examine_file),
    "semantic": (coco_panoptic.PREFIX, coco_panoptic.examine_file_as_labels),
}
"""For each task, how its annotation files' names begin, and the function that examines one with the
folders in which its pictures may lie."""
LAYOUTS = (
    "annotations/{prefix}{split}.json",
    "annotations/{prefix}{split}*.json",
    "{split}*/annotations/{prefix}*.json",
    "{split}*/_annotations.coco.json",
    "{split}*/result.json",
)
"""Where the annotation file of a split may be, below the root: in COCO, in an export of CVAT for each
split, of Roboflow (which only has instances, as the last), of Label Studio for each split."""


def find(task: str, config_data, split: str) -> records.Source:
    """Finds a split below `config.data.root`.

    Raises:
        UserError: there is no such folder, or not exactly one annotation file for the split.
    """
    prefix, examine_file = FILES[task]
    path = _find_annotations(config_data.root, split, prefix)
    # Pictures lie in the folder that is named like the file, or about where CVAT and others put them.
    top, name = path.parent.parent, path.stem.removeprefix(prefix)
    pictures = [top / name, top / "images" / name, top / "images", path.parent]
    facts = [examine.state(path)]
    if task == "instance":
        facts += ["with supercategories"] * config_data.supercategories
        examine_file = partial(examine_file, config_data.supercategories)
    name = records.config_name(task, split, *facts)
    return records.Source("coco", name, split, task, partial(examine_file, path, pictures))


def _find_annotations(given: str, split: str, prefix: str) -> Path:
    root = Path(os.path.expanduser(given))
    places = (layout.format(prefix=prefix, split=glob.escape(split)) for layout in LAYOUTS)
    found = next(filter(None, (sorted(root.glob(place)) for place in places)), [])
    if len(found) != 1 or not given:
        there = found or sorted([*root.glob("*.json"), *root.glob("*/*.json")])
        there = [str(path.relative_to(root)) for path in there]
        raise UserError(
            f"config.data.root: '{given}' must hold one annotations/{prefix}{split}*.json for split "
            f"'{split}' (or an export of Roboflow, CVAT or Label Studio in {split}*/), found "
            f"{', '.join(there[:8]) or 'none'}"
        )
    return found[0]
