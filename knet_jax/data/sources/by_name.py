"""The datasets: for each task that one has annotations for, the function that finds a split of it."""

from __future__ import annotations

from functools import partial

from knet_jax.data import records
from knet_jax.data.annotations import by_task
from knet_jax.data.sources import ade20k, cityscapes, coco, folder, scene_parse150, shapes

DATASETS = {
    "ade20k": {"semantic": ade20k.find},
    "cityscapes": {"semantic": cityscapes.find},
    "coco": {task: partial(coco.find, task) for task in by_task.KINDS},
    "folder": {"semantic": folder.find},
    "scene_parse150": {"semantic": scene_parse150.find},
    "shapes": {task: partial(shapes.find, task) for task in by_task.KINDS},
}
"""By name, `config.data.dataset`. A function takes `config.data` and the name of a split."""


def find(config_data, split: str, task: str) -> records.Source:
    """A split of the dataset that `config.data` names. Raises UserError where there is none."""
    return DATASETS[config_data.dataset][task](config_data, split)
