"""The datasets: where each one is found, and for which tasks it has annotations."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from knet_jax.config.rules import Rule, check, one_of
from knet_jax.data import prepared_split, records
from knet_jax.data.annotations import by_task
from knet_jax.data.sources import (
    ade20k,
    cityscapes,
    coco,
    folder,
    scene_parse150,
    shapes,
)
from knet_jax.system.errors import UserError

PATH = (lambda value: isinstance(value, str), "a path, or '' for none")
SPLIT = (lambda value: isinstance(value, str), "a name, or a slice of one")


class Dataset(NamedTuple):
    """How a split of a dataset is found."""

    builder: type[records.RecordBuilder]
    tasks: tuple[str, ...]
    keys: tuple[str, ...]
    """What it reads of `config.data` beside the keys of `RULES`."""
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
        ("semantic",),
        (),
        lambda data, split, task: ade20k.split_config(data.root, split),
    ),
    "cityscapes": Dataset(
        cityscapes.Cityscapes,
        ("semantic",),
        (),
        lambda data, split, task: cityscapes.split_config(data.root, split),
    ),
    "coco": Dataset(
        coco.Coco,
        tuple(by_task.KINDS),
        (),
        lambda data, split, task: coco.split_config(data.root, split, task),
    ),
    "folder": Dataset(
        folder.Folder,
        ("semantic",),
        ("images", "labels", "classes", "ignore_index"),
        lambda data, split, task: folder.split_config(data, split),
    ),
    "scene_parse150": Dataset(
        scene_parse150.SceneParse150,
        ("semantic",),
        (),
        lambda data, split, task: scene_parse150.split_config(data_dir(data), split),
    ),
    "shapes": Dataset(
        shapes.Shapes,
        tuple(by_task.KINDS),
        ("num_train", "num_val", "image_side"),
        _shapes,
    ),
}
"""By name, `config.data.dataset`."""

RULES: dict[str, Rule] = {
    "data.dataset": one_of(*DATASETS),
    "data.root": PATH,
    "data.data_dir": PATH,
    "data.train_split": SPLIT,
    "data.val_split": SPLIT,
}
"""Keys that the data of every config has."""


def find(
    config_data, split: str, task: str
) -> tuple[type[records.RecordBuilder], records.SplitConfig]:
    """The builder of a split, and its config.

    Args:
        config_data: `config.data`.
        split: a name.
        task: `config.task`.

    Raises:
        ValueError: there is no such dataset, it has no annotations for the task, or it cannot be
            found.
    """
    dataset = find_dataset(config_data, task)
    return dataset.builder, dataset.split_config(config_data, split, task)


def find_dataset(config_data, task: str) -> Dataset:
    """The dataset that `config.data` names.

    Raises:
        ValueError: there is none of that name, it has no annotations for the task, or a key is
            missing that it needs.
    """
    by_task.find(task)
    check({f"data.{key}": value for key, value in config_data.items()}, RULES)
    dataset = DATASETS[config_data.dataset]
    if task not in dataset.tasks:
        raise UserError(
            f"config.task '{task}': config.data.dataset '{config_data.dataset}' has annotations "
            f"for {', '.join(dataset.tasks)}"
        )
    for key in dataset.keys:
        if key not in config_data:
            raise UserError(
                f"config.data.{key} is missing: config.data.dataset '{config_data.dataset}' needs it"
            )
    return dataset


def data_dir(config_data) -> Path:
    """Where prepared splits are kept."""
    given = config_data.data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    return Path(os.path.expanduser(given))
