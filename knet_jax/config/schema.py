"""Every key of a config, said once: its default, what is accepted, and what it means.

`KEY_GROUPS` is the table. The first group holds the keys of every config, the others those that exist
for one task, dataset, backbone or neck only. Validation, defaults, `--help` and the tables of
docs/training.md are read from it.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from flax.traverse_util import empty_node, flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from knet_jax.config import rules
from knet_jax.config.rules import (
    BELOW_1,
    FOUR,
    ONE,
    POSITIVE,
    RANGE,
    SHARE,
    SOME,
    TEXT,
    WEIGHT,
    YES_NO,
    ZERO,
    one_of,
    or_none,
)
from knet_jax.system.errors import UserError, suggest

TASKS = ("panoptic", "instance", "semantic")
DATASETS = ("ade20k", "cityscapes", "coco", "folder", "scene_parse150", "shapes")
BACKBONES = ("resnet", "swin", "convnext", "vit")
NECKS = ("semantic_fpn", "fcn", "psp", "aspp", "uper")
NORMS = ("frozen_batch", "batch", "group")
DTYPES = ("float32", "bfloat16")

REQUIRED = "REQUIRED"
"""Stands for the default of a key that has none: every config says it."""


class Follows(NamedTuple):
    """Stands for the default of a key that is the value of another one."""

    key: str


class Key(NamedTuple):
    """One key of a config."""

    default: Any
    rule: rules.Rule
    text: str


class KeyGroup(NamedTuple):
    """Keys that exist where the config's value of `choice` is one of `values`."""

    choice: str
    """A key such as `task`, or "" for keys that every config has."""
    values: tuple[str, ...]
    keys: dict[str, Key]


ALL = (("all", r".*", 1.0, 1.0),)

