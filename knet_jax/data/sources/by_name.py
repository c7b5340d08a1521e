"""The datasets: where each one is found, and how."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from knet_jax.data import prepared_split, records
from knet_jax.data.sources import (
    ade20k,
    cityscapes,
    coco,
    folder,
    scene_parse150,
    shapes,
)
from knet_jax.system.errors import UserError


class Dataset(NamedTuple):
    """How a split of a dataset is found."""

    builder: type[records.RecordBuilder]
    split_config: Callable[..., records.SplitConfig]
    """config.data, name of the split, task -> the config of its builder."""


def _shapes(config_data, split: str, task: str) -> shapes.ShapesConfig:
    counts = {
        prepared_split.split_name(config_data.val_split): config_data.num_val,
        prepared_split.split_name(config_data.train_split): config_data.num_train,
    }
    if split not in counts:
        raise UserError(f"config.data: split '{split}' must be one of {sorted(counts)}")
    return shapes.split_config(split, counts[split], config_data.image_side, task)


DATASETS = {
    "ade20k": Dataset(
        ade20k.Ade20k,
        lambda data, split, task: ade20k.split_config(data.root, split),
    ),
    "cityscapes": Dataset(
        cityscapes.Cityscapes,
        lambda data, split, task: cityscapes.split_config(data.root, split),
    ),
    "coco": Dataset(
        coco.Coco,
        lambda data, split, task: coco.split_config(data.root, split, task),
    ),
    "folder": Dataset(
        folder.Folder,
        lambda data, split, task: folder.split_config(data, split),
    ),
    "scene_parse150": Dataset(
        scene_parse150.SceneParse150,
        lambda data, split, task: scene_parse150.split_config(data_dir(data), split),
    ),
    "shapes": Dataset(
        shapes.Shapes,
        _shapes,
    ),
}
"""By name, `config.data.dataset`."""


def find(
    config_data, split: str, task: str
) -> tuple[type[records.RecordBuilder], records.SplitConfig]:
    """The builder of a split, and its config.

    Args:
        config_data: `config.data`.
        split: a name.
        task: `config.task`.

    Raises:
        UserError: the split cannot be found.
    """
    dataset = DATASETS[config_data.dataset]
    return dataset.builder, dataset.split_config(config_data, split, task)


def data_dir(config_data) -> Path:
    """Where prepared splits are kept."""
    given = config_data.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(os.path.expanduser(given))
