"""Converts a dataset to ArrayRecord, as the first training run would, and says what it holds.

python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco
python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco --check

--check decodes every picture, reports what the annotations show, and draws some of them.
docs/data.md says where the archives of COCO and ADE20K are found.
"""

from __future__ import annotations

from pathlib import Path

from absl import flags

from knet_jax.cli.commandline import CommandLine, run
from knet_jax.config.files import load_config
from knet_jax.config.validation import check_data
from knet_jax.data import dataset_report, pipeline
from knet_jax.segmentation import class_lists
from knet_jax.segmentation.drawing import save_picture
from knet_jax.system.errors import UserError

CONFIG = flags.DEFINE_string("config", None, "configs/FILE.py or configs/FILE.py:variant,variant")
CHECK = flags.DEFINE_boolean("check", False, "examine what is prepared, and draw a sheet of it")
OUTPUT = flags.DEFINE_string("output", "runs/check", "where --check puts its sheets")


def main(command: CommandLine) -> None:
    if CONFIG.value is None:
        raise UserError("--config is missing, such as --config configs/coco_panoptic.py")
    config = load_config(CONFIG.value, command.overrides)
    check_data(config)
    data, task = config.data, config.task
    train, val = (
        pipeline.load_split(data, split, task) for split in (data.train_split, data.val_split)
    )
    class_lists.check_same_classes(train.categories, val.categories)
    if CHECK.value:
        for split in (train, val):
            print(f"{split.name}: {dataset_report.report(split)}")
            path = Path(OUTPUT.value) / f"{data.dataset}_{task}_{split.name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_picture(path, dataset_report.sheet(split))
            print(f"{split.name}: drawn in {path}")


if __name__ == "__main__":
    run(main)
