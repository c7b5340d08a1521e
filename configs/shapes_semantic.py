"""Semantic K-Net on drawn shapes: a small network that learns in minutes on two CPU cores."""

from ml_collections import ConfigDict

from configs import ade20k_semantic, shapes_panoptic


def get_config() -> ConfigDict:
    """The recipe of `make demo TASK=semantic`."""
    config = shapes_panoptic.get_config()
    config.task = "semantic"
    config.model = ConfigDict(
        {
            "num_proposals": 0,  # kernels: one a class
            "num_things": 0,
            "num_stuff": 9,
            "num_stages": 3,
            "channels": 64,
            "num_heads": 4,
            "ffn_channels": 128,
            "auxiliary_channels": 32,
            "dropout": 0.0,
            "dtype": "float32",
            "backbone": config.model.backbone.to_dict() | {"output_stride": 8},
            "neck": {"name": "fcn", "norm": "group"},
        }
    )
    keys = ("dataset", "root", "data_dir", "train_split", "val_split", "num_train", "num_val")
    kept = (*keys, "image_side", "flip", "num_workers", "max_broken_share")
    config.data = ConfigDict(
        {key: config.data[key] for key in kept}
        | {
            "scale": (128, 128),
            "ratio": (0.75, 1.5),
            "crop": (128, 128),
            "max_class_share": 0.75,
            "photometric": False,
            "eval_multiple": 128,
        }
    )
    config.loss = ConfigDict({"mask": 1.0, "dense": 0.4})
    config.eval = ade20k_semantic.get_config().eval
    return config


VARIANTS = shapes_panoptic.VARIANTS