EVERY = {
    # The run.
    "task": Key(REQUIRED, one_of(*TASKS), "what is learned"),
    "seed": Key(0, rules.SEED, "of initial weights, order of pictures, augmentation, dropout"),
    "precision": Key(
        "float32",
        one_of("float32", "tensorfloat32", "bfloat16"),
        "of matrix products: `float32` is exact, `tensorfloat32` much faster on recent GPUs",
    ),
    "init_weights": Key(
        "",
        rules.PATH,
        "of the backbone: a checkpoint of PyTorch, npz or safetensors; or of the whole network: "
        "the folder of a model; empty: from scratch",
    ),
    # The network.
    "model.num_proposals": Key(REQUIRED, ZERO, "kernels that look for things (N in the paper)"),
    "model.num_things": Key(None, or_none(ZERO), "thing classes; None: those of the data"),
    "model.num_stuff": Key(
        None, or_none(ZERO), "stuff classes, each with a kernel of its own; None: those of the data"
    ),
    "model.num_stages": Key(3, rules.UPDATES, "updates of the kernels; 0 is a plain decoder"),
    "model.channels": Key(256, rules.EVEN, "of features and kernels"),
    "model.num_heads": Key(8, ONE, "of the attention between kernels; divides the channels"),
    "model.ffn_channels": Key(2048, ONE, "hidden width of the network after the attention"),
    "model.auxiliary_channels": Key(0, ZERO, "of the auxiliary classifier on C4; 0 is none"),
    "model.dropout": Key(0.1, BELOW_1, "probability before the classifiers, in semantic tasks"),
    "model.adaptive_update": Key(True, YES_NO, "False adds kernels and their pixels (Table 4a)"),
    "model.kernel_interaction": Key(True, YES_NO, "kernels attend to each other (Table 4a)"),
    "model.dtype": Key("float32", one_of(*DTYPES), "of feature maps; parameters stay float32"),
    "model.backbone.name": Key("resnet", one_of(*BACKBONES), "which backbone"),
    "model.backbone.remat": Key(False, YES_NO, "computes blocks twice: less memory, slower"),
    "model.neck.name": Key("semantic_fpn", one_of(*NECKS), "which neck or decoder"),
    # The data.
    "data.dataset": Key(REQUIRED, one_of(*DATASETS), "where the pictures are from"),
    "data.root": Key("", rules.PATH, "the folder of the dataset"),
    "data.data_dir": Key(
        "", rules.PATH, "of prepared records; empty: `$TFDS_DATA_DIR`, or ~/tensorflow_datasets"
    ),
    "data.train_split": Key("train", TEXT, "a name, or a slice such as `train[:8]`"),
    "data.val_split": Key("val", TEXT, "the split of evaluation"),
    "data.supercategories": Key(
        False, YES_NO, "coco: whether those without annotations are classes too"
    ),
    "data.flip": Key(0.5, SHARE, "probability of a mirrored picture in training"),
    "data.num_workers": Key(2, ZERO, "processes that read pictures; 0: the program itself"),
    "data.max_broken_share": Key(0.01, SHARE, "of damaged pictures; beyond it training stops"),
    # The weights of the loss terms.
    "loss.mask": Key(1.0, WEIGHT, "cross entropy of the masks; also weighs the matching"),
    "loss.dice": Key(4.0, WEIGHT, "dice loss of the masks; also weighs the matching"),
    "loss.label": Key(2.0, WEIGHT, "focal loss of the classes; also weighs the matching"),
    "loss.rank": Key(0.1, WEIGHT, "cross entropy over kernels: which one owns a pixel"),
    "loss.dense": Key(1.0, WEIGHT, "classes of pixels, by the features or the auxiliary head"),
    # The optimizer.
    "optim.lr": Key(REQUIRED, POSITIVE, "learning rate of a group of factor 1"),
    "optim.scale_lr": Key(
        False, YES_NO, "multiplies it by `train.batch_size` / `optim.reference_batch`"
    ),
    "optim.reference_batch": Key(16, POSITIVE, "the batch that the learning rate is for"),
    "optim.weight_decay": Key(0.05, rules.NON_NEGATIVE, "of AdamW"),
    "optim.clip_norm": Key(1.0, POSITIVE, "the most that the norm of the gradient may be"),
    "optim.warmup_steps": Key(
        1000,
        or_none(rules.ZERO_STEPS),
        "steps until the full learning rate; None: a twentieth of the run, at most 1000",
    ),
    "optim.warmup_factor": Key(0.001, SHARE, "share of the learning rate at the first step"),
    "optim.decay_at": Key(
        (),
        or_none(rules.ASCENDING),
        "when the learning rate falls; None: after 2/3 and 11/12 of the run",
    ),
    "optim.decay_factor": Key(10.0, rules.DIVISOR, "by which it is divided then"),
    "optim.unit": Key("epoch", one_of("epoch", "step"), "of `optim.decay_at`"),
    "optim.groups": Key(
        ALL, rules.PARAMETER_GROUPS, "the first whose expression matches a path counts"
    ),
    # The run's length, and what it keeps.
    "train.batch_size": Key(16, ONE, "images of a step, over all devices"),
    "train.microbatch": Key(2, ONE, "images on a device at a time; gradients are summed"),
    "train.epochs": Key(0.0, rules.EPOCHS, "length, where `train.steps` is 0"),
    "train.steps": Key(0, rules.ZERO_STEPS, "length, where it is not 0"),
    "train.ema_decay": Key(
        0.0,
        BELOW_1,
        "of a moving average of the parameters, such as 0.9998, evaluated beside them "
        "(`val_ema/*`; `eval.py --ema`); 0 keeps none",
    ),
    "train.log_every": Key(50, rules.STEPS, "in steps"),
    "train.eval_every": Key(
        0, or_none(rules.ZERO_STEPS), "in steps; 0 is at the end only, None after every epoch"
    ),
    "train.patience": Key(
        0, ZERO, "evaluations without a better score after which the run ends; 0 is never"
    ),
    "train.tracker": Key(
        "", one_of("", "wandb", "mlflow"), "where the run is logged too: Weights & Biases, MLflow"
    ),
    "train.checkpoint_every": Key(1000, rules.STEPS, "in steps"),
    "train.keep": Key(3, ONE, "how many of the last checkpoints stay, beside the best"),
    "eval.batch_size": Key(8, ONE, "images of an evaluation's batch, over all devices"),
    "eval.window": Key((), rules.WINDOW, "the part of a large picture that is shown at a time"),
    "eval.window_step": Key((), rules.WINDOW, "from one to the next, at most the window"),
    "eval.num_pictures": Key(4, ZERO, "how many pictures each evaluation draws"),
    "eval.analysis": Key(
        16,
        ZERO,
        "of how many pictures, the first of the split, each evaluation of a run writes `analysis/`; 0 "
        "writes none",
    ),
}

