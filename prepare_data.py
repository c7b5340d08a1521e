"""Converts a dataset to ArrayRecord, as the first training run would, and says what it holds.

python prepare_data.py --config configs/coco_panoptic.py --config.data.root=/data/coco
"""

from __future__ import annotations

from absl import flags

from knet_jax.commandline import CommandLine, run
from knet_jax.configuration import ConfigError, load_config
from knet_jax.data import pipeline

CONFIG = flags.DEFINE_string("config", None, "configs/FILE.py or configs/FILE.py:variant,variant")


def main(command: CommandLine) -> None:
    if CONFIG.value is None:
        raise ConfigError("--config is missing, such as --config configs/coco_panoptic.py")
    data = load_config(CONFIG.value, command.overrides).data
    train, val = (pipeline.load_split(data, split) for split in (data.train_split, data.val_split))
    pipeline.check_same_categories(train.categories, val.categories)


if __name__ == "__main__":
    run(main)
