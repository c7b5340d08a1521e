"""Converts a dataset to ArrayRecord, as the first training run would, and says what it holds.

python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco
python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco --download
python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco --check

--download fetches the official archives of COCO or ADE20K first. --check decodes every picture,
reports what the annotations show, and draws some of them.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from knet_jax.commandline import CommandLine, run
from knet_jax.configuration import ConfigError, load_config
from knet_jax.data import check, download, pipeline
from knet_jax.validation import check_data
from knet_jax.visualize import save_picture

CONFIG = flags.DEFINE_string("config", None, "configs/FILE.py or configs/FILE.py:variant,variant")
DOWNLOAD = flags.DEFINE_boolean("download", False, "fetch the archives into config.data.root")
CHECK = flags.DEFINE_boolean("check", False, "examine what is prepared, and draw a sheet of it")
OUTPUT = flags.DEFINE_string("output", "runs/check", "where --check puts its sheets")


def main(command: CommandLine) -> None:
    if CONFIG.value is None:
        raise ConfigError("--config is missing, such as --config configs/coco_panoptic.py")
    config = load_config(CONFIG.value, command.overrides)
    check_data(config)
    data, task = config.data, config.task
    if DOWNLOAD.value:
        download.fetch(download.find(data.dataset, task), data.root)
    train, val = (
        pipeline.load_split(data, split, task) for split in (data.train_split, data.val_split)
    )
    pipeline.check_same_categories(train.categories, val.categories)
    if CHECK.value:
        for split in (train, val):
            print(f"{split.name}: {check.report(split)}")
            path = Path(OUTPUT.value) / f"{data.dataset}_{task}_{split.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(path, check.sheet(split))
            print(f"{split.name}: drawn in {path}")


if __name__ == "__main__":
    run(main)
