"""Semantic K-Net on drawn shapes: a small network that learns in minutes on two CPU cores."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

PANOPTIC = base("shapes_panoptic")


def get_config() -> ConfigDict:
    """The recipe of `make demo TASK=semantic`."""
    config = PANOPTIC.get_config()
    config.task = "semantic"
    config.model.num_proposals = 0  # kernels: one a class
    config.model.num_things = 0
    config.model.num_stuff = 9
    config.model.auxiliary_channels = 32
    config.model.dropout = 0.0
    config.model.backbone.output_stride = 8
    config.model.neck = ConfigDict({"name": "fcn", "norm": "group"})
    for key in ("canvas", "short_side", "long_side", "max_things"):
        del config.data[key]
    config.data.update(
        scale=(128, 128),
        ratio=(0.75, 1.5),
        crop=(128, 128),
        photometric=False,
        eval_multiple=128,
    )
    config.loss = ConfigDict({"mask": 1.0, "dense": 0.4})
    return config


VARIANTS = PANOPTIC.VARIANTS
