"""Instance K-Net on drawn shapes: a small network that learns in minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import coco_instance, shapes_panoptic


def get_config() -> ConfigDict:
    """The recipe of `make demo TASK=instance`."""
    config = shapes_panoptic.get_config()
    config.task = "instance"
    config.model.num_stuff = 0
    config.loss.rank = 0.0
    config.eval = coco_instance.get_config().eval
    return config


VARIANTS = shapes_panoptic.VARIANTS
