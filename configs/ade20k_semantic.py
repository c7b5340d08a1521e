"""Semantic K-Net on ADE20K, 80 000 steps: mIoU 43.3 with FCN in the paper; variants for the rest."""

from ml_collections import ConfigDict

BATCH = 16
RESNET = {
    "name": "resnet",
    "depths": (3, 4, 6, 3),
    "norm": "batch",
    "frozen_stages": 0,
    "deep_stem": True,
    "output_stride": 8,
}


def get_config() -> ConfigDict:
    """FCN on ResNet-50, three kernel updates."""
    return ConfigDict(
        {
            "task": "semantic",
            "model": {
                "num_proposals": 0,  # kernels: one a class
                "num_things": 0,
                "num_stuff": 150,
                "channels": 512,
                "num_heads": 8,  # 512 / 8 = 64 channels a head
                "auxiliary_channels": 256,
                "backbone": RESNET,
                "neck": {"name": "fcn", "norm": "batch"},
            },
            "data": {
                "dataset": "ade20k",
                "root": "data/ADEChallengeData2016",  # holds images/, annotations/
                "train_split": "training",
                "val_split": "validation",
                "scale": (2048, 512),  # long and short side, at most
                "ratio": (0.5, 2.0),
                "crop": (512, 512),
            },
            "loss": {"mask": 1.0, "dense": 0.4},
            "optim": {
                "lr": 1e-4,  # for a batch of 16
                "weight_decay": 5e-4,
                "decay_at": (60_000, 72_000),
                "unit": "step",
            },
            "train": {
                "batch_size": BATCH,
                "microbatch": BATCH,  # BatchNorm sees what all devices hold at a time
                "steps": 80_000,
                "eval_every": 8000,
                "checkpoint_every": 2000,
            },
            # In the paper (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) with flips, where it says so.
            "eval": {"scales": (1.0,), "flip": False},
        }
    )


# Norms and position biases; norms of the heads and of the decoder are decayed, as in the reference.
UNDECAYED = r"backbone/.*(norm|position_bias).*|stage\d+/(update|interaction)/.*norm/.*"
# Of backbones that the reference has not, also scales and tokens.
MORE_UNDECAYED = UNDECAYED + r"|backbone/.*(_scale|_tokens?|position_table)"


def uper_on(undecayed: str, **backbone) -> dict:
    """UPerNet on a backbone that was trained with AdamW: no weight decay of norms and the like."""
    return {
        "model.backbone": backbone,
        "model.neck.name": "uper",
        "model.channels": 256,
        "optim.lr": 6e-5,
        "optim.groups": (
            ("undecayed", undecayed, 1.0, 0.0),
            ("all", r".*", 1.0, 1.0),
        ),
    }


def swin(channels: int, depths: tuple[int, ...], num_heads: tuple[int, ...], drop_path: float):
    """UPerNet on a Swin Transformer."""
    sizes = {"channels": channels, "depths": depths, "num_heads": num_heads}
    return uper_on(UNDECAYED, name="swin", **sizes, drop_path=drop_path)


def convnext(channels: int, depths: tuple[int, ...]) -> dict:
    """UPerNet on a ConvNeXt."""
    return uper_on(MORE_UNDECAYED, name="convnext", channels=channels, depths=depths, drop_path=0.4)


def vit(channels: int, num_heads: int, **others) -> dict:
    """UPerNet on a vision transformer of twelve blocks, DINOv2's with registers."""
    sizes = {"channels": channels, "num_heads": num_heads, "drop_path": 0.1}
    return uper_on(MORE_UNDECAYED, name="vit", **sizes | others)


SWIN_T = swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 0.3)
SWIN_L = swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 0.3)

VARIANTS = {
    # Your own data, some hundred or thousand pictures: None follows from them, and norms from the
    # initial weights. Before a variant that has another backbone.
    "small": {
        "model.num_stuff": None,
        "model.backbone.norm": None,
        "model.neck.norm": None,
        "optim.warmup_steps": None,
        "optim.decay_at": None,
        "data.scale": None,
        "data.crop": None,
        "train.batch_size": 8,
        "train.microbatch": 8,
        "train.steps": 0,
        "train.epochs": 50.0,
        "train.log_every": 10,
        "train.eval_every": None,
    },
    "psp": {"model.neck.name": "psp"},  # mIoU 43.9
    "deeplabv3": {"model.neck.name": "aspp"},  # 44.6
    "uper": {  # 43.6
        "model.neck.name": "uper",
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
    # The paper has no such rows.
    "convnext_t": convnext(96, (3, 3, 9, 3)),
    "convnext_b": convnext(128, (3, 3, 27, 3)),
    "vit_s": vit(384, 6),
    "vit_b": vit(768, 12),
    "dinov3_b": vit(768, 12, patch=16, positions="rotary"),
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
        "model.backbone": RESNET | {"depths": (1, 1, 1, 1), "width": 16},
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
    # After `tiny`: other backbones of its size.
    "tiny_swin": {"model.backbone": swin(16, (1, 1, 1, 1), (1, 2, 4, 8), 0.2)["model.backbone"]},
    "tiny_convnext": {"model.backbone": convnext(16, (1, 1, 1, 1))["model.backbone"]},
    "tiny_vit": {"model.backbone": vit(32, 2, depth=2, grid=4)["model.backbone"]},
}
