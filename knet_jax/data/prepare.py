"""Preparing a dataset for training, and looking at what there is then."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from knet_jax.config.validation import check_data
from knet_jax.data import completion, dataset_report, pipeline, shards
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.drawing import save_picture
from knet_jax.segmentation.segments import Categories


def prepare_dataset(
    config: ConfigDict,
    sheets: str | Path | None = None,
    num_workers: int = 0,
    beam: Sequence[str] = (),
) -> Categories:
    """Converts the splits of a config to ArrayRecord, where that has not been done, and prints
    what they hold, and what of it is suspicious.

    Args:
        config: as for training; `config.data` and `config.task` are read.
        sheets: a folder. Every picture is decoded, what the annotations show is printed, and some
            pictures of each split are drawn into a PNG there. None leaves that out.
        num_workers: how many processes convert; 0 is one for each core.
        beam: flags of Apache Beam's pipelines, such as `--runner=FlinkRunner`: the machines of a
            cluster convert in place of processes.

    Returns:
        the classes.

    Raises:
        UserError: the dataset cannot be found or understood.
    """
    check_data(config)
    data, task = config.data, config.task
    write = shards.beam_writer(beam) if beam else partial(shards.write_locally, num_workers)
    splits = [
        pipeline.load_split(data, split, task, describe=True, write=write)
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
