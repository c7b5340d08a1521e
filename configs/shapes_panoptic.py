"""Panoptic K-Net on drawn shapes: a small network that learns in minutes on two CPU cores."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The recipe of `make demo`."""
    return ConfigDict(
        {
            "task": "panoptic",
            "model": {
                "num_proposals": 20,  # kernels: 20 proposals + 4 stuff = 24
                "num_things": 5,
                "num_stuff": 4,
                "channels": 64,
                "num_heads": 4,  # 64 / 4 = 16 channels a head
                "ffn_channels": 128,
                "backbone": {
                    "depths": (1, 1, 1, 1),
                    "width": 16,  # levels of 64, 128, 256, 512 channels
                    "norm": "group",
                    "frozen_stages": 0,
                },
            },
            "data": {
                "dataset": "shapes",
                "num_train": 2000,
                "num_val": 200,
                "image_side": (96, 128),
                "canvas": (128, 128),  # 16 x 16 masks at stride 8
                "short_side": (96, 128),
                "long_side": 128,
                "eval_multiple": 0,  # evaluation is on the canvas of training
                "max_things": 12,
                "num_workers": 0,
                "max_broken_share": 0.0,
            },
            # Textures are told apart by the classes of pixels, early enough by this weight.
            "loss": {"mask": 1.0, "dice": 4.0, "label": 2.0, "rank": 0.1, "dense": 10.0},
            "optim": {
                "lr": 1e-3,
                "reference_batch": 8,
                "warmup_steps": 100,
                "decay_at": (5.0, 6.3),
                "unit": "epoch",
            },
            "train": {
                "batch_size": 8,
                "microbatch": 8,
                "epochs": 7.0,  # 7 x 2000 / 8 = 1750 steps and a few: batches have one orientation
                "log_every": 25,
                "eval_every": 0,  # at the end only
                "checkpoint_every": 500,
                "keep": 2,
            },
        }
    )


VARIANTS = {
    # A few steps of everything.
    "tiny": {
        "data.num_train": 16,
        "data.num_val": 8,
        "optim.warmup_steps": 2,
        "train.batch_size": 4,
        "train.steps": 8,
        "train.log_every": 2,
        "train.eval_every": 4,
        "train.checkpoint_every": 4,
    },
}
