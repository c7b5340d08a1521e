"""Semantic K-Net on Cityscapes, 19 classes, crops of 512 x 1024. The paper has no such row."""

from ml_collections import ConfigDict

from knet_jax.config.files import base

ADE20K = base("ade20k_semantic")


def get_config() -> ConfigDict:
    """FCN on ResNet-50, three kernel updates, by the recipe of ADE20K but for the sizes."""
    config = ADE20K.get_config()
    config.model.num_stuff = 19
    config.data.dataset = "cityscapes"
    config.data.root = "data/cityscapes"  # holds leftImg8bit/, gtFine/
    config.data.train_split = "train"
    config.data.val_split = "val"
    config.data.scale = (2048, 1024)
    config.data.crop = (512, 1024)
    return config


# But for the size of ADE20K's pictures.
VARIANTS = {k: v for k, v in ADE20K.VARIANTS.items() if k != "swin_l_640"}
