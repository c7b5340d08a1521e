"""Whether the values of a config make sense, whoever wrote them."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from knet_jax.config.files import to_tuples
from knet_jax.config.rules import (
    NONE,
    ONE,
    SEED,
    SOME,
    YES_NO,
    ZERO,
    Rule,
    at_least_one,
    check,
    check_names,
    count,
    non_negative,
    one_of,
    positive,
    several,
    share,
)
from knet_jax.data.annotations import by_task
from knet_jax.data.recipes import CANVAS, STRIDE
from knet_jax.data.sources import by_name
from knet_jax.matching import LossWeights
from knet_jax.model import BACKBONES, NECKS, find_part, make_model
from knet_jax.nn.layers import NORMS
from knet_jax.system.errors import UserError
from knet_jax.training.optim import parse_groups

RULES: dict[str, Rule] = {
    "seed": SEED,
    "init_weights": (lambda value: isinstance(value, str), "a path, or '' for none"),
    "precision": one_of("float32", "tensorfloat32", "bfloat16"),
    "model.num_stages": ZERO,
    "model.channels": (lambda n: at_least_one(n) and n % 2 == 0, "an even number of at least 2"),
    "model.num_heads": ONE,
    "model.ffn_channels": ONE,
    "model.dropout": (lambda p: share(p) and p < 1, "a probability below 1"),
    "model.adaptive_update": YES_NO,
    "model.kernel_interaction": YES_NO,
    "model.dtype": one_of("float32", "bfloat16"),
    "optim.groups": (lambda groups: isinstance(groups, tuple), "rows, as in configs/"),
    "optim.scale_lr": YES_NO,
    "optim.lr": (positive, "a number above 0"),
    "optim.reference_batch": (positive, "a number above 0"),
    "optim.weight_decay": (non_negative, "a number of at least 0"),
    "optim.clip_norm": (positive, "a number above 0"),
    "optim.warmup_steps": ZERO,
    "optim.warmup_factor": (share, "a share between 0 and 1"),
    "optim.decay_at": (
        lambda at: isinstance(at, tuple) and all(map(positive, at)) and sorted(at) == [*at],
        "numbers above 0 in ascending order, such as (8, 11) or ()",
    ),
    "optim.decay_factor": (lambda f: positive(f) and f >= 1, "a divisor of at least 1"),
    "optim.unit": one_of("epoch", "step"),
    "train.batch_size": ONE,
    "train.microbatch": ONE,
    "train.epochs": (non_negative, "a number above 0, or 0 where train.steps is given"),
    "train.steps": (count, "a whole number above 0, or 0 where train.epochs is given"),
    "train.ema_decay": (lambda d: share(d) and d < 1, "0 for none, or a decay below 1"),
    "train.log_every": ONE,
    "train.eval_every": (count, "a number of steps, or 0 for at the end only"),
    "train.checkpoint_every": ONE,
    "train.keep": ONE,
    "eval.batch_size": ONE,
    "eval.num_pictures": ZERO,
}
"""Keys that every config has. Those of the model that it does not give have their defaults."""

RULES_WHERE_GIVEN: dict[str, Rule] = {
    # ResNet.
    "model.backbone.depths": (several(at_least_one, 4), "four numbers, such as (3, 4, 6, 3)"),
    "model.backbone.width": ONE,
    "model.backbone.norm": one_of(*NORMS),
    "model.backbone.frozen_stages": (lambda n: count(n) and n <= 4, "0 to 4 stages"),
    "model.backbone.deep_stem": YES_NO,
    "model.backbone.output_stride": one_of(8, 16, 32),
    "model.backbone.num_deformable": (lambda n: count(n) and n <= 4, "0 to 4 stages"),
    # Swin, whose depths are as many.
    "model.backbone.channels": ONE,
    "model.backbone.num_heads": (
        several(at_least_one, 4),
        "four numbers, such as (3, 6, 12, 24)",
    ),
    "model.backbone.window": ONE,
    "model.backbone.drop_path": (lambda p: share(p) and p < 1, "a probability below 1"),
    "model.backbone.remat": YES_NO,
    # Necks.
    "model.neck.norm": one_of(*NORMS),
    "model.neck.scales": SOME,
    "model.neck.dilations": SOME,
    "model.neck.sine": YES_NO,
    "model.neck.coordinates": YES_NO,
    **{f"loss.{term}": (non_negative, "a weight of at least 0") for term in LossWeights._fields},
}
"""Keys that some configs have."""

THINGS: dict[str, Rule] = {
    "model.num_proposals": ONE,
    "model.num_things": ONE,
    "model.auxiliary_channels": NONE,
    "model.neck.name": one_of("semantic_fpn"),
}

RULES_OF_TASKS: dict[str, dict[str, Rule]] = {
    "panoptic": THINGS
    | {
        "model.num_stuff": ZERO,
        "eval.instance_threshold": (share, "a score between 0 and 1"),
        "eval.overlap_threshold": (share, "a share between 0 and 1"),
    },
    "instance": THINGS | {"model.num_stuff": NONE, "eval.num_results": ONE},
    "semantic": {
        "model.num_proposals": NONE,
        "model.num_things": NONE,
        "model.num_stuff": ONE,
        "model.auxiliary_channels": ZERO,
        "model.neck.name": one_of(*(name for name in NECKS if name != "semantic_fpn")),
        "eval.scales": (
            lambda v: isinstance(v, tuple) and len(v) > 0 and all(map(positive, v)),
            "numbers above 0, such as (1.0,) or (0.5, 1.0, 1.5)",
        ),
        "eval.flip": YES_NO,
        "eval.window": (
            lambda v: v == () or CANVAS[0](v),
            f"(), which is the whole picture, or {CANVAS[1]}",
        ),
        "eval.window_step": (
            lambda v: v == () or CANVAS[0](v),
            f"{CANVAS[1]}, or () where there is no window",
        ),
    },
}
"""Keys that every config of a task has: above all the three counts, which are what a task is."""


def check_data(config: ConfigDict) -> None:
    """Checks what the data of a config needs: its task and `config.data`.

    Raises:
      ValueError: a key is missing or unknown, or a value makes no sense.
    """
    kind = by_task.find(config.get("task"))
    dataset = by_name.find_dataset(config.get("data", {}), config.task)
    check_names(
        "data",
        config.data,
        [
            *(path.removeprefix("data.") for path in by_name.RULES),
            *dataset.keys,
            *kind.keys,
        ],
    )
    kind.recipe(config.data)


def validate(
    config: ConfigDict, num_devices: int = 1, parts: Sequence[str] = ("train", "eval")
) -> None:
    """Checks the values of a config, whoever wrote them.

    Args:
      config: from `load_config` or `load_saved_config`.
      num_devices: among which a batch is divided.
      parts: what is to be run, and must fit the devices.

    Raises:
      ValueError: a key is missing or unknown, or a value makes no sense.
    """
    check_data(config)
    given = flatten_dict(to_tuples(config.to_dict()), sep=".")
    check_names("loss", config.get("loss", {}), LossWeights._fields)
    values = _model_defaults(config.get("model", {})) | given
    check(values, RULES)
    check(values, {key: rule for key, rule in RULES_WHERE_GIVEN.items() if key in values})
    check(values, RULES_OF_TASKS[config.task], f" where config.task is {config.task!r}")
    keys = {*RULES, *RULES_OF_TASKS[config.task]}
    for part in "optim", "train", "eval":
        known = sorted(key.partition(".")[2] for key in keys if key.startswith(f"{part}."))
        check_names(part, config[part], known)
    parse_groups(config.optim.groups)

    if not (config.train.epochs or config.train.steps):
        raise UserError("config.train.epochs and config.train.steps are both 0; give one")
    for part in parts:
        if config[part].batch_size % num_devices:
            raise UserError(
                f"config.{part}.batch_size is {config[part].batch_size}; accepted: "
                f"multiples of the {num_devices} devices"
            )
    per_device = max(config.train.batch_size // num_devices, 1)
    if "train" in parts and per_device % min(per_device, config.train.microbatch):
        raise UserError(
            f"config.train.microbatch is {config.train.microbatch}; accepted: a divisor of the "
            f"{per_device} images that each device gets of a batch"
        )
    frozen = values.get("model.backbone.frozen_stages", 0)
    path = f"backbone/layer{frozen}_block0/conv1/kernel"
    groups = parse_groups(config.optim.groups)
    group = next((group for group in groups if re.fullmatch(group.pattern, path)), None)
    if frozen and group and group.lr:
        raise UserError(
            f"config.optim.groups: {group.name!r} trains layer{frozen} of the backbone, which "
            f"config.model.backbone.frozen_stages={frozen} freezes"
        )
    max_things, num_proposals = values.get("data.max_things", 0), config.model.num_proposals
    if max_things > num_proposals > 0:
        raise UserError(
            f"config.data.max_things is {max_things}; accepted: at most "
            f"config.model.num_proposals, {num_proposals}, one kernel a thing"
        )
    window, step = (values.get(f"eval.{key}", ()) for key in ("window", "window_step"))
    if len(step) != len(window) or any(move > side for move, side in zip(step, window)):
        raise UserError(
            f"config.eval.window_step is {step}; accepted: (height, width) of at most "
            f"config.eval.window, {window}, so that no pixel is left out"
        )
    multiple = values.get("data.eval_multiple", STRIDE)
    if window and multiple % STRIDE:
        raise UserError(
            f"config.data.eval_multiple is {multiple}; accepted with config.eval.window: multiples "
            f"of {STRIDE}, so that windows meet at the pixels of the masks"
        )
    channels, num_heads = values["model.channels"], values["model.num_heads"]
    if values["model.kernel_interaction"] and channels % num_heads:
        raise UserError(
            f"config.model.channels is {channels}; accepted: "
            f"multiples of config.model.num_heads, {num_heads}"
        )


def _model_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """What keys of `config.model` are that are not given, as `make_model` and the classes of the
    backbone and of the neck say it. Names of keys are checked by the same."""
    arguments = inspect.signature(make_model).parameters
    check_names("model", model, arguments)
    defaults = {}
    for name, argument in arguments.items():
        if argument.default is not argument.empty:
            defaults[f"model.{name}"] = argument.default
        elif name not in model:
            raise UserError(f"config.model.{name} is missing")
    for part, table in ("backbone", BACKBONES), ("neck", NECKS):
        module, given = find_part(part, table, model.get(part, {}))
        handed_on = {"parent", "name", "dtype"} | ({"channels"} if part == "neck" else set())
        fields = {
            field.name: field.default
            for field in dataclasses.fields(module)
            if field.name not in handed_on
        }
        check_names(f"model.{part}", given, fields)
        fields["name"] = next(name for name in table if table[name] is module)
        defaults |= {f"model.{part}.{key}": value for key, value in fields.items()}
    return defaults
