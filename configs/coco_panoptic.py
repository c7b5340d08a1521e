"""Panoptic K-Net on COCO: ResNet-50, 1x schedule, the published recipe (PQ 44.3 on val)."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The 1x recipe."""
    return ConfigDict(
        {
            "task": "panoptic",
            "model": {
                "num_proposals": 100,  # kernels: 100 proposals + 53 stuff = 153
                "num_things": 80,  # classes: 80 + 53 = 133
                "num_stuff": 53,
                "channels": 256,
                "num_heads": 8,  # 256 / 8 = 32 channels a head
                "backbone": {
                    "depths": (3, 4, 6, 3),
                    "frozen_stages": 1,  # with the stem; the group `frozen` below says the same
                },
            },
            "data": {
                "dataset": "coco",
                "root": "data/coco",  # holds train2017/, val2017/, annotations/
                "canvas": (800, 1344),  # 1333 up to a multiple of 32; portrait is 1344 x 800
                "short_side": (800, 800),
                "long_side": 1333,
                "eval_multiple": 32,
            },
            "loss": {"mask": 1.0, "dice": 4.0, "label": 2.0, "rank": 0.1, "dense": 1.0},
            "optim": {
                "lr": 1e-4,  # for a batch of 16
                "weight_decay": 0.05,  # norms and biases too
                "warmup_steps": 1000,  # from 1e-7 = 0.001 x 1e-4
                "decay_at": (8, 11),  # steps 59 144 and 81 322: 1e-4, 1e-5, 1e-6
                "unit": "epoch",
                # (name, parameters, learning rate factor, weight decay factor); 0 is frozen.
                "groups": (
                    ("frozen", r"backbone/(stem|layer1)_.*", 0.0, 0.0),
                    ("backbone", r"backbone/.*", 0.25, 1.0),
                    ("head", r".*", 1.0, 1.0),
                ),
            },
            "train": {
                "batch_size": 16,
                "microbatch": 2,
                "epochs": 12.0,  # 12 x 118 287 / 16 = 88 715 steps
                "eval_every": None,  # every epoch, whatever the batch
            },
        }
    )


def swin(channels: int, depths: tuple[int, ...], num_heads: tuple[int, ...]) -> dict:
    """A Swin Transformer, all of which is trained."""
    return {
        "name": "swin",
        "channels": channels,
        "depths": depths,
        "num_heads": num_heads,
        "drop_path": 0.2,
    }


def convnext(channels: int, depths: tuple[int, ...]) -> dict:
    """A ConvNeXt, all of which is trained."""
    return {"name": "convnext", "channels": channels, "depths": depths, "drop_path": 0.2}


def vit(channels: int, num_heads: int, **others) -> dict:
    """A vision transformer of twelve blocks, DINOv2's with registers unless told otherwise."""
    return {"name": "vit", "channels": channels, "num_heads": num_heads, "drop_path": 0.1} | others


def decay_by_depth(depth: int, share: float) -> tuple[tuple[str, str, float, float], ...]:
    """Groups in which every block learns by a share of the one after it; embeddings by the least."""
    first = ("embedding", r"backbone/(patches/.*|class_token|register_tokens|position_table)")
    return (
        (*first, share ** (depth + 1), 1.0),
        *((f"block{i}", rf"backbone/block{i}/.*", share ** (depth - i), 1.0) for i in range(depth)),
        ("head", r".*", 1.0, 1.0),
    )


R101 = (3, 4, 23, 3)
UNFROZEN = (("backbone", r"backbone/.*", 0.25, 1.0), ("head", r".*", 1.0, 1.0))
TINY = {"depths": (1, 1, 1, 1), "width": 16, "norm": "group", "frozen_stages": 0}
FROZEN_VIT = (("frozen", r"backbone/(?!pyramid).*", 0.0, 0.0), ("head", r".*", 1.0, 1.0))
FROM_SCRATCH = (("all", r".*", 1.0, 1.0),)