WITH_THINGS = {
    "model.num_proposals": Key(REQUIRED, ONE, "kernels that look for things"),
    "model.num_things": Key(None, or_none(ONE), "thing classes; None: those of the data"),
    "model.auxiliary_channels": Key(0, rules.NONE, "there is no auxiliary classifier"),
    "model.neck.name": Key("semantic_fpn", one_of("semantic_fpn"), "the one neck"),
    "data.canvas": Key(
        REQUIRED,
        or_none(rules.LANDSCAPE),
        "of training; portraits get it transposed; None: what fits the sides",
    ),
    "data.short_side": Key(
        REQUIRED,
        or_none(RANGE),
        "of its random length; evaluation takes the largest; None: that of the pictures, at most 800",
    ),
    "data.long_side": Key(
        REQUIRED,
        or_none(POSITIVE),
        "the most that the long side becomes; None: that of the pictures, at most 1333",
    ),
    "data.max_things": Key(
        Follows("model.num_proposals"), ONE, "slots for the things of a picture, largest first"
    ),
    "data.min_things": Key(0, ZERO, "pictures with fewer are not trained on; crowds aside"),
    "data.eval_multiple": Key(0, rules.MULTIPLE, "of the canvas's sides in evaluation"),
}
PANOPTIC = {
    "eval.instance_threshold": Key(0.3, SHARE, "least score of a thing"),
    "eval.overlap_threshold": Key(0.6, SHARE, "least share of a mask that others leave it"),
}
INSTANCE = {
    "model.num_stuff": Key(REQUIRED, rules.NONE, "there is no stuff"),
    "eval.num_results": Key(
        Follows("model.num_proposals"), ONE, "best (kernel, class) pairs of a picture"
    ),
}
SEMANTIC = {
    "model.num_proposals": Key(REQUIRED, rules.NONE, "every kernel is that of a class"),
    "model.num_things": Key(REQUIRED, rules.NONE, "all classes count as stuff"),
    "model.num_stuff": Key(None, or_none(ONE), "classes; None: those of the data"),
    "model.neck.name": Key(REQUIRED, one_of(*NECKS[1:]), "the decoder"),
    "data.scale": Key(
        REQUIRED,
        or_none(rules.SIZE),
        "the most that the sides become at ratio 1; None: the pictures' own, at most (2048, 512)",
    ),
    "data.ratio": Key((0.5, 2.0), RANGE, "of a random factor of the scale"),
    "data.crop": Key(
        REQUIRED,
        or_none(rules.CANVAS),
        "a random window; smaller pictures are padded; None: a square of the short side",
    ),
    "data.max_class_share": Key(
        0.75, rules.ABOVE_0, "of ten windows, the first where no class has more of the pixels"
    ),
    "data.photometric": Key(True, YES_NO, "random brightness, contrast, saturation and hue"),
    "data.eval_multiple": Key(
        32, rules.SIDE, "of the canvas's sides in evaluation; 1 pads nothing"
    ),
    "eval.scales": Key(
        (1.0,), rules.SCALES, "sizes of a picture over which probabilities are averaged"
    ),
    "eval.flip": Key(False, YES_NO, "averages over mirrored pictures too"),
}

