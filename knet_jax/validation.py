"""Whether the values of a config make sense, whoever wrote them."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from knet_jax.configuration import ConfigError, suggest, to_tuples
from knet_jax.knet import BACKBONES, NECKS, make_model
from knet_jax.layers import NORMS
from knet_jax.matching import Weights
from knet_jax.optim import parse_groups
from knet_jax.tasks import TASKS

Rule = tuple[Callable[[Any], bool], str]
"""The test of a value, and what is accepted in words."""


def _number(value: Any) -> bool:
    kind = isinstance(value, int | float) and not isinstance(value, bool)
    return kind and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _non_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _count(value: Any) -> bool:
    return isinstance(value, int) and _non_negative(value)


def _at_least_one(value: Any) -> bool:
    return isinstance(value, int) and _positive(value)


def _share(value: Any) -> bool:
    return _non_negative(value) and value <= 1


def _several(test: Callable[[Any], bool], count: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, tuple) and len(value) == count and all(map(test, value))


def _pair(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return _several(test, 2)


def _one_of(*choices: Any) -> Rule:
    return lambda value: value in choices, ", ".join(map(str, choices))


NONE = (lambda value: _count(value) and value == 0, "0")
ZERO = (_count, "a whole number of at least 0")
ONE = (_at_least_one, "a whole number of at least 1")
YES_NO = (lambda value: isinstance(value, bool), "True or False")
STRIDES = (
    _pair(lambda n: _at_least_one(n) and n % 32 == 0),
    "(height, width), multiples of 32",
)
SOME = (
    lambda value: isinstance(value, tuple) and len(value) > 0 and all(map(_at_least_one, value)),
    "whole numbers of at least 1, such as (1, 2, 3)",
)

RULES: dict[str, Rule] = {
    "seed": ZERO,
    "init_weights": (lambda value: isinstance(value, str), "a path, or '' for none"),
    "precision": _one_of("float32", "tensorfloat32", "bfloat16"),
    "model.num_stages": ZERO,
    "model.channels": (lambda n: _at_least_one(n) and n % 2 == 0, "an even number of at least 2"),
    "model.num_heads": ONE,
    "model.ffn_channels": ONE,
    "model.dropout": (lambda p: _share(p) and p < 1, "a probability below 1"),
    "model.adaptive_update": YES_NO,
    "model.kernel_interaction": YES_NO,
    "model.dtype": _one_of("float32", "bfloat16"),
    "data.dataset": (lambda value: isinstance(value, str), "a name, such as 'coco'"),
    "data.data_dir": (lambda value: isinstance(value, str), "a path, or '' for the default"),
    "data.train_split": (lambda value: isinstance(value, str), "a name, or a slice of one"),
    "data.val_split": (lambda value: isinstance(value, str), "a name, or a slice of one"),
    "data.flip": (_share, "a probability"),
    "data.num_workers": ZERO,
    "data.max_broken_share": (_share, "a share between 0 and 1"),
    "optim.groups": (lambda groups: isinstance(groups, tuple), "rows, as in configs/"),
    "optim.scale_lr": YES_NO,
    "optim.lr": (_positive, "a number above 0"),
    "optim.reference_batch": (_positive, "a number above 0"),
    "optim.weight_decay": (_non_negative, "a number of at least 0"),
    "optim.clip_norm": (_positive, "a number above 0"),
    "optim.warmup_steps": ZERO,
    "optim.warmup_factor": (_share, "a share between 0 and 1"),
    "optim.decay_at": (
        lambda at: isinstance(at, tuple) and all(map(_positive, at)) and sorted(at) == [*at],
        "numbers above 0 in ascending order, such as (8, 11) or ()",
    ),
    "optim.decay_factor": (lambda f: _positive(f) and f >= 1, "a divisor of at least 1"),
    "optim.unit": _one_of("epoch", "step"),
    "train.batch_size": ONE,
    "train.microbatch": ONE,
    "train.epochs": (_non_negative, "a number above 0, or 0 where train.steps is given"),
    "train.steps": (_count, "a whole number above 0, or 0 where train.epochs is given"),
    "train.ema_decay": (lambda d: _share(d) and d < 1, "0 for none, or a decay below 1"),
    "train.log_every": ONE,
    "train.eval_every": (_count, "a number of steps, or 0 for at the end only"),
    "train.checkpoint_every": ONE,
    "train.keep": ONE,
    "eval.batch_size": ONE,
    "eval.num_pictures": ZERO,
}
"""Keys that every config has. Those of the model that it does not give have their defaults."""

RULES_WHERE_GIVEN: dict[str, Rule] = {
    # ResNet.
    "model.backbone.depths": (_several(_at_least_one, 4), "four numbers, such as (3, 4, 6, 3)"),
    "model.backbone.width": ONE,
    "model.backbone.norm": _one_of(*NORMS),
    "model.backbone.frozen_stages": (lambda n: _count(n) and n <= 4, "0 to 4 stages"),
    "model.backbone.deep_stem": YES_NO,
    "model.backbone.output_stride": _one_of(8, 16, 32),
    "model.backbone.num_deformable": (lambda n: _count(n) and n <= 4, "0 to 4 stages"),
    # Swin, whose depths are as many.
    "model.backbone.channels": ONE,
    "model.backbone.num_heads": (
        _several(_at_least_one, 4),
        "four numbers, such as (3, 6, 12, 24)",
    ),
    "model.backbone.window": ONE,
    "model.backbone.drop_path": (lambda p: _share(p) and p < 1, "a probability below 1"),
    "model.backbone.remat": YES_NO,
    # Necks.
    "model.neck.norm": _one_of(*NORMS),
    "model.neck.scales": SOME,
    "model.neck.dilations": SOME,
    "model.neck.sine": YES_NO,
    "model.neck.coordinates": YES_NO,
    # Data of things and stuff.
    "data.canvas": STRIDES,
    "data.short_side": (
        lambda pair: _pair(_positive)(pair) and pair[0] <= pair[1],
        "(smallest, largest) in pixels",
    ),
    "data.long_side": (_positive, "a number of pixels"),
    "data.max_things": ONE,
    "data.min_things": ZERO,
    **{f"loss.{term}": (_non_negative, "a weight of at least 0") for term in Weights._fields},
}
"""Keys that some configs have."""

THINGS: dict[str, Rule] = {
    "model.num_proposals": ONE,
    "model.num_things": ONE,
    "model.auxiliary_channels": NONE,
    "model.neck.name": _one_of("semantic_fpn"),
}

RULES_OF_TASKS: dict[str, dict[str, Rule]] = {
    "panoptic": THINGS
    | {
        "model.num_stuff": ZERO,
        "eval.instance_threshold": (_share, "a score between 0 and 1"),
        "eval.overlap_threshold": (_share, "a share between 0 and 1"),
    },
    "instance": THINGS | {"model.num_stuff": NONE, "eval.num_results": ONE},
    "semantic": {
        "model.num_proposals": NONE,
        "model.num_things": NONE,
        "model.num_stuff": ONE,
        "model.auxiliary_channels": ZERO,
        "model.neck.name": _one_of(*(name for name in NECKS if name != "semantic_fpn")),
        "eval.scales": (
            lambda v: isinstance(v, tuple) and len(v) > 0 and all(map(_positive, v)),
            "numbers above 0, such as (1.0,) or (0.5, 1.0, 1.5)",
        ),
        "eval.flip": YES_NO,
        "eval.window": (
            lambda v: v == () or STRIDES[0](v),
            f"(), which is the whole picture, or {STRIDES[1]}",
        ),
        "eval.window_step": (
            lambda v: v == () or STRIDES[0](v),
            f"{STRIDES[1]}, or () where there is no window",
        ),
    },
}
"""Keys that every config of a task has: above all the three counts, which are what a task is."""


def validate(
    config: ConfigDict, num_devices: int = 1, parts: Sequence[str] = ("train", "eval")
) -> None:
    """Checks the values of a config, whoever wrote them.

    Args:
      config: from `load_config` or `load_saved_config`.
      num_devices: among which a batch is divided.
      parts: what is to be run, and must fit the devices.

    Raises:
      ConfigError: a key is missing or a value makes no sense.
    """
    given = flatten_dict(to_tuples(config.to_dict()), sep=".")
    _check(given, {"task": _one_of(*TASKS)})
    _check_names("loss", config.get("loss", {}), Weights._fields)
    values = _model_defaults(config.get("model", {})) | given
    _check(values, RULES)
    _check(values, {key: rule for key, rule in RULES_WHERE_GIVEN.items() if key in values})
    _check(values, RULES_OF_TASKS[config.task], f" where config.task is {config.task!r}")
    keys = {*RULES, *chain.from_iterable(RULES_OF_TASKS.values())}
    for part in "optim", "train", "eval":
        known = sorted(key.partition(".")[2] for key in keys if key.startswith(f"{part}."))
        _check_names(part, config[part], known)
    parse_groups(config.optim.groups)

    if not (config.train.epochs or config.train.steps):
        raise ConfigError("config.train.epochs and config.train.steps are both 0; give one")
    for part in parts:
        if config[part].batch_size % num_devices:
            raise ConfigError(
                f"config.{part}.batch_size is {config[part].batch_size}; accepted: "
                f"multiples of the {num_devices} devices"
            )
    share = max(config.train.batch_size // num_devices, 1)
    if "train" in parts and share % min(share, config.train.microbatch):
        raise ConfigError(
            f"config.train.microbatch is {config.train.microbatch}; accepted: a divisor of the "
            f"{share} images that each device gets of a batch"
        )
    frozen = values.get("model.backbone.frozen_stages", 0)
    path = f"backbone/layer{frozen}_block0/conv1/kernel"
    groups = parse_groups(config.optim.groups)
    group = next((group for group in groups if re.fullmatch(group.pattern, path)), None)
    if frozen and group and group.lr:
        raise ConfigError(
            f"config.optim.groups: {group.name!r} trains layer{frozen} of the backbone, which "
            f"config.model.backbone.frozen_stages={frozen} freezes"
        )
    max_things, num_proposals = values.get("data.max_things", 0), config.model.num_proposals
    if max_things > num_proposals > 0:
        raise ConfigError(
            f"config.data.max_things is {max_things}; accepted: at most "
            f"config.model.num_proposals, {num_proposals}, one kernel a thing"
        )
    window, step = (values.get(f"eval.{key}", ()) for key in ("window", "window_step"))
    if len(step) != len(window) or any(move > side for move, side in zip(step, window)):
        raise ConfigError(
            f"config.eval.window_step is {step}; accepted: (height, width) of at most "
            f"config.eval.window, {window}, so that no pixel is left out"
        )
    channels, num_heads = values["model.channels"], values["model.num_heads"]
    if values["model.kernel_interaction"] and channels % num_heads:
        raise ConfigError(
            f"config.model.channels is {channels}; accepted: "
            f"multiples of config.model.num_heads, {num_heads}"
        )


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str = "") -> None:
    for key, (test, accepted) in rules.items():
        if key not in values:
            raise ConfigError(f"config.{key} is missing; accepted: {accepted}{where}")
        if not test(values[key]):
            raise ConfigError(f"config.{key} is {values[key]!r}; accepted: {accepted}{where}")


def _check_names(path: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    for name in given:
        if name not in accepted:
            raise ConfigError(f"there is no key config.{path}.{name}; {suggest(name, accepted)}")


def _model_defaults(model: Mapping[str, Any]) -> dict[str, Any]:
    """What keys of `config.model` are that are not given, as `make_model` and the classes of the
    backbone and of the neck say it. Names of keys are checked by the same."""
    arguments = inspect.signature(make_model).parameters
    _check_names("model", model, arguments)
    defaults = {}
    for name, argument in arguments.items():
        if argument.default is not argument.empty:
            defaults[f"model.{name}"] = argument.default
        elif name not in model:
            raise ConfigError(f"config.model.{name} is missing")
    for part, table in ("backbone", BACKBONES), ("neck", NECKS):
        given = model.get(part, {})
        name = given.get("name", next(iter(table)))
        _check({f"model.{part}.name": name}, {f"model.{part}.name": _one_of(*table)})
        handed_on = {"parent", "name", "dtype"} | ({"channels"} if part == "neck" else set())
        fields = {
            field.name: field.default
            for field in dataclasses.fields(table[name])
            if field.name not in handed_on
        }
        _check_names(f"model.{part}", given, {"name", *fields})
        fields["name"] = name
        defaults |= {f"model.{part}.{key}": value for key, value in fields.items()}
    return defaults
