"""COCO's own layout, and any dataset exported to it.

    root/annotations/panoptic_<split>*.json    images, annotations, categories
    root/annotations/panoptic_<split>*/        a PNG an image, whose colors are segment ids
    root/annotations/instances_<split>*.json   images, masks, categories
    root/<split>*/                             the pictures

`*` is whatever the files agree on: `panoptic_train2017.json` goes with `train2017/`. Panoptic and
semantic segmentation need the first two, instance segmentation the third.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from knet_jax.data import records
from knet_jax.data.sources import coco_instance, coco_panoptic, examine
from knet_jax.data.sources.coco_json import find_annotations


class Source(NamedTuple):
    """Where a task finds its annotations."""

    prefix: str
    """Of the file's name."""
    scan: Callable[[Path], records.Examples]


SOURCES = {
    "instance": Source(coco_instance.PREFIX, coco_instance.scan),
    "panoptic": Source(coco_panoptic.PREFIX, coco_panoptic.scan),
    "semantic": Source(coco_panoptic.PREFIX, coco_panoptic.scan_semantic),
}


class Coco(records.RecordBuilder, skip_registration=True):
    """Writes a split of a directory in COCO's layout."""

    name = "coco"

    def examples(self) -> records.Examples:
        """See the base class."""
        config = self.builder_config
        return SOURCES[config.task].scan(Path(config.annotations))


@dataclasses.dataclass
class CocoConfig(records.SplitConfig):
    """A split of one directory, as it is now."""

    annotations: str = ""
    """Path of the JSON file."""


def split_config(root: str, split: str, task: str) -> CocoConfig:
    """Finds a split; changed annotations or another root give another name.

    Raises:
        ValueError: there is no such directory, or not exactly one annotation file for the split.
    """
    annotations = find_annotations(root, split, SOURCES[task].prefix)
    name = records.config_name(task, split, examine.state(annotations))
    return CocoConfig(name=name, split=split, task=task, annotations=str(annotations))
