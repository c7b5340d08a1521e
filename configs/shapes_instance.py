"""Instance K-Net on drawn shapes: a small network that learns in minutes on two CPU cores."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

PANOPTIC = base("shapes_panoptic")


def get_config() -> ConfigDict:
    """The recipe of `make demo TASK=instance`."""
    config = PANOPTIC.get_config()
    config.task = "instance"
    config.model.num_stuff = 0
    config.loss.rank = 0.0
    config.loss.dense = 1.0  # there are no textures to tell apart
    config.eval = {"num_results": 100}  # AP over as many pairs of a kernel and a class as for COCO
    return config


VARIANTS = PANOPTIC.VARIANTS
