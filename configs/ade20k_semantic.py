"""Semantic K-Net on ADE20K, 80 000 steps: mIoU 43.3 with FCN in the paper; variants for the rest."""

from ml_collections import ConfigDict

BATCH = 16


def get_config() -> ConfigDict:
    """FCN on ResNet-50, three kernel updates."""
    return ConfigDict(
        {
            "task": "semantic",
            "seed": 0,
            # Of matrix products: float32 is exact, tensorfloat32 much faster on recent GPUs.
            "precision": "float32",
            # pth, npz or safetensors of the backbone; "" starts from scratch.
            "init_weights": "",
            "model": {
                "num_proposals": 0,  # kernels: one a class
                "num_things": 0,
                "num_stuff": 150,
                "num_stages": 3,
                "channels": 512,
                "num_heads": 8,  # 512 / 8 = 64 channels a head
                "ffn_channels": 2048,
                "adaptive_update": True,
                "kernel_interaction": True,
                "auxiliary_channels": 256,
                "dropout": 0.1,
                "dtype": "float32",
                "backbone": {
                    "name": "resnet",
                    "depths": (3, 4, 6, 3),
                    "width": 64,
                    "norm": "batch",
                    "frozen_stages": 0,
                    "deep_stem": True,
                    "output_stride": 8,
                    "remat": False,  # True: less memory, slower
                },
                "neck": {"name": "fcn", "norm": "batch"},
            },
            "data": {
                "dataset": "ade20k",
                "root": "data/ADEChallengeData2016",  # holds images/, annotations/
                "data_dir": "",  # of the prepared records; "" is TFDS_DATA_DIR or ~/tensorflow_datasets
                "train_split": "training",
                "val_split": "validation",
                "scale": (2048, 512),  # long and short side, at most
                "ratio": (0.5, 2.0),
                "crop": (512, 512),
                "max_class_share": 0.75,
                "flip": 0.5,
                "photometric": True,
                "eval_multiple": 32,  # of the canvas's sides in evaluation; 1 pads nothing
                "num_workers": 2,
                "max_broken_share": 0.01,
            },
            # Weights of the loss terms: of the masks of every stage, of the auxiliary classifier.
            "loss": {"mask": 1.0, "dense": 0.4},
            "optim": {
                "lr": 1e-4,  # for a batch of 16; scale_lr makes it lr x batch_size / reference_batch
                "scale_lr": False,
                "reference_batch": BATCH,
                "weight_decay": 5e-4,
                "clip_norm": 1.0,
                "warmup_steps": 1000,
                "warmup_factor": 0.001,
                "decay_at": (60_000, 72_000),
                "decay_factor": 10.0,
                "unit": "step",
                # (name, parameters, learning rate factor, weight decay factor)
                "groups": (("all", r".*", 1.0, 1.0),),
            },
            "train": {
                "batch_size": BATCH,
                "microbatch": BATCH,  # BatchNorm sees what all devices hold at a time
                "epochs": 0.0,
                "steps": 80_000,
                "ema_decay": 0.0,  # of a moving average of the parameters, such as 0.9998; 0 keeps none
                "log_every": 50,
                "eval_every": 8000,
                "checkpoint_every": 2000,
                "keep": 3,
            },
            "eval": {
                "batch_size": 8,
                "num_pictures": 4,
                # The mean of the probabilities over these scales (and mirrored pictures). In the paper
                # (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) with flips, where it says so.
                "scales": (1.0,),
                "flip": False,
                # (height, width) of windows that overlap, for large pictures; () shows them whole.
                "window": (),
                "window_step": (),
            },
        }
    )


# Norms and position biases; norms of the heads and of the decoder are decayed, as in the reference.
UNDECAYED = r"backbone/.*(norm|position_bias).*|stage\d+/(update|interaction)/.*norm/.*"


def swin(channels: int, depths: tuple[int, ...], num_heads: tuple[int, ...], drop_path: float):
    """UPerNet on a Swin Transformer: no weight decay of norms and position biases."""
    return {
        "model.backbone": {
            "name": "swin",
            "channels": channels,
            "depths": depths,
            "num_heads": num_heads,
            "drop_path": drop_path,
            "remat": False,
        },
        "model.neck": {"name": "uper", "norm": "batch"},
        "model.channels": 256,
        "optim.lr": 6e-5,
        "optim.groups": (
            ("undecayed", UNDECAYED, 1.0, 0.0),
            ("all", r".*", 1.0, 1.0),
        ),
    }


SWIN_T = swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.3)
SWIN_L = swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3)

VARIANTS = {
    "psp": {"model.neck": {"name": "psp", "norm": "batch"}},  # mIoU 43.9
    "deeplabv3": {"model.neck": {"name": "aspp", "norm": "batch"}},  # 44.6
    "uper": {  # 43.6
        "model.neck": {"name": "uper", "norm": "batch"},
        "model.channels": 256,
        "model.backbone.output_stride": 32,
    },
    "swin_t": SWIN_T,  # 45.8
    "swin_l": SWIN_L,  # 52.0
    # 52.2 at one scale (OpenMMLab); 54.3 with scales and flips.
    "swin_l_640": SWIN_L
    | {
        "model.backbone": SWIN_L["model.backbone"] | {"drop_path": 0.4},
        "data.scale": (2048, 640),
        "data.crop": (640, 640),
    },
    # After `uper`, `swin_t` or `swin_l`: as in OpenMMLab's published models. The authors' repository
    # has 256 channels there.
    "wide": {"model.channels": 512},
    # The decoder alone: 36.7 for FCN, 42.6 PSP, 43.5 DeepLabV3, 42.4 UPer.
    "baseline": {"model.num_stages": 0},
    "bf16": {"model.dtype": "bfloat16"},  # feature maps; parameters stay float32
    # Twenty steps of everything on a laptop.
    "tiny": {
        "model.channels": 64,
        "model.ffn_channels": 128,
        "model.auxiliary_channels": 32,
        "model.backbone": {
            "name": "resnet",
            "depths": (1, 1, 1, 1),
            "width": 16,
            "norm": "batch",
            "frozen_stages": 0,
            "deep_stem": True,
            "output_stride": 8,
        },
        "optim.warmup_steps": 5,
        "data.scale": (256, 64),
        "data.crop": (64, 64),
        "data.num_workers": 0,
        "train.batch_size": 2,
        "train.microbatch": 2,
        "train.steps": 20,
        "train.log_every": 5,
        "train.eval_every": 10,
        "train.checkpoint_every": 10,
    },
    # After `tiny`: another backbone of its size.
    "tiny_swin": {"model.backbone": swin(16, (1, 1, 1, 1), (1, 2, 4, 8), 0.2)["model.backbone"]},
}