VARIANTS = {
    # Your own data, some hundred or thousand pictures: None follows from them, and norms from the
    # initial weights. Before a variant that has another backbone.
    "small": {
        "model.num_things": None,
        "model.num_stuff": None,
        "model.backbone.norm": None,
        "model.backbone.frozen_stages": 0,
        "optim.groups": UNFROZEN,
        "optim.warmup_steps": None,
        "optim.decay_at": None,
        "data.canvas": None,
        "data.short_side": None,
        "data.long_side": None,
        "train.batch_size": 8,
        "train.steps": 0,
        "train.epochs": 50.0,
        "train.log_every": 10,
        "train.eval_every": None,
    },
    # PQ 47.1. 12 passes over the set repeated three times, / 10 at passes 9 and 11, are 36 epochs,
    # / 10 at 27 and 33: 36 x 118 287 / 16 = 266 146 steps.
    "ms3x": {
        "train.epochs": 36.0,
        "optim.decay_at": (27, 33),
        "data.short_side": (640, 800),
    },
    "r101": {"model.backbone.depths": R101},  # with ms3x PQ 48.4
    "r101_dcn": {  # with ms3x PQ 49.6
        "model.backbone.depths": R101,
        "model.backbone.num_deformable": 3,
    },
    "swin_l": {  # with ms3x PQ 54.6
        "model.backbone": swin(192, (2, 2, 18, 2), (6, 12, 24, 48)),
        "optim.groups": UNFROZEN,
        "train.batch_size": 32,
    },
    "swin_t": {  # the paper has no such row
        "model.backbone": swin(96, (2, 2, 6, 2), (3, 6, 12, 24)),
        "optim.groups": UNFROZEN,
    },
    # Nor these; weights of timm or torchvision.
    "convnext_t": {"model.backbone": convnext(96, (3, 3, 9, 3)), "optim.groups": UNFROZEN},
    "convnext_b": {"model.backbone": convnext(128, (3, 3, 27, 3)), "optim.groups": UNFROZEN},
    # Weights of DINOv2 with registers, and of DINOv3.
    "vit_s": {"model.backbone": vit(384, 6), "optim.groups": decay_by_depth(12, 0.8)},
    "vit_b": {"model.backbone": vit(768, 12), "optim.groups": decay_by_depth(12, 0.8)},
    "dinov3_b": {
        "model.backbone": vit(768, 12, patch=16, positions="rotary"),
        "optim.groups": decay_by_depth(12, 0.8),
    },
    # After one of them: the transformer stays as it is.
    "frozen_vit": {"model.backbone.frozen_trunk": True, "optim.groups": FROZEN_VIT},
    "bf16": {"model.dtype": "bfloat16"},  # feature maps; parameters stay float32
    # Twenty steps of everything on a laptop. 1 / 4 of the picture's side, 1 / 4 of the channels.
    "tiny": {
        "model.num_proposals": 20,
        "model.channels": 64,
        "model.ffn_channels": 128,
        "model.backbone": TINY,
        "optim.groups": FROM_SCRATCH,
        "optim.warmup_steps": 5,
        "data.canvas": (192, 320),
        "data.short_side": (192, 192),
        "data.long_side": 320,
        "data.num_workers": 0,
        "train.batch_size": 2,
        "train.steps": 20,
        "train.log_every": 5,
        "train.eval_every": 10,
        "train.checkpoint_every": 10,
    },
    # After `tiny`: other backbones of its size.
    "tiny_dcn": {
        "model.backbone": TINY | {"num_deformable": 3},
        "optim.groups": FROM_SCRATCH,
    },
    "tiny_swin": {
        "model.backbone": swin(16, (1, 1, 1, 1), (1, 2, 4, 8)),
        "optim.groups": FROM_SCRATCH,
    },
    "tiny_convnext": {
        "model.backbone": convnext(16, (1, 1, 1, 1)),
        "optim.groups": FROM_SCRATCH,
    },
    "tiny_vit": {
        "model.backbone": vit(32, 2, depth=2, grid=4),
        "optim.groups": FROM_SCRATCH,
    },
}