FOLDER = {
    "data.images": Key("images/{split}", TEXT, "the folder of pictures, below the root"),
    "data.labels": Key("labels/{split}", TEXT, "the folder of index PNGs"),
    "data.classes": Key("classes.txt", TEXT, "the names of the classes, one a line"),
    "data.ignore_index": Key(255, rules.whole(0, 2**16 - 1), "the index that is no class"),
}
SHAPES = {
    "data.num_train": Key(REQUIRED, rules.STEPS, "pictures to train on"),
    "data.num_val": Key(REQUIRED, rules.STEPS, "pictures to evaluate on"),
    "data.image_side": Key(REQUIRED, RANGE, "of their sides, in pixels"),
}

RESNET = {
    "model.backbone.depths": Key((3, 4, 6, 3), FOUR, "blocks; (3, 4, 23, 3) is ResNet-101"),
    "model.backbone.width": Key(64, ONE, "channels of the first stage's 3x3 convolutions"),
    "model.backbone.norm": Key(
        "frozen_batch",
        or_none(one_of(*NORMS)),
        "`frozen_batch` uses the statistics of the initial weights and trains scale and bias; "
        "`batch` trains statistics too, over one microbatch of all devices; `group` needs none; "
        "None: what the initial weights have, `group` without any",
    ),
    "model.backbone.frozen_stages": Key(
        1, rules.STAGES, "first stages that get no gradient, nor does the stem"
    ),
    "model.backbone.deep_stem": Key(False, YES_NO, "three 3x3 convolutions (ResNet-C)"),
    "model.backbone.output_stride": Key(
        32, one_of(8, 16, 32), "where it is reached, stages dilate instead of shrinking"
    ),
    "model.backbone.num_deformable": Key(
        0, rules.STAGES, "last stages with deformable convolutions; 3 in R101-DCN"
    ),
}
DROP_PATH = Key(0.0, BELOW_1, "probability at the last block; it grows from 0 at the first")
SWIN = {
    "model.backbone.channels": Key(96, ONE, "of the first level; 192 in Swin-L"),
    "model.backbone.depths": Key((2, 2, 6, 2), FOUR, "blocks; (2, 2, 18, 2) is Swin-L"),
    "model.backbone.num_heads": Key((3, 6, 12, 24), FOUR, "of each stage"),
    "model.backbone.window": Key(7, ONE, "side of the windows of attention"),
    "model.backbone.drop_path": DROP_PATH,
}
CONVNEXT = {
    "model.backbone.channels": Key(96, ONE, "of the first level; 128 in ConvNeXt-B, 192 in -L"),
    "model.backbone.depths": Key((3, 3, 9, 3), FOUR, "blocks; (3, 3, 27, 3) from ConvNeXt-S on"),
    "model.backbone.drop_path": DROP_PATH,
}
VIT = {
    "model.backbone.channels": Key(768, ONE, "384 in ViT-S, 1024 in -L"),
    "model.backbone.depth": Key(12, rules.whole(1, 100), "blocks; 24 in ViT-L"),
    "model.backbone.num_heads": Key(12, ONE, "6 in ViT-S, 16 in -L"),
    "model.backbone.patch": Key(14, rules.whole(4, 64), "side of patches; 16 in DINOv3"),
    "model.backbone.registers": Key(4, rules.whole(0, 64), "tokens without a place"),
    "model.backbone.positions": Key(
        "learned", one_of("learned", "rotary"), "`learned` as in DINOv2, `rotary` as in DINOv3"
    ),
    "model.backbone.grid": Key(
        37, rules.whole(1, 256), "patches of a side that have learned positions"
    ),
    "model.backbone.frozen_trunk": Key(
        False, YES_NO, "trains the pyramid only; the transformer then keeps nothing for a gradient"
    ),
    "model.backbone.drop_path": DROP_PATH,
}

