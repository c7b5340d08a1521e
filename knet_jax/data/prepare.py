"""Preparing a dataset for training, and looking at what there is then."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from knet_jax.config.validation import check_data
from knet_jax.data import completion, dataset_report, pipeline
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.drawing import save_picture
from knet_jax.segmentation.segments import Categories


def prepare_dataset(config: ConfigDict, sheets: str | Path | None = None) -> Categories:
    """Converts the splits of a config to ArrayRecord, where that has not been done, and prints
    what they hold, and what of it is suspicious.

    Args:
        config: as for training; `config.data` and `config.task` are read.
        sheets: a folder. Every picture is decoded, what the annotations show is printed, and some
            pictures of each split are drawn into a PNG there. None leaves that out.

    Returns:
        the classes.

    Raises:
        UserError: the dataset cannot be found or understood.
    """
    check_data(config)
    data, task = config.data, config.task
    splits = [
        pipeline.load_split(data, split, task, describe=True)
        for split in (data.train_split, data.val_split)
    ]
    class_lists.check_same_classes(*(split.categories for split in splits))
    data = completion.complete(config, splits[0]).data
    for split in splits:
        if sheets is not None:
            print(f"{split.name}: {dataset_report.report(split)}")
            path = Path(sheets) / f"{data.dataset}_{task}_{split.name}.png"
            save_picture(path, dataset_report.sheet(split))
            print(f"{split.name}: drawn in {path}")
        for line in dataset_report.find_suspicious(split, data):
            print(f"{split.name}: suspicious: {line}")
    return splits[0].categories
