"""Semantic K-Net on COCO: things and stuff as 133 classes of pixels, by the recipe of ADE20K."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

ADE20K = base("ade20k_semantic")


def get_config() -> ConfigDict:
    """FCN on ResNet-50, three kernel updates. The paper has no such row."""
    config = ADE20K.get_config()
    config.model.num_stuff = 133
    config.data.dataset = "coco"
    config.data.root = "data/coco"  # in COCO's panoptic layout
    config.data.train_split = "train"
    config.data.val_split = "val"
    return config


VARIANTS = ADE20K.VARIANTS
