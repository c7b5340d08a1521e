"""Instance K-Net on COCO, ResNet-50, 1x schedule: mask AP 34.0 in the paper (`ms3x`: 37.8)."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

PANOPTIC = base("coco_panoptic")


def get_config() -> ConfigDict:
    """The recipe of the panoptic network, without stuff and without the rank loss."""
    config = PANOPTIC.get_config()
    config.task = "instance"
    config.model.num_stuff = 0  # kernels: 100 proposals
    config.data.min_things = 1
    config.loss.rank = 0.0
    return config


VARIANTS = PANOPTIC.VARIANTS | {
    "small": PANOPTIC.VARIANTS["small"] | {"model.num_stuff": 0},
    "n256": {"model.num_proposals": 256},  # with ms3x AP 38.6
}
