"""Semantic K-Net on your own pictures: a folder of them, one of index PNGs, and a list of classes."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

ADE20K = base("ade20k_semantic")


def get_config() -> ConfigDict:
    """FCN on ResNet-50, three kernel updates, by the recipe of ADE20K."""
    config = ADE20K.get_config()
    config.model.num_stuff = None  # as many as the list has
    config.data.dataset = "folder"
    config.data.root = "data/folder"
    config.data.train_split = "train"
    config.data.val_split = "val"
    return config


VARIANTS = ADE20K.VARIANTS