SEMANTIC_FPN = {
    "model.neck.sine": Key(True, YES_NO, "positional encoding (Table 4b)"),
    "model.neck.coordinates": Key(False, YES_NO, "two channels of coordinates (Table 4b)"),
}
DECODER = {"model.neck.norm": Key("batch", or_none(one_of(*NORMS)), "as `model.backbone.norm`")}
POOLING = {"model.neck.scales": Key((1, 2, 3, 6), SOME, "sides of the pooled maps")}
DILATED = {
    "model.neck.dilations": Key((1, 12, 24, 36), SOME, "of the decoder's parallel convolutions")
}
SEMANTIC_ONLY = {"task": Key(REQUIRED, one_of("semantic"), "what they are annotated for")}

KEY_GROUPS = (
    KeyGroup("", (), EVERY),
    KeyGroup("task", ("panoptic", "instance"), WITH_THINGS),
    KeyGroup("task", ("panoptic",), PANOPTIC),
    KeyGroup("task", ("instance",), INSTANCE),
    KeyGroup("task", ("semantic",), SEMANTIC),
    KeyGroup("data.dataset", ("ade20k", "cityscapes", "folder", "scene_parse150"), SEMANTIC_ONLY),
    KeyGroup("data.dataset", ("folder",), FOLDER),
    KeyGroup("data.dataset", ("shapes",), SHAPES),
    KeyGroup("model.backbone.name", ("resnet",), RESNET),
    KeyGroup("model.backbone.name", ("swin",), SWIN),
    KeyGroup("model.backbone.name", ("convnext",), CONVNEXT),
    KeyGroup("model.backbone.name", ("vit",), VIT),
    KeyGroup("model.neck.name", ("semantic_fpn",), SEMANTIC_FPN),
    KeyGroup("model.neck.name", ("fcn", "psp", "aspp", "uper"), DECODER),
    KeyGroup("model.neck.name", ("psp", "uper"), POOLING),
    KeyGroup("model.neck.name", ("aspp",), DILATED),
)
"""All keys. Where two groups have one key, a value must pass the rules of both."""

MODEL_CHOICES = ("model.backbone.name", "model.neck.name")
CHOICES = ("task", "data.dataset", *MODEL_CHOICES)
"""Keys on whose values other keys depend."""


def to_tuples(value: Any) -> Any:
    """Makes tuples of the lists in a nest of dicts: JSON has lists only, a config has tuples."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: to_tuples(item) for key, item in value.items()}
    return tuple(map(to_tuples, value)) if isinstance(value, list | tuple) else value


def flatten(config: Mapping[str, Any] | ConfigDict) -> dict[str, Any]:
    """Makes one dict of nested ones: {"optim": {"lr": 1.0}} becomes {"optim.lr": 1.0}.

    An empty one stays, and is not accepted for any key: it would hide that a value is lost.
    """
    values = flatten_dict(to_tuples(config), keep_empty_nodes=True, sep=".")
    return {key: {} if value is empty_node else value for key, value in values.items()}


def find_groups(values: Mapping[str, Any], choices: Sequence[str] = CHOICES) -> list[KeyGroup]:
    """The groups whose keys a config has.

    Args:
        values: of the config, flat.
        choices: which of `CHOICES` are looked at.

    Raises:
        UserError: one of them is missing or has a value that is not accepted.
    """
    keys = {name: EVERY[name] for name in choices}
    chosen = with_defaults(values, keys)
    _check_rules(chosen, KeyGroup("", (), keys))
    return [g for g in KEY_GROUPS if not g.choice or chosen.get(g.choice) in g.values]


def find_keys(values: Mapping[str, Any], choices: Sequence[str] = CHOICES) -> dict[str, Key]:
    """The keys that a config has, by name. Arguments and errors are those of `find_groups`."""
    groups = find_groups(values, choices)
    return {name: key for group in groups for name, key in group.keys.items()}


def with_defaults(values: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """The values of keys, flat, with the defaults of those that are not stated."""
    known = {name: values.get(name, key.default) for name, key in keys.items()}
    for name, value in known.items():
        if isinstance(value, Follows):
            known[name] = known[value.key]
    return {name: value for name, value in known.items() if value != REQUIRED}


def complete_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `config.model`, with the defaults of those that it does not state.

    Raises:
        UserError: a key does not exist, or is missing and has no default.
    """
    values = flatten({"model": model})
    keys = find_keys(values, MODEL_CHOICES)
    keys = {name: key for name, key in keys.items() if name.startswith("model.")}
    check_names(values, keys)
    completed = with_defaults(values, keys)
    if missing := sorted(name for name in keys if completed.get(name) is None):
        accepted = keys[missing[0]].rule[1].removesuffix(", or None")
        raise UserError(f"config.{missing[0]} is missing; accepted: {accepted}")
    return unflatten_dict(completed, sep=".")["model"]


