"""COCO's own layout, and any dataset exported to it.

    root/annotations/panoptic_<split>*.json    images, annotations, categories
    root/annotations/panoptic_<split>*/        a PNG an image, whose colors are segment ids
    root/annotations/instances_<split>*.json   images, masks, categories
    root/<split>*/                             the pictures

`*` is whatever the files agree on: `panoptic_train2017.json` goes with `train2017/`. Panoptic and
semantic segmentation need the first two, instance segmentation the third.
"""

from __future__ import annotations

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
"""For each task, how its annotation files' names begin, and the function that examines one."""


def find(task: str, config_data, split: str) -> records.Source:
    """Finds a split below `config.data.root`.

    Raises:
        UserError: there is no such folder, or not exactly one annotation file for the split.
    """
    prefix, examine_file = FILES[task]
    path = _find_annotations(config_data.root, split, prefix)
    name = records.config_name(task, split, examine.state(path))
    return records.Source("coco", name, split, task, partial(examine_file, path))


def _find_annotations(root: str, split: str, prefix: str) -> Path:
    folder = Path(os.path.expanduser(root)) / "annotations"
    wanted = f"annotations/{prefix}{split}*.json"
    if not root or not folder.is_dir():
        raise UserError(
            f"config.data.root: no dataset in COCO's layout at '{root}', expected {wanted} in it"
        )
    exact = folder / f"{prefix}{split}.json"
    found = [exact] if exact.is_file() else sorted(folder.glob(f"{prefix}{split}*.json"))
    if len(found) != 1:
        what = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"config.data.root: '{root}' must hold one {wanted} for split '{split}', found {what}"
        )
    return found[0]