def check_names(given: Iterable[str], known: Mapping[str, Key]) -> None:
    """Raises UserError where a key does not exist, with those that may have been meant."""
    for name in given:
        if name not in known:
            words = name.rpartition(".")[2].replace("_", " ")  # learning_rate is optim.lr
            meant = [key for key in known if known[key].text.startswith(words)]
            raise UserError(f"there is no key config.{name:.100}; {suggest(name, meant or known)}")


def check(values: Mapping[str, Any]) -> None:
    """Compares the names and values of a config, flat, with the table.

    Raises:
        UserError: a key is missing, does not exist, or has a value that is not accepted.
    """
    check_names(values, find_keys(values))
    for group in find_groups(values):
        _check_rules(values, group)


def passes(rule: rules.Rule, value: Any) -> bool:
    """Whether a value passes a rule, the test of which is made for sound values."""
    with suppress(Exception):
        return rule[0](value)
    return False


def _check_rules(values: Mapping[str, Any], group: KeyGroup) -> None:
    where = f" where config.{group.choice} is {values[group.choice]!r}" if group.choice else ""
    for name, (_, rule, _) in group.keys.items():
        if name not in values:
            raise UserError(f"config.{name} is missing; accepted: {rule[1]}{where}")
        if not passes(rule, values[name]):
            shown = reprlib.repr(values[name])
            raise UserError(f"config.{name} is {shown}; accepted: {rule[1]}{where}")


def decay_steps(optim: ConfigDict, steps_per_epoch: float) -> tuple[int, ...]:
    """Steps from which `config.optim.decay_at` lowers the learning rate."""
    scale = steps_per_epoch if optim.unit == "epoch" else 1
    return tuple(round(at * scale) for at in optim.decay_at)


def describe(values: Mapping[str, Any]) -> str:
    """The keys of a config with value, meaning and what is accepted, for `--help`."""
    return "\n".join(
        f"  --config.{name}={values.get(name, REQUIRED)!r}\n      {key.text}; accepted: {key.rule[1]}"
        for name, key in find_keys(values).items()
    )


def to_markdown() -> str:
    """The whole table for the documentation, a Markdown table for each group."""
    parts = []
    for group in KEY_GROUPS:
        values = " or ".join(f"`{value}`" for value in group.values)
        title = f"Where `{group.choice}` is {values}:" if group.choice else "Every config:"
        parts += [title, "", "| key | default | accepted | meaning |", "|---|---|---|---|"]
        for name, (default, (_, accepted), text) in group.keys.items():
            shown = "" if default == REQUIRED else f"`{default!r}`"
            if isinstance(default, Follows):
                shown = f"that of `{default.key}`"
            parts.append(f"| `{name}` | {shown} | {accepted} | {text} |")
        parts.append("")
    return "\n".join(parts)
